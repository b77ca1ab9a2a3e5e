"""Random quantized matrices, and how far from float64 a multiplication by them may be."""

from itertools import product

import torch


SHAPES = [(64, 256), (70, 1000), (33, 688), (5, 34), (130, 4224)]
ROWS = [1, 2, 3, 7, 16, 17, 30]


def random_case(kernels, bits, out, columns, group_size=None, rows=3, dtype=torch.float32):
    """Returns x, packed weight, scales, and the weight in float64. One channel of x is 100 times the others."""
    limit = {4: 8, 8: 128}[bits]  # all that can be read; -8 and -128 are never written
    quantized = torch.randint(-limit, limit, (out, columns), dtype=torch.int8)
    scale = torch.rand((out,) if group_size is None else (out, columns // group_size)).to(dtype) - 0.25
    x = torch.randn(rows, columns)
    x[:, 3] *= 100
    weight = kernels.pack_int4(quantized) if bits == 4 else quantized
    matrix = quantized.double().unflatten(1, (scale.numel() // out, -1)) * scale.double().view(out, -1, 1)
    return x.to(dtype), weight, scale, matrix.flatten(1)


def all_cases(kernels):
    torch.manual_seed(0)
    for bits, (out, columns), group_size, rows in product((4, 8), SHAPES, (None, 32, 128), ROWS):
        if group_size is None or columns % group_size == 0:
            yield bits, random_case(kernels, bits, out, columns, group_size, rows)


def rounding_bound(x: torch.Tensor, weight: torch.Tensor, block: int = 32) -> torch.Tensor:
    """The most that INT8 in blocks can change x @ weight.T: half a step of its block for each activation."""
    padding = -x.shape[1] % block
    blocks = torch.nn.functional.pad(x.double().abs(), (0, padding)).unflatten(1, (-1, block))
    step = (blocks.amax(-1, keepdim=True) / 127).expand_as(blocks).flatten(1)[:, : x.shape[1]]
    return step / 2 @ weight.abs().T


def float_bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double().abs() @ weight.abs().T
