"""What lies between the matrix multiplications, on CPUs: one call of the compiled library for each."""

import functools
from collections.abc import Callable

import torch

from .quantization_cpu import SCALE_TYPES, cpu_library
from .quantization_kernels import is_traced


def fused_on_cpu(kernel: Callable) -> Callable:
    """
    A decorator for functions of tensors that take torch several operations, each of which reads and writes all numbers: without
    gradients, `kernel` is called instead.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def either(x: torch.Tensor, *args):
            return (kernel if can_fuse(x, *args) else function)(x, *args)

        return either

    return decorate


def can_fuse(x: torch.Tensor, *args) -> bool:
    tensors = (x, *(arg for arg in args if isinstance(arg, torch.Tensor)))
    return (
        not torch.is_grad_enabled()
        and not is_traced(x)  # before its size, which a traced program would then depend on
        and all(tensor.device.type == "cpu" and tensor.dtype in SCALE_TYPES for tensor in tensors)
        and x.numel() > 0
        and cpu_library() is not None
    )
