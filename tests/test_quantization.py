"""INT8 and INT4: the published formats, and every way to a quantized model giving the same one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from conftest import SMALL


IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def quantization(chatglm):
    import sys

    return sys.modules[chatglm.modeling.quantize.__module__]


@pytest.fixture(scope="module")
def checkpoint(small_model, write_checkpoint, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", SMALL, small_model(1).state_dict())


def load(path, auto_class=AutoModel, **kwargs):
    return auto_class.from_pretrained(path, trust_remote_code=True, **kwargs).eval()


def same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values()):
        assert x.dtype == y.dtype and torch.equal(x, y), name
    with torch.no_grad():
        assert torch.equal(a(IDS).logits, b(IDS).logits)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bits", [8, 4])
def test_published_format(quantization, golden, dtype, bits):
    reference = golden("quantization")
    case = f"{dtype}_int{bits}/"
    weight, scale = quantization.quantize_weight(reference[case + "weight"], bits)
    assert torch.equal(weight, reference[case + "packed"])
    assert torch.equal(scale, reference[case + "weight_scale"])
    restored = quantization.dequantize_weight(weight, scale.float(), bits)
    assert torch.equal(restored, reference[case + "dequant_fp32"])


def test_packing(quantization):
    values = torch.tensor([[1, -2, 7, -7]], dtype=torch.int8)
    packed = quantization.pack_int4(values)
    assert packed.view(torch.uint8).tolist() == [[0x1E, 0x79]]  # the even column is in the high half
    assert torch.equal(quantization.unpack_int4(packed), values)


@pytest.mark.parametrize("bits", [8, 4])
def test_bfloat16_does_not_wrap(quantization, bits):
    weight = torch.randn(64, 256).bfloat16()
    packed, scale = quantization.quantize_weight(weight, bits)
    restored = quantization.dequantize_weight(packed, scale.float(), bits)
    error = (restored - weight.float()).norm() / weight.float().norm()
    assert error < {8: 0.01, 4: 0.15}[bits]  # 0.28 where the largest value of a row changes its sign


def test_zero_rows(quantization):
    packed, scale = quantization.quantize_weight(torch.zeros(2, 4), 8)
    assert (scale == 0).all() and (quantization.dequantize_weight(packed, scale, 8) == 0).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_every_way_gives_the_same(checkpoint, chatglm, quantization, bits, tmp_path):
    in_place = load(checkpoint).quantize(bits)
    config = quantization.ChatGLMQuantizationConfig(bits=bits)
    same(load(checkpoint, quantization_config=config), in_place)
    same(load(checkpoint, quantization_config={"quant_method": "chatglm", "bits": bits}), in_place)
    in_place.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["quantization_bit"] == bits and saved["quantization_config"]["bits"] == bits
    again = load(tmp_path / "saved")
    same(again, in_place)
    again.save_pretrained(tmp_path / "again")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "again")]
    assert weights[0] == weights[1]

    names = set(load_file(tmp_path / "saved/model.safetensors"))
    assert "transformer.encoder.layers.0.self_attention.dense.weight_scale" in names
    assert "transformer.output_layer.weight_scale" not in names
    exact = load(checkpoint)(IDS).logits
    error = (again(IDS).logits - exact).norm() / exact.norm()
    assert 0 < error < {8: 0.05, 4: 0.5}[bits]


def test_published_int4_checkpoint(checkpoint, write_checkpoint, tmp_path):
    """`quantization_bit` in config.json, int8 weights and scales in a .bin."""
    model = load(checkpoint).quantize(4)
    folder = write_checkpoint(tmp_path / "int4", {**SMALL, "quantization_bit": 4})
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    loaded = load(folder)
    assert loaded.quantized
    same(loaded, model)


def test_casts(checkpoint):
    """The first-party README's idioms: scales and activations follow, packed weights stay."""
    for make in (lambda: load(checkpoint).half().quantize(4), lambda: load(checkpoint).quantize(4).half()):
        model = make()
        layer = model.transformer.encoder.layers[0].mlp.dense_h_to_4h
        assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float16)
        assert model(IDS).logits.dtype == torch.float16
        model = model.float()
        assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)
        assert model(IDS).logits.dtype == torch.float32
    assert load(checkpoint).quantize(8).to(torch.bfloat16)(IDS).logits.dtype == torch.bfloat16
    assert load(checkpoint).quantize(0).quantized is False


def test_twice(checkpoint, logs):
    model = load(checkpoint).quantize(4)
    before = model.state_dict()
    assert model.quantize(8) is model
    assert "Already quantized" in logs.text
    assert model.config.quantization_bit == 4 and model.state_dict().keys() == before.keys()


def test_dequantize(checkpoint):
    model = load(checkpoint).quantize(8)
    expected = model(IDS).logits
    model.dequantize()
    assert not model.quantized and model.config.quantization_bit == 0
    assert all(p.is_floating_point() for p in model.parameters())
    torch.testing.assert_close(model(IDS).logits, expected)


def test_classification_and_prefix(checkpoint):
    model = load(checkpoint, AutoModelForSequenceClassification).quantize(4)
    assert type(model.classifier_head) is torch.nn.Linear and torch.isfinite(model(IDS).logits).all()
    tuned = load(checkpoint, pre_seq_len=3).quantize(4)
    tuned.train()(IDS, labels=IDS).loss.backward()
    trained = [name for name, p in tuned.named_parameters() if p.grad is not None]
    assert trained == ["transformer.prefix_encoder.embedding.weight"]


def test_lora(checkpoint):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(checkpoint).quantize(4), peft.LoraConfig(task_type="CAUSAL_LM"))
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=IDS).loss.backward()
    assert embeds.grad.abs().sum() > 0
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_gradient(quantization):
    """To the input, against the dequantized layer."""
    linear = torch.nn.Linear(16, 8)
    quantized = quantization.QuantizedLinear.from_linear(linear, 4)
    x = torch.randn(3, 16, requires_grad=True)
    quantized(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    quantized.to_linear()(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_compile(checkpoint):
    model = load(checkpoint).quantize(4)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(IDS, use_cache=False).logits, expected)


# Bad input


@pytest.mark.parametrize("bits", [2, 16, "4"])
def test_other_bits(checkpoint, quantization, bits):
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        quantization.ChatGLMQuantizationConfig(bits=bits)
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        load(checkpoint).quantize(bits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(quantization, value):
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantization.quantize_weight(torch.full((2, 4), value), 8)


@pytest.mark.parametrize("damage", ["missing", "zero", "nan"])
def test_damaged_scales(checkpoint, write_checkpoint, tmp_path, damage):
    state_dict = load(checkpoint).quantize(4).state_dict()
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight_scale"
    if damage == "missing":
        del state_dict[name]
    else:
        state_dict[name] = torch.full_like(state_dict[name], 0 if damage == "zero" else float("nan"))
    with pytest.raises(ValueError, match="dense_4h_to_h.weight_scale is missing"):
        load(write_checkpoint(tmp_path / "damaged", {**SMALL, "quantization_bit": 4}, state_dict))


def test_odd_columns(quantization):
    with pytest.raises(ValueError, match="must be even, got 3"):
        quantization.QuantizedLinear(3, 4, 4, False)
