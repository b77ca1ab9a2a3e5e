"""
Attention where the library's own (5.24) copies keys and values for each head or has torch do so: on CPUs, and of one token
with a mask (static caches, padded batches) on GPUs.
"""

import functools
import itertools

import torch
from torch import nn

from .quantization_cpu import SCALE_TYPES, cpu_attention, cpu_library
from .quantization_kernels import fastest_path, is_traced, needs_gradients


LONG = 512  # positions; attention to fewer is a small part of a step
SCORES = 1 << 20  # of a block of queries: 4 MB in float32


def can_use_grouped_sdpa(query: torch.Tensor, attention_mask: torch.Tensor | None, kwargs: dict) -> bool:
    is_one_mask = attention_mask is None or attention_mask.shape[1] == 1  # for all heads
    has_cache_to_update = "cache" in kwargs
    # On GPUs, torch may fall back to all scores at once, which is too much for prompts.
    is_one_token = query.device.type == "cuda" and query.shape[2] == 1 and attention_mask is not None
    return (
        (query.device.type == "cpu" or is_one_token)
        and is_one_mask
        and not has_cache_to_update
        and not torch.jit.is_tracing()
    )


def grouped_sdpa_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    The library's sdpa, without copies of keys and values.

    Measured on two cores of an AMD EPYC (Zen 5), 32 heads on 2, in turn: one token 1.0 to 2.8 times (float32) and 21 to 24
    times (bfloat16) as fast without a mask, 5 tokens 6.3 and 2.1 times, 512 tokens 1.0 to 1.3 times. On an NVIDIA H200, one
    token in bfloat16 with a mask: 4.8, 13 and 37 times at 2,048, 8,192 and 32,768 positions (compiled, 2.9, 7.5 and 20 times).

    Arguments and output are those of `eager_attention_forward`, without the weights; the mask is one for all heads.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads = module.num_key_value_heads
    options = dict(attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
    if q_len == 1 and query.device.type == "cpu":
        # The query heads that share a key-value head become rows of one matrix.
        folded = query.reshape(batch, kv_heads, module.num_key_value_groups, head_dim)
        if can_use_compiled(folded, key, value, attention_mask, dropout):
            output = attend_to_all(folded, key, value, scaling)
        else:
            output = nn.functional.scaled_dot_product_attention(folded, key, value, **options)
        return output.reshape(batch, 1, heads, head_dim), None
    is_causal = (module.is_causal if is_causal is None else is_causal) and attention_mask is None
    if is_causal and key.shape[2] > q_len:  # an empty static cache, whose rest is masked
        key, value = key[:, :, :q_len], value[:, :, :q_len]
    if is_causal and q_len >= LONG and can_choose(query, key, value) and dropout == 0:
        return attend_causally(query, key, value, scaling), None
    return sdpa(query, key, value, is_causal=is_causal, **options), None


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
    """Torch's own attention, with heads that share keys and values, as `[batch, length, heads, head_dim]`."""
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, enable_gqa=query.shape[1] > key.shape[1], **options
    )
    return output.transpose(1, 2).contiguous()


def can_choose(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    return (
        query.device.type == "cpu"
        and not is_traced(query)
        and not needs_gradients(query, key, value)
        and query.dtype == key.dtype == value.dtype
        and query.dtype in SCALE_TYPES
    )


# Prompts


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    return sdpa(query, key, value, scale=scaling, is_causal=True)


def causal_attention_by_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """
    As matrix products of so many queries at a time that their scores stay in the cache. Products are in the dtype of `query`,
    but float16, which CPUs multiply slowly, is in float32; so is softmax.
    """
    batch, heads, length, head_dim = query.shape
    groups, output = key.shape[1], query.new_empty(batch, length, heads, head_dim)
    dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
    # The query heads that share a key-value head become rows of one matrix.
    folded, key, value = query.to(dtype).unflatten(1, (groups, -1)), key.to(dtype), value.to(dtype)
    start = 0
    while start < length:
        end = min(length, start + max(1, SCORES // (batch * heads * length)))
        rows = folded[:, :, :, start:end].flatten(2, 3)
        scores = torch.matmul(rows, key[:, :, :end].transpose(2, 3)).float().mul_(scaling)
        later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        scores.unflatten(2, (-1, end - start))[..., start:].masked_fill_(later, -torch.inf)
        weights = nn.functional.softmax(scores, dim=-1).to(dtype)
        part = torch.matmul(weights, value[:, :, :end])
        output[:, start:end] = part.view(batch, heads, end - start, head_dim).transpose(1, 2)
        start = end
    return output


CAUSAL_PATHS = {"torch": causal_attention, "blocks": causal_attention_by_blocks}


def attend_causally(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    Attention of each of at least `LONG` positions to those up to it, in the faster way on this CPU, measured at first use.

    Measured on two cores of an AMD EPYC (Zen 5), 32 heads on 2, in turn: the blocks are 1.6 times (float32), 3.2 to 4.0 times
    (bfloat16) and 2.9 times (float16) as fast at 512 positions, and 1.1, 2.7 and 1.4 times at 2,048.

    Args:
        query: `[batch, heads, length, head_dim]`.
        key, value: `[batch, kv_heads, length, head_dim]`.

    Returns:
        `[batch, length, heads, head_dim]`.
    """
    kind = f"attention of many tokens with {query.shape[1]} heads of {query.shape[3]} on {key.shape[1]}", query.dtype
    sample = lambda: (*(states[:1, :, :LONG] for states in (query, key, value)), scaling)  # noqa: E731
    path = fastest_path(kind, CAUSAL_PATHS, lambda: itertools.repeat(sample()))
    return CAUSAL_PATHS[path](query, key, value, scaling)


# One token


def torch_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)


PATHS = {"torch": torch_attention, "compiled": cpu_attention}


def attend_to_all(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    Attention without a mask, by torch or by the compiled library, whichever is faster on this CPU, measured at first use.

    Measured on two cores of an AMD EPYC (Zen 5), 32 heads on 2, in turn: at 512 to 32,000 positions the compiled one is 1.9
    to 2.1 times as fast in float32, 1.5 to 1.8 times in bfloat16 and 4.4 to 5.9 times in float16.
    """
    _, kv_heads, heads, head_dim = query.shape
    kind = kind_of_one_token(kv_heads * heads, kv_heads, head_dim, query.dtype)
    sample = lambda: (query[:1], key[:1, :, :LONG], value[:1, :, :LONG], scaling)  # noqa: E731
    path = fastest_path(kind, PATHS, lambda: itertools.repeat(sample()))
    return PATHS[path](query, key, value, scaling)


@functools.cache
def kind_of_one_token(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple:
    return f"attention of one token with {heads} heads of {head_dim} on {kv_heads}", dtype


def is_compiled_size(head_dim: int) -> bool:
    """Whether the compiled library can attend with heads of this size."""
    return head_dim % 16 == 0 and head_dim <= 256


def can_use_compiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
) -> bool:
    """
    Whether the compiled library can attend with `query`, `[batch, kv_heads, heads, head_dim]`, to all of `key` and `value`,
    `[batch, kv_heads, length, head_dim]`, and there are enough of them to be worth it.
    """
    batch, kv_heads, _, head_dim = query.shape
    return (
        key.shape[2] >= LONG
        and attention_mask is None
        and dropout == 0
        and can_choose(query, key, value)
        and is_compiled_size(head_dim)
        and key.stride() == value.stride()
        and key.stride(3) == 1
        and (batch == 1 or key.stride(0) == kv_heads * key.stride(1))
        and cpu_library() is not None
    )
