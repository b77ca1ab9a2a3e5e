"""ONNX graphs: ONNX Runtime and OpenVINO compute with them what the model does (`make test-conversion`)."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

from conftest import SMALL, TINY


pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed: make test-conversion")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make test-conversion")

from conversion import quantize, to_onnx  # noqa: E402


def ort(path):
    """Returns a function of inputs by name that gives outputs by name."""
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs)))


def openvino(path):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: make test-conversion")
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs):
        result = model(inputs)
        return {output.get_any_name(): np.array(result[output]) for output in model.outputs}

    return run


def greedy(run, config, inputs, steps: int) -> list[list[int]]:
    """Greedy tokens of a batch, up to `</s>` each: the prompt at once from an empty cache, then one by one."""
    ids, mask, positions = (inputs[name].numpy() for name in ("input_ids", "attention_mask", "position_ids"))
    empty = np.zeros((len(ids), config.num_key_value_heads, 0, config.kv_channels), np.float32)
    kinds = [f"{i}.{kind}" for i in range(config.num_layers) for kind in ("key", "value")]
    past = {f"past_key_values.{kind}": empty for kind in kinds}
    tokens = []
    for _ in range(steps):
        outputs = run({"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})
        past = {f"past_key_values.{kind}": outputs[f"present.{kind}"] for kind in kinds}
        ids = outputs["logits"][:, -1:].argmax(-1)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        positions = positions[:, -1:] + 1
        tokens.append(ids[:, 0])
    return [until_eos(row) for row in np.stack(tokens, axis=1).tolist()]


def until_eos(row: list[int]) -> list[int]:
    return row[: row.index(2)] if 2 in row else row


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "tiny"
    to_onnx.convert(TINY, folder)
    return folder


@pytest.mark.parametrize("engine", [ort, openvino])
def test_greedy_tokens(exported, tiny_tokenizer, engine):
    """Alone and in a padded batch."""
    model = AutoModel.from_pretrained(TINY, trust_remote_code=True).float().eval()
    run = engine(exported / "model.onnx")
    prompts = [tiny_tokenizer.build_prompt(query) for query in ("你好", "Tell me a story about a dog.", "Who are you?")]
    for texts in (prompts[:1], prompts):
        inputs = tiny_tokenizer(texts, padding=True, return_tensors="pt")
        answers = model.generate(**inputs, do_sample=False, max_new_tokens=30)[:, inputs["input_ids"].shape[1] :]
        assert greedy(run, model.config, inputs, 30) == [until_eos(row) for row in answers.tolist()]


@pytest.mark.parametrize("variant", [{"rmsnorm": False}, {"rope_ratio": 4}, {"tie_word_embeddings": True}])
def test_variants(small_model, write_checkpoint, tmp_path, variant):
    model = small_model(3, **variant)
    state_dict = model.state_dict()
    if variant.get("tie_word_embeddings"):
        del state_dict["transformer.output_layer.weight"]
    source = write_checkpoint(tmp_path / "source", {**SMALL, **variant}, state_dict)
    to_onnx.convert(source, tmp_path / "out")
    ids = torch.arange(20)[None] + 5
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": ids - 5}
    empty = np.zeros((1, model.config.num_key_value_heads, 0, 8), np.float32)
    past = {f"past_key_values.{i}.{kind}": empty for i in range(2) for kind in ("key", "value")}
    outputs = ort(tmp_path / "out/model.onnx")({**{name: t.numpy() for name, t in inputs.items()}, **past})
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(torch.tensor(outputs["logits"]), expected, atol=1e-4, rtol=1e-4)


class Logits(torch.nn.Module):
    """The legacy exporter makes inputs of a forward's optional arguments: this one has none."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_legacy_export(small_model, tmp_path, attn_implementation):
    """`torch.onnx.export(dynamo=False)`, by which other programs export models."""
    model = Logits(small_model(attn_implementation=attn_implementation))
    ids = torch.randint(3, 128, (2, 7))
    axes = {0: "batch", 1: "sequence"}
    torch.onnx.export(
        model, (ids, torch.ones_like(ids)), tmp_path / "model.onnx", dynamo=False,
        input_names=["input_ids", "attention_mask"], output_names=["logits"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "logits": axes},
    )  # fmt: skip
    ids = torch.randint(3, 128, (3, 11))  # another size than the example's
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    outputs = ort(tmp_path / "model.onnx")({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        expected = model(ids, mask)
    torch.testing.assert_close(
        torch.tensor(outputs["logits"])[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4
    )


def test_quantized_and_what_cannot_be(small_model, write_checkpoint, tmp_path):
    source = write_checkpoint(tmp_path / "source", SMALL, small_model().state_dict())
    quantize.convert(source, tmp_path / "int8", bits=8)
    to_onnx.convert(tmp_path / "int8", tmp_path / "out")
    assert (tmp_path / "out/model.onnx").exists()
    with pytest.raises(SystemExit, match="exists already"):
        to_onnx.main(["--model", str(source), "--output", str(tmp_path / "out")])
    prefix = write_checkpoint(tmp_path / "prefix", {**SMALL, "pre_seq_len": 4}, small_model(pre_seq_len=4).state_dict())
    with pytest.raises(SystemExit, match="without a P-Tuning prefix"):
        to_onnx.main(["--model", str(prefix), "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
