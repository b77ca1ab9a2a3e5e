"""
A server with OpenAI's API: `python -m serving`. Read in this order: shapes.py (requests and answers), generation.py with
prefix_cache.py and processors.py, batching.py (tokens), text.py (tokens to text), server.py (HTTP).
"""
