"""Loading and saving: published checkpoints as they are, the README's idioms, and checkpoints that cannot be right."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    modeling_utils,
    pipeline,
    tokenization_utils_base,
)

from conftest import ROOT, SMALL, TINY


IDS = torch.tensor([[5, 6, 7, 8]])
AUTO_CLASSES = {
    AutoModel: "ChatGLMForConditionalGeneration",
    AutoModelForCausalLM: "ChatGLMForConditionalGeneration",
    AutoModelForSeq2SeqLM: "ChatGLMForConditionalGeneration",
    AutoModelForSequenceClassification: "ChatGLMForSequenceClassification",
    AutoModelForTokenClassification: "ChatGLMForTokenClassification",
}


@pytest.fixture(scope="module")
def model(small_model):
    return small_model(1)


@pytest.fixture(scope="module")
def checkpoint(model, write_checkpoint, tmp_path_factory):
    """A folder as published, with the published float16 inv_freq among the weights."""
    state_dict = {**model.state_dict(), "transformer.rotary_pos_emb.inv_freq": torch.zeros(2).half()}
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", SMALL, state_dict)


def load(path, auto_class=AutoModel, **kwargs):
    return auto_class.from_pretrained(path, trust_remote_code=True, **kwargs).eval()


def same(a, b, ids=IDS):
    with torch.no_grad():
        torch.testing.assert_close(a(ids).logits, b(ids).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_auto_classes(checkpoint, model, auto_class, logs):
    loaded = load(checkpoint, auto_class)
    assert type(loaded).__name__ == AUTO_CLASSES[auto_class]
    if "ConditionalGeneration" in AUTO_CLASSES[auto_class]:
        same(loaded, model)
        assert "UNEXPECTED" not in logs.text and "MISSING" not in logs.text


def test_state_dict_names(model, shared, tmp_path):
    """The published names, which the 6B's weight index lists."""
    index = json.loads((shared / "golden/hub_metadata/chatglm2-6b/pytorch_model.bin.index.json").read_text())
    published = {
        name for name in index["weight_map"] if ".layers." not in name or ".layers.0." in name or ".layers.1." in name
    }
    assert set(model.state_dict()) == published - {"transformer.rotary_pos_emb.inv_freq"}
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == published


def test_bin_shards(model, write_checkpoint, tmp_path):
    folder = write_checkpoint(tmp_path / "bin", SMALL)
    state_dict = {**model.state_dict(), "transformer.rotary_pos_emb.inv_freq": torch.zeros(2).half()}
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(sorted(state_dict))}
    for file in set(files.values()):
        torch.save({name: state_dict[name] for name in files if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    same(load(folder), model)


def test_mended_snapshot(model, shared, tmp_path):
    """The README's recipe: a published folder, into which the code is copied; its own config.json stays."""
    published = shared / "golden/hub_metadata/chatglm2-6b"
    config = json.loads((published / "config.json").read_text())
    assert "model_type" not in config
    (tmp_path / "config.json").write_text(json.dumps({**config, **SMALL, "torch_dtype": "float32"}))
    shutil.copy(published / "tokenizer_config.json", tmp_path)
    shutil.copy(shared / "tokenizer/tokenizer.model", tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for path in [*ROOT.glob("*_chatglm.py"), *ROOT.glob("quantization*.py"), ROOT / "chat_template.jinja"]:
        shutil.copy(path, tmp_path)
    same(load(tmp_path), model)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert tokenizer("你好")["input_ids"] == [64790, 64792, 36474, 54591]
    assert tokenizer.chat_template == (ROOT / "chat_template.jinja").read_text()


def test_quantize_puts_the_model_on_a_device(small_model):
    assert small_model().quantize(8).device.type == "cpu"
    assert small_model().quantize(8, device="meta").device.type == "meta"


def test_save_and_load(checkpoint, tmp_path):
    """The same bytes, the code beside them, and a config.json for everybody."""
    loaded = load(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    loaded.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    first = load_file(tmp_path / "model.safetensors")
    again = load(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert first.pop("transformer.rotary_pos_emb.inv_freq").shape == (2,)
    assert {name: t.dtype for name, t in first.items()} == {name: t.dtype for name, t in loaded.state_dict().items()}
    files = {path.name for path in tmp_path.iterdir()}
    assert files >= {
        "configuration_chatglm.py",
        "modeling_chatglm.py",
        "tokenization_chatglm.py",
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.model",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["ChatGLMModel"]
    published = json.loads((ROOT / "config.json").read_text())
    assert config["auto_map"] == published["auto_map"]


def test_folder_of_a_model_alone(checkpoint, tmp_path):
    """The library's message does not say that the tokenizer is missing: docs/migration.md does."""
    load(checkpoint).save_pretrained(tmp_path)
    page = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
    for part in re.search(r"`(Couldn't instantiate .*? installed)`", page)[1].split(" ... "):
        with pytest.raises(ValueError, match=part):
            AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)("你好")["input_ids"]


def test_push_to_hub_carries_everything(checkpoint, tmp_path, monkeypatch):
    """Up to the request: what would be uploaded is what a user needs."""
    uploaded = set()

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        uploaded.update(os.listdir(working_dir))

    loaded = load(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    for item in (loaded, tokenizer):
        cls = type(item)
        monkeypatch.setattr(cls, "_upload_modified_files", upload, raising=True)

    def create_repo(*args, **kwargs):
        return SimpleNamespace(repo_id="user/model")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    for module in (modeling_utils, tokenization_utils_base):  # as older releases call it
        monkeypatch.setattr(module, "create_repo", create_repo, raising=False)
    for item in (loaded, tokenizer):
        item.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="user/model")
    assert uploaded >= {
        "modeling_chatglm.py",
        "model.safetensors",
        "config.json",
        "tokenizer.model",
        "tokenization_chatglm.py",
    }


def test_sequence_classification_checkpoint(checkpoint, tmp_path):
    loaded = load(checkpoint, AutoModelForSequenceClassification, num_labels=3)
    assert loaded.classifier_head.weight.shape == (3, 32)
    loaded.save_pretrained(tmp_path)
    again = load(tmp_path, AutoModelForSequenceClassification)
    same(again, loaded)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ChatGLMForSequenceClassification"]


# The first-party README's idioms


def test_published_idioms(checkpoint, model):
    same(load(checkpoint, device="cpu"), model)
    same(load(checkpoint, empty_init=False), model)
    same(load(checkpoint, device_map="cpu"), model)
    half = load(checkpoint).half()
    assert half.dtype == torch.float16 and half.transformer.rotary_pos_emb.inv_freq.max() == 1
    assert load(checkpoint).float()(IDS).logits.dtype == torch.float32
    assert load(checkpoint).bfloat16().dtype == torch.bfloat16
    same(load(checkpoint, attn_implementation="eager"), model)
    same(load(checkpoint, low_cpu_mem_usage=True, torch_dtype=torch.float32), model)
    if torch.cuda.is_available():
        assert load(checkpoint).half().cuda()(IDS.cuda()).logits.is_cuda
    if torch.backends.mps.is_available():
        assert load(checkpoint).to("mps")(IDS.to("mps")).logits.device.type == "mps"


def test_default_dtype_is_the_checkpoints(model, write_checkpoint, tmp_path):
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    assert load(write_checkpoint(tmp_path / "half", {**SMALL, "torch_dtype": "float16"}, half)).dtype == torch.float16


def test_constructor_arguments(chatglm):
    config = chatglm.ChatGLMConfig(**SMALL)
    model = chatglm.ChatGLMForConditionalGeneration(config, empty_init=False, device="cpu")
    assert model.device.type == "cpu" and model.max_sequence_length == 64


def test_prefix_tuning_as_published(checkpoint, model, tmp_path):
    """As the published scripts: a fresh prefix on a base checkpoint, trained, its weights saved alone and loaded back."""
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True, pre_seq_len=6)
    tuned = AutoModel.from_pretrained(checkpoint, config=config, trust_remote_code=True).eval()
    assert [n for n, p in tuned.named_parameters() if p.requires_grad] == [
        "transformer.prefix_encoder.embedding.weight"
    ]
    torch.nn.init.normal_(tuned.transformer.prefix_encoder.embedding.weight)
    prefix = {n: p for n, p in tuned.state_dict().items() if n.startswith("transformer.prefix_encoder.")}
    torch.save(prefix, tmp_path / "pytorch_model.bin")

    other = AutoModel.from_pretrained(checkpoint, config=config, trust_remote_code=True).eval()
    loaded = torch.load(tmp_path / "pytorch_model.bin")
    other.transformer.prefix_encoder.load_state_dict(
        {n.removeprefix("transformer.prefix_encoder."): t for n, t in loaded.items()}
    )
    same(other, tuned)
    assert not torch.allclose(tuned(IDS).logits, model(IDS).logits)


def test_explicit_device_map(checkpoint, model):
    names = ["embedding.word_embeddings", "rotary_pos_emb", "encoder.final_layernorm", "output_layer"]
    names += [f"encoder.layers.{i}" for i in range(2)]
    same(load(checkpoint, device_map={f"transformer.{name}": "cpu" for name in names}), model)


def test_disk_offload(checkpoint, model, tmp_path):
    device_map = {
        "transformer.embedding": "cpu",
        "transformer.rotary_pos_emb": "cpu",
        "transformer.output_layer": "cpu",
    }
    device_map |= {"transformer.encoder.layers.0": "disk", "transformer.encoder.layers.1": "cpu"}
    device_map |= {"transformer.encoder.final_layernorm": "cpu"}
    same(load(checkpoint, device_map=device_map, offload_folder=str(tmp_path)), model)


@pytest.mark.parametrize("to", ["disk", "cpu"])
def test_chat_with_offloaded_weights(tmp_path, to):
    """The model is then on the meta device, and its inputs are not."""
    accelerate = pytest.importorskip("accelerate")
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    plain = load(TINY, dtype=torch.float32)
    if to == "disk":
        # The norm is small. Transformers 5.9 runs no model that is on disk as a whole.
        device_map = {"transformer.encoder.final_layernorm": "cpu", "transformer.rotary_pos_emb": "cpu"}
        disk = ["embedding", "output_layer", *(f"encoder.layers.{i}" for i in range(8))]
        device_map |= {f"transformer.{name}": "disk" for name in disk}
        offloaded = load(TINY, dtype=torch.float32, device_map=device_map, offload_folder=str(tmp_path))
    else:
        offloaded = accelerate.cpu_offload(load(TINY, dtype=torch.float32), torch.device("cpu"))
    assert offloaded.device.type == "meta"

    def answers(model) -> list:
        options = dict(do_sample=False, max_new_tokens=4)
        first, history, cache = model.chat(tokenizer, "你好", return_past_key_values=True, **options)
        *_, (second, _) = model.stream_chat(tokenizer, "hi", history, past_key_values=cache, **options)
        return [first, second, *model.chat(tokenizer, ["你好", "hi"], **options)[0]]

    assert answers(offloaded) == answers(plain)


def test_pipeline(checkpoint):
    generator = pipeline(
        "text-generation", model=load(checkpoint), tokenizer=AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    )
    generator.model.resize_token_embeddings(8064)
    assert generator("你好", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("你好")
    chat = generator([{"role": "user", "content": "hi"}], max_new_tokens=3, do_sample=False)
    assert chat[0]["generated_text"][-1]["role"] == "assistant"


def test_no_circular_or_hidden_dependencies(checkpoint):
    """A fresh process loads the folder with nothing of the repository on its path."""
    code = (
        "import sys; from transformers import AutoModel, AutoTokenizer\n"
        "m = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(m).__name__, t('hi')['input_ids'])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)],
        capture_output=True,
        text=True,
        cwd=checkpoint.parent,
        timeout=120,
    )
    assert output.stdout.startswith("ChatGLMForConditionalGeneration"), output.stderr


# Bad input


def test_missing_tensor(model, write_checkpoint, tmp_path, logs):
    state_dict = model.state_dict()
    del state_dict["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"]
    load(write_checkpoint(tmp_path / "missing", SMALL, state_dict))
    assert "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight" in logs.text and "MISSING" in logs.text


def test_unknown_tensor(model, write_checkpoint, tmp_path, logs):
    load(write_checkpoint(tmp_path / "extra", SMALL, {**model.state_dict(), "transformer.extra.weight": torch.ones(2)}))
    assert "transformer.extra.weight" in logs.text and "UNEXPECTED" in logs.text


def test_tensor_of_another_shape(model, write_checkpoint, tmp_path):
    state_dict = {**model.state_dict(), "transformer.output_layer.weight": torch.ones(5, 32)}
    with pytest.raises(RuntimeError, match="transformer.output_layer.weight|mismatch"):
        load(write_checkpoint(tmp_path / "shape", SMALL, state_dict))


def test_truncated_weights(checkpoint, write_checkpoint, model, tmp_path):
    folder = write_checkpoint(tmp_path / "cut", SMALL, model.state_dict())
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match="(?i)incomplete|truncat|safetensors|corrupt|invalid"):
        load(folder)


def test_chatglm_6b_is_refused(write_checkpoint, tmp_path):
    """The first generation: other positions, masks and residuals under the same model_type."""
    config = {**SMALL, "position_encoding_2d": True, "inner_hidden_size": 48, "max_sequence_length": 2048}
    with pytest.raises(ValueError, match="another architecture"):
        load(write_checkpoint(tmp_path / "chatglm-6b", config))


def test_weights_of_another_model(write_checkpoint, tmp_path, logs):
    folder = write_checkpoint(tmp_path / "other", SMALL)
    save_file({"model.layers.0.mlp.weight": torch.ones(2, 2)}, folder / "model.safetensors", {"format": "pt"})
    load(folder)
    assert "MISSING" in logs.text and "UNEXPECTED" in logs.text


def test_published_weights_load_by_load_state_dict(chatglm, model, tmp_path):
    """`inv_freq` is in published checkpoints. It is ignored, and written again, by every model."""
    published = {**model.state_dict(), "transformer.rotary_pos_emb.inv_freq": torch.zeros(2).half()}
    fresh = chatglm.ChatGLMForConditionalGeneration(model.config)
    assert str(fresh.load_state_dict(published)) == "<All keys matched successfully>"
    same(fresh, model)
    assert "transformer.rotary_pos_emb.inv_freq" in published  # the caller's dict is left alone
    network = {name.removeprefix("transformer."): tensor for name, tensor in published.items()}
    assert str(chatglm.ChatGLMModel(model.config).load_state_dict(network)) == "<All keys matched successfully>"
    for saved, name in ((model, "transformer.rotary_pos_emb.inv_freq"), (model.transformer, "rotary_pos_emb.inv_freq")):
        saved.save_pretrained(tmp_path)
        inv_freq = load_file(tmp_path / "model.safetensors")[name]
        assert torch.equal(inv_freq, saved.base_model.rotary_pos_emb.inv_freq)


@pytest.mark.parametrize("head", ["Sequence", "Token"])
def test_classifier_head_has_two_names(chatglm, small_model, tmp_path, head):
    """`score` in the model, where other libraries look for it; `classifier_head` in files, as published."""
    model_class = getattr(chatglm, f"ChatGLMFor{head}Classification")
    model = small_model(3, model_class=model_class, num_labels=3)
    assert list(dict(model.named_children())) == ["transformer", "dropout", "score"]
    assert model.classifier_head is model.score
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name for name in saved if "transformer" not in name} == {"classifier_head.weight", "classifier_head.bias"}
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    same(loaded, model)
    fresh = small_model(4, model_class=model_class, num_labels=3)
    fresh.load_state_dict(saved)
    same(fresh, model)


def test_peft_trains_and_saves_the_classifier_head(chatglm, small_model, tmp_path):
    peft = pytest.importorskip("peft")
    base = small_model(3, model_class=chatglm.ChatGLMForSequenceClassification, num_labels=3)
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS"))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name]
    assert [name.rsplit(".", 1)[-1] for name in trainable] == ["bias", "weight"] and all(
        "score" in n for n in trainable
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trainable:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    again = chatglm.ChatGLMForSequenceClassification.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        close = torch.allclose(again.eval()(ids).logits, model.eval()(ids).logits, atol=1e-5)
        assert close and not torch.allclose(model(ids).logits, base.base_model(ids).last_hidden_state.sum() * 0)


def test_language_model_as_an_encoder(model):
    """sentence-transformers reads `last_hidden_state`; generation and training do not hold it in memory."""
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        output, network = model(ids), model.transformer(ids)
    assert torch.equal(output.last_hidden_state, network.last_hidden_state)
    assert output[0] is output.logits
    assert model(ids, logits_to_keep=1).last_hidden_state is None
    assert model(ids, return_last_logit=True).last_hidden_state is None
    assert model(ids, labels=ids).last_hidden_state is None
    assert "last_hidden_state" in model.config.keys_to_ignore_at_inference  # Trainer would gather it
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    tiny = load(TINY)
    features = pipeline("feature-extraction", model=tiny.transformer, tokenizer=tokenizer)
    assert len(features("你好")[0][0]) == tiny.config.hidden_size


def test_entry_file_imports_every_module(checkpoint):
    """Until 5.16, of a local folder the library copies only the files that the entry file imports."""
    from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

    entry = checkpoint / "modeling_chatglm.py"
    needed = {path.rsplit("/", 1)[-1].removesuffix(".py") for path in map(str, get_relative_import_files(entry))}
    assert needed == set(get_relative_imports(entry))
