"""Linear layers that multiply in half precision on CPUs by what is fastest there, which torch's own way often is not."""

import functools

import torch
from torch import nn

from .quantization_cpu import cpu_half_linear, cpu_half_matmul, cpu_library, has_half_matmul
from .quantization_kernels import (
    FEW_ROWS,
    MEASURED_SIZE,
    fastest_path,
    is_traced,
    matmul_by_chunks,
    needs_gradients,
    rows_kind,
    samples,
)


STREAMED_ROWS = 4  # of activations: beyond, a CPU that multiplies bfloat16 is faster with panels of the weight


class Linear(nn.Linear):
    """
    `nn.Linear`. Without gradients, in bfloat16 or float16 on the CPU, it takes the fastest of several ways, measured at first
    use: torch's own, the compiled library, or, for many rows, chunks of the weight in float32 or bfloat16.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if weight.dtype in (torch.float16, torch.bfloat16) and can_choose(input, weight):
            rows = input.reshape(-1, input.shape[-1])
            paths = half_paths(rows, weight)
            path = fastest_path(kind_of_half(weight.dtype, len(rows)), paths, lambda: samples(rows, weight))
            if path != "torch":
                output = paths[path](rows, weight).view(*input.shape[:-1], -1)
                return output if self.bias is None else output + self.bias
        return super().forward(input)


def choose_linear(model: nn.Module):
    """
    Turns the model's `nn.Linear`s on the CPU into `Linear`. Call it after loading: while a model is loaded, other libraries
    (bitsandbytes) replace layers whose class is exactly `nn.Linear`.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = Linear


def can_choose(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        not is_traced(x)
        and not is_traced(weight)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.shape[-1:] == weight.shape[1:]  # else torch says so: C++ would read on
        and x.numel() > 0
        and weight.numel() >= MEASURED_SIZE  # a smaller one takes little time in any way
        and not needs_gradients(x, weight)
    )


def kind_of_half(dtype: torch.dtype, rows: int) -> tuple:
    return dtype, rows_kind(rows)


def by_chunks(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # By way of float32: torch (2.13) converts float16 to bfloat16 three times slower than that
    return matmul_by_chunks(x, len(weight), dtype, lambda rows: weight[rows].float().to(dtype))


def half_paths(x: torch.Tensor, weight: torch.Tensor) -> dict:
    """The ways to multiply x, `[rows, in]`, by the transpose of a weight in half precision."""
    paths = {"torch": nn.functional.linear, "float32": functools.partial(by_chunks, dtype=torch.float32)}
    if weight.dtype == torch.float16:  # in bfloat16, torch's own way
        paths["bfloat16"] = functools.partial(by_chunks, dtype=torch.bfloat16)
    if len(x) > STREAMED_ROWS and has_half_matmul():
        paths["compiled"] = cpu_half_matmul
    elif len(x) <= FEW_ROWS and cpu_library():
        paths["compiled"] = cpu_half_linear
    return paths
