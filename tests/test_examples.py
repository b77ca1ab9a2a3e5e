"""What the README shows a new user: the terminal chat, with the small model that the repository comes with."""

import codecs
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from conftest import ROOT, TINY
from examples import cli_chat


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

    monkeypatch.setattr(cli_chat, "print", print_and_interrupt, raising=False)
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
        (["--model", "no/such/folder"], "--model no/such/folder: no model there"),
        (["--model", "docs"], "--model docs: no model there"),
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


@pytest.mark.parametrize("options", [["--quantization", "int8"], ["--dtype", "bfloat16"]])
def test_loads_as_asked(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cli_chat", "--greedy", "--prompt", "你好", *options])
    cli_chat.main()
    assert "ChatGLM2-Tiny" in capsys.readouterr().out


def test_damaged_checkpoints_are_one_line(tmp_path, monkeypatch):
    for path in TINY.glob("[!.]*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(sys, "argv", ["cli_chat", "--model", str(tmp_path), "--prompt", "hi"])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    with pytest.raises(SystemExit, match=f"--model {tmp_path}: "):
        cli_chat.main()
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(SystemExit, match="tokenizer.model is missing"):
        cli_chat.main()


def test_least_temperature(tiny):
    model, tokenizer = tiny
    assert model.chat(tokenizer, "你好", temperature=1e-300)[0] == model.chat(tokenizer, "你好", do_sample=False)[0]


def test_reader_that_leaves():
    process = subprocess.Popen(CHAT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    process.stdin.write("你好\nWho are you?\n".encode())
    process.stdin.close()
    assert process.wait(120) == 1 and process.stderr.read() == b""


def test_output_that_cannot_be_encoded():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run([*CHAT, "--prompt", "你好"], capture_output=True, cwd=ROOT, timeout=120, env=environment)
    assert run.returncode == 0 and b"ChatGLM2-Tiny" in run.stdout


def test_input_that_is_not_utf8():
    run = subprocess.run(
        CHAT, input=b"\xff\xfe\n\xe4\xbd\xa0\xe5\xa5\xbd\n", capture_output=True, cwd=ROOT, timeout=120
    )
    assert run.returncode == 0 and "ChatGLM2-Tiny" in run.stdout.decode()


class Terminal:
    """A program in a terminal of 80 columns."""

    def __init__(self, command):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ.update(TERM="xterm", COLUMNS="80", LINES="24", PYTHONIOENCODING="utf-8")
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


def test_terminal(tmp_path):
    """In a terminal: greeting, an answer, Ctrl-C in the middle of one, the dialogue that goes on, clear, stop."""
    terminal = Terminal([*CHAT])
    try:
        terminal.read_until("用户：")
        terminal.write("你好\n")
        assert "ChatGLM2-Tiny" in terminal.read_until("用户：")
        terminal.write("Tell me a story.\n")
        terminal.read_until("ChatGLM：")
        time.sleep(0.3)
        os.kill(terminal.pid, signal.SIGINT)
        terminal.read_until("用户：")
        terminal.write("clear\n")
        terminal.read_until("用户：")
        terminal.write("Who are you?\n")
        assert "ChatGLM2-Tiny" in terminal.read_until("用户：")
        terminal.write("stop\n")
        assert os.waitpid(terminal.pid, 0)[1] == 0
    finally:
        os.close(terminal.fd)


def test_markdown_is_rendered(monkeypatch):
    """Tables and code as such, wide characters in columns that meet, lines that end where they end, < as it is."""
    console = pytest.importorskip("rich.console")
    text = "一行\na < b <div>\n\n| 名 | n |\n|---|---|\n| 中文 | 1 |\n\n```html\n<p>\n```\n\x1b[2J"
    recorded = console.Console(width=40, record=True, file=open(os.devnull, "w"), force_terminal=True)
    monkeypatch.setattr(cli_chat, "Console", lambda: recorded)
    with cli_chat.MarkdownDisplay() as display:
        display.show(text)
    lines = [line.strip() for line in recorded.export_text().splitlines()]
    assert "一行" in lines and "a < b <div>" in lines and "<p>" in lines and "中文  1" in lines
    assert "```html" not in lines and "\x1b[2J" not in recorded.export_text()


# The small model itself


def test_tiny_is_small():
    assert (TINY / "model.safetensors").stat().st_size <= 20_000_000
    for path in TINY.glob("*.py"):
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
