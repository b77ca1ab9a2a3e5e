"""Equality with the published implementation: its recorded outputs, on its own weights."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file


TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def build(chatglm, golden):
    """Builds the reference model: `build(model_class, **config)`, with weights from `source` under `prefix`."""

    def build(model_class=chatglm.ChatGLMForConditionalGeneration, source="model", prefix="state_dict/", **overrides):
        config = {k.removeprefix("config/"): v for k, v in golden("model").items() if k.startswith("config/")}
        torch.manual_seed(0)
        model = model_class(chatglm.ChatGLMConfig(**{**config, **overrides})).eval()
        state_dict = {k.removeprefix(prefix): v for k, v in golden(source).items() if k.startswith(prefix)}
        loaded = model.load_state_dict(state_dict, strict=False)
        for key in loaded.unexpected_keys:
            assert any(re.search(pattern, key) for pattern in model_class._keys_to_ignore_on_load_unexpected), key
        return model, loaded.missing_keys

    return build


@pytest.fixture(scope="module")
def model(build):
    model, missing = build()
    assert not missing
    return model


def close(a, b):
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


def test_forward(model, golden):
    reference = golden("forward")
    with torch.no_grad():
        output = model(reference["plain/input_ids"], output_hidden_states=True)
    close(output.logits, reference["plain/logits"])
    assert len(output.hidden_states) == 4
    for i, states in enumerate(output.hidden_states):
        close(states.transpose(0, 1), reference[f"plain/hidden_states/{i}"])
    for i, layer in enumerate(output.past_key_values.layers):  # published: [seq, batch, kv_heads, head_dim]
        close(layer.keys.permute(2, 0, 1, 3), reference[f"plain/past_key_values/{i}/0"])
        close(layer.values.permute(2, 0, 1, 3), reference[f"plain/past_key_values/{i}/1"])


def test_loss(model, golden):
    reference = golden("forward")
    output = model(reference["plain/input_ids"], labels=reference["loss/labels"])
    close(output.loss, reference["loss/loss"])


def test_return_last_logit(model, golden):
    reference = golden("forward")
    logits = model(reference["plain/input_ids"], return_last_logit=True).logits
    close(logits, reference["return_last_logit/logits"])


def test_left_padding(model, golden):
    reference = golden("forward")
    mask, positions = reference["leftpad/attention_mask"], reference["leftpad/position_ids"]
    with torch.no_grad():
        logits = model(reference["leftpad/input_ids"], attention_mask=mask, position_ids=positions).logits
    close(logits[mask.bool()], reference["leftpad/logits"][mask.bool()])
    assert torch.isfinite(logits).all()


def test_chunked(model, golden):
    reference = golden("forward")
    past, logits = None, []
    for chunk in reference["plain/input_ids"].split(reference["chunked/splits"], dim=1):
        output = model(chunk, past_key_values=past)
        past = output.past_key_values
        logits.append(output.logits)
    close(torch.cat(logits, dim=1), reference["chunked/logits"])


def test_float16(model, golden, build):
    """In float16 the published angles are off by up to 0.05 below position 128; ours are not, so the bound is loose."""
    reference = golden("forward")
    half, _ = build()
    logits = half.half()(reference["plain/input_ids"]).logits
    assert logits.dtype == torch.float16
    assert (logits - reference["plain_float16"]).abs().max() < 0.02
    assert (logits.float() - reference["plain/logits"]).abs().max() < 0.01


def test_greedy(model, golden):
    reference = golden("generate")
    ids = reference["greedy/input_ids"]
    sequences = model.generate(ids, do_sample=False, max_new_tokens=20)
    assert torch.equal(sequences, reference["greedy/sequences"])
    batch = model.generate(
        reference["greedy_batch/input_ids"],
        attention_mask=reference["greedy_batch/attention_mask"],
        do_sample=False,
        max_new_tokens=20,
    )
    assert torch.equal(batch, reference["greedy_batch/sequences"])


def test_prefix(build, golden):
    """P-Tuning v2: logits, logits of a padded batch, greedy tokens, and what is trainable."""
    reference, forward = golden("prefix"), golden("forward")
    model, missing = build(source="prefix", prefix="prefix_projFalse/state_dict/", pre_seq_len=5)
    if missing:  # the file holds the prefix alone
        state_dict = {
            k.removeprefix("state_dict/"): v for k, v in golden("model").items() if k.startswith("state_dict/")
        }
        missing = set(missing) - set(state_dict)
        model.load_state_dict(state_dict, strict=False)
    assert not missing
    for use_cache in (True, False):
        close(model(forward["plain/input_ids"], use_cache=use_cache).logits, reference["prefix_projFalse/logits"])
    mask = forward["leftpad/attention_mask"]
    output = model(forward["leftpad/input_ids"], attention_mask=mask, position_ids=forward["leftpad/position_ids"])
    close(output.logits[mask.bool()], reference["prefix_projFalse/leftpad_logits"][mask.bool()])
    greedy = reference["prefix_projFalse/greedy"]
    prompt = golden("generate")["greedy/input_ids"]
    new_tokens = greedy.shape[1] - prompt.shape[1]
    for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=new_tokens, **cache), greedy)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == reference["prefix_projFalse/trainable"]


def test_sequence_classification(build, chatglm, golden):
    forward = golden("forward")
    model, missing = build(chatglm.ChatGLMForSequenceClassification, "seqcls", "seqcls/state_dict/", num_labels=3)
    assert not missing
    for padding in ("left", "right"):
        ids, mask = forward["leftpad/input_ids"], forward["leftpad/attention_mask"]
        if padding == "right":
            lengths = mask.sum(-1).tolist()
            ids, mask = (torch.stack([row.roll(n) for row, n in zip(x, lengths)]) for x in (ids, mask))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        close(logits, golden("seqcls")["seqcls/logits"])


@pytest.mark.parametrize("variant", ["mha", "bias"])
def test_variants(build, golden, variant):
    reference = golden("variants")
    prefix = f"variant_{variant}/overrides/"
    overrides = {k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)}
    assert overrides
    model, missing = build(source="variants", prefix=f"variant_{variant}/state_dict/", **overrides)
    assert not missing
    close(model(golden("forward")["plain/input_ids"]).logits, reference[f"variant_{variant}/logits"])


def test_rope_ratio(build, golden):
    reference, ids = golden("rope_ratio"), golden("forward")["plain/input_ids"]
    close(build(rope_ratio=1.0)[0](ids).logits, reference["linear_ratio1.0"])
    close(build(rope_ratio=4.0)[0](ids).logits, reference["linear_ratio4.0"])
    chatglm3 = {"rope_type": "default", "rope_theta": 40000.0}
    close(build(rope_parameters=chatglm3)[0](ids).logits, reference["base_ratio4.0"])


@pytest.mark.parametrize("name", ["tiny_glm2", "tiny_glm2_prefix"])
def test_independent_model(chatglm, shared, name):
    """A one-layer model of another project, with three steps that share a cache."""
    path = shared / "golden/tiny_glm2" / name
    info = json.loads(path.with_suffix(".json").read_text())
    model = chatglm.ChatGLMModel(chatglm.ChatGLMConfig(**info["config"]), with_output_layer=False).eval()
    state_dict = {
        k.removeprefix("transformer."): v.float() for k, v in load_file(path.with_suffix(".safetensors")).items()
    }
    if "prefix" in name:  # given as [key and value, group, position, channel]
        prefix = state_dict.pop("prefix_past_key_values_f16")
        state_dict["prefix_encoder.embedding.weight"] = prefix.permute(2, 0, 1, 3).flatten(1)
    loaded = model.load_state_dict(state_dict, strict=False)
    assert not loaded.missing_keys
    past = None
    for step in info["steps"]:
        output = model(torch.tensor([step["input_ids"]]), past_key_values=past, use_cache=True)
        past = output.past_key_values
        expected = torch.tensor(step["last_hidden_state"]).view_as(output.last_hidden_state)
        torch.testing.assert_close(output.last_hidden_state, expected, atol=5e-4, rtol=0)
