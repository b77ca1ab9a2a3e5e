"""KV caches of recent dialogues, so that their next rounds do not encode the history again."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import DynamicCache

from cache_chatglm import common_prefix


MIN_PREFIX = 16  # tokens: fewer are sooner encoded than looked after


@dataclass
class Entry:
    ids: list[int]  # of the tokens that the cache holds
    prompt_length: int  # how many of them were the prompt
    cache: DynamicCache
    bytes: int


class PrefixCache:
    """
    Keeps caches of up to `max_bytes` in total. The least recently used ones are dropped first.

    Args:
        new_cache: Makes an empty cache.
    """

    def __init__(self, max_bytes: int, new_cache):
        self.max_bytes, self.new_cache = max_bytes, new_cache
        self.entries: list[Entry] = []  # the least recently used first

    def take(self, prompt: Sequence[int]) -> DynamicCache:
        """
        Returns the cache that holds the longest beginning of `prompt`, at most all tokens but the last. Nobody else gets it
        until `put` returns it.
        """
        lengths = [common_prefix(entry.ids, prompt[:-1]) for entry in self.entries]
        length = max(lengths, default=0)
        if length < MIN_PREFIX:
            return self.new_cache()
        entry = self.entries.pop(lengths.index(length))
        if length >= entry.prompt_length - 1:  # the next round, or the same again: the old answer is all that is lost
            if len(entry.ids) > length:
                entry.cache.crop(length - len(entry.ids))
            return entry.cache
        # Another dialogue that begins alike: each has its own from here.
        self.entries.append(entry)
        cache = self.new_cache()
        for i, layer in enumerate(entry.cache.layers):
            cache.update(layer.keys[..., :length, :].clone(), layer.values[..., :length, :].clone(), i)
        return cache

    def put(self, ids: Sequence[int], prompt_length: int, cache: DynamicCache):
        """
        Args:
            ids: Prompt and answer. The cache may hold only the first ones of them.
        """
        length = int(cache.get_seq_length())
        if length < MIN_PREFIX:
            return
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        size = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        self.entries.append(Entry(list(ids[:length]), min(prompt_length, length), cache, size))
        while sum(entry.bytes for entry in self.entries) > self.max_bytes:
            self.entries.pop(0)
