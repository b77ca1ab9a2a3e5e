"""
Servers of OpenAI's API in the ChatGLM2-6B shape on the CPU, with several clients at once: this package's, one by one and with
continuous batching, beside llama.cpp's (llama-cpp-python with its `server` extra) and vLLM's, where they are installed.

    python -m benchmarks.serving --output build/serving.json
    python -m benchmarks.serving --vllm .venv-vllm/bin/vllm

All have the same random weights, in INT4 or Q4_0 with embedding and output layer in INT8 or Q8_0 (vLLM: bfloat16). They run at
once and take turns: each answers the same prompts, of different lengths, greedily and as a stream. Tokens per second are those of
all answers together, the prompts' time included. The time to the first token is a client's, from its request on; that per token
is between its tokens. Medians over rounds.
"""

import json
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from common.package import ROOT

from .measure import SHARED, options, report
from .random_checkpoint import write_checkpoint
from .systems import is_installed, prepared


CONTEXT = 4096  # tokens, that llama.cpp reserves a cache for
START_SECONDS = 900  # for a server to load 6B


def write_with_vocabulary(folder: Path, **sizes):
    """A random checkpoint with the published tokenizer: of the small model's, most of 65,024 tokens have no text."""
    write_checkpoint(folder, **sizes)
    (folder / "tokenizer.model").unlink()
    shutil.copy(SHARED / "tokenizer/tokenizer.model", folder)


def converted(command: str, checkpoint: Path, path: Path, *options: str) -> Path:
    """The same weights as a command of conversion/ writes them."""

    def write(output: Path):
        command_line = [sys.executable, "-m", command, "--model", str(checkpoint), "--output", str(output), *options]
        subprocess.run(command_line, cwd=ROOT, check=True)

    return prepared(path, write)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """A server in a process of its own, at a free port; `with Server(command) as server: ...`."""

    def __init__(self, command: list[str]):
        self.port = free_port()
        self.command = [*command, "--port", str(self.port)]

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        threading.Thread(target=self.keep_errors, daemon=True).start()
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=5) as answer:
                    self.model = json.load(answer)["data"][0]["id"]
                return self
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    self.process.kill()
                    raise SystemExit(f"{self.command} did not start: {self.errors[-2000:]}") from None
                time.sleep(0.5)

    def keep_errors(self):
        self.errors = ""
        for line in self.process.stderr:
            self.errors = (self.errors + line.decode(errors="replace"))[-5000:]

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(60)

    def complete(self, prompt: str, tokens: int) -> list[float]:
        """Returns the seconds, from the request on, at which the pieces of an answer come."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        start, times = time.perf_counter(), []
        with urllib.request.urlopen(request, timeout=3600) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"])
                if event["choices"] and event["choices"][0]["text"]:
                    times.append(time.perf_counter() - start)
        return times

    def measure(self, prompts: list[str], tokens: int) -> dict:
        start = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: self.complete(prompt, tokens), prompts))
        duration = time.perf_counter() - start
        steps = [b - a for times in answers for a, b in zip(times, times[1:])]
        return {
            "tokens_s": sum(map(len, answers)) / duration,
            "first_token_s": statistics.median(times[0] for times in answers if times),
            "token_s": statistics.median(steps),
        }


def make_prompts(clients: int, words: int, turn: int) -> list[str]:
    """Different ones in each turn, so that no server has the next one's cache."""
    text = re.findall(r"\w+", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    rng = random.Random(f"{clients} {turn}")
    return [" ".join(rng.choices(text, k=words // 2 + rng.randrange(words))) for _ in range(clients)]


def medians(results: list[dict]) -> dict:
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def main():
    parser = options(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer; default: %(default)s")
    parser.add_argument("--words", type=int, default=100, help="of a prompt, on average; default: %(default)s")
    parser.add_argument("--vllm", type=Path, help="the program vllm of another environment")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.rounds, args.clients, args.tokens, args.words = 1, 1, [1, 2], 4, 10
    if not SHARED.is_dir():
        raise SystemExit(f"The published tokenizer is not at {SHARED}.")
    checkpoint = prepared(args.work / f"serving-{args.layers}", write_with_vocabulary, num_layers=args.layers)
    threads = str(torch.get_num_threads())
    folder = args.work / f"serving-int4-{args.layers}"
    int4 = converted("conversion.quantize", checkpoint, folder, "--quantize-embeddings")
    ours = [sys.executable, "-m", "serving", "--model", str(int4)]
    commands = {"one by one": ours, "continuous batching": [*ours, "--continuous-batching"]}
    if is_installed("llama_cpp"):
        gguf = converted("conversion.to_gguf", checkpoint, args.work / f"q4_0-{args.layers}.gguf", "--type", "q4_0")
        settings = {"n_ctx": CONTEXT, "n_threads": threads, "n_threads_batch": threads, "interrupt_requests": False}
        settings = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        commands["llama.cpp"] = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), *settings]
    if args.vllm:
        vllm = [str(args.vllm), "serve", str(checkpoint), "--trust-remote-code", "--dtype", "bfloat16"]
        commands["vLLM"] = [*vllm, "--max-model-len", str(CONTEXT)]
    rows = []
    with ExitStack() as stack:
        servers = {name: stack.enter_context(Server(command)) for name, command in commands.items()}
        for server in servers.values():
            server.complete("warm up", 4)
        for clients in args.clients:
            results = {name: [] for name in servers}
            for turn in range(args.rounds):
                prompts = make_prompts(clients, args.words, turn)
                for name, server in servers.items():
                    results[name].append(server.measure(prompts, args.tokens))
                    print(f"  {name}, {clients} clients: {results[name][-1]}", file=sys.stderr, flush=True)
            rows.append({"clients": clients, **{name: medians(turns) for name, turns in results.items()}})
    report({"layers": args.layers, "words": args.words, "tokens": args.tokens, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
