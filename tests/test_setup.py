"""Setting up: what the Makefile checks and leaves behind, the container's steps, and the table of memory."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from benchmarks import memory
from common import checkpoint
from common.load_model import shows_progress
from conftest import ROOT, STORED


FAKE_PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit $OLD
mkdir -p "$3/bin"
printf '#!/bin/sh\\nexit %s\\n' $PIP_FAILS > "$3/bin/pip"
chmod +x "$3/bin/pip"
"""


@pytest.fixture
def make(tmp_path):
    """Runs make in a copy of the repository's files for it, on an interpreter of which only `-m venv` works."""
    for name in ("Makefile", "setup.cfg", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def run(*words, old: int = 0, pip_fails: int = 0) -> subprocess.CompletedProcess:
        command = ["make", f"PYTHON={python}", *words]
        environment = {**os.environ, "OLD": str(old), "PIP_FAILS": str(pip_fails)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_old_python_is_one_line(make, tmp_path):
    result = make("chat", old=1)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "Python 3.11 or newer is needed" in result.stderr and str(tmp_path / "python") in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_half_made_environment_is_made_anew(make, tmp_path):
    assert make(".venv/installed", pip_fails=1).returncode == 2
    (tmp_path / ".venv/left-over").write_text("")
    result = make(".venv/installed")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / ".venv/left-over").exists() and "This takes minutes" in result.stdout

    (tmp_path / ".venv/mine").write_text("")  # what is whole is brought up to date in place
    os.utime(tmp_path / "setup.cfg", (2**32, 2**32))
    assert make(".venv/installed").returncode == 0 and (tmp_path / ".venv/mine").exists()


def test_upgrade_without_a_folder_says_so(make):
    result = make("upgrade")
    assert result.returncode == 2 and 'make upgrade FOLDER="path/to/chatglm2-6b"' in result.stderr


def test_container_installs_what_its_entry_needs():
    text = (ROOT / "serving/deploy/Containerfile").read_text()
    assert re.search(r"^ARG BASE=", text, re.M) and re.search(r"^FROM \$BASE$", text, re.M)
    (extras,) = re.findall(r'-e "\.\[(.*?)\]"', text)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(extras.split(",")) <= set(setup["options.extras_require"])
    for path in re.findall(r" -f (\S+)", text) + re.findall(r" -c (\S+\.txt)", text):
        assert (ROOT / path).is_file(), path
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "COPY . ." in text and {".git", ".venv*", "checkpoints/*", "!checkpoints/tiny"} <= set(ignored)
    program, *words = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.M)[1])
    assert program == "chatglm2"
    result = subprocess.run([sys.executable, ROOT / "chatglm2.py", *words, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_table_of_memory_is_computed(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.search(r"<!-- memory -->\n(.*?)\n<!-- /memory -->", text, re.S)[1].splitlines() == memory.table()


def test_loading_of_large_weights_shows_progress_in_a_terminal(tmp_path, monkeypatch):
    for size, is_terminal, expected in ((2 * 10**9, True, True), (2 * 10**9, False, False), (10**6, True, False)):
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.truncate(size)
        monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=partial(bool, is_terminal)))
        assert shows_progress(tmp_path) is expected


def test_links_that_git_wrote_as_files_are_named(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    for path in STORED.iterdir():
        if path.is_symlink():
            (folder / path.name).write_text(os.readlink(path))
        elif path.suffix in (".json", ".model", ".safetensors"):
            shutil.copy(path, folder)
    with pytest.raises(ValueError, match="is a symbolic link that Git wrote as a plain file.*conversion.upgrade"):
        checkpoint.load_tokenizer(folder)


def test_folder_without_a_tokenizer_says_what_is_missing(tmp_path):
    shutil.copy(STORED / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.model is missing, and without it the folder has no tokenizer"):
        checkpoint.load_tokenizer(tmp_path)
