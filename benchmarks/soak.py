"""
Clients that ask the server all the time: errors, and its memory minute by minute.

    python -m benchmarks.soak                  # 16 clients, 10 minutes one by one, and 10 with continuous batching

Some hang up in the middle, and two send what is no request. Greedy answers to the same dialogue must be the same. It starts
the server, with the small model and at a free port of this machine, and stops it.
"""

import http.client
import itertools
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time

import openai
import psutil

from common.package import ROOT

from .measure import options, report


QUERIES = [
    "你好",
    "Who are you?",
    "Tell me a short story.",
    "翻译成英文：我爱你。",
    "今天天气真好。",
    "I feel sad today.",
]
WAYS = {"one by one": [], "continuous batching": ["--continuous-batching"]}  # options of the server
EXPECTED = {"answered", "hung up", "refused"}
HANG_UP = 0.1  # the share of streams that are left after their first text
ATTACKERS = 2
MESSAGE = b'{"messages": [{"role": "user", "content": "hi"}]'
HOSTILE = [  # what is sent, and the status that it has to be answered with
    (b"{", 400),
    (b'{"messages": ' + b"[" * 100_000 + b"}", 400),
    (b'{"messages": [' + b"null," * 200_000 + b"null]}", 400),
    (b'{"messages": [{"role": "user", "content": "' + b"x" * 1_000_000 + b'"}]}', 400),
    (MESSAGE + b', "temperature": NaN}', 400),
    (MESSAGE + b', "tools": [{"type": "function"}]}', 400),
    (MESSAGE + b', "model": "another"}', 404),
    (b" " * (2 << 20), 413),
]


def start_server(options: list[str]) -> tuple[subprocess.Popen, str]:
    """Returns the process and its address."""
    command = [sys.executable, "-m", "serving", "--port", "0", *options]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in server.stdout:
        if found := re.search(r" at (http://\S+)$", line):
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return server, found[1]
    raise SystemExit("The server did not start.")


def attack(address: str, seed: int, until: float, counts: dict, lock: threading.Lock):
    """Sends bad requests, and connections that are left half way."""
    rng, (host, port) = random.Random(seed), address.removeprefix("http://").split(":")
    left = []
    while time.monotonic() < until:
        body, expected = rng.choice(HOSTILE)
        try:
            connection = http.client.HTTPConnection(host, int(port), timeout=30)
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            status = connection.getresponse().status
            outcome = "refused" if status == expected else f"refused with {status} instead of {expected}"
            left.append(socket.create_connection((host, int(port))))
            left[-1].sendall(rng.choice([b"", b"GET / HT", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf"]))
        except OSError as error:
            outcome = f"{type(error).__name__}: {error}"[:200]
        del left[:-50]
        with lock:
            counts["outcomes"][outcome] = counts["outcomes"].get(outcome, 0) + 1
        time.sleep(0.5)


def ask(address: str, seed: int, until: float, counts: dict, lock: threading.Lock):
    """A client: rounds of dialogues, streamed or not, one after another."""
    rng = random.Random(seed)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
    while time.monotonic() < until:
        messages, outcome = [], "answered"
        for _ in range(rng.randint(1, 4)):
            messages.append({"role": "user", "content": rng.choice(QUERIES)})
            start, stream, temperature = time.monotonic(), rng.random() < 0.5, rng.choice([0, 0.8])
            try:
                answer = client.chat.completions.create(
                    model="tiny", messages=messages, stream=stream, max_tokens=100, temperature=temperature
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
                if outcome == "answered" and not temperature:
                    key = json.dumps(messages)
                    if counts["greedy"].setdefault(key, text) != text:
                        outcome = "answered differently than before"
                counts["outcomes"][outcome] = counts["outcomes"].get(outcome, 0) + 1
                counts["seconds"].append(time.monotonic() - start)
            if outcome != "answered":
                break
            messages.append({"role": "assistant", "content": text})


def soak(server_options: list[str], clients: int, minutes: float) -> dict:
    server, address = start_server(server_options)
    try:
        process = psutil.Process(server.pid)
        counts, lock = {"outcomes": {}, "seconds": [], "greedy": {}}, threading.Lock()
        until = time.monotonic() + 60 * minutes
        threads = [
            threading.Thread(target=function, args=(address, seed, until, counts, lock))
            for function, number in ((ask, clients), (attack, ATTACKERS))
            for seed in range(number)
        ]
        for thread in threads:
            thread.start()
        memory = []
        for minute in itertools.count(1):
            time.sleep(max(0, min(60, until - time.monotonic())))
            memory.append(round(process.memory_info().rss / 1e6))
            print(f"minute {minute}: {memory[-1]} MB, {json.dumps(counts['outcomes'])}", file=sys.stderr, flush=True)
            if time.monotonic() >= until:
                break
        for thread in threads:
            thread.join()
    finally:
        server.terminate()
        server.wait(30)
    waits = sorted(counts["seconds"])
    return {
        "outcomes": counts["outcomes"],
        "memory_mb": memory,
        "median_s": waits[len(waits) // 2],
        "slowest_s": waits[-1],
    }


def main():
    parser = options(__doc__)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=10, help="of each way to serve; default: %(default)s")
    args = parser.parse_args()
    if args.quick:
        args.clients, args.minutes = 2, 0.1
    ways = {name: soak(server_options, args.clients, args.minutes) for name, server_options in WAYS.items()}
    report({"clients": args.clients, "minutes": args.minutes, "ways": ways}, args.output)
    if any(result["outcomes"].keys() - EXPECTED for result in ways.values()):
        raise SystemExit("There were errors.")


if __name__ == "__main__":
    main()
