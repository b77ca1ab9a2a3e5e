"""GGUF files: what is in them, and that llama.cpp computes with them what the model does (`make test-conversion`)."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

from conftest import SMALL, TINY


gguf = pytest.importorskip("gguf", reason="conversion.to_gguf needs gguf")

from benchmarks.random_checkpoint import write_gguf  # noqa: E402
from conversion import quantize, to_gguf  # noqa: E402


PROMPTS = ["你好", "Tell me a story about a dog.", "“床前明月光”的下一句是什么？"]
TEXTS = [
    "[gMASK]sop[Round 1]\n\n问：你好，sophisticated sop eop x\t é😀 \n\n答：",
    "[gMASK]sop[Round 1]\n\n问： Hi\n\n答：Hello\n\n[Round 2]\n\n问：  12345 ▁ ok\n\n答：",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    for kind in to_gguf.TYPES:
        to_gguf.convert(TINY, folder / f"{kind}.gguf", kind)
    return folder


@pytest.fixture(scope="module")
def tiny():
    return AutoModel.from_pretrained(TINY, trust_remote_code=True).float().eval()


def read(path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Returns the fields of a file, and its tensors as float32, under their names in it."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
    return fields, {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}


def to_ours(tensors: dict, state_dict: dict, layers: int) -> dict:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.CHATGLM, layers)
    of = {name: names.get_name(name.removeprefix("transformer."), (".weight", ".bias")) for name in state_dict}
    assert sorted(of.values()) == sorted(tensors)
    return {name: tensors[of[name]] for name in state_dict}


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


def test_fields(files, tiny_tokenizer):
    fields, _ = read(files / "q4_0.gguf")
    assert fields["general.architecture"] == "chatglm" and fields["general.file_type"] == 2
    sizes = {
        "context_length": 2048, "embedding_length": 384, "feed_forward_length": 1152, "block_count": 8,
        "attention.head_count": 12, "attention.head_count_kv": 2, "rope.dimension_count": 16, "rope.freq_base": 10000,
    }  # fmt: skip
    assert {name: fields[f"chatglm.{name}"] for name in sizes} == sizes
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    size = tiny_tokenizer.vocab_size
    assert len(tokens) == len(kinds) == len(fields["tokenizer.ggml.scores"]) == 8064
    assert tokens[size - 5 : size] == ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
    assert set(kinds[size - 5 : size]) == {gguf.TokenType.CONTROL} and set(kinds[size:]) == {gguf.TokenType.UNUSED}
    assert len(set(tokens)) == len(tokens)
    assert tokens[3] == "<0x00>" and kinds[:4] == [2, 3, 3, 6]
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.padding_token_id"]) == (2, 0)
    assert not fields["tokenizer.ggml.add_bos_token"] and fields["tokenizer.ggml.add_space_prefix"]
    assert "generation" not in fields["tokenizer.chat_template"].replace("add_generation_prompt", "")


@pytest.mark.parametrize("kind, bound", [("f16", 0), ("q8_0", 0.01), ("q4_0", 0.12)])
def test_weights(files, tiny, kind, bound):
    """The numbers of the checkpoint, within what the type keeps."""
    _, tensors = read(files / f"{kind}.gguf")
    state_dict = tiny.state_dict()
    for name, tensor in to_ours(tensors, state_dict, 8).items():
        assert relative(tensor, state_dict[name]) <= (bound if tensor.ndim == 2 else 0), name


@pytest.mark.parametrize(
    "variant", [{"multi_query_attention": False}, {"rope_ratio": 4}, {"tie_word_embeddings": True}]
)
def test_variants(small_model, write_checkpoint, tmp_path, variant):
    variant = {**variant, "padded_vocab_size": 8064}
    state_dict = small_model(3, **variant).half().state_dict()
    if variant.get("tie_word_embeddings"):
        del state_dict["transformer.output_layer.weight"]
    source = write_checkpoint(tmp_path / "source", {**SMALL, **variant}, state_dict)
    to_gguf.convert(source, tmp_path / "out.gguf")
    fields, tensors = read(tmp_path / "out.gguf")
    groups = 2 if variant.get("multi_query_attention", True) else 4
    assert fields["chatglm.attention.head_count_kv"] == groups
    if "rope_ratio" in variant:
        assert (fields["chatglm.rope.scaling.type"], fields["chatglm.rope.scaling.factor"]) == ("linear", 4)
    assert ("output.weight" in tensors) == ("tie_word_embeddings" not in variant)
    qkv = state_dict["transformer.encoder.layers.1.self_attention.query_key_value.weight"].float()
    if groups == 4:  # llama.cpp has all queries first, then all keys, then all values
        qkv = qkv.view(4, 3, 8, 32).transpose(0, 1).flatten(0, 2)
    assert torch.equal(tensors["blk.1.attn_qkv.weight"], qkv)


def test_quantized_checkpoint(tmp_path):
    quantize.convert(TINY, tmp_path / "int4", bits=4)
    to_gguf.convert(tmp_path / "int4", tmp_path / "out.gguf")
    model = AutoModel.from_pretrained(tmp_path / "int4", trust_remote_code=True).dequantize()
    _, tensors = read(tmp_path / "out.gguf")
    for name, tensor in to_ours(tensors, model.state_dict(), 8).items():
        assert torch.equal(tensor, model.state_dict()[name].float()), name


@pytest.mark.parametrize(
    "variant, message",
    [
        ({"rmsnorm": False}, "llama.cpp has no equivalent for rmsnorm=False"),
        ({"kv_channels": 16}, "not of kv_channels=16"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' cannot be converted"),
    ],
)
def test_what_llama_cpp_does_not_compute(small_model, write_checkpoint, tmp_path, variant, message):
    variant = {**variant, "padded_vocab_size": 8064}
    source = write_checkpoint(tmp_path / "source", {**SMALL, **variant}, small_model(**variant).state_dict())
    with pytest.raises(SystemExit, match=message):
        to_gguf.main(["--model", str(source), "--output", str(tmp_path / "out.gguf")])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_bad_input(small_model, write_checkpoint, tmp_path):
    (tmp_path / "there.gguf").write_text("mine")
    huge = small_model(padded_vocab_size=8064).state_dict()
    huge["transformer.output_layer.weight"] = huge["transformer.output_layer.weight"] + 1e6
    source = write_checkpoint(tmp_path / "huge", {**SMALL, "padded_vocab_size": 8064}, huge)
    few = write_checkpoint(tmp_path / "few", SMALL, small_model().state_dict())
    for arguments, message in (
        (["--output", "there.gguf"], "there.gguf exists already"),
        (["--model", str(source), "--output", "out.gguf"], "output_layer.weight has values that are not finite"),
        (["--model", str(few), "--output", "out.gguf"], "8,005 tokens, the embedding 128 rows"),
        (["--model", "nowhere", "--output", "out.gguf"], "There is no folder nowhere"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            with pytest.raises(SystemExit, match=message):
                to_gguf.main(arguments)
    assert (tmp_path / "there.gguf").read_text() == "mine"
    assert not (tmp_path / "out.gguf").exists() and not list(tmp_path.glob(".*"))


# On llama.cpp


@pytest.fixture(scope="module")
def load_llama():
    """Loads a file into llama.cpp: `load_llama(path)`."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-conversion")
    default = llama_cpp.llama_model_default_params

    def plain_kernels():
        # Those that repack weights (AMX among them) end the process with a segmentation fault on some virtual machines.
        params = default()
        params.use_extra_bufts = False
        return params

    loaded = {}

    def load(path):
        if path not in loaded:
            options = dict(n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
            loaded[path] = llama_cpp.Llama(str(path), **options)
        return loaded[path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", plain_kernels)
        yield load
    for model in loaded.values():
        model.close()


@pytest.fixture
def llama(load_llama, files):
    """The tiny model: `llama("f16")`."""
    return lambda kind: load_llama(files / f"{kind}.gguf")


@torch.no_grad()
def forced(llama_model, model, ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns llama.cpp's and the model's logits, `[seq, vocab]`, for the same ids."""
    llama_model.reset()
    llama_model.eval(ids[0].tolist())
    return torch.tensor(llama_model.scores[: ids.shape[1]]), model(ids).logits[0]


def test_ids_on_llama_cpp(llama, tiny_tokenizer):
    model = llama("f16")
    for text in TEXTS:
        ids = model.tokenize(text.replace("]sop", "]<sop>", 1).encode(), add_bos=False, special=True)
        assert ids == tiny_tokenizer(text)["input_ids"]


def test_greedy_tokens_on_llama_cpp(llama, tiny, tiny_tokenizer):
    """F16: the tokens that the model says, one by one."""
    model = llama("f16")
    for prompt in PROMPTS:
        inputs = tiny_tokenizer(tiny_tokenizer.build_prompt(prompt), return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        expected = tiny.generate(**inputs, do_sample=False, max_new_tokens=40)[0, length:].tolist()
        model.reset()
        tokens = model.generate(inputs["input_ids"][0].tolist(), temp=0.0, repeat_penalty=1.0)
        assert [token for token, _ in zip(tokens, expected)] == expected


@pytest.mark.parametrize("kind, logit_error", [("f16", 0.002), ("q8_0", 0.03), ("q4_0", 0.03)])
def test_logits_on_llama_cpp(llama, files, tiny, tiny_tokenizer, kind, logit_error):
    """
    Against the model with the weights that the file holds: what is left are activations, which llama.cpp rounds to float16
    or, for quantized weights, to INT8. The likeliest token is the same wherever it leads by more than that.
    """
    _, tensors = read(files / f"{kind}.gguf")
    model = AutoModel.from_pretrained(TINY, trust_remote_code=True).float().eval()
    model.load_state_dict(to_ours(tensors, model.state_dict(), 8))
    checked = 0
    for prompt in PROMPTS:
        inputs = tiny_tokenizer(tiny_tokenizer.build_prompt(prompt), return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=40)
        theirs, ours = forced(llama(kind), model, ids)
        assert relative(theirs, ours) < logit_error
        top = ours.topk(2).values
        sure = top[:, 0] - top[:, 1] > 2 * (theirs - ours).abs().max()
        assert torch.equal(theirs.argmax(-1)[sure], ours.argmax(-1)[sure])
        checked += int(sure.sum())
    assert checked > 40


@pytest.mark.parametrize("variant", [{}, {"multi_query_attention": False}, {"rope_ratio": 4}])
def test_variants_on_llama_cpp(load_llama, small_model, write_checkpoint, tmp_path, variant):
    variant = {**variant, "padded_vocab_size": 8064, "seq_length": 512}
    model = small_model(3, **variant)
    source = write_checkpoint(tmp_path / "source", {**SMALL, **variant}, model.state_dict())
    to_gguf.convert(source, tmp_path / "out.gguf")
    theirs, ours = forced(load_llama(tmp_path / "out.gguf"), model, torch.arange(300)[None] + 5)
    assert relative(theirs, ours) < 0.005


def test_chat_on_llama_cpp(llama, tiny, tiny_tokenizer):
    """Through the chat template in the file, two rounds."""
    model, messages, history = llama("f16"), [], []
    for query in ("你好", "Who are you?"):
        messages.append({"role": "user", "content": query})
        answer = model.create_chat_completion(messages, temperature=0, max_tokens=60)["choices"][0]["message"][
            "content"
        ]
        expected, history = tiny.chat(tiny_tokenizer, query, history, do_sample=False, max_new_tokens=60)
        assert answer.strip() == expected
        messages.append({"role": "assistant", "content": answer.strip()})


def test_benchmarks_write_the_same_architecture(files, tmp_path):
    """The random files that llama.cpp is measured with have the fields and tensors of a converted checkpoint."""
    sizes = dict(hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, kv_channels=32, padded_vocab_size=64)
    write_gguf(tmp_path / "random.gguf", layers=8, kind="Q8_0", **sizes)
    (random_fields, random_tensors), (fields, tensors) = read(tmp_path / "random.gguf"), read(files / "q8_0.gguf")
    names = {name for name in fields if name.startswith("chatglm.")}
    assert names == {name for name in random_fields if name.startswith("chatglm.")} - {"chatglm.vocab_size"}
    assert random_tensors.keys() == tensors.keys()
