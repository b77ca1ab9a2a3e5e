"""
Times the multiplications of a few rows by the matrices of ChatGLM2-6B on a GPU, in INT4 and INT8 beside torch's in float16.

    python -m benchmarks.gpu_products --output benchmarks/results/gpu_products.json
    python -m benchmarks.gpu_products --device cpu --quick       # small matrices, to see that every call can be made

Each runs with so many weights in turn that the GPU's cache does not hold them, and as a CUDA graph: without the time of Python.
"""

import json
import statistics
from collections.abc import Callable

import torch
from torch import nn

from common.package import ROOT, product

from .gpu_limits import layer_shapes
from .measure import device_name, options, report, seconds


READ_BYTES = 256_000_000  # of weights in turn; the largest caches have 60 to 130 MB
ROWS = (1, 2, 4, 8, 16, 17)  # of 17 and more, weights are dequantized
WEIGHTS = ((4, None), (4, 128), (8, None))  # bits and group size


def microseconds(multiply: Callable[[int], None], count: int, device: torch.device) -> float:
    """Of `multiply(i)`, the median of ten times all `i` below `count`."""

    def all_of_them():
        for i in range(count):
            multiply(i)

    all_of_them()
    if device.type != "cuda":
        return seconds(all_of_them) / count * 1e6
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def how_many(weight_bytes: int, device: torch.device) -> int:
    return max(4, READ_BYTES // weight_bytes + 1) if device.type == "cuda" else 1


@torch.no_grad()
def measure_half(out: int, columns: int, device: torch.device) -> dict:
    """Returns the microseconds of torch's multiplication in float16, by the number of rows."""
    count = how_many(2 * out * columns, device)
    weights = [torch.randn(out, columns, dtype=torch.float16, device=device) for _ in range(count)]
    times = {}
    for rows in ROWS:
        x = torch.randn(rows, columns, dtype=torch.float16, device=device)
        times[rows] = microseconds(lambda i, x=x: nn.functional.linear(x, weights[i]), count, device)
    return times


@torch.no_grad()
def measure_quantized(out: int, columns: int, bits: int, group_size: int | None, device: torch.device) -> dict:
    multiply = product("quantization_kernels.quantized_linear")
    row_bytes = columns * bits // 8
    count = how_many(out * row_bytes, device)
    weights = [torch.randint(-128, 128, (out, row_bytes), dtype=torch.int8, device=device) for _ in range(count)]
    scales = (out,) if group_size is None else (out, columns // group_size)
    scale = torch.rand(scales, dtype=torch.float16, device=device) / 100
    times = {}
    for rows in ROWS:
        x = torch.randn(rows, columns, dtype=torch.float16, device=device)
        times[rows] = microseconds(lambda i, x=x: multiply(x, weights[i], scale, bits), count, device)
    return times


def main():
    parser = options(__doc__)
    parser.add_argument("--device", type=torch.device, default="cuda")
    args = parser.parse_args()
    name = device_name(args.device)
    config = json.loads((ROOT / "config.json").read_text())
    shapes = [(256, 128)] if args.quick else layer_shapes(config)[1:]  # query_key_value is like the next
    result = {"device": name, "products": []}
    for out, columns in shapes:
        half = measure_half(out, columns, args.device)
        for bits, group_size in WEIGHTS:
            times = measure_quantized(out, columns, bits, group_size, args.device)
            row = {"out": out, "columns": columns, "bits": bits, "group_size": group_size}
            result["products"].append({**row, "microseconds": times, "float16_microseconds": half})
    report(result, args.output)


if __name__ == "__main__":
    main()
