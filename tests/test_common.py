"""What the folders share: files that are written whole, settings of runs, error lines; and that they share nothing else."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModel, GlmForCausalLM

from common import checkpoint, glm, package
from common.errors import one_line, plain_errors
from common.files import new_file, new_folder, only_run, read_json, write_json
from common.settings import check_settings, rows_fingerprint, weights_fingerprint
from conftest import ROOT, SMALL, TINY


FOLDERS = ("common", "training", "evaluation", "conversion", "examples", "serving", "benchmarks")
OTHERS = {*FOLDERS, "tests"}


def imported(path) -> set[str]:
    """The modules that a file imports, by their absolute names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(".".join([path.parent.name] * node.level + [node.module] * bool(node.module)))
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_only_common(folder):
    """Not each other, nor the tests; and what they share imports none of them."""
    others = OTHERS - {folder} - ({"common"} if folder != "common" else set())
    for path in (ROOT / folder).glob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[0] in others}, path


@pytest.mark.parametrize(
    "files, answer",
    [
        ({"config.json": {"model_type": "chatglm"}}, True),
        ({"config.json": {}}, True),  # the published one
        ({"config.json": {"model_type": "llama"}}, False),
        ({"tokenizer_config.json": {"tokenizer_class": "ChatGLMTokenizer"}}, True),
        ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}, False),
        ({}, False),
    ],
    ids=str,
)
def test_folders_of_chatglm2(tmp_path, files, answer):
    for name, content in files.items():
        write_json(tmp_path / name, content)
    assert checkpoint.is_chatglm(tmp_path) is answer


def test_checkpoints_carry_all_modules(tmp_path):
    """Every module that one of the package's imports is copied with it."""
    package.copy_code(tmp_path)
    modules = {path.stem: path.read_text() for path in tmp_path.glob("*.py")}
    assert {"modeling_chatglm", "configuration_chatglm", "tokenization_chatglm", "quantization"} <= modules.keys()
    for text in modules.values():
        assert set(re.findall(r"^\s*from \.(\w+) import", text, re.M)) <= modules.keys()
    assert {path.name for path in tmp_path.iterdir()} >= set(package.DEFAULTS)
    assert {path.stem for path in ROOT.glob("*.py")} - {"chatglm2"} == modules.keys()  # the program is not copied


# Files


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "a.json is empty. Do this"),
        (b'{"a": 1', "a.json is not JSON .*Do this"),
        (b"\xff", "a.json is not JSON .*utf-8.*Do this"),
        (b"[" * 100_000, "a.json is not JSON .*recursion"),
        (b"[]", "a.json must hold a JSON object, got list. Do this"),
        (None, "a.json is missing. Do this"),
    ],
)
def test_damaged_json_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json", "Do this.")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/a.json"
    write_json(path, {"问": 1})
    assert read_json(path) == {"问": 1} and "问" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"问": 1}


def test_lock_ends_with_its_process(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from common.files import only_run
with only_run(Path({str(tmp_path)!r}), "--output"):
    print("locked", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=f"Another process is writing to {tmp_path}.* choose another --output"):
        with only_run(tmp_path, "--output"):
            pytest.fail("both have it")
    process.kill()
    process.wait()
    with only_run(tmp_path, "--output"):
        pass
    with only_run(tmp_path, "--output"):
        pass


@pytest.mark.parametrize("kind", ["new", "in new folders", "empty", "link", "link to an empty folder"])
def test_new_folder(tmp_path, kind):
    """Complete at the end, and until then hidden; config.json is there last, without which nothing is loaded."""
    output, target = tmp_path / "out", tmp_path / "target"
    if kind == "in new folders":
        output = tmp_path / "a/b/out"
    if "link" in kind:
        output.symlink_to(target)
    if "empty" in kind:
        (target if "link" in kind else output).mkdir()
    renamed = []
    with pytest.MonkeyPatch.context() as patch:
        rename = type(output).rename
        patch.setattr(type(output), "rename", lambda self, to: (renamed.append(self.name), rename(self, to))[1])
        with new_folder(output) as folder:
            for name in ("config.json", "a", "z"):
                (folder / name).write_text(name)
            assert not (output / "a").exists() and folder.stat().st_dev == tmp_path.stat().st_dev
    assert {path.name: path.read_text() for path in output.iterdir()} == {n: n for n in ("config.json", "a", "z")}
    assert renamed[-1] == ("config.json" if "empty" in kind else "files")
    assert {path.name for path in output.parent.iterdir()} == ({"out", "target"} if "link" in kind else {"out"})


def test_new_file(tmp_path):
    with new_file(tmp_path / "new/out.gguf") as path:
        path.write_text("x")
        assert not (tmp_path / "new/out.gguf").exists()
    assert (tmp_path / "new/out.gguf").read_text() == "x" and len(list((tmp_path / "new").iterdir())) == 1
    with pytest.raises(ValueError, match="exists already"), new_file(tmp_path / "new/out.gguf"):
        pytest.fail("it is there")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("x"), KeyboardInterrupt()])
def test_errors_leave_nothing(tmp_path, error):
    """In a folder that was there, too, which stays empty."""
    (tmp_path / "empty").mkdir()
    for name in ("out", "empty"):
        with pytest.raises(type(error), match="out could not be written|empty could not be written|x|"):
            with new_folder(tmp_path / name) as folder:
                (folder / "a").write_text("a")
                raise error
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_other_hidden_folders_are_left_alone(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".mine.unfinished").mkdir()  # without a lock: not made here
    (tmp_path / ".mine.unfinished/a").write_text("a")
    with new_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".git", ".mine.unfinished", "out"}


# Settings


def test_settings(tmp_path):
    path = tmp_path / "settings.json"
    write_json(path, {"a": 1, "group": {"b": [1, 2], "c": None}, "more": 5})
    check_settings(path, {"a": 1, "group": {"b": [1, 2], "c": None}}, "--output")
    with pytest.raises(ValueError, match=r"other settings: a 1, now 2; b \[1, 2\], now \[1\]. .*another --output to"):
        check_settings(path, {"a": 2, "group": {"b": [1]}}, "--output")
    with pytest.raises(ValueError, match="d None, now 3"):
        check_settings(path, {"d": 3}, "--output")


def test_fingerprints(tmp_path):
    rows = [{"a": i} for i in range(5000)]
    changed = [dict(row) for row in rows]
    changed[4995]["a"] = 0
    assert rows_fingerprint(rows) == rows_fingerprint([dict(row) for row in rows])
    assert len({rows_fingerprint(r) for r in (rows, rows[:-1], changed, rows[1:], [])}) == 5
    same = [{"a": 0}] * 6000
    assert rows_fingerprint(same[:5001]) != rows_fingerprint(same[:5004])  # of which 1,001 are looked at
    for name in ("b.bin", "a.safetensors", "config.json"):
        (tmp_path / name).write_text(name)
    before = weights_fingerprint(tmp_path)
    assert [name for name, *_ in before] == ["a.safetensors", "b.bin"]
    (tmp_path / "config.json").write_text("other")
    assert weights_fingerprint(tmp_path) == before
    (tmp_path / "b.bin").write_text("longer than before")
    assert weights_fingerprint(tmp_path) != before and weights_fingerprint("THUDM/chatglm2-6b") == []


# Errors


@pytest.mark.parametrize(
    "error, message",
    [
        (ValueError("two\nlines"), ": two lines$"),
        (OSError(28, "No space left"), "No space left"),
        (MemoryError(), ": MemoryError$"),
        (FloatingPointError("The loss is nan"), "The loss is nan"),
        (ImportError("No module named 'gguf'"), r"No module named 'gguf'. pip install -e '.\[conversion\]'"),
    ],
)
def test_expected_errors_are_one_line(error, message):
    with pytest.raises(SystemExit, match=message):
        with plain_errors("conversion"):
            raise error
    assert "\n" not in one_line(error)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_end_the_command_by_an_exception(name):
    """And afterwards are what they were."""
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit, plain_errors("conversion"):
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert exit.value.code == 128 + number and signal.getsignal(number) is before
    signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        with plain_errors("conversion"):
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


def test_unexpected_errors_keep_their_traceback():
    with pytest.raises(AssertionError), plain_errors("conversion"):
        raise AssertionError


# Checkpoints


def test_files_of_weights(tmp_path):
    """In the library's order; what lies beside them is not read."""
    with pytest.raises(ValueError, match="There are no weights in .*: none of model.safetensors, "):
        checkpoint.weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert checkpoint.weight_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}'
    )
    with pytest.raises(
        ValueError, match="lacks 1.safetensors, 2.safetensors of the files in model.safetensors.index.json"
    ):
        checkpoint.weight_files(tmp_path)
    for i in (1, 2):
        (tmp_path / f"{i}.safetensors").write_bytes(b"x")
    assert checkpoint.weight_files(tmp_path) == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    (tmp_path / "2.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="2.safetensors is a Git LFS pointer.*git lfs pull"):
        checkpoint.weight_files(tmp_path)


def test_unused_weights_are_one_line(small_model, write_checkpoint, tmp_path, logs):
    """Which the library lists in a table; what else it logs stays."""
    weights = small_model().state_dict() | {"transformer.extra": torch.zeros(2)}
    folder = write_checkpoint(tmp_path / "a", SMALL, weights)
    checkpoint.load(AutoModel, folder)
    assert [record.getMessage() for record in logs.records if record.levelname == "WARNING"] == [
        f"{folder} has transformer.extra, which the model does not use."
    ]
    logs.clear()
    AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert "LOAD REPORT" in logs.text


def test_names_of_many():
    assert checkpoint.name_some(["a", "b", "c"]) == "a, b, c"
    assert checkpoint.name_some(list("abcd") * 300) == "a, b, c and 1,197 more"


# GlmForCausalLM


@pytest.mark.parametrize(
    "variant",
    [
        {}, {"multi_query_attention": False}, {"rope_ratio": 4}, {"add_qkv_bias": False},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
    ],
)  # fmt: skip
def test_glm_has_the_same_network(small_model, variant):
    """Configuration and tensors give `GlmForCausalLM` the logits of the model, and the parts of fused tensors fuse again."""
    model = small_model(3, **variant)
    config = glm.glm_config(model.config, architectures=None)
    if "rope_ratio" not in variant:  # else it is linear scaling there
        assert config.rope_parameters["rope_type"] == model.config.rope_parameters["rope_type"]
    oracle = GlmForCausalLM(config).eval()
    tensors = dict(glm.glm_tensors(model.state_dict().items(), model.config))
    oracle.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(oracle(ids).logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    for name, tensor in model.state_dict().items():
        parts = [tensors[part] for part in glm.glm_names(name)]
        assert torch.equal(glm.fuse_query_key_value(parts, model.config) if len(parts) == 3 else parts[0], tensor)


def test_tiny_is_read():
    fields, config = checkpoint.read_config(TINY)
    assert fields == json.loads((TINY / "config.json").read_text()) and config.num_layers == fields["num_layers"]
    assert os.path.samefile(checkpoint.weight_files(TINY)[0], TINY / "model.safetensors")
