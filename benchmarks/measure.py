"""Tools of the benchmarks: clocks, memory, the machine, and writing the figures."""

import argparse
import ctypes
import functools
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from common.options import Parser
from common.package import ROOT, product


SHARED = ROOT.parent / "shared/data"
PEERS = {"llama-cpp-python": "llama_cpp", "bitsandbytes": "bitsandbytes"}  # packages, and their modules


def options(description: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """Returns a parser with the options that all benchmarks have."""
    parser = Parser(description)
    parser.add_argument(
        "--quick", action="store_true", help="smoke test with small sizes; the figures cannot be compared"
    )
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"how often the systems take turns ({rounds})")
    parser.add_argument("--work", type=Path, default=ROOT / "build/benchmarks", help="where weights are written")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser


def report(result: dict, output: Path | None):
    """Prints the figures and the machine as JSON, and writes them to `output` if it is given."""
    text = json.dumps({"machine": describe_machine(), **result}, indent=2)
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")


def in_turn(functions: dict[str, Callable], rounds: int) -> dict[str, list]:
    """Calls each function in turn, `rounds` times, and returns all results."""
    results = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            results[name].append(function())
            print(f"  {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    return results


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Clock(BaseStreamer):
    """A streamer that records when the prompt and each token of `generate` arrive."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def step_seconds(self) -> float:
        """Median seconds from one token to the next, after the first."""
        return statistics.median(b - a for a, b in zip(self.times[1:], self.times[2:]))


class PeakMemory:
    """Watches the memory of this process that is not mapped from files: `with PeakMemory() as memory: ...; memory.gb`."""

    def __enter__(self):
        self._before = self._peak = anonymous_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.01):
            self._peak = max(self._peak, anonymous_memory())

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()

    @property
    def gb(self) -> float:
        """GB that the peak was above what there was before."""
        return self._peak - self._before


def anonymous_memory() -> float:
    """GB of this process that are not files; NaN where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024 / 1e9


STREAM = r"""
#include <cstdint>
// Reads n words (a multiple of 64) once, each thread its own part. Prefetching `ahead` words helps some CPUs; 0 turns it off.
extern "C" uint64_t read_words(const uint64_t *words, int64_t n, int64_t ahead, int threads) {
  uint64_t result = 0;
#pragma omp parallel for num_threads(threads) reduction(^ : result) schedule(static)
  for (int64_t begin = 0; begin < n; begin += 64) {
    for (int64_t line = 0; ahead && line < 64; line += 8) __builtin_prefetch(words + begin + ahead + line);
    for (int64_t i = begin; i < begin + 64; i++) result ^= words[i];
  }
  return result;
}
"""


@functools.cache
def stream_library() -> ctypes.CDLL:
    """Compiles `STREAM` as the package compiles its own C++."""
    find_compiler, compiler_flags, run_compiler = (
        product(f"quantization_cpu.{name}") for name in ("find_compiler", "compiler_flags", "run_compiler")
    )
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "stream.cpp"), Path(folder, "stream.so")
        source.write_text(STREAM)
        run_compiler([*find_compiler(), *compiler_flags(), str(source), "-o", str(library)])
        loaded = ctypes.CDLL(str(library))
    loaded.read_words.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    return loaded


def read_bandwidth(numbers: torch.Tensor) -> float:
    """GB/s at which the CPU reads `numbers` once, the limit of decoding: the better of with and without prefetching."""
    words, threads = numbers.nbytes // 512 * 64, torch.get_num_threads()
    read = stream_library().read_words
    times = [seconds(lambda ahead=ahead: read(numbers.data_ptr(), words, ahead, threads)) for ahead in (0, 512)]
    return 8 * words / min(times) / 1e9


def cpu_name() -> str:
    """The CPU's name; with its family and model where virtual machines hide the rest."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    if "cpu family" not in fields:
        return name
    return f"{name}, family {fields['cpu family']} model {fields.get('model', '?')}"


def device_name(device: torch.device) -> str:
    """Raises SystemExit if there is no such GPU."""
    if device.type != "cuda":
        return str(device)
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device: install its CUDA build, or choose another with --device.")
    return torch.cuda.get_device_name(device)


def describe_machine() -> dict:
    return {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peers": {name: version(name) for name in PEERS if importlib.util.find_spec(PEERS[name])},
    }
