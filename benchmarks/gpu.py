"""
Decoding on a GPU in the ChatGLM2-6B shape: tokens per second at several lengths of context in bfloat16, INT8 and INT4, as a
share of what the memory's bandwidth allows, and peak memory.

    python -m benchmarks.gpu --output gpu.json

Weights are random. The kernels' correctness on the GPU is what tests/test_quantization_kernels.py checks there.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from .decode import Clock, describe_machine, prepared, report, weight_bytes
from .random_checkpoint import ROOT, load, write_checkpoint


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of reading and writing, as a copy on the device does."""
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds) / 1e9


def measure(model, positions: int, tokens: int) -> dict:
    """Times `generate` of the last `tokens` of so many positions."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ids = torch.randint(100, 60000, (1, positions - tokens), device=device)
    options = dict(max_new_tokens=tokens, do_sample=False, prefill_chunk_size=2048)
    clock = Clock()
    model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
    seconds = statistics.median(b - a for a, b in zip(clock.times[1:], clock.times[2:]))
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return {"positions": positions, "tokens_s": 1 / seconds, "peak_gb": peak}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--positions", type=int, nargs="*", default=[2048 + 64, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate at each length")
    parser.add_argument("--work", type=Path, default=ROOT / "build/benchmarks", help="where the weights are written")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device: install its CUDA build, or choose another with --device.")

    bandwidth = copy_bandwidth(args.device)
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device)
    result = {"device": name, "machine": describe_machine(), "layers": args.layers, "bandwidth_gb_s": bandwidth}
    for bits in (None, 8, 4):
        folder = prepared(
            args.work / f"{f'int{bits}' if bits else 'bf16'}-{args.layers}", write_checkpoint, args.layers, bits
        )
        model = load(folder, dtype=torch.bfloat16, device=args.device)
        limit = bandwidth * 1e9 / weight_bytes(model)
        measure(model, 128, 16)  # compiles the kernels
        rows = [measure(model, positions, args.tokens) for positions in args.positions]
        for row in rows:
            row["share_of_limit"] = row["tokens_s"] / limit
            print(bits or "bfloat16", row, file=sys.stderr)
        result[f"int{bits}" if bits else "bfloat16"] = rows
        del model
        torch.cuda.empty_cache()
    report(result, args.output)


if __name__ == "__main__":
    main()
