"""
Speed of prefill and decoding in the ChatGLM2-6B shape, on the CPU, beside llama.cpp.

    python -m benchmarks.decode --against llama.cpp
    python -m benchmarks.decode --layers 4 --tokens 16        # a few minutes; no figures to compare

Weights are random. Both systems generate greedily from the same number of tokens, on as many threads, in turn; reported
are medians over the rounds, and their ratios. The files are written once, to `--work`.
"""

import argparse
import inspect
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from .random_checkpoint import ROOT, load, write_checkpoint, write_gguf


class Clock(BaseStreamer):
    """Notes when the prompt and each token of `generate` come."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


class Ours:
    """This package, through `generate`."""

    def __init__(self, folder: Path, **kwargs):
        before, start = anonymous_memory(), time.perf_counter()
        self.model = load(folder, **kwargs)
        self.load_seconds = time.perf_counter() - start
        self.run(list(range(100, 116)), 4)  # weights are mapped from the file, and read at first use
        self.memory = anonymous_memory() - before

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Returns the seconds to the first token, and the median seconds of the next ones."""
        clock, start = Clock(), time.perf_counter()
        ids = torch.tensor([prompt])
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, streamer=clock
        )
        times = clock.times[1:]  # the first is the prompt
        return times[0] - start, statistics.median(b - a for a, b in zip(times, times[1:]))


class LlamaCpp:
    """llama.cpp, through llama-cpp-python's `eval`, without sampling."""

    def __init__(self, path: Path, threads: int, context: int):
        import llama_cpp

        self.model = llama_cpp.Llama(
            str(path),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=512,
            n_ubatch=512,
            verbose=False,
        )
        self.run(list(range(100, 116)), 4)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        self.model.reset()  # forgets the cache
        start = time.perf_counter()
        self.model.eval(prompt)
        prefill, times = time.perf_counter() - start, []
        for i in range(tokens - 1):
            start = time.perf_counter()
            self.model.eval([i + 100])
            times.append(time.perf_counter() - start)
        return prefill, statistics.median(times)


def anonymous_memory() -> float:
    """GB of this process that are not files; NaN where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024 / 1e9


def read_bandwidth() -> float:
    """GB/s at which numbers in memory can be added up, the limit of decoding."""
    numbers = torch.ones(1 << 28)  # 1 GB
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds) / 1e9


def weight_bytes(model) -> int:
    """Bytes that each token reads: all but the embedding, of which it reads a row."""
    embedding = set(model.get_input_embeddings().parameters())
    return sum(p.nbytes for p in model.parameters() if p not in embedding)


def gemv_seconds(model, tokens: int) -> float:
    """Median seconds that all quantized layers of the model take for one token, without the rest of the step."""
    layers = [
        module for module in model.modules() if hasattr(module, "weight_scale") and hasattr(module, "in_features")
    ]
    inputs = [torch.randn(1, 1, layer.in_features) for layer in layers]
    seconds = []
    with torch.no_grad():
        for _ in range(tokens):
            start = time.perf_counter()
            for layer, x in zip(layers, inputs):
                layer(x)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def describe_machine() -> dict:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def compare(bits: int, args) -> dict:
    ours = Ours(
        prepared(args.work / f"int{bits}-{args.layers}", write_checkpoint, args.layers, bits), dtype=torch.float32
    )
    systems = {"this": ours}
    if args.against == "llama.cpp":
        path = prepared(args.work / f"int{bits}-{args.layers}.gguf", write_gguf, args.layers, bits)
        systems["llama.cpp"] = LlamaCpp(path, args.threads, args.prompt + args.tokens)
    prompt = torch.randint(100, 60000, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    rounds = {name: [] for name in systems}
    bandwidths = []
    for _ in range(args.rounds):
        bandwidths.append(read_bandwidth())
        for name, system in systems.items():
            rounds[name].append(system.run(prompt, args.tokens))
            prefill, decode = rounds[name][-1]
            print(
                f"  {name}: {args.prompt} tokens in {prefill:.2f} s, then {1000 * decode:.1f} ms each", file=sys.stderr
            )
    result = {"bits": bits, "load_seconds": ours.load_seconds, "anonymous_gb": ours.memory}
    result["bandwidth_gb_s"] = statistics.median(bandwidths)
    for name, pairs in rounds.items():
        prefill, decode = (statistics.median(values) for values in zip(*pairs))
        result[name] = {"prefill_tokens_s": args.prompt / prefill, "decode_tokens_s": 1 / decode}
    step = 1 / result["this"]["decode_tokens_s"]
    result["read_gb_s"] = weight_bytes(ours.model) / 1e9 / step
    result["share_outside_weights"] = 1 - gemv_seconds(ours.model, args.tokens) / step
    if "llama.cpp" in systems:
        for figure in ("prefill_tokens_s", "decode_tokens_s"):
            result[f"{figure}_ratio"] = result["this"][figure] / result["llama.cpp"][figure]
    return result


def compare_half(args) -> dict:
    """Prefill of bfloat16 weights as they are multiplied here, and by torch's own products."""
    ours = Ours(prepared(args.work / "bf16-4", write_checkpoint, 4, None), dtype=torch.bfloat16)
    modeling = inspect.getmodule(type(ours.model))
    prompt = list(range(100, 100 + args.prompt))
    seconds = {"this": [], "torch": [], "torch without oneDNN, as without AVX-512": []}
    own_choice = modeling.rows_for_float32
    for _ in range(args.rounds):
        seconds["this"].append(ours.run(prompt, 2)[0])
        modeling.rows_for_float32 = lambda dtype: float("inf")
        try:
            seconds["torch"].append(ours.run(prompt, 2)[0])
            with torch.backends.mkldnn.flags(enabled=False):
                seconds["torch without oneDNN, as without AVX-512"].append(ours.run(prompt, 2)[0])
        finally:
            modeling.rows_for_float32 = own_choice
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"layers": 4, "seconds": medians, "ratios": {n: s / medians["this"] for n, s in medians.items()}}


def prepared(path: Path, write, *args) -> Path:
    """Returns `path`, written by `write(path, *args)` if it was not there yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"writing {path}", file=sys.stderr)
        unfinished = path.with_name(path.name + ".part")
        if write is write_checkpoint:
            layers, bits = args
            write(unfinished, layers, bits, **({"quantize_embeddings": True} if bits else {}))
        else:
            write(unfinished, *args)
        os.replace(unfinished, path)
    return path


def report(result: dict, output: Path | None):
    """Prints the figures as JSON, and writes them to `output` if there is one."""
    text = json.dumps(result, indent=2)
    print(text)
    if output:
        output.write_text(text + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=["llama.cpp"], help="also measure this; needs the `bench` extra")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--half", action="store_true", help="measure prefill of bfloat16 weights too (4 layers)")
    parser.add_argument("--work", type=Path, default=ROOT / "build/benchmarks", help="where the weights are written")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"machine": describe_machine(), "layers": args.layers, "prompt": args.prompt, "tokens": args.tokens}
    result["quantized"] = [compare(bits, args) for bits in args.bits]
    if args.half:
        result["bfloat16_prefill"] = compare_half(args)
    report(result, args.output)


if __name__ == "__main__":
    main()
