"""All layers for one token in one call of the compiled library: the very numbers of the forward pass, and only where it can."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache


PRECISIONS = {
    "int4": dict(bits=4),
    "int8": dict(bits=8),
    "int4 in groups": dict(bits=4, group_size=32),
    "int4 in bfloat16": dict(bits=4, dtype=torch.bfloat16),
    "int8 in float16": dict(bits=8, dtype=torch.float16),
    "bfloat16": dict(dtype=torch.bfloat16),
    "float16": dict(dtype=torch.float16),
}
SIZES = dict(hidden_size=64, ffn_hidden_size=96, kv_channels=16)


@pytest.fixture
def layers(chatglm):
    return chatglm.layers


@pytest.fixture
def build(chatglm, small_model, choosing, monkeypatch):
    """Builds a model that the compiled library multiplies and attends for: `build(bits=..., dtype=..., **config)`."""
    choosing("compiled")
    for module in (chatglm.attention, chatglm.layers):
        monkeypatch.setattr(module, "LONG", 1)

    def build(bits=None, dtype=torch.float32, group_size=None, **config):
        model = small_model(**{"attn_implementation": "sdpa", **SIZES, **config}).to(dtype)
        if bits is not None:
            return model.quantize(bits, group_size=group_size)
        chatglm.linear.choose_linear(model)
        return model

    return build


@pytest.fixture
def calls(layers, monkeypatch):
    """For each token, whether all layers were computed in one call."""
    results, decode = [], layers.decode
    spy = lambda *args, **kwargs: (output := decode(*args, **kwargs), results.append(output is not None))[0]  # noqa: E731
    monkeypatch.setattr(layers, "decode", spy)
    return results


@torch.no_grad()
def logits(model, batch=1, tokens=6, new_cache=None, **kwargs) -> torch.Tensor:
    """Logits of a prompt and of the tokens after it, one by one."""
    ids = torch.randint(3, 100, (batch, 5 + tokens), generator=torch.Generator().manual_seed(0))
    cache = new_cache(model) if new_cache else DynamicCache(config=model.config)
    parts = [model(ids[:, :5], cache=cache, **kwargs).logits]
    parts += [model(ids[:, i : i + 1], cache=cache, **kwargs).logits for i in range(5, 5 + tokens)]
    return torch.cat(parts, dim=1)


def logits_of_forward(model, layers, monkeypatch, **kwargs) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(layers, "decode", lambda *args, **kwargs: None)
        return logits(model, **kwargs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bias", [{}, {"add_bias_linear": True}, {"add_qkv_bias": False}], ids=["qkv", "all", "none"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_numbers_of_the_forward_pass(build, layers, calls, monkeypatch, precision, bias, batch):
    model = build(**PRECISIONS[precision], **bias)
    expected = logits_of_forward(model, layers, monkeypatch, batch=batch)
    calls.clear()
    assert torch.equal(logits(model, batch=batch), expected)
    assert calls == [False] + 6 * [True]  # the prompt, then each token


def test_the_cache_grows_and_is_cropped(build, layers, calls, monkeypatch):
    """Beyond its room, and after `crop`: what was cropped is overwritten."""

    def cropped(model):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([[7, 8, 9, 10]]), cache=cache)
        model(torch.tensor([[11]]), cache=cache)
        cache.crop(-2)
        return cache

    model = build(bits=4)
    for new_cache in (None, cropped):
        expected = logits_of_forward(model, layers, monkeypatch, tokens=150, new_cache=new_cache)
        calls.clear()
        assert torch.equal(logits(model, tokens=150, new_cache=new_cache), expected)
        assert calls.count(True) >= 150


def test_rows_at_positions_of_their_own(build, layers, calls, monkeypatch):
    model, positions = build(bits=8), torch.tensor([[4], [9]])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[5, 6], [7, 8]]), cache=cache)
        steps = []
        for decode in (lambda *args, **kwargs: None, layers.decode):
            with monkeypatch.context() as patch:
                patch.setattr(layers, "decode", decode)
                steps.append(model(torch.tensor([[9], [10]]), position_ids=positions, cache=cache).logits)
            cache.crop(-1)
    assert torch.equal(*steps) and calls[-1]


def test_until_it_is_known_what_is_fastest(build, calls):
    logits(build(bits=4), tokens=3)
    assert calls == [False, False, True, True]  # the first token was measured with


@pytest.mark.parametrize("kind, path", [("INT4", "float32"), ("attention of one", "torch")])
def test_not_where_another_way_is_faster(chatglm, build, calls, kind, path):
    model, chosen = build(bits=4), chatglm.kernels.chosen_paths
    logits(model)
    chosen.update({name: path for name in chosen if name[0].startswith(kind)})
    calls.clear()
    logits(model)
    assert not any(calls)


# What is left to the forward pass. Each of these changes the model or returns what else to call it with; the answers are those of
# the forward pass, and no token was computed in one call.


def hooked(model):
    model.transformer.encoder.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_before(model):
    model.transformer.encoder.layers[0].self_attention.dense.register_forward_pre_hook(
        lambda module, args: (2 * args[0],)
    )


def own_forward(model):
    norm = model.transformer.encoder.layers[0].input_layernorm
    norm.forward = lambda x: 2 * x


def own_class(model):
    block = model.transformer.encoder.layers[0]
    doubled = lambda self, *args, **kwargs: 2 * super(type(self), self).forward(*args, **kwargs)  # noqa: E731
    block.__class__ = type("Block", (type(block),), {"forward": doubled})


def adapter(model):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(target_modules=["dense"], init_lora_weights=False)
    torch.manual_seed(0)
    inject_adapter_in_model(config, model.transformer)


def another_linear(model):
    attention = model.transformer.encoder.layers[0].self_attention
    attention.dense = attention.dense.dequantize()


def transposed(model):
    layer = model.transformer.encoder.layers[0].mlp.dense_4h_to_h
    layer.weight = nn.Parameter(layer.weight.T.contiguous().T, requires_grad=False)


def dropout(model):
    model.transformer.encoder.layers[0].hidden_dropout = 1.0
    model.transformer.encoder.layers[0].train()


def in_float64(model):
    model.to(torch.float64)


def other_attention(model):
    from transformers import AttentionInterface

    def doubled(module, query, key, value, attention_mask, scaling, **kwargs):
        output = nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
        return 2 * output.transpose(1, 2), None

    AttentionInterface.register("doubled", doubled)
    model.set_attn_implementation("doubled")


def attention_dropout(model):
    attention = model.transformer.encoder.layers[0].self_attention
    attention.attention_dropout = 1.0
    attention.training = True


def norm_in_another_dtype(model):
    norm = model.transformer.encoder.layers[0].input_layernorm
    norm.weight = nn.Parameter(norm.weight.bfloat16())


def five_rows(model):
    return {"batch": 5}


def for_attention(model):
    return {"is_causal": True}


def static_cache(model):
    return {"new_cache": lambda model: StaticCache(config=model.config, max_cache_len=16)}


def cache_of_the_library(model):
    return {"new_cache": lambda model: DynamicCache()}


LEFT = (hooked, hooked_before, own_forward, own_class, adapter, another_linear, transposed, dropout, in_float64)
LEFT += (
    attention_dropout,
    norm_in_another_dtype,
    five_rows,
    other_attention,
    for_attention,
    static_cache,
    cache_of_the_library,
)


@pytest.mark.parametrize("change", LEFT, ids=lambda change: change.__name__)
def test_left_to_the_forward_pass(build, layers, calls, monkeypatch, change):
    model = build(bits=4)
    logits(model)
    assert calls.pop()
    kwargs = change(model) or {}
    expected = logits_of_forward(model, layers, monkeypatch, **kwargs)
    calls.clear()
    assert torch.equal(logits(model, **kwargs), expected)
    assert not any(calls)


@pytest.mark.parametrize(
    "config",
    [
        {"rmsnorm": False},
        {"apply_residual_connection_post_layernorm": True},
        {"fp32_residual_connection": True},
        {"multi_query_attention": False},
        {"pre_seq_len": 4},
        {"kv_channels": 8},
        {"kv_channels": 272},
    ],
    ids=str,
)
def test_networks_left_to_the_forward_pass(build, layers, calls, monkeypatch, config):
    monkeypatch.setattr(layers, "LONG", 512)
    model = build(bits=8, **config)
    logits(model)
    calls.clear()
    assert torch.equal(logits(model), logits_of_forward(model, layers, monkeypatch))
    assert not any(calls)


@pytest.mark.parametrize("name", ["query_key_value", "dense"])
@pytest.mark.parametrize(
    "part, change",
    [
        ("weight", lambda weight: weight[:-1]),
        ("weight", lambda weight: weight[:, :-16]),
        ("weight", lambda weight: weight.to("meta")),
        ("weight", lambda weight: weight.float()),
        ("weight_scale", lambda scale: scale[:-1]),
        ("weight_scale", lambda scale: scale.to("meta")),
        ("weight_scale", lambda scale: scale[:, None].expand(-1, 3).contiguous()),
        ("weight_scale", lambda scale: scale[:, None].expand(-1, 32).contiguous()),
    ],
)
def test_weights_that_do_not_fit(build, layers, monkeypatch, name, part, change):
    """The forward pass says so. C++ would read on."""
    monkeypatch.setattr(layers, "MEASURED_SIZE", 1 << 20)
    model = build(bits=4)
    logits(model)
    cache, layer = DynamicCache(config=model.config), getattr(model.transformer.encoder.layers[1].self_attention, name)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]), cache=cache)
        setattr(layer, part, nn.Parameter(change(getattr(layer, part)), requires_grad=False))
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
            model(torch.tensor([[7]]), cache=cache)


@torch.no_grad()
def test_padding(build, layers, calls, monkeypatch):
    model, steps = build(bits=4), []
    logits(model)
    for decode in (layers.decode, lambda *args, **kwargs: None):
        monkeypatch.setattr(layers, "decode", decode)
        cache = DynamicCache(config=model.config)
        model(torch.tensor([[3, 5, 6]]), attention_mask=torch.tensor([[0, 1, 1]]), cache=cache)
        calls.clear()
        steps.append(model(torch.tensor([[7]]), attention_mask=torch.tensor([[0, 1, 1, 1]]), cache=cache).logits)
        assert not any(calls)
    assert torch.equal(*steps)


def test_a_forced_way_to_multiply(build, calls, monkeypatch):
    model = build(bits=4)
    logits(model)
    calls.clear()
    monkeypatch.setenv("CHATGLM_CPU_PATH", "float32")
    logits(model)
    assert not any(calls)


def test_with_gradients_and_autocast(build, calls):
    model = build(bits=4)
    logits(model)
    calls.clear()
    ids, cache = torch.tensor([[5]]), DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), cache=cache)
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, cache=cache)
    model(ids, cache=cache)
    assert not any(calls)


def test_hidden_states(build):
    model = build(bits=4)
    logits(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]), cache=cache)
        states = model(torch.tensor([[7]]), cache=cache, output_hidden_states=True).hidden_states
    assert len(states) == 3 and not torch.equal(states[1], states[2])


def test_weights_that_change(build, layers, calls, monkeypatch):
    """In place, by assignment, and to another dtype: nothing is remembered of the weights."""
    model = build(bits=4)
    logits(model)
    mlp, norm = model.transformer.encoder.layers[0].mlp, model.transformer.encoder.layers[1].input_layernorm
    with torch.no_grad():
        mlp.dense_h_to_4h.weight_scale.mul_(2)
        norm.weight = nn.Parameter(norm.weight * 2)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        logits(model)  # measures
        expected = logits_of_forward(model, layers, monkeypatch)
        calls.clear()
        assert torch.equal(logits(model), expected) and all(calls[1:])


def test_not_enough_memory(build, layers, monkeypatch):
    """The cache is as it was before."""
    model = build(bits=4)
    logits(model)
    cache, library = DynamicCache(config=model.config), layers.cpu_library()
    failing = type("Library", (), {"__getattr__": lambda self, name: getattr(library, name)})()
    failing.chatglm_layers = lambda *args: 1
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), cache=cache)
        with monkeypatch.context() as patch:
            patch.setattr(layers, "cpu_library", lambda: failing)
            with pytest.raises(MemoryError, match="Not enough memory to attend to 4 tokens"):
                model(torch.tensor([[8]]), cache=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [3, 3]


def test_fewer_layers(build, layers, calls, monkeypatch):
    """As in early-exit decoding."""
    model = build(bits=4)
    logits(model)
    model.config.num_layers = 1
    expected = logits_of_forward(model, layers, monkeypatch)
    calls.clear()
    assert torch.equal(logits(model), expected) and all(calls[1:])
