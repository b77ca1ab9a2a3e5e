"""The arithmetic of quantized weights: the number formats, plain torch, and the choice among the ways to multiply.

`quantized_linear` multiplies by the fastest way for the device. Plain torch works everywhere; the C++ for CPUs is in
quantization_cpu.py, the Triton kernels for GPUs in quantization_gpu.py.
"""

import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging

from .quantization_cpu import SCALE_TYPES, cpu_dequantize, cpu_library, cpu_linear, keep_choices, kept_choices
from .quantization_gpu import HAS_TRITON, gpu_linear, gpu_linear_backward


logger = logging.get_logger(__name__)

GROUP_SIZES = (32, 64, 128)  # columns that can share a scale
CHUNK_ROWS = 1024  # of the weight: 16 MB as float32 in the 6B shape, which stays in the cache until it is multiplied
FEW_ROWS = 16  # of activations: up to so many, reading the weight from memory is what takes the time


def is_traced(x: torch.Tensor) -> bool:
    """Whether operations on it are recorded, by torch.compile or another, so that its data is not to be touched."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in (torch.Tensor, nn.Parameter):
        return True
    try:
        x.data_ptr()
    except RuntimeError:  # within torch.func.vmap and its like there is none
        return True
    return False


def needs_gradients(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


# The number formats


def pack_int4(quantized: torch.Tensor) -> torch.Tensor:
    """Packs int8 `[out, in]` with values in -8..7 into `[out, in / 2]`, even columns in the high half of the byte."""
    return (quantized[:, 0::2] << 4) | (quantized[:, 1::2] & 15)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int4`. Shifts of int8 are arithmetic: they keep the sign."""
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(-2)


def check_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int):
    """Raises `ValueError` if `weight` and `scale` are not those of a quantized matrix; see `dequantize_weight`."""
    if weight.dtype != torch.int8 or weight.ndim != 2 or bits not in (4, 8):
        raise ValueError(
            f"A weight of {bits} bits must be int8 with 2 dimensions, got {weight.dtype} {list(weight.shape)}."
        )
    out, columns = weight.shape[0], weight.shape[1] * 8 // bits
    shapes = [(out,), (out, 1), *((out, columns // size) for size in GROUP_SIZES if columns % size == 0)]
    if tuple(scale.shape) not in shapes or not scale.is_floating_point():
        raise ValueError(
            f"Scales {list(scale.shape)} in {scale.dtype} do not fit a weight {[out, columns]}: it takes one for each row, or "
            f"for each {', '.join(map(str, GROUP_SIZES))} columns of it."
        )


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """
    Returns the matrix `[out, in]` in the dtype of `scale`.

    Args:
        weight: int8 `[out, in]`, or packed `[out, in / 2]` if `bits` is 4.
        scale: Floating point. One for each row, `[out]`, or for each group of columns, `[out, groups]`.

    Raises:
        ValueError: if the scales do not fit the weight.
    """
    check_weight(weight, scale, bits)
    if weight.numel() == 0:
        return scale.new_empty(weight.shape[0], weight.shape[1] * 8 // bits)
    is_plain = not is_traced(weight) and weight.device.type == scale.device.type == "cpu"
    if scale.dtype == torch.float32 and is_plain and cpu_library():
        return cpu_dequantize(weight, scale, bits, torch.float32)
    quantized = (unpack_int4(weight) if bits == 4 else weight).to(scale.dtype)
    scale = scale.reshape(len(weight), -1, 1)
    quantized.unflatten(1, (scale.shape[1], -1)).mul_(scale)  # in place: a second matrix would have to be allocated
    if scale.dtype == torch.float16:  # a scale rounded up can carry its largest weight beyond 65504, into infinity
        quantized.clamp_(-65504, 65504)
    return quantized


# Plain torch


def torch_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`x @ weight.T` for x `[rows, in]`, in plain torch on any device; on the CPU in float32 or bfloat16 (`dtype`)."""
    if x.device.type != "cpu":
        return nn.functional.linear(x, dequantize_weight(weight, scale.to(x.dtype), bits))
    int8_matmul = getattr(torch, "_weight_int8pack_mm", None)
    is_supported = int8_matmul is not None and scale.ndim == 1 and x.dtype in SCALE_TYPES
    # For bfloat16 torch (2.13) reads beyond the rows if they are no multiple of 16.
    if is_supported and x.shape[0] <= FEW_ROWS and x.shape[1] % 16 == 0:
        if bits == 8:
            return int8_matmul(x.contiguous(), weight, scale.to(x.dtype))
        chunks = zip(weight.split(CHUNK_ROWS), scale.to(x.dtype).split(CHUNK_ROWS))
        return torch.cat([int8_matmul(x.contiguous(), unpack_int4(w), s) for w, s in chunks], dim=1)
    return matmul_by_chunks(x, len(weight), dtype, lambda rows: dequantize_to(dtype, weight[rows], scale[rows], bits))


def matmul_by_chunks(
    x: torch.Tensor, out_features: int, dtype: torch.dtype, weight_rows: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """
    `x @ weight.T`, in the dtype of x. `weight_rows(rows)` returns those rows of the weight in `dtype`, so the full weight
    never exists in memory in that dtype.
    """
    output = torch.empty(x.shape[0], out_features, dtype=x.dtype)
    x = x.to(dtype)
    with torch.autocast("cpu", enabled=False):
        for start in range(0, out_features, CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            part = output[:, chunk]
            if part.dtype == dtype:
                torch.mm(x, weight_rows(chunk).T, out=part)  # a copy would take a tenth of the time
            else:
                part.copy_(torch.mm(x, weight_rows(chunk).T))
    return output


def dequantize_to(dtype: torch.dtype, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """`dequantize_weight` on the CPU in float32 or bfloat16, whatever the dtype of `scale`."""
    if scale.dtype in SCALE_TYPES and cpu_library():
        return cpu_dequantize(weight, scale, bits, dtype)
    return dequantize_weight(weight, scale.float(), bits).to(dtype)


# The choice among the CPU's ways

CPU_PATHS = {
    "compiled": cpu_linear,
    "bfloat16": functools.partial(torch_linear, dtype=torch.bfloat16),
    "float32": torch_linear,
}
ALL_PATHS = (*CPU_PATHS, "torch")  # "torch": its own product, of weights in half precision
MEASURED_SIZE = 1 << 20  # numbers in a weight; a smaller one takes little time by any path
# Rows of activations that are measured in place of as many or fewer; in place of more, the last
MEASURED_ROWS = (1, 4, 16, 128)
chosen_paths: dict[tuple, str] = {}
TIE = 1.1  # times the least time: no difference, as measurements go
BUSY = 0.1  # of the time of a measurement that a thread waited for a CPU: beyond, the choice is not sure
PROVISIONAL_SECONDS = 10
provisional_paths: dict[tuple, tuple[str, float]] = {}  # choices that are not sure, and until when they hold


def cpu_path(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> str:
    """
    Returns which of `CPU_PATHS` is fastest for such a multiplication on this CPU.

    The environment variable `CHATGLM_CPU_PATH` takes precedence over what was measured.
    """
    paths = CPU_PATHS
    if scale.dtype not in SCALE_TYPES or not cpu_library():
        paths = {name: path for name, path in CPU_PATHS.items() if name != "compiled"}
    if forced := forced_path(paths):
        return forced
    if weight.numel() < MEASURED_SIZE:
        return "compiled" if "compiled" in paths else "float32"
    kind = kind_of_quantized(bits, x.shape[1], scale.numel() // len(scale), x.dtype, len(x))
    return fastest_path(kind, paths, lambda: ((*pieces, bits) for pieces in samples(x, weight, scale)))


@functools.cache
def kind_of_quantized(bits: int, columns: int, groups: int, dtype: torch.dtype, rows: int) -> tuple:
    scales = f"a scale for {columns // groups} columns" if groups > 1 else "a scale for each row"
    return f"INT{bits}", scales, dtype, rows_kind(rows)


def forced_path(paths: Iterable[str]) -> str | None:
    """Returns what `CHATGLM_CPU_PATH` says, if anything. Raises `ValueError` if it is none of `paths`."""
    forced = os.environ.get("CHATGLM_CPU_PATH")
    if forced and forced not in paths:
        raise ValueError(f"CHATGLM_CPU_PATH must be one of {', '.join(paths)}, got {forced!r}.")
    return forced or None


def measured_rows(rows: int) -> int:
    return next((measured for measured in MEASURED_ROWS if rows <= measured), MEASURED_ROWS[-1])


def rows_kind(rows: int) -> str:
    return f"up to {measured_rows(rows)} rows" if rows <= MEASURED_ROWS[-2] else "many rows"


def samples(x: torch.Tensor, *weights: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """
    Yields without end what to measure with: as many rows of activations for a kind whatever the first call has, and
    `CHUNK_ROWS` of the weights, each time other ones, as decoding reads them from memory rather than from the cache. Fewer rows
    that are left at the end are not among them: the path that gets them would seem to be the fastest.
    """
    x = x[torch.arange(measured_rows(len(x))) % len(x)]
    while True:
        for start in range(0, max(1, len(weights[0]) - CHUNK_ROWS + 1), CHUNK_ROWS):
            pieces = [weight[start : start + CHUNK_ROWS] for weight in weights]
            for piece in pieces:  # a number of each page: at first use, most of a weight is in the file only
                piece.flatten()[:: 4096 // piece.element_size()].sum()
            yield (x, *pieces)


def fastest_path(kind: tuple, paths: dict[str, Callable], samples: Callable[[], Iterator[tuple]]) -> str:
    """
    Returns which of `paths` is fastest for a kind of multiplication, measured at first use. `samples` returns an iterator
    over the arguments of each call that is measured.

    The choice is kept for the process and, beside the compiled library, for the next ones; but not if the machine was so busy
    that it may be wrong: then it is made again some seconds later. The environment variable `CHATGLM_CPU_PATH` takes
    precedence, if there is such a path for the kind.
    """
    if kind not in chosen_paths:
        path, until = provisional_paths.get(kind, ("", 0.0))
        forced = forced_path(ALL_PATHS)
        if forced not in paths and time.monotonic() < until:
            return path
        path, is_sure = (
            (forced, True) if forced in paths else kept_or_measured(", ".join(map(str, kind)), paths, samples)
        )
        if not is_sure:
            provisional_paths[kind] = path, time.monotonic() + PROVISIONAL_SECONDS
            return path
        chosen_paths[kind] = path
    return chosen_paths[kind]


def kept_or_measured(kind: str, paths: dict[str, Callable], samples: Callable[[], Iterator[tuple]]) -> tuple[str, bool]:
    """Returns the path, and whether the choice is sure."""
    kept = kept_choices()
    if kept.get(kind) in paths:
        return kept[kind], True
    before, start = waits(), time.perf_counter()
    seconds = measure(paths, samples())
    busy = longest_wait(before) > BUSY * (time.perf_counter() - start)
    told = ", ".join(f"{path} {1000 * s:.2f} ms" for path, s in seconds.items())
    logger.info(f"{kind}: {told}{', while other programs took the CPU' if busy else ''}.")
    path = min(seconds, key=seconds.get)
    # Memory is faster at some times than at others, and then other paths are limited by their arithmetic. On a busy machine, each
    # call took as long as the others' turn.
    if "compiled" in paths and (busy or seconds["compiled"] <= TIE * seconds[path]):
        path = "compiled"
    if busy:
        return path, False
    kept[kind] = path
    keep_choices(kept)
    return path, True


def waits() -> dict[str, int]:
    """Returns the nanoseconds that each thread of this process has waited for a CPU; nothing where the system does not say."""
    try:
        tasks = list(Path("/proc/self/task").iterdir())
        return {task.name: int((task / "schedstat").read_text().split()[1]) for task in tasks}
    except (OSError, ValueError, IndexError):
        return {}


def longest_wait(before: dict[str, int]) -> float:
    """Returns the seconds that one thread waited since then."""
    return max((now - before.get(thread, 0) for thread, now in waits().items()), default=0) / 1e9


def measure(paths: dict[str, Callable], samples: Iterator[tuple]) -> dict[str, float]:
    """
    Returns the seconds that each path takes: the least of several calls, of which the first does not count. The paths take
    turns, so other load on the machine slows all of them.
    """
    seconds = {name: [] for name in paths}
    for _ in range(6):
        for name, path in paths.items():
            arguments = next(samples)
            start = time.perf_counter()
            path(*arguments)
            seconds[name].append(time.perf_counter() - start)
    return {name: min(times[1:]) for name, times in seconds.items()}


# The choice


def quantized_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, exact: bool = False
) -> torch.Tensor:
    """
    `x @ weight.T` without gradients, by the fastest way for the device.

    Args:
        x: `[..., in]`, floating point.
        weight: int8 `[out, in]`, or packed `[out, in / 2]` if `bits` is 4.
        scale: Floating point `[out]`, or `[out, groups]` for groups of 32, 64 or 128 columns.
        exact: Whether the CPU leaves activations as they are, for training. Otherwise it quantizes them to INT8 in blocks
            of 32 columns. Other devices never do.

    Returns:
        `[..., out]`, in the dtype of `x`.

    Raises:
        ValueError: if the shapes, dtypes or devices do not fit.
    """
    if is_traced(x):
        return quantized_linear_op(x, weight, scale, bits, exact)
    return multiply(x, weight, scale, bits, exact)


def quantized_linear_backward(
    grad_output: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """The gradient of `quantized_linear` for x: `grad_output @ weight`, for grad_output `[..., out]`."""
    if grad_output.device.type == "cuda" and HAS_TRITON and grad_output.numel() > 0 and not is_traced(grad_output):
        rows = grad_output.reshape(-1, len(weight))
        return gpu_linear_backward(rows, weight, scale, bits).view(*grad_output.shape[:-1], -1)
    if grad_output.dtype != torch.float32 or grad_output.device.type != "cpu" or is_traced(grad_output):
        return grad_output @ dequantize_weight(weight, scale, bits).to(grad_output.dtype)
    rows = grad_output.reshape(grad_output.shape[:-1].numel(), weight.shape[0])
    grad = rows.new_zeros(rows.shape[0], weight.shape[1] * 8 // bits)
    for start in range(0, weight.shape[0], CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        grad.addmm_(rows[:, chunk], dequantize_weight(weight[chunk], scale[chunk].float(), bits))
    return grad.view(*grad_output.shape[:-1], grad.shape[1])


def multiply(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, exact: bool) -> torch.Tensor:
    """`quantized_linear`, of tensors that are not being traced."""
    check_weight(weight, scale, bits)
    if x.shape[-1] * bits != 8 * weight.shape[1] or not x.is_floating_point():
        raise ValueError(
            f"Cannot multiply {x.dtype} {list(x.shape)} with a weight of {bits} bits in {weight.dtype} {list(weight.shape)}."
        )
    if not x.device == weight.device == scale.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.device}, its scales on {scale.device}.")
    if x.numel() == 0 or weight.numel() == 0:
        return x.new_zeros(*x.shape[:-1], weight.shape[0])
    rows, device = x.reshape(-1, x.shape[-1]), x.device.type
    if device == "cuda" and HAS_TRITON:
        output = gpu_linear(rows, weight, scale, bits)
    elif device == "cpu" and not exact:
        output = CPU_PATHS[cpu_path(rows, weight, scale, bits)](rows, weight, scale, bits)
    else:
        output = torch_linear(rows, weight, scale, bits)
    return output.view(*x.shape[:-1], weight.shape[0])


# What torch.compile sees of it. Each copy of this module has its own name, to avoid name clashes.
_namespace = "chatglm_" + hashlib.sha256(__name__.encode()).hexdigest()[:16]


@torch.library.custom_op(f"{_namespace}::quantized_linear", mutates_args=())
def quantized_linear_op(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, exact: bool
) -> torch.Tensor:
    return multiply(x, weight, scale, bits, exact)


@quantized_linear_op.register_fake
def _(x, weight, scale, bits, exact):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
