"""The program `chatglm2`: every command from any folder, quick help, and one line for what is missing or wrong."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

import chatglm2
from common.options import Parser, add_model_options
from conftest import ROOT, TINY


ALL = [[name] for name in chatglm2.COMMANDS]
ALL += [[group, kind] for group, (_, kinds, _) in chatglm2.GROUPS.items() for kind in kinds]
# Packages whose import takes a second or more
SLOW = ("torch", "transformers", "gradio", "fastapi", "lm_eval", "datasets", "trl", "peft", "gguf", "huggingface_hub")


def run(folder, *words, without: tuple[str, ...] = (), **options) -> subprocess.CompletedProcess:
    """Runs the program in a folder; `without` names packages that are then missing."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules.update(dict.fromkeys({without!r})); "
    program += "import chatglm2; sys.argv[0] = 'chatglm2'; chatglm2.main()"
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, **options)


def test_setup_installs_the_program():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options"]["py_modules"] == "chatglm2"
    assert "chatglm2 = chatglm2:main" in setup["options.entry_points"]["console_scripts"]


def test_every_command_is_a_module_of_the_repository():
    modules = [module for module, _ in chatglm2.COMMANDS.values()]
    modules += [f"{folder}.{kind}" for folder, kinds, _ in chatglm2.GROUPS.values() for kind in kinds]
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    extras = {extra for _, extra in chatglm2.COMMANDS.values()} | {extra for *_, extra in chatglm2.GROUPS.values()}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert extras <= set(setup["options.extras_require"])


def test_help_lists_all_commands(tmp_path):
    result = run(tmp_path, "--help")
    assert result.returncode == 0
    assert all(f"chatglm2 {name}" in result.stdout for name in [*chatglm2.COMMANDS, *chatglm2.GROUPS])
    for group, (_, kinds, _) in chatglm2.GROUPS.items():
        assert all(kind in run(tmp_path, group, "--help").stdout for kind in kinds)


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_imports_nothing_slow(tmp_path, words):
    result = run(tmp_path, *words, "--help", without=SLOW)
    assert result.returncode == 0, result.stderr
    if words[0] == "train":
        assert "python -m training" in result.stdout and "--output FOLDER" in result.stdout
    else:
        assert result.stdout.startswith(f"usage: chatglm2 {' '.join(words)}")


@pytest.mark.parametrize("module", ["examples.api", "evaluation.report"])
def test_help_of_other_programs_imports_nothing_slow(module):
    program = f"import runpy, sys; sys.modules.update(dict.fromkeys({SLOW!r})); sys.argv = ['', '--help']; "
    command = [sys.executable, "-c", f"{program} runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("usage:"), result.stderr


@pytest.mark.parametrize(
    "words, without, extra",
    [
        (["serve"], "uvicorn", "serve"),
        (["evaluate", "--model", TINY, "--output", "out"], "lm_eval", "evaluation"),
        (["train", "lora", "--config", "lora.yaml"], "trl", "training"),
        (["convert", "merge-lora", "--adapter", "lora", "--output", "out"], "peft", "conversion"),
        (["web"], "gradio", "web"),
    ],
)
def test_missing_extra_is_one_line(tmp_path, words, without, extra):
    result = run(tmp_path, *words, without=(without,))
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert without in result.stderr and f"pip install -e '{ROOT}[{extra}]'" in result.stderr


@pytest.mark.parametrize("words", [["cook"], ["train", "cook"], ["serve", "--cook"], ["download", "--model", "cook"]])
def test_wrong_options_exit_with_2(tmp_path, words):
    result = run(tmp_path, *words)
    assert result.returncode == 2 and "chatglm2" in result.stderr and "cook" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "quantize", "--model", "nowhere", "--output", "out"],
        ["train", "lora", "--model", "nowhere", "--train-file", ROOT / "training/example.jsonl", "--output", "out"],
        ["train", "lora", "--model", TINY, "--train-file", "nowhere", "--output", "out"],
        ["train", "lora", "--config", "nowhere"],
    ],
)
def test_missing_model_or_file_is_one_line(tmp_path, words):
    result = run(tmp_path, *words)
    lines = [line for line in result.stderr.splitlines() if "nowhere" in line]
    assert result.returncode == 1 and len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    assert lines[0].startswith("chatglm2 ")


def test_commands_work_from_any_folder(tmp_path):
    result = run(tmp_path, "convert", "to_safetensors", "--output", "copy")
    assert result.returncode == 0, result.stderr
    assert {"config.json", "tokenizer.model", "modeling_chatglm.py"} <= {
        path.name for path in Path(tmp_path, "copy").iterdir()
    }
    result = run(tmp_path, "chat", "--model", "copy", "--prompt", "你好", "--greedy")
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


def test_underscores_are_accepted_for_hyphens():
    parser = Parser("")
    add_model_options(parser)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--prompt")
    args = parser.parse_args(["--max_length=3", "--checkpoint_code", "--prompt", "a_b --c_d"])
    assert (args.max_length, args.checkpoint_code, args.prompt) == (3, True, "a_b --c_d")
