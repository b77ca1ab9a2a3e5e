"""Conversions: what comes out computes the same, is complete or absent, and needs little memory."""

import importlib.util
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM

from conftest import ROOT, SMALL, STORED, TINY
from conversion import checkpoint, from_glm, merge_lora, quantize, to_glm, to_safetensors


IDS = torch.tensor([[5, 6, 7, 8, 90, 3]])
CHATS = [
    [("user", "你好，sophisticated sop x\t é😀")],
    [("user", "Hi"), ("assistant", "Hello there"), ("user", "Tell me a story about a dog.")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")],
]


def load(path, auto_class=AutoModelForCausalLM, **kwargs):
    return auto_class.from_pretrained(path, trust_remote_code=True, **kwargs).eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


INV_FREQ = "transformer.rotary_pos_emb.inv_freq"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What the files hold but `inv_freq`, which nothing reads."""
    found = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    found.pop(INV_FREQ, None)
    return found


def assert_same_bytes(a: dict, b: dict):
    """Of two checkpoints, but for `inv_freq`: save_pretrained writes it, the conversions do not."""
    a, b = ({name: tensor for name, tensor in x.items() if not name.endswith("inv_freq")} for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def test_classifier_keeps_the_published_name_of_its_head(chatglm, small_model, write_checkpoint, tmp_path):
    model = small_model(3, model_class=chatglm.ChatGLMForSequenceClassification, num_labels=3)
    source = write_checkpoint(tmp_path / "source", {**SMALL, "num_labels": 3})
    model.save_pretrained(source)
    to_safetensors.convert(source, tmp_path / "out")
    assert_same_bytes(weights(tmp_path / "out"), weights(source))
    assert "classifier_head.weight" in weights(tmp_path / "out")


def write_bin(folder: Path, state_dict: dict, shards: int = 2):
    """As published: `.bin` shards, an index, and float16 `inv_freq`."""
    state_dict = {**state_dict, INV_FREQ: torch.zeros(2).half()}
    names = sorted(state_dict)
    files = {
        name: f"pytorch_model-{1 + i * shards // len(names):05d}-of-{shards:05d}.bin" for i, name in enumerate(names)
    }
    for file in set(files.values()):
        torch.save({name: state_dict[name].clone() for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.fixture(scope="module")
def tiny():
    return load(TINY).float()


@pytest.fixture(scope="module")
def tiny_glm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glm") / "tiny"
    to_glm.convert(TINY, folder)
    return folder


# GlmForCausalLM


def test_glm_says_the_same(tiny, tiny_tokenizer, tiny_glm):
    """Without remote code: the same ids for chats, the same greedy answers."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_glm)
    model = AutoModelForCausalLM.from_pretrained(tiny_glm).float().eval()
    assert type(model) is GlmForCausalLM and not list(tiny_glm.glob("*.py"))
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        options = dict(add_generation_prompt=chat[-1][0] == "user", return_tensors="pt")
        inputs = tokenizer.apply_chat_template(messages, **options)
        expected = tiny_tokenizer.apply_chat_template(messages, **options)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        options = dict(do_sample=False, max_new_tokens=30)
        assert torch.equal(model.generate(**inputs, **options), tiny.generate(**expected, **options))
    text = "The sop of 中文, eop of people <n>\n\n12345"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (2, 0, "left")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)


def test_glm_batch(tiny, tiny_tokenizer, tiny_glm):
    tokenizer = AutoTokenizer.from_pretrained(tiny_glm)
    model = AutoModelForCausalLM.from_pretrained(tiny_glm).float().eval()
    texts, options = ["你好", "Tell me a short story, please."], dict(do_sample=False, max_new_tokens=10)
    inputs, expected = (t(texts, padding=True, return_tensors="pt") for t in (tokenizer, tiny_tokenizer))
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(model.generate(**inputs, **options), tiny.generate(**expected, **options))


def test_glm_and_back(tiny_glm, tmp_path):
    from_glm.convert(tiny_glm, tmp_path / "back")
    assert_same_bytes(weights(tmp_path / "back"), weights(TINY))
    tokenizer, original = (AutoTokenizer.from_pretrained(p, trust_remote_code=True) for p in (tmp_path / "back", TINY))
    assert tokenizer.build_prompt("你好") == original.build_prompt("你好") and tokenizer("你好") == original("你好")
    config, original = (AutoConfig.from_pretrained(p, trust_remote_code=True) for p in (tmp_path / "back", TINY))
    differing = {k for k, v in original.to_dict().items() if config.to_dict().get(k) != v}
    assert differing <= {"transformers_version", "_name_or_path"}


VARIANTS = {
    "plain": {},
    "all heads": {"multi_query_attention": False},
    "as many groups as heads": {"multi_query_group_num": 4},
    "no bias": {"add_qkv_bias": False},
    "rope_ratio": {"rope_ratio": 4},
    "another base": {"rope_parameters": {"rope_type": "default", "rope_theta": 40000.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
    "wide heads": {"kv_channels": 16},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_glm_variants(small_model, write_checkpoint, tmp_path, name, dtype):
    model = small_model(3, **VARIANTS[name]).to(dtype)
    config = {**SMALL, **VARIANTS[name], "torch_dtype": str(dtype).removeprefix("torch.")}
    source = write_checkpoint(tmp_path / "source", config)
    write_bin(source, model.state_dict())
    to_glm.convert(source, tmp_path / "glm")
    glm = load(tmp_path / "glm")
    assert type(glm) is GlmForCausalLM and glm.dtype == dtype
    ids = torch.arange(40)[None] + 5
    torch.testing.assert_close(logits(glm.float(), ids), logits(model.float(), ids), atol=1e-5, rtol=1e-5)
    from_glm.convert(tmp_path / "glm", tmp_path / "back")
    assert_same_bytes(weights(tmp_path / "back"), model.to(dtype).state_dict())
    torch.testing.assert_close(logits(load(tmp_path / "back").float(), ids), logits(model.float(), ids), atol=0, rtol=0)


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8, "group_size": 32, "quantize_embeddings": True}])
def test_glm_of_a_quantized_checkpoint(small_model, write_checkpoint, tmp_path, options):
    source = write_checkpoint(tmp_path / "source", SMALL, small_model(4, ffn_hidden_size=64).state_dict())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "ffn_hidden_size": 64}))
    quantize.convert(source, tmp_path / "quantized", **options)
    to_glm.convert(tmp_path / "quantized", tmp_path / "glm")
    expected = load(tmp_path / "quantized").dequantize()
    torch.testing.assert_close(logits(load(tmp_path / "glm")), logits(expected), atol=1e-5, rtol=1e-5)


def test_glm_checkpoint_in_shards(tiny_glm, tmp_path):
    """Query, key and value of a layer in different files, as another program may have written them."""
    load(tiny_glm).save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    shutil.copy(tiny_glm / "tokenizer.model", tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    from_glm.convert(tmp_path / "shards", tmp_path / "back")
    assert_same_bytes(weights(tmp_path / "back"), load_file(TINY / "model.safetensors"))


@pytest.mark.parametrize(
    "variant",
    [
        {"rmsnorm": False}, {"post_layer_norm": False}, {"add_bias_linear": True}, {"pre_seq_len": 4},
        {"apply_residual_connection_post_layernorm": True}, {"fp32_residual_connection": True},
    ],
)  # fmt: skip
def test_what_glm_cannot_be(small_model, write_checkpoint, tmp_path, variant):
    source = write_checkpoint(tmp_path / "source", {**SMALL, **variant}, small_model(**variant).state_dict())
    with pytest.raises(ValueError, match=f"GlmForCausalLM has no equivalent for {next(iter(variant))}"):
        to_glm.convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "change, message", [({"hidden_act": "gelu"}, "hidden_act='gelu'"), ({"model_type": "glm4"}, "'glm4', not 'glm'")]
)
def test_what_is_not_from_glm(tiny_glm, tmp_path, change, message):
    folder = Path(shutil.copytree(tiny_glm, tmp_path / "glm"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        from_glm.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_glm_without_tokenizer_model(tiny_glm, tmp_path):
    folder = shutil.copytree(tiny_glm, tmp_path / "glm", ignore=shutil.ignore_patterns("tokenizer.model"))
    with pytest.raises(ValueError, match="tokenizer.model is missing.* Copy it there"):
        from_glm.convert(Path(folder), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["glm"]


# safetensors


def test_safetensors(small_model, write_checkpoint, tmp_path):
    model = small_model(5)
    source = write_checkpoint(tmp_path / "source", SMALL)
    write_bin(source, model.state_dict(), shards=3)
    to_safetensors.convert(source, tmp_path / "out", shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / file).stat().st_size < 22_000 for file in files)
    assert_same_bytes(weights(tmp_path / "out"), model.state_dict())
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values()) + 2 * 4  # inv_freq
    assert all(name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items())
    loaded = load(tmp_path / "out", AutoModel)
    assert torch.equal(logits(loaded), logits(model))
    assert (tmp_path / "out/config.json").stat().st_mode & 0o777 == (tmp_path / "out" / files[0]).stat().st_mode & 0o777


def test_weights_in_files(tmp_path):
    """Tied weights are written twice; a tensor larger than a file has one to itself; files are as large as may be."""
    tied, large = torch.arange(4.0), torch.arange(100.0)
    tensors = [("large", large), ("a", tied + 1), ("b", tied), ("c", tied), ("large2", large)]
    checkpoint.write_weights(tmp_path, tensors, shard_bytes=48)
    files = {path.name: load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))}
    assert [list(held) for held in files.values()] == [["large"], ["a", "b", "c"], ["large2"]]
    assert all(torch.equal(weights(tmp_path)[name], tensor) for name, tensor in tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, held in files.items() for name in held}


def test_files_are_those_of_save_pretrained(tiny_glm, adapter, tmp_path):
    """Also `inv_freq`, which nothing reads but programs that compare checkpoints."""
    saved = {}
    for name, model in (("float", load(TINY)), ("int8", load(TINY).quantize(8))):
        model.save_pretrained(tmp_path / name)
        saved[name] = load_file(tmp_path / name / "model.safetensors")
    to_safetensors.convert(TINY, tmp_path / "a")
    from_glm.convert(tiny_glm, tmp_path / "b")
    quantize.convert(TINY, tmp_path / "c", bits=8)
    merge_lora.convert(adapter[0], tmp_path / "d", TINY)
    for output, name in (("a", "float"), ("b", "float"), ("c", "int8")):
        assert_same_bytes(load_file(tmp_path / output / "model.safetensors"), saved[name])
    merged = load_file(tmp_path / "d/model.safetensors")
    assert merged.keys() == saved["float"].keys() and torch.equal(merged[INV_FREQ], saved["float"][INV_FREQ])


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_classifiers(chatglm, small_model, tmp_path, kind):
    """Their head keeps the published name, whatever it is called in the model."""
    name = f"ChatGLMFor{kind}"
    if not hasattr(chatglm, name):
        pytest.skip(f"There is no {name}.")
    model = small_model(model_class=getattr(chatglm, name), num_labels=3)
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source/tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    for output, convert in (("a", to_safetensors.convert), ("b", lambda *paths: quantize.convert(*paths, bits=8))):
        convert(tmp_path / "source", tmp_path / output)
        assert "classifier_head.weight" in load_file(tmp_path / output / "model.safetensors")
        auto_class = getattr(transformers, f"AutoModelFor{kind}")
        loaded, found = auto_class.from_pretrained(tmp_path / output, trust_remote_code=True, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"]
        assert torch.equal(loaded.score.weight, model.score.weight)
    assert_same_bytes(weights(tmp_path / "a"), weights(tmp_path / "source"))


def test_safetensors_of_the_published_folder(small_model, shared, tmp_path):
    """Its config.json without model_type, and code that does not run any more, which is replaced."""
    published = shared / "golden/hub_metadata/chatglm2-6b"
    config = {**json.loads((published / "config.json").read_text()), **SMALL}
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    (tmp_path / "source/modeling_chatglm.py").write_text("raise ImportError('the published code')")
    shutil.copy(shared / "tokenizer/tokenizer.model", tmp_path / "source")
    model = small_model(5).half()
    torch.save(model.state_dict(), tmp_path / "source/pytorch_model.bin")
    to_safetensors.convert(tmp_path / "source", tmp_path / "out")
    assert_same_bytes(weights(tmp_path / "out"), model.state_dict())
    assert_same_bytes(load(tmp_path / "out").state_dict(), model.state_dict())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="There is no /proc/self/status.")
@pytest.mark.parametrize("command", ["to_safetensors", "quantize"])
def test_memory(write_checkpoint, chatglm, tmp_path, command):
    """Of a model of 380 MB, a fraction is in memory: one shard, and what a tensor takes to convert."""
    sizes = {**SMALL, "hidden_size": 1024, "kv_channels": 256, "ffn_hidden_size": 4096, "num_layers": 12}
    with torch.device("meta"):
        names = chatglm.ChatGLMForConditionalGeneration(chatglm.ChatGLMConfig(**sizes)).state_dict()
    source = write_checkpoint(tmp_path / "source", sizes)
    write_bin(source, {name: torch.ones(tensor.shape, dtype=torch.float16) for name, tensor in names.items()}, shards=4)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.measure import PeakMemory
from conversion import checkpoint, {command}
checkpoint.write_weights.__defaults__ = (50_000_000,)
arguments = dict(bits=4) if {command!r} == "quantize" else {{}}
import torch
torch.ones(1 << 20).half().float() @ torch.ones(1 << 20)  # what torch starts
checkpoint.Checkpoint(Path({str(source)!r}))  # imports the package
with PeakMemory() as memory:
    {command}.convert(Path({str(source)!r}), Path({str(tmp_path / "out")!r}), **arguments)
print(memory.gb)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    size = sum(tensor.numel() * 2 for tensor in names.values())
    assert size > 370e6 and float(run.stdout) * 1e9 < 160e6, run.stdout


# INT4 and INT8


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 8, "quantize_embeddings": True},
        {"bits": 4, "scale_search": True},
        {"bits": 4, "group_size": 32, "modules_to_not_convert": ["layers.0"]},
    ],
)
def test_quantize_is_what_the_model_does(tmp_path, options):
    """The files of `model.quantize(...).save_pretrained(...)`, without the model in memory."""
    arguments = [
        f"--quantization=int{value}"
        if name == "bits"
        else f"--{name.replace('_', '-')}" + (f"={value}" if type(value) is int else "")
        for name, value in options.items()
    ]
    at = arguments.index("--modules-to-not-convert") + 1 if "modules_to_not_convert" in options else None
    if at:
        arguments[at:at] = options["modules_to_not_convert"]
    quantize.main(["--model", str(TINY), "--output", str(tmp_path / "out"), *arguments])
    model = load(TINY, AutoModel).quantize(**options)
    model.save_pretrained(tmp_path / "saved")
    assert_same_bytes(weights(tmp_path / "out"), weights(tmp_path / "saved"))
    loaded = load(tmp_path / "out", AutoModel)
    assert loaded.quantized and torch.equal(logits(loaded), logits(model))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "saved")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_quantize_calibrated(tiny, tiny_tokenizer, tmp_path):
    """Nearer to the model than rounding to the nearest, on text of the kind."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text[:3000], encoding="utf-8")
    arguments = ["--model", str(TINY), "--output", str(tmp_path / "calibrated")]
    quantize.main([*arguments, "--calibration", str(tmp_path / "text.txt")])
    quantize.main(["--model", str(TINY), "--output", str(tmp_path / "plain")])
    ids = tiny_tokenizer(text[3000:4000], return_tensors="pt")["input_ids"]
    expected = logits(tiny, ids)
    errors = [(logits(load(tmp_path / name).float(), ids) - expected).norm() for name in ("calibrated", "plain")]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--calibration", "nowhere.txt"], "no file nowhere.txt"),
        (["--calibration", "empty.txt"], "empty.txt .*is empty"),
        (["--calibration", "latin.txt"], "not UTF-8"),
        (["--group-size", "64", "--model", "small"], "group_size must divide in_features"),
        (["--model", "int4"], "quantized already"),
        (["--quantization", "int3"], "^2$"),  # the usage is printed
    ],
)
def test_quantize_bad_input(small_model, write_checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "small", SMALL, small_model().state_dict())
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    if "int4" in arguments:
        quantize.convert(TINY, Path("int4"), bits=4)
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=message):
        quantize.main(["--model", str(TINY), "--output", "out", *arguments])
    assert set(tmp_path.iterdir()) == before


# LoRA


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["query_key_value", "dense_4h_to_h"], init_lora_weights=False
    )
    model = get_peft_model(load(TINY).float(), config)
    model.save_pretrained(folder)
    return folder, logits(model.eval())


@pytest.mark.parametrize("named", [True, False])
def test_merge_lora(adapter, tiny, tmp_path, named):
    """What the model computes with its adapters, without PEFT; the base is found by the adapters' file."""
    folder, expected = adapter
    arguments = ["--adapter", str(folder), "--output", str(tmp_path / "out")]
    merge_lora.main(arguments + ["--model", str(TINY)] * named)
    merged = load(tmp_path / "out")
    assert set(merged.state_dict()) == set(tiny.state_dict()) and merged.dtype == torch.float16
    difference = (logits(merged.float()) - expected).norm() / (expected - logits(tiny)).norm()
    assert difference < 0.01


def test_merge_lora_into_quantized(adapter, tmp_path):
    folder, _ = adapter
    quantize.convert(TINY, tmp_path / "int8", bits=8)
    merge_lora.convert(folder, tmp_path / "out", tmp_path / "int8")
    merged = load(tmp_path / "out")
    assert not merged.quantized
    base = load(tmp_path / "int8").dequantize().float()
    from peft import PeftModel

    expected = logits(PeftModel.from_pretrained(base, folder).eval())
    torch.testing.assert_close(logits(merged.float()), expected, atol=0.05, rtol=0.05)


def test_merge_lora_bad_input(adapter, small_model, write_checkpoint, tmp_path):
    folder, _ = adapter
    small = write_checkpoint(tmp_path / "small", SMALL, small_model().state_dict())
    prefix = get_peft_model(small_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prefix.save_pretrained(tmp_path / "prefix")

    def changed(name: str, weights: bytes | None = b"", **config) -> Path:
        other = tmp_path / name
        other.mkdir()
        old = json.loads((folder / "adapter_config.json").read_text())
        (other / "adapter_config.json").write_text(json.dumps({**old, **config}))
        if weights is not None:
            (other / "adapter_model.safetensors").write_bytes(weights)
        return other

    for arguments, message in (
        (["--adapter", str(TINY)], "has no adapter_config.json"),
        (["--adapter", str(folder), "--model", str(small)], f"{folder} does not fit"),
        (["--adapter", str(tmp_path / "prefix"), "--model", str(small)], "PREFIX_TUNING.*cannot be merged"),
        (["--adapter", str(folder), "--model", "nowhere"], "There is no folder nowhere"),
        (["--adapter", str(changed("no base", base_model_name_or_path=None))], "does not name its base model"),
        (["--adapter", str(changed("odd", peft_type="FOO"))], "cannot be read by this PEFT"),
        (["--adapter", str(changed("empty", weights=None))], "the adapters themselves are missing"),
        (["--adapter", str(changed("cut", weights=b"{")), "--model", str(TINY)], "does not fit"),
    ):
        with pytest.raises(SystemExit, match=message):
            merge_lora.main(["--output", str(tmp_path / "out"), *arguments])
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# Bad input, for all


def spoiled(write_checkpoint, model, folder: Path, how: str) -> Path:
    state_dict = dict(model.state_dict())
    if how == "a tensor is missing":
        del state_dict["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"]
    elif how == "a tensor is unknown":
        state_dict["lm_head.weight"] = torch.zeros(128, 32)
    elif how == "another shape":
        state_dict["transformer.output_layer.weight"] = torch.zeros(64, 32)
    write_checkpoint(folder, SMALL, state_dict)
    path = folder / "model.safetensors"
    if how == "no weights":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "LFS pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif how == "damaged .bin":
        path.rename(folder / "pytorch_model.bin")
    elif how == "a shard is missing":
        path.unlink()
        write_bin(folder, state_dict)
        (folder / "pytorch_model-00002-of-00002.bin").unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif how == "config is wrong":
        (folder / "config.json").write_text('{"num_layers": 0}')
    elif how == "config is a list":
        (folder / "config.json").write_text("[1]")
    elif how == "quantization is no object":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": "x"}))
    elif how == "bin of something else":
        path.unlink()
        torch.save({"epoch": 3}, folder / "pytorch_model.bin")
    elif how == "index without a map":
        path.unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": 5}')
    elif how == "index of other folders":
        path.unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    elif how in ("number as text", "unknown dtype"):
        config = json.loads((folder / "config.json").read_text())
        change = {"number as text": {"num_layers": "2"}, "unknown dtype": {"torch_dtype": "evil"}}[how]
        (folder / "config.json").write_text(json.dumps({**config, **change}))
    elif how == "damaged tokenizer settings":
        (folder / "tokenizer_config.json").write_text("{")
    elif how == "unknown class":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["FooForSequenceClassification"]}))
    elif how == "another architecture":
        (folder / "config.json").write_text('{"model_type": "llama"}')
    elif how == "quantized by others":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    elif how == "no tokenizer":
        (folder / "tokenizer.model").unlink()
    return folder


SPOILED = {
    "a tensor is missing": "lack transformer.encoder.layers.1.mlp.dense_4h_to_h.weight",
    "a tensor is unknown": "does not know: lm_head.weight",
    "another shape": r"is \[64, 32\]; config.json says \[128, 32\]",
    "no weights": "There are no weights",
    "truncated": "cannot be read.*Download it again",
    "LFS pointer": "git lfs pull",
    "damaged .bin": "pytorch_model.bin .*cannot be read",
    "a shard is missing": "lacks pytorch_model-00002-of-00002.bin",
    "no config": "config.json is missing",
    "config is no JSON": "config.json is not JSON",
    "config is wrong": "config.json: .*num_layers must be between 1 and 1000, got 0",
    "config is a list": "must hold a JSON object, got list",
    "quantization is no object": "config.json: quantization_config must be an object, got 'x'",
    "bin of something else": "pytorch_model.bin has no named tensors",
    "index without a map": "index.json: weight_map must be an object .*, got 5",
    "index of other folders": "index.json: weight_map must be an object .*'../model.safetensors'",
    "number as text": "config.json: .*num_layers.*expected int, got str",
    "unknown dtype": "config.json: torch_dtype must name a type of torch, such as 'float16', got 'evil'",
    "damaged tokenizer settings": "tokenizer_config.json is not JSON",
    "unknown class": "'FooForSequenceClassification', which this package does not support",
    "another architecture": "config.json: model_type is 'llama', and ChatGLM2's is 'chatglm'",
    "quantized by others": "quantized by 'gptq'",
    "no tokenizer": "tokenizer.model is missing",
}


@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_checkpoints(small_model, write_checkpoint, tmp_path, how):
    folder = spoiled(write_checkpoint, small_model(), tmp_path / "source", how)
    for command in (to_safetensors, to_glm, quantize):
        with pytest.raises(SystemExit, match=f"{SPOILED[how]}|tokenizer.model not found") as error:
            command.main(["--model", str(folder), "--output", str(tmp_path / "out")])
        assert len(str(error.value).splitlines()) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_output_that_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SystemExit, match="exists already. Give another --output"):
            to_safetensors.main(["--output", str(output)])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    to_safetensors.main(["--output", str(tmp_path / "empty")])
    assert (tmp_path / "empty/model.safetensors").exists()


def test_output_that_is_a_link(tmp_path):
    """To an empty folder, or to one that is to be made: what it leads to is written, and the link stays."""
    for name in ("empty", "none"):
        (tmp_path / name).symlink_to(tmp_path / f"{name} target")
    (tmp_path / "empty target").mkdir()
    for name in ("empty", "none"):
        to_safetensors.main(["--output", str(tmp_path / name)])
        assert (tmp_path / name).is_symlink()
        files = {path.name for path in (tmp_path / f"{name} target").iterdir()}
        assert {"model.safetensors", "config.json", "quantization.py"} <= files and not any(f[0] == "." for f in files)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SystemExit, match="loop"):
        to_safetensors.main(["--output", str(tmp_path / "loop")])


def test_error_leaves_nothing(tmp_path, monkeypatch):
    """Neither under the name nor beside it."""
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        monkeypatch.setattr(checkpoint, "save_file", raising(error))
        with pytest.raises(SystemExit) as exit:
            to_safetensors.main(["--output", str(tmp_path / "out")])
        assert exit.value.code == 130 or "No space left" in exit.value.code
        assert not any(tmp_path.iterdir())


def raising(error):
    def fail(*args):
        raise error

    return fail


@pytest.mark.parametrize("command", ["to_safetensors", "to_glm", "to_gguf"])
def test_full_disk_is_one_line(tmp_path, command):
    """A file system that takes no file of more than 1 MB, which is how a full one ends the writing of large files."""
    if command == "to_gguf":
        pytest.importorskip("gguf", reason="conversion.to_gguf needs gguf")
    arguments = ["--output", str(tmp_path / "out")]
    code = f"""
import resource, sys
from conversion import {command}
sys.modules["__main__"].__spec__ = {command}.__spec__
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
{command}.main({arguments!r})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    said = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert said.startswith(f"conversion.{command}: {tmp_path / 'out'} could not be written")
    assert "If the disk is full" in said
    assert not any(tmp_path.iterdir())


def interrupted(output: Path, number: int) -> subprocess.Popen:
    """A conversion that has got a signal while it was writing."""
    code = f"""
import sys, time
from pathlib import Path
from conversion import checkpoint, to_safetensors
write = checkpoint.save_file
def slow(*args):
    write(*args)
    print("writing", flush=True)
    time.sleep(60)
checkpoint.save_file = slow
to_safetensors.main(["--output", {str(output)!r}])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_signal_leaves_nothing(tmp_path, name):
    process = interrupted(tmp_path / "out", getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name) and "Traceback" not in errors
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("empty_folder", [False, True])
def test_next_run_removes_what_a_killed_one_left(tmp_path, capsys, empty_folder):
    output = tmp_path / "out"
    if empty_folder:
        output.mkdir()
    process = interrupted(output, signal.SIGKILL)
    process.communicate(timeout=60)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) > 10_000_000
    to_safetensors.main(["--output", str(output)])
    assert re.search(r"Removed [\d,]{10} bytes in .*, left by an interrupted run", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any(path.name.startswith(".") for path in output.iterdir())
    assert_same_bytes(weights(output), weights(STORED))


def test_two_runs_to_one_output(tmp_path):
    """The second is refused, and takes nothing from the first; other outputs beside it are free."""
    process = interrupted(tmp_path / "out", 0)
    with pytest.raises(SystemExit, match="Another process is writing to .*out"):
        to_safetensors.main(["--output", str(tmp_path / "out")])
    to_safetensors.main(["--output", str(tmp_path / "other")])
    assert (tmp_path / ".out.unfinished/files/0.safetensors").exists()
    process.terminate()
    process.communicate(timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_modes_are_those_of_the_user(tmp_path):
    """By the process's umask, which is not changed meanwhile: other threads would make files that all may write."""
    code = f"""
import os
os.umask(0o027)
umask = os.umask
os.umask = None
from conversion import to_safetensors
to_safetensors.main(["--output", {str(tmp_path / "out")!r}])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    modes = {path.name: path.stat().st_mode & 0o777 for path in [tmp_path / "out", *(tmp_path / "out").iterdir()]}
    assert modes["out"] == 0o750 and modes["model.safetensors"] == modes["config.json"] == 0o640


def test_old_bin_format(small_model, write_checkpoint, tmp_path):
    """Of torch before 1.6, which cannot be mapped into memory; the library reads it, too."""
    model = small_model(5)
    source = write_checkpoint(tmp_path / "source", SMALL)
    torch.save(model.state_dict(), source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    to_safetensors.convert(source, tmp_path / "out")
    assert_same_bytes(weights(tmp_path / "out"), model.state_dict())
    assert_same_bytes(load(source).state_dict(), model.state_dict())


# The page


def test_commands_of_the_page(tmp_path, monkeypatch, adapter):
    """Every command in docs/convert.md, in the order of the page, with files where it says that there are some."""
    pytest.importorskip("gguf", reason="conversion.to_gguf needs gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    shutil.copytree(adapter[0], tmp_path / "output")
    shutil.copy(ROOT / "README.md", tmp_path / "dialogues.txt")
    monkeypatch.setattr(quantize, "ROWS", 1)
    page = (ROOT / "docs/convert.md").read_text(encoding="utf-8")
    page = page.replace("path/to/chatglm2-6b", str(TINY))
    blocks = re.findall(r"```shell\n(.*?)```", page, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    lines.remove(["source", ".venv/bin/activate"])
    commands = [line[2:] for line in lines if line[:2] == ["python", "-m"]]
    # What the Makefile runs, with the interpreter of the tests
    makes = [dict(word.split("=", 1) for word in line[2:]) for line in lines if line[:2] == ["make", "hub-repo"]]
    commands += [["conversion.hub", "--model", m["MODEL"], "--output", m["OUTPUT"]] for m in makes]
    assert len(lines) == len(commands) + 1  # pip install
    modules = [path for path in (ROOT / "conversion").glob("*.py") if "def main(" in path.read_text(encoding="utf-8")]
    of_the_readme = {"conversion.download", "conversion.upgrade"}  # in test_download.py and test_upgrade.py
    assert {name for name, *_ in commands} == {f"conversion.{path.stem}" for path in modules} - of_the_readme
    for name, *arguments in commands:
        if name == "conversion.to_onnx" and importlib.util.find_spec("onnxscript") is None:
            continue  # runs in make test-conversion
        importlib.import_module(name).main(arguments)
        assert Path(arguments[arguments.index("--output") + 1]).exists()
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    exec(example, {})
