"""Putting this package's code into an old checkpoint folder, and taking it out again."""

import json
import os
import shutil

import pytest
from transformers import AutoModel, AutoTokenizer

from common import package
from conftest import ROOT, STORED, TINY
from conversion import upgrade


OLD_CODE = "raise RuntimeError('the old code')\n"
OTHERS_CLASSES = {"AutoModel": "THUDM/chatglm2-6b--modeling_chatglm.ChatGLMForConditionalGeneration"}


@pytest.fixture
def old_folder(tmp_path):
    """A folder as it was published: weights, tokenizer and the old code, without a chat template. Its name has a space."""
    folder = tmp_path / "old model"
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.model", "tokenizer_config.json", "config.json"):
        shutil.copy(TINY / name, folder)
    for name in ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm", "quantization", "older_chatglm"):
        (folder / f"{name}.py").write_text(OLD_CODE)
    (folder / "notes.txt").write_text("mine")
    return folder


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_upgraded_folder_loads_and_undo_restores_it(old_folder, capsys):
    before = contents(old_folder)
    upgrade.main([str(old_folder)])
    output = capsys.readouterr().out
    assert str(old_folder) in output and "modeling_chatglm.py" in output and "--undo" in output
    assert (old_folder / "modeling_chatglm.py.old").read_text() == OLD_CODE
    assert not (old_folder / "older_chatglm.py").exists()
    model = AutoModel.from_pretrained(old_folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(old_folder, trust_remote_code=True)
    assert model.chat(tokenizer, "你好", do_sample=False)[0]
    after = contents(old_folder)
    assert {name: after[name] for name in ("config.json", "notes.txt")} == {
        name: before[name] for name in ("config.json", "notes.txt")
    }

    upgrade.main([str(old_folder)])
    assert "Nothing was changed" in capsys.readouterr().out and contents(old_folder) == after
    upgrade.main([str(old_folder), "--undo"])
    assert contents(old_folder) == before


def test_classes_of_another_repository_are_replaced(old_folder):
    config = json.loads((old_folder / "config.json").read_text())
    (old_folder / "config.json").write_text(json.dumps({**config, "auto_map": OTHERS_CLASSES, "seq_length": 77}))
    before = contents(old_folder)
    upgrade.upgrade(old_folder)
    config = json.loads((old_folder / "config.json").read_text())
    assert config["auto_map"] == json.loads((ROOT / "config.json").read_text())["auto_map"]
    assert config["seq_length"] == 77
    upgrade.undo(old_folder)
    assert contents(old_folder) == before


def test_links_are_replaced_and_their_targets_stay(old_folder, tmp_path):
    blob = tmp_path / "blob"
    (old_folder / "modeling_chatglm.py").rename(blob)
    (old_folder / "modeling_chatglm.py").symlink_to("../blob")
    upgrade.upgrade(old_folder)
    assert blob.read_text() == OLD_CODE == (old_folder / "modeling_chatglm.py.old").read_text()
    assert not (old_folder / "modeling_chatglm.py").is_symlink()
    upgrade.undo(old_folder)
    assert os.readlink(old_folder / "modeling_chatglm.py") == "../blob"


def test_links_that_git_wrote_as_files_are_replaced(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    for path in STORED.iterdir():
        if path.is_symlink():
            (folder / path.name).write_text(os.readlink(path))
        elif path.suffix in (".json", ".model", ".safetensors"):
            shutil.copy(path, folder)
    upgrade.upgrade(folder)
    assert AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).chat_template


def test_newer_code_replaces_the_former_upgrade(old_folder, tmp_path, monkeypatch):
    before = contents(old_folder)
    upgrade.upgrade(old_folder)
    newer = tmp_path / "newer"
    newer.mkdir()
    for name in contents(ROOT.joinpath("checkpoints/tiny")):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, newer)
    (newer / "prefix_chatglm.py").unlink()  # a file that the newer release does not have
    (newer / "modeling_chatglm.py").write_text("newer")
    shutil.copy(ROOT / "config.json", newer)
    monkeypatch.setattr(upgrade, "ROOT", newer)
    written, kept = upgrade.upgrade(old_folder)
    assert (written, kept) == (["modeling_chatglm.py"], [])
    assert (old_folder / "modeling_chatglm.py").read_text() == "newer"
    assert (old_folder / "modeling_chatglm.py.old").read_text() == OLD_CODE
    assert not (old_folder / "prefix_chatglm.py").exists()
    upgrade.undo(old_folder)
    assert contents(old_folder) == before


def test_changed_files_are_not_lost(old_folder):
    upgrade.upgrade(old_folder)
    (old_folder / "modeling_chatglm.py").write_text("my own changes")
    for change in (upgrade.upgrade, upgrade.undo):
        with pytest.raises(ValueError, match="modeling_chatglm.py was changed after the upgrade"):
            change(old_folder)
    assert (old_folder / "modeling_chatglm.py").read_text() == "my own changes"


def test_failed_upgrade_is_undone(old_folder, monkeypatch):
    before = contents(old_folder)
    replace = os.replace

    def full(source, target):
        if str(source).endswith("quantization.py.part"):
            raise OSError("No space left on device")
        replace(source, target)

    monkeypatch.setattr(upgrade.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        upgrade.upgrade(old_folder)
    assert contents(old_folder) == before


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "config.json is missing"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": "chatglm", "position_encoding_2d": True}, "not ChatGLM2's"),  # the first ChatGLM-6B
    ],
)
def test_other_folders_are_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=message):
        upgrade.main([str(tmp_path)])
    assert contents(tmp_path) == before


def test_undo_without_an_upgrade_is_refused(old_folder):
    with pytest.raises(ValueError, match="was not upgraded"):
        upgrade.undo(old_folder)


def test_all_code_is_written(old_folder):
    written, _ = upgrade.upgrade(old_folder)
    code = {path.name for pattern in package.CODE for path in ROOT.glob(pattern)}
    assert code <= set(written) and "chat_template.jinja" in written
