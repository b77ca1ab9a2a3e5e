"""
Clients that ask `examples.serve` all the time, some of whom hang up in the middle: errors, and its memory minute by minute.

    python -m benchmarks.soak                          # 16 clients, 10 minutes
    python -m benchmarks.soak --continuous-batching

It starts the server, with the small model and at a free port of this machine, and stops it.
"""

import argparse
import itertools
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import psutil

from .measure import report
from .random_checkpoint import ROOT


QUERIES = [
    "你好",
    "Who are you?",
    "Tell me a short story.",
    "翻译成英文：我爱你。",
    "今天天气真好。",
    "I feel sad today.",
]
HANG_UP = 0.1  # the share of streams that are left after their first text


def start_server(options: list[str]) -> tuple[subprocess.Popen, str]:
    """Returns the process and its address."""
    command = [sys.executable, "-m", "examples.serve", "--port", "0", *options]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in server.stdout:
        if found := re.search(r" at (http://\S+)$", line):
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return server, found[1]
    raise SystemExit("The server did not start.")


def ask(address: str, seed: int, until: float, counts: dict, lock: threading.Lock):
    """A client: rounds of dialogues, streamed or not, one after another."""
    rng = random.Random(seed)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
    while time.monotonic() < until:
        messages, outcome = [], "answered"
        for _ in range(rng.randint(1, 4)):
            messages.append({"role": "user", "content": rng.choice(QUERIES)})
            start, stream = time.monotonic(), rng.random() < 0.5
            try:
                answer = client.chat.completions.create(
                    model="tiny", messages=messages, stream=stream, max_tokens=100, temperature=rng.choice([0, 0.8])
                )
                if not stream:
                    text = answer.choices[0].message.content
                elif rng.random() < HANG_UP:
                    next(iter(answer))
                    answer.close()
                    outcome, text = "hung up", ""
                else:
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
            except Exception as error:  # counted, whatever it is: that is what this is for
                outcome, text = f"{type(error).__name__}: {error}"[:200], ""
            with lock:
                counts["outcomes"][outcome] = counts["outcomes"].get(outcome, 0) + 1
                counts["seconds"].append(time.monotonic() - start)
            if outcome != "answered":
                break
            messages.append({"role": "assistant", "content": text})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--continuous-batching", action="store_true", help="of the server")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    server, address = start_server(["--continuous-batching"] if args.continuous_batching else [])
    try:
        process = psutil.Process(server.pid)
        counts, lock = {"outcomes": {}, "seconds": []}, threading.Lock()
        until = time.monotonic() + 60 * args.minutes
        clients = [
            threading.Thread(target=ask, args=(address, seed, until, counts, lock)) for seed in range(args.clients)
        ]
        for client in clients:
            client.start()
        memory = []
        for minute in itertools.count(1):
            time.sleep(max(0, min(60, until - time.monotonic())))
            memory.append(round(process.memory_info().rss / 1e6))
            print(f"minute {minute}: {memory[-1]} MB, {json.dumps(counts['outcomes'])}", file=sys.stderr, flush=True)
            if time.monotonic() >= until:
                break
        for client in clients:
            client.join()
    finally:
        server.terminate()
        server.wait(30)
    waits = sorted(counts["seconds"])
    result = {"clients": args.clients, "minutes": args.minutes, "continuous_batching": args.continuous_batching}
    result |= {"outcomes": counts["outcomes"], "memory_mb": memory, "threads_left": threading.active_count() - 1}
    result |= {"median_s": waits[len(waits) // 2], "slowest_s": waits[-1]}
    report(result, args.output)


if __name__ == "__main__":
    main()
