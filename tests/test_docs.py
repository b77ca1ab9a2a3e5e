"""
What the documentation tells people to type works: Python is run, on the small model; of commands all targets of make, modules,
options, files and links exist, and these are run: `make chat`, `make serve` and `make web` here, docs/convert.md by
test_conversion.py, docs/evaluate.md (on made-up questions) by test_evaluation.py, accelerate and torchrun by test_training.py.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from transformers import AutoModel, AutoTokenizer

import chatglm2
from conftest import ROOT, TINY
from docs import arguments


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# Programs that other packages bring, or the shell; what they are given is not this repository's
OTHERS = {"pip", "python3", "source", "hf", "curl", "open-webui"}
RECIPES = {f"training.{name}" for name in chatglm2.GROUPS["train"][1]}
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
for _, words in COMMANDS:  # `chatglm2 train lora` is `python -m training.lora`
    if words[0] == "chatglm2" and words[1] != "--help":
        kind = chatglm2.GROUPS.get(words[1])
        module = chatglm2.COMMANDS[words[1]][0] if kind is None else f"{kind[0]}.{words[2].replace('-', '_')}"
        words[: 2 if kind is None else 3] = ["python", "-m", module]
MODULES = sorted({words[words.index("-m") + 1] for _, words in COMMANDS if "-m" in words})


def test_every_command_is_of_a_known_kind():
    assert {words[0] for _, words in COMMANDS} <= {
        "make",
        "python",
        "chatglm2",
    } | OTHERS | LAUNCHERS


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
            word.split("=")[0].replace("_", "-")
            for _, words in COMMANDS
            if module in words
            for word in words[words.index(module) + 1 :]
            if word.startswith("--")
        }
    if options:
        all_options = "--help-all" if module in RECIPES else "--help"
        result = subprocess.run([sys.executable, "-m", module, all_options], cwd=ROOT, capture_output=True, text=True)
        if "ModuleNotFoundError" in result.stderr:
            pytest.skip(result.stderr.splitlines()[-1])
        assert result.returncode == 0, result.stderr
        known = {name.replace("_", "-") for name in re.findall(r"--[\w-]+", result.stdout)}
        assert options <= known | {"--config", "--model", "--output", "--quantization", "--device"}, (
            module,
            options - known,
        )


def test_files_that_commands_name():
    for page, words in COMMANDS:
        for word in words:
            if word.startswith(("training/configs/", "examples/", "benchmarks/")):
                assert (ROOT / word).exists(), (page, word)


# What of the Python is not run here, and why
NOT_RUN = {
    'device_map="auto"': "a device_map of two GPUs; with one of CPU and disk in test_loading.py",
    'tp_plan="auto"': "two processes, in test_parallel.py",
    "llamafactory": "LLaMA-Factory, in test_programs.py",
    "openai": "a server, asked by the same client in test_serve.py",
    "build/convert/glm": "the output of a command, run with it in test_conversion.py",
    "output/sft": "the output of training, below",
}


def run_python(page: str, block: str, **names):
    block = block.replace("path/to/chatglm2-6b", str(TINY)).replace('"checkpoints/tiny"', f'"{TINY}"')
    block = block.replace(', device="cuda"', "").replace("texts = [...]", "texts = ['你好', 'Who are you?']")
    exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page, block", blocks("python"))
def test_python_runs(page, block, tmp_path, monkeypatch):
    if any(part in block for part in NOT_RUN):
        compile(block, page, "exec")
        return
    if "QuantizedCache" in block:
        pytest.importorskip("optimum.quanto")
    monkeypatch.chdir(tmp_path)
    names = {"path": str(TINY), "query": "你好", "history": [], "AutoModel": AutoModel}
    names["tokenizer"] = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    model, small = (AutoModel.from_pretrained(TINY, trust_remote_code=True).float().eval() for _ in range(2))
    if "config.quantization_config" in block:  # of a quantized checkpoint
        model.quantize(4).save_pretrained(tmp_path / "int4")
        names["path"] = str(tmp_path / "int4")
        block = "from transformers import AutoConfig\n" + block
    run_python(page, block, model=model, small=small, **names)


def test_what_is_trained_is_used_as_documented(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from training import lora, ptuning, sft

    monkeypatch.chdir(ROOT)
    few = ["--max-steps", "1"]
    for recipe in (sft, lora, ptuning):
        name = recipe.__name__.split(".")[-1]
        output = ["--output", str(tmp_path / "output" / name)]
        config = f"training/configs/{name}.yaml"
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            recipe.main(["--config", config, "--model", str(TINY), *few, *output])
        log = json.loads((tmp_path / "output" / name / "trainer_state.json").read_text())["log_history"]
        assert "loss" in log[0]
    card = (tmp_path / "output/lora/README.md").read_text(encoding="utf-8")
    assert "More Information Needed" not in card and "| rank, alpha | 16, 32 |" in card and "example.jsonl" in card
    (block,) = (block for _, block in blocks("python") if "output/sft" in block)
    monkeypatch.chdir(tmp_path)
    run_python("training.md", block, path=str(TINY))


def needs_make():
    if sys.executable != str(ROOT / ".venv/bin/python"):
        pytest.skip("make would set up another environment.")


def test_make_chat():
    needs_make()
    for command in ('make chat PROMPT="你好"', 'echo "你好" | make chat'):
        result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0 and "ChatGLM2-Tiny" in result.stdout, result.stderr


@pytest.mark.parametrize("target", ["serve", "web"])
def test_make_starts_a_server(target):
    needs_make()
    command = ["make", target, "ARGS=--port 0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert any("http://127.0.0.1:" in line for line in process.stdout)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)


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


def test_arguments_page_is_up_to_date():
    assert arguments.PAGE.read_text(encoding="utf-8") == arguments.page(), "run python -m docs.arguments"


def test_readme_is_short():
    for name in ("README.md", "README_zh.md"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 120


def test_versions_agree():
    version = re.search(r"^version = (.*)$", (ROOT / "setup.cfg").read_text(), re.M)[1]
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_github_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert ".ci/run" in [step.get("run") for step in job["steps"]]


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != ROOT and page.name != "README.md"])
def test_pages_begin_with_a_command(page):
    """After a sentence, from an activated environment or by make."""
    command = page.read_text(encoding="utf-8").split("```shell\n")[1].splitlines()[0]
    assert command == "source .venv/bin/activate" or command.startswith("make "), command


def test_maps_name_every_page():
    for folder in (ROOT / "docs", ROOT / "docs/zh"):
        text = (folder / "README.md").read_text(encoding="utf-8")
        pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
        assert {Path(target).name for target in re.findall(r"\]\(([^)#]+\.md)\)", text)} >= pages
    for page in sorted((ROOT / "docs/zh").glob("*.md")):  # English pages are marked
        for label, target in re.findall(r"\[([^\]]+)\]\(\.\./([a-z-]+\.md)[^)]*\)", page.read_text(encoding="utf-8")):
            assert label.endswith("（英文）"), (page.name, target)
