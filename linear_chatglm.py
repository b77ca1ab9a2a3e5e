"""Linear layers that multiply in half precision on CPUs by what is fastest there, which torch's own way often is not."""

import functools

import torch
from torch import nn

from .quantization_cpu import cpu_half_linear, cpu_half_matmul, cpu_library, has_half_matmul
from .quantization_kernels import (
    CHUNK_ROWS,
    MEASURED_SIZE,
    fastest_path,
    is_traced,
    matmul_by_chunks,
    needs_gradients,
)


FEW_ROWS = 4  # of activations: up to so many, reading the weight from memory is what takes the time


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
            kind = (weight.dtype, "many rows" if len(rows) > FEW_ROWS else "few rows")
            path = fastest_path(kind, paths, lambda: (rows[:128], weight[:CHUNK_ROWS]))
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
        and x.numel() > 0
        and weight.numel() >= MEASURED_SIZE  # a smaller one takes little time in any way
        and not needs_gradients(x, weight)
    )


def by_chunks(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # By way of float32: torch (2.13) converts float16 to bfloat16 three times slower than that
    return matmul_by_chunks(x, len(weight), dtype, lambda rows: weight[rows].float().to(dtype))


FEW_ROW_PATHS = {"torch": nn.functional.linear, "compiled": cpu_half_linear}
MANY_ROW_PATHS = {
    "torch": nn.functional.linear,
    "compiled": cpu_half_matmul,
    "float32": functools.partial(by_chunks, dtype=torch.float32),
    "bfloat16": functools.partial(by_chunks, dtype=torch.bfloat16),
}


def half_paths(x: torch.Tensor, weight: torch.Tensor) -> dict:
    """The ways to multiply x, `[rows, in]`, by the transpose of a weight in half precision."""
    is_few = len(x) <= FEW_ROWS
    paths = dict(FEW_ROW_PATHS if is_few else MANY_ROW_PATHS)
    if not (cpu_library() if is_few else has_half_matmul()):
        del paths["compiled"]
    if weight.dtype == torch.bfloat16:
        paths.pop("bfloat16", None)  # what torch does
    return paths
