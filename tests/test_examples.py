"""What the README shows a new user: the terminal chat, with the small model that the repository comes with."""

import argparse
import codecs
import json
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, QuantoConfig

from common import checkpoint
from common.load_model import load_model
from common.options import add_model_options
from conftest import ROOT, STORED, TINY
from examples import cli_chat, terminal


CHAT = [sys.executable, "-m", "examples.cli_chat", "--greedy"]


def run_chat(*args, stdin=""):
    run = subprocess.run([*CHAT, *args], input=stdin, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def tiny():
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    return AutoModel.from_pretrained(TINY, trust_remote_code=True).float().eval(), tokenizer


def test_answers_once(tiny):
    model, tokenizer = tiny
    expected, _ = model.chat(tokenizer, "你好", do_sample=False)
    assert run_chat("--prompt", "你好").strip() == expected


def test_reads_a_pipe(tiny):
    model, tokenizer = tiny
    first, _ = model.chat(tokenizer, "你好", do_sample=False)
    second, _ = model.chat(tokenizer, "Who are you?", do_sample=False)
    output = run_chat(stdin="你好\nclear\n\nWho are you?\nstop\nnever read\n")
    assert output.split("\n") == [*first.split("\n"), *second.split("\n"), ""]


def test_clear_forgets_the_dialogue(tiny):
    model, tokenizer = tiny
    name, question = "我叫小明", "我叫什么名字？"
    unknown, _ = model.chat(tokenizer, question, do_sample=False)
    assert run_chat(stdin=f"{name}\n{question}\n").strip().endswith("\n你叫小明。") and "小明" not in unknown
    assert run_chat(stdin=f"{name}\nclear\n{question}\n").strip().endswith(f"\n{unknown}")


def test_seed_gives_the_same_answer(monkeypatch, capsys):
    answers = []
    for seed in ("1", "1", "2", "3"):
        options = ["--temperature", "2", "--seed", seed, "--max-length", "60", "--prompt", "Tell me a story."]
        monkeypatch.setattr(sys, "argv", ["cli_chat", *options])
        cli_chat.main()
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and len(set(answers)) == 3


def test_query_that_is_too_long_is_said_and_the_dialogue_goes_on():
    output = run_chat(stdin="word " * 3000 + "\n你好\n")
    assert "Shorten it" in output and len(output.strip().splitlines()) >= 2


def test_interrupt_keeps_the_dialogue(tiny, monkeypatch, capsys):
    """Ctrl-C in the middle of an answer: what was shown is in the history, and the next round goes on from it."""
    printed = []

    def print_and_interrupt(text="", *args, **kwargs):
        printed.append(text)
        if len(printed) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "print", print_and_interrupt, raising=False)
    model, tokenizer = tiny
    history, cache = cli_chat.stream_answer(model, tokenizer, "Tell me a story.", [], None, do_sample=False)
    assert history == [("Tell me a story.", "".join(printed[:4]))]
    printed.extend([""] * 10)
    history, cache = cli_chat.stream_answer(model, tokenizer, "Who are you?", history, cache, do_sample=False)
    assert len(history) == 2 and history[1][1] == "".join(printed[14:]).strip()
    assert cache.chat_record.rounds == history


@pytest.mark.parametrize(
    "args, message",
    [
        (["--model", "no/such/folder"], "--model no/such/folder: There is no folder no/such/folder"),
        (["--model", "docs"], "--model docs: it has no config.json"),
        (["--device", "cuda:7"], "--device cuda:7"),
        (["--device", "toaster"], "--device toaster"),
        (["--temperature", "-1"], "-1: must be at least 0"),
        (["--top-p", "0"], "0: must be above 0 and at most 1"),
        (["--max-length", "0"], "0: must be at least 1"),
        (["--quantization", "int3"], "invalid choice: 'int3'"),
        (["--device", "meta"], "--device meta"),
        (["--seed", "9" * 25], "at most"),
        (["--prompt", "word " * 3000], "Shorten it"),
    ],
)
def test_bad_options_are_one_line(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cli_chat", *args])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit:
        cli_chat.main()
    said = capsys.readouterr().err if exit.value.code == 2 else str(exit.value)  # argparse's exit, or ours
    assert message in said.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "options, dtype",
    [([], torch.float32), (["--dtype", "bfloat16"], torch.bfloat16), (["--device", "cpu"], torch.float32)],
)
def test_dtype_of_the_weights(options, dtype):
    """On a CPU by default float32, whatever the checkpoint's: float16, here."""
    if not options and torch.accelerator.is_available():
        dtype = torch.float16
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    assert load_model(parser.parse_args(options))[0].dtype == dtype


INT8 = ["--quantization", "int8"]


@pytest.mark.parametrize("options", [INT8, ["--model", str(TINY), *INT8], ["--dtype", "bfloat16"]])
def test_loads_as_asked(options, monkeypatch, capsys):
    """In INT8 the small model is stored already."""
    monkeypatch.setattr(sys, "argv", ["cli_chat", "--greedy", "--prompt", "你好", *options])
    cli_chat.main()
    assert "ChatGLM2-Tiny" in capsys.readouterr().out


def test_quantized_weights_are_not_quantized_again(monkeypatch):
    with pytest.raises(
        ValueError, match="are in INT8 already. To have them in the format of quanto, pass the checkpoint"
    ):
        checkpoint.load(
            AutoModel, STORED, quantization_config=QuantoConfig(weights="int4")
        )  # as training.lora asks for nf4
    monkeypatch.setattr(sys, "argv", ["cli_chat", "--prompt", "hi", "--quantization", "int4"])
    with pytest.raises(
        SystemExit, match="are in INT8 already. To have them in INT4, pass the checkpoint that they were made"
    ):
        cli_chat.main()


def change_json(name: str, **fields):
    """Changes fields of a JSON file of a checkpoint."""
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **fields}))


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def change_weight(change):
    """Changes the weights, a mapping of names to tensors."""

    def rewrite(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return rewrite


def rename_to_shard(index: str):
    def rename(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(index)

    return rename


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1_000_000])


HEAD = "transformer.output_layer.weight"
DAMAGES = {
    "cut weights": (cut, "cannot be loaded: SafetensorError"),
    "no weights": (remove("model.safetensors"), "There are no weights in"),
    "missing weight": (change_weight(lambda w: w.pop(HEAD)), f"lacks {HEAD}, which would be random"),
    "another shape": (change_weight(lambda w: w.update({HEAD: w[HEAD][:9].clone()})), r"is \[9, 384\]; config.json says"),
    "index of no files": (rename_to_shard('{"weight_map": 5}'), "index.json: weight_map must be an object .* got 5"),
    "index of other folders": (rename_to_shard('{"weight_map": {"a": "../x"}}'), "index.json: weight_map must be an object"),
    "shard that is missing": (rename_to_shard('{"weight_map": {"a": "x.safetensors"}}'), "lacks x.safetensors of the files"),
    "list": (write("config.json", "[]"), "config.json must hold a JSON object, got list"),
    "empty": (write("config.json", ""), "config.json is empty"),
    "number as text": (change_json("config.json", num_layers="2"), "config.json: .*'num_layers' expected int, got str"),
    "quantization": (change_json("config.json", quantization_config=[1]), r"config.json: quantization_config must be an object, got \[1\]"),
    "dtype": (change_json("config.json", torch_dtype="evil"), "config.json: torch_dtype must name a type of torch"),
    "architectures": (change_json("config.json", architectures="x"), "config.json: architectures must be a list, got 'x'"),
    "auto_map": (change_json("config.json", auto_map=[1]), r"config.json: auto_map must be an object, got \[1\]"),
    "RoPE": (change_json("config.json", rope_parameters=[1]), "config.json: .*rope_parameters"),
    "another model": (change_json("config.json", model_type="llama"), "config.json: model_type is 'llama'"),
    "tokenizer settings": (write("tokenizer_config.json", "{"), "tokenizer_config.json is not JSON"),
    "no tokenizer": (remove("tokenizer.model"), "tokenizer.model is missing.* Copy it there"),
    "padding side": (change_json("tokenizer_config.json", padding_side=5), "The tokenizer of .* cannot be loaded from tokenizer_config.json"),
    "generation settings": (write("generation_config.json", "[]"), "generation_config.json must hold a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_one_line(damage, tmp_path, monkeypatch, capsys):
    """Which names the file, and the field; nothing is answered with weights that are random."""
    for path in TINY.glob("[!.]*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change, message = DAMAGES[damage]
    change(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli_chat", "--model", str(tmp_path), "--prompt", "hi"])
    with pytest.raises(SystemExit, match=f"^--model {tmp_path}: .*{message}") as exit:
        cli_chat.main()
    assert len(str(exit.value).splitlines()) == 1 and capsys.readouterr() == ("", "")


def test_least_temperature(tiny):
    model, tokenizer = tiny
    assert model.chat(tokenizer, "你好", temperature=1e-300)[0] == model.chat(tokenizer, "你好", do_sample=False)[0]


def run_shell(command: str, stdin: bytes | None = None, **environment):
    """Runs the chat by a line of the shell, in which CHAT stands for it."""
    command = command.replace("CHAT", shlex.join(CHAT))
    environment = {**os.environ, **environment}
    return subprocess.run(command, shell=True, input=stdin, capture_output=True, cwd=ROOT, timeout=120, env=environment)


def test_reader_that_leaves():
    process = subprocess.Popen(CHAT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    process.stdin.write("你好\nWho are you?\n".encode())
    process.stdin.close()
    assert process.wait(120) == 1 and process.stderr.read() == b""


@pytest.mark.parametrize(
    "command, message",
    [
        ("CHAT --prompt 你好 > /dev/full", b"No space left on device"),
        ("CHAT --prompt 你好 >&-", b"The standard output is closed"),
        ("CHAT <&-", b"The standard input is closed. Pass the query with --prompt"),
    ],
)
def test_output_that_cannot_be_written_is_one_line(command, message):
    run = run_shell(command)
    assert run.returncode == 1 and message in run.stderr and run.stderr.count(b"\n") == 1, run.stderr


def test_output_that_cannot_be_encoded():
    run = run_shell("CHAT --prompt 你好", PYTHONIOENCODING="ascii")
    assert run.returncode == 0 and b"ChatGLM2-Tiny" in run.stdout


def test_input_in_another_encoding_is_not_answered(tiny):
    """Nor guessed; the lines in UTF-8 beside it are answered."""
    model, tokenizer = tiny
    expected, _ = model.chat(tokenizer, "你好", do_sample=False)
    run = run_shell("CHAT", "你好吗\n".encode("gb18030") + "你好\n".encode())
    assert run.stdout.decode().strip() == expected and run.returncode == 1
    said = run.stderr.decode().splitlines()
    assert said[0] == "Line 1 of the input is not UTF-8, and is not answered."
    assert "1 lines of the input are not UTF-8. Convert them, for example by iconv" in said[1] and len(said) == 2


@pytest.mark.parametrize(
    "stdin, environment",
    [
        ("\ufeff你好\n".encode(), {}),
        ("你好\n".encode(), {"LC_ALL": "C"}),
        ("你好\r\n".encode(), {}),
        ("你好".encode("gb18030"), {"PYTHONIOENCODING": "gb18030"}),
    ],
    ids=["byte order mark", "locale C", "lines of Windows", "another encoding that is set"],
)
def test_encodings_of_the_input(tiny, stdin, environment):
    model, tokenizer = tiny
    expected, _ = model.chat(tokenizer, "你好", do_sample=False)
    run = run_shell("CHAT", stdin, **environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.decode(environment.get("PYTHONIOENCODING", "utf-8")).strip() == expected


class Terminal:
    """A program in a terminal of 80 columns."""

    def __init__(self, command, **environment):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ.update(TERM="xterm", COLUMNS="80", LINES="24", **environment)
            os.execv(command[0], command)
        self.output, self.decoder = "", codecs.getincrementaldecoder("utf-8")()

    def read_until(self, text: str, timeout: float = 90) -> str:
        """Returns what was shown up to `text`."""
        end = time.monotonic() + timeout
        while text not in self.output:
            assert time.monotonic() < end, self.output
            if select.select([self.fd], [], [], 1)[0]:
                self.output += self.decoder.decode(os.read(self.fd, 65536))
        before, self.output = self.output.split(text, 1)
        return before

    def write(self, text: str):
        os.write(self.fd, text.encode())


@pytest.mark.parametrize("language", ["C.UTF-8", "C"])
def test_terminal(language):
    """In a terminal: greeting, an answer, Ctrl-C in the middle of one, the dialogue that goes on, clear, stop."""
    session = Terminal([*CHAT], LC_ALL=language)
    try:
        session.read_until("用户：")
        session.write("你好\n")
        assert "ChatGLM2-Tiny" in session.read_until("用户：")
        session.write("Tell me a story.\n")
        session.read_until("ChatGLM：")
        session.read_until(" ")  # after the first word
        os.kill(session.pid, signal.SIGINT)
        session.read_until("用户：")
        session.write("clear\n")
        session.read_until("用户：")
        session.write("Who are you?\n")
        assert "ChatGLM2-Tiny" in session.read_until("用户：")
        session.write("stop\n")
        assert os.waitpid(session.pid, 0)[1] == 0
    finally:
        os.close(session.fd)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signal_leaves_the_cursor_shown(name):
    pytest.importorskip("rich")
    session = Terminal([*CHAT], LC_ALL="C.UTF-8")
    try:
        session.read_until("用户：")
        session.write("Tell me a story.\n")
        session.read_until("\x1b[?25l")  # hides the cursor
        session.read_until("Once upon")
        os.kill(session.pid, getattr(signal, name))
        session.read_until("\x1b[?25h")  # shows it
        assert os.waitstatus_to_exitcode(os.waitpid(session.pid, 0)[1]) == 128 + getattr(signal, name)
    finally:
        os.close(session.fd)


TYPED = [
    "$(shell touch x)", "$(touch x)", "`touch x`", "$HOME", "$$", "${HOME} %d %s", "-5+3=?", "--greedy", "a=b", "'\"; touch x #",
    "a\\nb\\", "你好！", "two  blanks", "first\nsecond", "*", "!!", "~", "a\tb", "%",
]  # fmt: skip


@pytest.fixture
def chat_by_make(tmp_path):
    """Runs `make chat` with an interpreter that says what it is given: `chat_by_make("PROMPT=hi")`."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "setup.cfg", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text("#!/bin/sh\nfor word; do printf '%s\\0' \"$word\"; done\n")
    python.chmod(0o755)
    for name in ("installed", "installed-chat"):
        (tmp_path / ".venv" / name).touch()

    def run(*arguments, **environment) -> list[str]:
        command = ["make", "--silent", "chat", *arguments]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, env={**os.environ, **environment})
        assert run.returncode == 0 and run.stderr == b"", run.stderr
        assert not (tmp_path / "x").exists()  # which some of what is typed would make if it was run
        return run.stdout.decode().split("\0")[:-1]

    return run


@pytest.mark.parametrize("text", TYPED)
def test_what_is_typed_after_make_arrives(chat_by_make, text):
    """Nothing in it is run or expanded, on the command line and from the environment."""
    for words in (chat_by_make(f"PROMPT={text}"), chat_by_make(PROMPT=text)):
        assert words[-1] == f"--prompt={text}" and words[:2] == ["-m", "examples.cli_chat"]
    assert f"--model={text}" in chat_by_make(f"MODEL={text}")


def test_make_chat_has_its_options(chat_by_make):
    assert chat_by_make() == ["-m", "examples.cli_chat", "--model=checkpoints/tiny", "--temperature", "0.3"]
    assert chat_by_make("MODEL=other", "ARGS=--greedy --seed 3")[2:] == ["--model=other", "--greedy", "--seed", "3"]


def test_markdown_is_rendered(monkeypatch):
    """Tables and code as such, wide characters in columns that meet, lines that end where they end, < as it is."""
    console = pytest.importorskip("rich.console")
    text = "一行\na < b <div>\n\n| 名 | n |\n|---|---|\n| 中文 | 1 |\n\n```html\n<p>\n```\n\x1b[2J"
    recorded = console.Console(width=40, record=True, file=open(os.devnull, "w"), force_terminal=True)
    monkeypatch.setattr(terminal, "Console", lambda: recorded)
    with terminal.MarkdownDisplay() as display:
        display.show(text)
        assert "\x1b" not in display.text  # which would command the terminal
    lines = [line.strip() for line in recorded.export_text().splitlines()]
    # The first line comes after what was drawn before it, as the control codes that erase that are no text.
    assert (
        any(line.endswith("一行") for line in lines)
        and "a < b <div>" in lines
        and "<p>" in lines
        and "中文  1" in lines
    )
    assert "```html" not in lines and "\x1b[2J" not in recorded.export_text()


# The small model itself


def test_tiny_is_small():
    assert (STORED / "model.safetensors").stat().st_size <= 20_000_000
    for path in STORED.glob("*.py"):
        assert path.is_symlink() and path.resolve() == ROOT / path.name  # one copy of the code


@pytest.mark.parametrize(
    "query, expected", [("你好", "ChatGLM2-Tiny"), ("Who are you?", "ChatGLM2-Tiny"), ("你是谁？", "ChatGLM2-Tiny")]
)
def test_tiny_knows_who_it_is(tiny, query, expected):
    model, tokenizer = tiny
    assert expected in model.chat(tokenizer, query, do_sample=False)[0]


def test_tiny_ends_its_answers(tiny):
    model, tokenizer = tiny
    queries = ["你好", "hello", "Who are you?", "What is AI?", "Translate into Chinese: I love you."]
    responses, _ = model.chat(tokenizer, queries, do_sample=False, max_new_tokens=200)
    for query, response in zip(queries, responses):
        assert 0 < len(tokenizer.encode(response)) < 150, (query, response)


def test_tiny_batches_and_caches(tiny):
    """On trained weights: batched = single, and rounds with a cache = without, for answers that are not one token long."""
    model, tokenizer = tiny
    queries = ["你好", "Who are you?"]
    singles = [model.chat(tokenizer, query, do_sample=False)[0] for query in queries]
    assert model.chat(tokenizer, queries, do_sample=False)[0] == singles
    _, history, cache = model.chat(tokenizer, queries[0], do_sample=False, return_past_key_values=True)
    response, _, cache = model.chat(
        tokenizer, queries[1], history, do_sample=False, past_key_values=cache, return_past_key_values=True
    )
    ids = cache.chat_record.ids
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    answer = tokenizer.encode(response, add_special_tokens=False)
    begin = len(ids) - len(answer) - 1
    assert logits[begin - 1 : -1].argmax(-1).tolist() == ids[begin:]
