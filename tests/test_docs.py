"""What the documentation tells people to type exists: targets of make, modules and their options, files, links."""

import re
import shlex
import subprocess
import sys

import pytest

from conftest import ROOT


PAGES = [ROOT / "README.md", ROOT / "README_zh.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Programs that other packages bring, or the shell; what they are given is not this repository's
OTHERS = {"pip", "cp", "(cd", ".venv/bin/hf", "hf", "curl"}
LAUNCHERS = {"accelerate", "torchrun"}


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, block)
        for page in PAGES
        for block in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    ]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each command, without variables set before it, what is piped into it, and comments."""
    found = []
    for page, block in blocks("shell"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.split("|")[-1], comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words:
                found.append((page, words))
    return found


COMMANDS = commands()
MODULES = sorted({words[words.index("-m") + 1] for _, words in COMMANDS if "-m" in words})


def test_every_command_is_of_a_known_kind():
    assert {words[0] for _, words in COMMANDS} <= {"make", "python", ".venv/bin/python"} | OTHERS | LAUNCHERS


def test_make():
    made = [words for _, words in COMMANDS if words[0] == "make"]
    assert len(made) > 10
    for words in made:
        result = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, (words, result.stderr)


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_their_options(module):
    if module.startswith("benchmarks"):
        options = {}  # they are run by test_benchmarks.py, or need a GPU
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file() or (ROOT / module / "__main__.py").is_file()
    else:
        options = {
            word.split("=")[0]
            for _, words in COMMANDS
            if module in words
            for word in words[words.index(module) + 1 :]
            if word.startswith("--")
        }
    if options:
        result = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
        if "ModuleNotFoundError" in result.stderr:
            pytest.skip(result.stderr.splitlines()[-1])
        assert result.returncode == 0, result.stderr
        known = set(re.findall(r"--[\w-]+", result.stdout))
        assert options <= known | {"--config"}, (module, options - known)


def test_files_that_commands_name():
    for page, words in COMMANDS:
        for word in words:
            if word.startswith(("training/configs/", "examples/", "benchmarks/")):
                assert (ROOT / word).exists(), (page, word)


def test_python_can_be_read():
    assert len(blocks("python")) > 10
    for page, block in blocks("python"):
        compile(block, page, "exec")


def heading_anchors(text: str) -> set[str]:
    """As GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in heading_anchors(path.read_text(encoding="utf-8")), target
