"""
Programs that other people wrote, on the embedded checkpoint: `make test-others`. docs/migration.md names their releases.

The first-party project's scripts are not here: what they call is written out in short code of our own.
"""

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from common.package import copy_code
from conftest import TINY


QUERY = "你好"
CHAT = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(TINY, trust_remote_code=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def named_folder(tmp_path_factory) -> Path:
    """The checkpoint in a folder with "chatglm2" in its name, by which FastChat finds its adapter."""
    folder = tmp_path_factory.mktemp("programs") / "chatglm2-tiny"
    folder.mkdir()
    copy_code(folder)
    for path in [TINY / "config.json", TINY / "model.safetensors", TINY / "tokenizer.model"]:
        (folder / path.name).symlink_to(path)
    return folder


# The first-party project's evaluation/evaluate_ceval.py


def test_two_prompts_of_the_ceval_script(model, tokenizer):
    """It decodes an answer without options, and puts the text into a second prompt: special tokens must not be in it."""
    texts = ["1+1=?\nA. 1\nB. 2", "Which is a colour?\nA. red\nB. 7"]
    inputs = tokenizer([tokenizer.build_prompt(text) for text in texts], padding=True, return_tensors="pt")
    outputs = model.generate(**inputs, do_sample=False, max_new_tokens=48)
    answers = [tokenizer.decode(row[inputs["input_ids"].shape[1] :]) for row in outputs.tolist()]
    assert not any(token in answer for answer in answers for token in ("</s>", "<unk>", "sop"))
    prompts = [tokenizer.build_prompt(text + answer + "\n综上所述，") for text, answer in zip(texts, answers)]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", truncation=True, max_length=2048)
    with torch.no_grad():
        last = model(**inputs, return_last_logit=True).logits
        single = model(**tokenizer(prompts[0], return_tensors="pt")).logits[:, -1:]
    assert last.shape[1] == 1
    torch.testing.assert_close(last[:1], single, atol=1e-3, rtol=1e-3)


# FastChat


def test_fastchat(named_folder, model, tokenizer):
    pytest.importorskip("fastchat", reason="fschat is not installed: make test-others")
    from fastchat.model.model_adapter import get_conversation_template, get_generate_stream_function, load_model
    from fastchat.utils import get_context_length

    path = str(named_folder)
    served, served_tokenizer = load_model(path, device="cpu")
    assert get_context_length(served.config) == model.config.seq_length
    conversation = get_conversation_template(path)
    conversation.append_message(conversation.roles[0], QUERY)
    conversation.append_message(conversation.roles[1], None)
    prompt = conversation.get_prompt()
    assert prompt == tokenizer.build_prompt(QUERY)
    stream = get_generate_stream_function(served, path)
    parameters = {"prompt": prompt, "temperature": 0.0, "max_new_tokens": 64, "echo": False}
    *_, last = stream(served, served_tokenizer, parameters, "cpu")
    expected, _ = model.chat(tokenizer, QUERY, do_sample=False, max_new_tokens=64)
    assert last["text"] == expected and "</s>" not in last["text"]


# LLaMA-Factory


@pytest.fixture
def llama_factory(monkeypatch):
    """Its module of templates. It imports torchaudio for models of speech, and does not allow this Transformers."""
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    audio = types.ModuleType("torchaudio")
    audio.__spec__ = ModuleSpec("torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio", audio)
    pytest.importorskip("llamafactory", reason="llamafactory is not installed: make test-others")
    return pytest.importorskip("llamafactory.data.template")


def registration_of_the_page() -> str:
    page = (Path(__file__).resolve().parent.parent / "docs/migration.md").read_text(encoding="utf-8")
    section = page.split("## LLaMA-Factory")[1]
    return section.split("```python\n")[1].split("```")[0]


def test_llama_factory_template(llama_factory, tokenizer, monkeypatch):
    """The code of docs/migration.md: two rounds are the ids of the published prompt, each answer encoded by itself."""
    ran = types.ModuleType("llamafactory.train.tuner")
    ran.run_exp = lambda: None
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", ran)
    exec(registration_of_the_page(), {})
    messages = [*CHAT, {"role": "user", "content": QUERY}, {"role": "assistant", "content": "你好"}]
    pairs = llama_factory.TEMPLATES.pop("chatglm2").encode_multiturn(tokenizer, messages)
    assert pairs[0][0] == tokenizer.encode(tokenizer.build_prompt("Who are you?"))
    assert pairs[0][1] == tokenizer.encode("A model.", add_special_tokens=False)
    text = tokenizer.decode([i for pair in pairs for ids in pair for i in ids])
    expected = tokenizer.build_prompt(QUERY, [("Who are you?", "A model.")]) + "你好"
    assert text.replace(" ", "") == expected.replace(" ", "")


# OpenVINO


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_openvino_converts_the_model(small_model, attn_implementation):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: make test-others")
    model = small_model(attn_implementation=attn_implementation)
    model.config.use_cache = False  # OpenVINO does not know the library's caches
    ids = torch.randint(3, 128, (2, 7))
    mask = torch.ones_like(ids)
    converted = openvino.convert_model(model, example_input={"input_ids": ids, "attention_mask": mask})
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ids = torch.randint(3, 128, (3, 11))  # another size than the example's
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    output = torch.tensor(compiled({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["logits"])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(output[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


# sentence-transformers


def test_sentence_transformers(model, tokenizer):
    """It pools the hidden states, by the checkpoint's path."""
    name = "sentence_transformers"
    library = pytest.importorskip(name, reason="sentence-transformers is not installed: make test-others")
    encoder = library.SentenceTransformer(
        str(TINY), trust_remote_code=True, device="cpu", model_kwargs={"dtype": torch.float32}
    )
    texts = ["Hello", "A longer text, so that the other one is padded."]
    prompts = [tokenizer.build_prompt(text) for text in texts]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.transformer(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    expected = (states * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(encoder.encode(texts, convert_to_tensor=True), expected, atol=1e-4, rtol=1e-4)


# TRL and PEFT


def test_reward_trainer_with_lora_saves_the_head(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    from datasets import Dataset

    def load():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(
            TINY, trust_remote_code=True, num_labels=1, dtype=torch.float32
        )

    base = load()
    base.save_pretrained(tmp_path / "base")  # TINY has no head: both models must begin with the same one
    rows = [{"prompt": "1+1=", "chosen": f"{i}, two", "rejected": f"{i}, seven"} for i in range(8)]
    options = trl.RewardConfig(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], save_strategy="no", use_cpu=True, gradient_checkpointing=False, bf16=False,
    )  # fmt: skip
    before = base.score.weight.detach().clone()
    trainer = trl.RewardTrainer(
        model=base, args=options, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query_key_value"]),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    again = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", trust_remote_code=True, dtype=torch.float32
    )
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    trained = again.base_model.model.score.modules_to_save["default"].weight
    assert not torch.equal(trained, before)
    inputs = tokenizer(["1+1=2", "seven"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


# bitsandbytes


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_bitsandbytes_leaves_the_classifiers_head(options):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: make test-others")
    model = AutoModelForSequenceClassification.from_pretrained(
        TINY, trust_remote_code=True, num_labels=3, quantization_config=BitsAndBytesConfig(**options)
    )
    layer = model.transformer.encoder.layers[0].mlp.dense_h_to_4h
    assert type(layer).__module__.startswith("bitsandbytes")
    assert model.score.weight.is_floating_point()
    assert model.classifier_head is model.score
