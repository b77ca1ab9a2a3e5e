"""Attention on CPUs: each way is right for every shape that it takes, and taken only where it can be and is fastest."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def attention(chatglm):
    return chatglm.attention


def states(batch, kv_heads, heads, length, head_dim, dtype, room=0):
    """Query, and key and value as a growing cache has them, with room for `room` more positions."""
    generator = torch.Generator().manual_seed(length + heads)
    query = 3 * torch.randn(batch, kv_heads, heads, head_dim, generator=generator)
    key, value = torch.randn(2, batch, kv_heads, length + room, head_dim, generator=generator).to(dtype)
    return query.to(dtype), key[:, :, :length], value[:, :, :length]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length, room", [(1, 0), (7, 3), (64, 0), (65, 100), (1024, 0), (1025, 0), (3000, 1)])
def test_against_float64(attention, dtype, length, room):
    for batch, kv_heads, heads, head_dim in [(1, 2, 16, 128), (2, 1, 1, 16), (3, 2, 17, 32), (1, 3, 40, 256)]:
        query, key, value = states(batch, kv_heads, heads, length, head_dim, dtype, room)
        exact = nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
        scaling = head_dim**-0.5
        y = attention.cpu_attention(query, key, value, scaling)
        error = (y.double() - exact).abs()
        assert y.dtype == dtype and (error <= torch.finfo(dtype).eps * exact.abs() + 2e-5).all()


def test_scores_far_apart(attention):
    """One key takes all of the weight; others, more than e^87 smaller, none. Scores beyond float32's e^x do not overflow."""
    query, key, value = states(1, 1, 4, 600, 16, torch.float32)
    key[..., 99, :] = 100 * query[..., 0, :]
    y = attention.cpu_attention(query, key, value, 1.0)[0]
    torch.testing.assert_close(y[0, 0], value[0, 0, 99])
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_keys_that_are_not_finite(attention, broken):
    """A broken cache gives NaN, as torch does, rather than an answer."""
    query, key, value = states(1, 2, 4, 600, 16, torch.float32)
    key[0, 1, 5] = broken
    y = attention.cpu_attention(query, key, value, 1.0)[0]
    assert torch.isfinite(y[0]).all() and not torch.isfinite(y[1]).any()


@pytest.fixture
def compiled(attention, monkeypatch):
    """Returns the list of what the compiled library was called with."""
    called, compiled = [], attention.cpu_attention
    monkeypatch.setitem(attention.PATHS, "compiled", lambda *given: (called.append(given), compiled(*given))[1])
    return called


@pytest.mark.parametrize("path", ["compiled", "torch"])
def test_a_long_context_takes_the_fastest_path(small_model, compiled, choosing, path):
    model = small_model(seq_length=1024, kv_channels=16)
    ids = torch.randint(0, model.config.padded_vocab_size, (1, 600), generator=torch.Generator().manual_seed(0))
    choosing(path)
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        step = model(ids[:, -1:], past_key_values=cache).logits
        expected = model(ids).logits[:, -1:]
    assert len(compiled) == (model.config.num_layers if path == "compiled" else 0)
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)


def test_other_heads_are_measured_apart(attention, choosing):
    measured = choosing("torch")
    for kv_heads, heads, head_dim in ((2, 16, 32), (2, 16, 64), (2, 8, 32), (4, 16, 32), (2, 16, 32)):
        attention.attend_to_all(*states(1, kv_heads, heads, 600, head_dim, torch.float32), 1.0)
    assert measured.count("torch") == 4


def test_what_is_left_to_torch(attention):
    """Masks, gradients, short contexts, other dtypes and layouts."""
    query, key, value = states(2, 2, 4, 600, 16, torch.float32)
    can_use = attention.can_use_compiled
    assert can_use(query, key, value, None, 0.0)
    assert not can_use(query, key[:, :, :500], value[:, :, :500], None, 0.0)
    assert not can_use(query, key, value, torch.ones(1, 1, 1, 600), 0.0)
    assert not can_use(query, key, value, None, 0.1)
    assert not can_use(query.requires_grad_(), key, value, None, 0.0)
    query = query.detach()
    assert not can_use(query, key.bfloat16(), value.bfloat16(), None, 0.0)
    assert not can_use(query, key, value.transpose(2, 3).contiguous().transpose(2, 3), None, 0.0)
    assert not can_use(query, key.transpose(0, 1).contiguous().transpose(0, 1), value, None, 0.0)
    for head_dim in (8, 272):
        assert not can_use(*states(1, 2, 4, 600, head_dim, torch.float32), None, 0.0)
    for dtype in (torch.float64,):
        assert not can_use(*states(1, 2, 4, 600, 16, dtype), None, 0.0)


def test_every_number_of_heads(attention):
    """Heads fill vectors of 16, of 8 or of 4, or leave some of their lanes empty."""
    for heads, head_dim in itertools.product(range(1, 36, 3), (16, 48)):
        query, key, value = states(1, 1, heads, 70, head_dim, torch.float32)
        exact = nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)
        torch.testing.assert_close(attention.cpu_attention(query, key, value, 1.0), exact, rtol=1e-4, atol=1e-5)


def test_on_gpus_one_token_with_a_mask(chatglm):
    """There, torch does not copy keys and values without a mask, and may take much memory for prompts."""
    can_use = chatglm.attention.can_use_grouped_sdpa
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    for length, attention_mask, kwargs, expected in [
        (1, mask, {}, True),
        (1, None, {}, False),
        (2, mask, {}, False),
        (1, mask.expand(1, 4, 1, 8), {}, False),
        (1, mask, {"cache": None}, False),
    ]:
        query = SimpleNamespace(device=torch.device("cuda"), shape=(1, 4, length, 8))
        assert can_use(query, attention_mask, kwargs) == expected


# Prompts


def prompt_states(batch, kv_heads, heads, length, head_dim, dtype):
    generator = torch.Generator().manual_seed(length + heads)
    shapes = [(batch, n, length, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scores", [1, 5000, 1 << 20])
def test_prompts_against_float64(attention, monkeypatch, dtype, scores):
    """In blocks of one query, of several, and all at once."""
    monkeypatch.setattr(attention, "SCORES", scores)
    for batch, kv_heads, heads, length, head_dim in [(1, 2, 32, 70, 128), (2, 2, 6, 33, 16), (1, 3, 3, 1, 48)]:
        given = prompt_states(batch, kv_heads, heads, length, head_dim, dtype)
        exact = nn.functional.scaled_dot_product_attention(
            *(g.double() for g in given), is_causal=True, scale=0.1, enable_gqa=True
        ).transpose(1, 2)
        for name, path in attention.CAUSAL_PATHS.items():
            y = path(*given, 0.1)
            assert y.dtype == dtype and y.shape == (batch, length, heads, head_dim), name
            # Weights may be rounded to the dtype, and are 1 together.
            bound = 2 * torch.finfo(dtype).eps * (exact.abs() + given[2].abs().max()) + 1e-5
            assert ((y.double() - exact).abs() <= bound).all(), name


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_reach_earlier_positions(attention, broken):
    query, key, value = prompt_states(1, 2, 4, 70, 16, torch.float32)
    key[0, 1, 40] = broken
    for name, path in attention.CAUSAL_PATHS.items():
        y = path(query, key, value, 0.25)
        assert y[0, :40].isfinite().all() and y[0, :, :2].isfinite().all() and not y[0, 40:, 2:].isfinite().any(), name


@pytest.mark.parametrize("path", ["blocks", "torch"])
def test_a_prompt_takes_the_fastest_path(attention, small_model, choosing, monkeypatch, path):
    model = small_model(seq_length=1024, kv_channels=16)
    ids = torch.randint(0, model.config.padded_vocab_size, (2, 600), generator=torch.Generator().manual_seed(0))
    called = []
    for name, function in attention.CAUSAL_PATHS.items():
        spy = lambda *args, name=name, function=function: (called.append(name), function(*args))[1]  # noqa: E731
        monkeypatch.setitem(attention.CAUSAL_PATHS, name, spy)
    choosing(path)
    with torch.no_grad():
        logits = model(ids).logits
        model(ids[:, :500])
        model.config._attn_implementation = "eager"
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert called == [path] * model.config.num_layers
    model.config._attn_implementation = "sdpa"
    model(ids)  # gradients are wanted
    assert len(called) == model.config.num_layers
