"""What lies between the matrix multiplications, for a few tokens on CPUs: one call of the compiled library for each."""

import functools
from collections.abc import Callable

import torch

from .quantization_cpu import SCALE_TYPES, cpu_library
from .quantization_kernels import is_traced


MOST_NUMBERS = 32768  # beyond, torch's operations take several threads (its GRAIN_SIZE), and the compiled ones take one


def fused_on_cpu(kernel: Callable) -> Callable:
    """
    A decorator for functions of tensors that take torch several operations: without gradients, and with so few numbers that
    the operations' own time is most of it, `kernel` is called instead.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def either(x: torch.Tensor, *args):
            return (kernel if can_fuse(x, *args) else function)(x, *args)

        return either

    return decorate


def can_fuse(x: torch.Tensor, *args) -> bool:
    if torch.is_grad_enabled() or is_traced(x) or not 0 < x.numel() <= MOST_NUMBERS or cpu_library() is None:
        return False
    for tensor in (x, *args):
        if isinstance(tensor, torch.Tensor) and (tensor.device.type != "cpu" or tensor.dtype not in SCALE_TYPES):
            return False
    return True
