"""Commands run this package's code on any checkpoint, and a checkpoint's own only if asked to."""

import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from common import checkpoint
from conftest import TINY


@pytest.fixture
def old_folder(tmp_path):
    """As published: the old code, which fails, and neither a chat template nor a generation_config.json."""
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    config = json.loads((TINY / "config.json").read_text())
    del config["model_type"]
    config["auto_map"] = {"AutoModel": "THUDM/chatglm2-6b--modeling_chatglm.ChatGLMForConditionalGeneration"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration", "modeling", "tokenization"):
        (folder / f"{name}_chatglm.py").write_text("raise RuntimeError('the old code runs')\n")
    return folder


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_package_code_runs_on_an_old_folder(old_folder, auto_class):
    model = checkpoint.load(auto_class, old_folder)
    tokenizer = checkpoint.load_tokenizer(old_folder)
    expected = checkpoint.load(auto_class, TINY)
    ids = tokenizer("你好", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, expected(**ids).logits)
    assert tokenizer.chat_template == checkpoint.load_tokenizer(TINY).chat_template


def test_checkpoint_code_runs_if_asked_to(old_folder):
    config = json.loads((old_folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    }
    (old_folder / "config.json").write_text(json.dumps({**config, "model_type": "chatglm"}))
    with pytest.raises((ValueError, RuntimeError), match="the old code runs"):
        checkpoint.load(AutoModel, old_folder, checkpoint_code=True)


def test_what_is_saved_has_this_code_and_loads_alone(old_folder, tmp_path):
    model, tokenizer = checkpoint.load(AutoModel, old_folder), checkpoint.load_tokenizer(old_folder)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "THUDM" not in str(json.loads((tmp_path / "saved/config.json").read_text())["auto_map"])
    loaded = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert loaded.chat(tokenizer, "你好", do_sample=False) == model.chat(tokenizer, "你好", do_sample=False)


def test_class_is_that_of_the_auto_class(small_model, write_checkpoint, tmp_path, chatglm):
    model = small_model(model_class=chatglm.ChatGLMForSequenceClassification, num_labels=3)
    folder = write_checkpoint(tmp_path / "classifier", model.config.to_dict(), model.state_dict())
    loaded = checkpoint.load(AutoModelForSequenceClassification, folder)
    assert type(loaded).__name__ == "ChatGLMForSequenceClassification" and loaded.config.num_labels == 3
