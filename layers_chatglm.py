"""
All layers for one token of each sequence, on CPUs: one call of the compiled library in place of a dozen for each layer.

Each call takes Python 5 to 20 microseconds, and twice that while weights pass through the caches. Measured on two cores of an
AMD EPYC (Zen 5), in turn, 6B shape: with one call a step takes 0.91 of the time (INT4), 0.96 (half precision) or 0.99 (INT8).
"""

import ctypes
import functools
import os
from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from .attention_chatglm import LONG, is_compiled_size, kind_of_one_token
from .cache_chatglm import GrowingLayer
from .fused_chatglm import can_fuse
from .linear_chatglm import STREAMED_ROWS, Linear, kind_of_half
from .quantization import QuantizedLinear
from .quantization_cpu import SCALE_TYPES, cpu_library
from .quantization_kernels import GROUP_SIZES, MEASURED_SIZE, chosen_paths, kind_of_quantized


class MatrixArguments(ctypes.Structure):
    """`Matrix` in the C++."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("out", "in", "groups")),
        *((name, ctypes.c_int) for name in ("bits", "scale_type")),
    ]


class LayerArguments(ctypes.Structure):
    """`Layer` in the C++."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input_norm", "attention_norm")),
        *((name, MatrixArguments) for name in ("qkv", "dense", "gate_and_up", "down")),
        *((name, ctypes.c_void_p) for name in ("key", "value")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "columns", "length", "head_stride")),
        *((name, ctypes.c_float) for name in ("input_eps", "attention_eps", "scaling")),
    ]


FORWARDS: dict[type, Callable] = {Linear: Linear.forward, QuantizedLinear: QuantizedLinear.forward}


def in_one_call(*parts: type[nn.Module]) -> Callable:
    """
    A decorator for the forward pass of a stack of layers, with the classes that these are made of: where the compiled library
    can, it computes all of them. Everywhere else, and until it is known which way to multiply is fastest, the forward pass does.
    """
    FORWARDS.update((part, part.forward) for part in parts)

    def decorate(forward: Callable) -> Callable:
        @functools.wraps(forward)
        def either(stack: nn.Module, hidden_states: torch.Tensor, prefix=None, cache: Cache | None = None, **kwargs):
            output = None
            if prefix is None and type(cache) is DynamicCache and can_fuse(hidden_states):
                output = decode(stack, hidden_states, cache, **kwargs)
            return forward(stack, hidden_states, prefix, cache, **kwargs) if output is None else output

        return either

    return decorate


def decode(
    stack: nn.Module,
    x: torch.Tensor,
    cache: DynamicCache,
    attention_mask: torch.Tensor | None = None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    position_ids: torch.Tensor | None = None,  # not used by layers, as the next
    use_cache: bool | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """
    Returns the output of the layers for x, `[batch, 1, hidden]`, and adds keys and values to the cache; or returns None, and has
    changed nothing.
    """
    if (
        x.shape[1] != 1
        or len(x) > STREAMED_ROWS
        or attention_mask is not None
        or kwargs  # for the attention
        or stack.config._attn_implementation != "sdpa"
        or torch.is_autocast_enabled("cpu")
        or os.environ.get("CHATGLM_CPU_PATH")
    ):
        return None
    cos, sin = position_embeddings
    shape = (1 if len(cos) == 1 else len(x), 1, cos.shape[-1])
    if not is_ready(cos, x.dtype, shape) or not is_ready(sin, x.dtype, shape):
        return None
    blocks, states = list(stack.layers)[: stack.config.num_layers], []
    arguments = (LayerArguments * len(blocks))()
    for i, block in enumerate(blocks):
        if block.training or not is_plain(block) or not is_plain(block.self_attention):
            return None
        extended = extended_states(block.self_attention, x, cache, shape[2])
        fields = extended and layer_arguments(block, x, *extended)
        if not fields:
            return None
        arguments[i] = fields
        states.append((cache.layers[block.self_attention.layer_idx], *extended))
    output = x.clone(memory_format=torch.contiguous_format)
    failed = cpu_library().chatglm_layers(
        arguments, len(blocks), cos.data_ptr(), sin.data_ptr(), output.data_ptr(), len(x), shape[2] if len(cos) > 1 else 0,
        SCALE_TYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"Not enough memory to attend to {cache.get_seq_length() + 1} tokens.")
    for layer, keys, values in states:
        layer.keys, layer.values = keys, values
    return output


def is_plain(module: nn.Module) -> bool:
    """Whether the module does what is written in its class, and no more."""
    return (
        FORWARDS.get(type(module)) is type(module).forward
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def is_fastest(kind: tuple) -> bool:
    """Whether the compiled library is known to be the fastest."""
    return chosen_paths.get(kind) == "compiled"


def is_ready(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple) -> bool:
    """Whether C++ can read the tensor as it is."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.dtype == dtype
        and tensor.shape == shape
        and tensor.is_cpu
        and tensor.is_contiguous()
    )


def extended_states(
    attention: nn.Module, x: torch.Tensor, cache: DynamicCache, columns: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns keys and values with room for those of x; None if the compiled library cannot attend to them, or is not the fastest."""
    heads, kv_heads = attention.num_heads, attention.num_key_value_heads
    layer = cache.layers[attention.layer_idx] if attention.layer_idx < len(cache.layers) else None
    if type(layer) is not GrowingLayer or not layer.is_initialized:
        return None
    batch, cached_heads, length, head_dim = layer.keys.shape
    if (
        (batch, cached_heads, head_dim, layer.keys.dtype) != (len(x), kv_heads, columns, x.dtype)
        or not is_compiled_size(columns)
        or not attention.multi_query_attention
        or attention.training
    ):
        return None
    kind = kind_of_one_token(heads, kv_heads, columns, x.dtype)
    return layer.extended(1) if length + 1 < LONG or is_fastest(kind) else None


def layer_arguments(block: nn.Module, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple | None:
    """Returns the fields of `LayerArguments`; None if the compiled library cannot compute the layer, or is not the fastest."""
    attention, mlp, norms = block.self_attention, block.mlp, (block.input_layernorm, block.post_attention_layernorm)
    linears = (attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h)
    if not all(map(is_plain, (mlp, *norms, *linears))):
        return None
    rows, _, hidden = x.shape
    (_, kv_heads, length, columns), heads = keys.shape, attention.num_heads
    width, weights = linears[3].in_features, [norm.weight for norm in norms]
    shapes = (
        ((heads + 2 * kv_heads) * columns, hidden), (hidden, heads * columns), (2 * width, hidden), (hidden, width)
    )  # fmt: skip
    matrices = [matrix_arguments(linear, *shape, x.dtype, rows) for linear, shape in zip(linears, shapes)]
    if (
        None in matrices
        or not all(is_ready(weight, x.dtype, (hidden,)) for weight in weights)
        or block.residual_post_layernorm
        or block.fp32_residual_connection
    ):
        return None
    return (
        *(weight.data_ptr() for weight in weights), *matrices, keys.data_ptr(), values.data_ptr(),
        heads // kv_heads, kv_heads, columns, length, keys.stride(1), norms[0].eps, norms[1].eps, attention.scaling,
    )  # fmt: skip


def matrix_arguments(linear: nn.Linear, out: int, in_features: int, dtype: torch.dtype, rows: int) -> tuple | None:
    """Returns the fields of `MatrixArguments`; None if the compiled library cannot multiply by it, or is not the fastest."""
    weight, bias = linear.weight, linear.bias
    if bias is not None and not is_ready(bias, dtype, (out,)):
        return None
    scale, groups, bits, scale_type = None, 1, 16, 0
    if type(linear) is Linear:
        if dtype == torch.float32 or weight.numel() < MEASURED_SIZE or not is_fastest(kind_of_half(dtype, rows)):
            return None
        is_fit = is_ready(weight, dtype, (out, in_features))
    else:
        scale, bits = linear.weight_scale, linear.bits
        groups, scale_type = 1 if scale.ndim == 1 else scale.shape[1], SCALE_TYPES.get(scale.dtype)
        kind = kind_of_quantized(bits, in_features, groups, dtype, rows)
        if scale_type is None or (weight.numel() >= MEASURED_SIZE and not is_fastest(kind)):
            return None
        is_fit = (
            is_ready(weight, torch.int8, (out, in_features * bits // 8))
            and is_ready(scale, scale.dtype, (out,) if scale.ndim == 1 else (out, groups))
            and (groups == 1 or in_features in [groups * size for size in GROUP_SIZES])
        )
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (weight, scale, bias))
    return (*pointers, out, in_features, groups, bits, scale_type) if is_fit else None
