"""The chat in a terminal, in small windows of tmux: what stands in the window, and what in the lines that have left it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from conftest import ROOT


pytest.importorskip("rich")
from examples import terminal  # noqa: E402


pytestmark = [
    pytest.mark.xdist_group("terminal"),
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]

# Answers a text, eight characters at a time; at a \v it makes a file "paused", and waits until
# that is removed. To other queries it says what it was asked.
SCRIPTED = """
import os, sys, time
from examples import cli_chat

class Model:
    def stream_chat(self, tokenizer, query, history, past_key_values=None, return_past_key_values=True, **options):
        text = open(sys.argv[1]).read() if query == "go" else f"{len(history)} earlier, asked {query!r}"
        for end in range(8, len(text) + 8, 8):
            yield text[:end], [*history, (query, text[:end])], None
            time.sleep(0.004)
            if "\\v" in text[end - 8 : end]:
                open("paused", "w").close()
                while os.path.exists("paused"):
                    time.sleep(0.01)

cli_chat.chat(Model(), None, "ChatGLM2 · scripted")
"""
ITEMS = "".join(f"{i}. item number {i} with words that wrap in small windows 中文也会换行\n" for i in range(10, 40))
PARAGRAPHS = "# A title\n\nfirst " + "and on " * 8 + "\n\n| a | b |\n|---|---|\n| 中文 | 1 |\n\n" + ITEMS


class Window:
    """A shell in tmux."""

    def __init__(self, folder, columns: int, rows: int):
        self.tmux = ["tmux", "-f", "/dev/null", "-S", str(folder / "tmux")]
        environment = ["-e", "LC_ALL=C.UTF-8", "-e", f"PYTHONPATH={ROOT}"]
        size = ["-x", str(columns), "-y", str(rows)]
        self.do(
            "new-session",
            "-d",
            *size,
            "-c",
            str(folder),
            *environment,
            "env -u COLUMNS -u LINES bash --norc --noprofile",
        )
        self.wait_for("[$#]")

    def do(self, *command: str) -> str:
        return subprocess.run([*self.tmux, *command], check=True, capture_output=True, text=True).stdout

    def type(self, *keys: str):
        """Types keys, by their names in tmux, or text."""
        self.do("send-keys", *keys)

    def seen(self) -> str:
        return self.do("capture-pane", "-p").rstrip()

    def all_lines(self) -> str:
        """With those that have left the window at its top"""
        return self.do("capture-pane", "-p", "-S", "-")

    def wait_for(self, pattern: str, seconds: float = 120):
        end = time.monotonic() + seconds
        while not re.search(pattern, shown := self.seen()):
            assert time.monotonic() < end, shown
            time.sleep(0.02)

    def run(self, *command: str):
        self.type("-l", "clear; " + shlex.join(command) + "; echo code $?")
        self.type("Enter")

    def ask(self, query: str):
        self.wait_for("用户：$")
        self.type("-l", query)
        self.type("Enter")


@pytest.fixture
def open_window(tmp_path):
    windows = []

    def open(columns: int = 40, rows: int = 10, answer: str = ITEMS) -> Window:
        windows.append(Window(tmp_path, columns, rows))
        (tmp_path / "answer.md").write_text(answer, encoding="utf-8")
        (tmp_path / "scripted.py").write_text(SCRIPTED, encoding="utf-8")
        windows[-1].run(sys.executable, "scripted.py", "answer.md")
        return windows[-1]

    yield open
    for window in windows:
        window.do("kill-server")


def item_numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^ *\d+ item number (\d+)", text, flags=re.M)]


def test_answer_that_is_taller_than_the_window_shows_its_end(open_window):
    window = open_window()
    window.ask("go")
    window.wait_for(r"item number [23]\d")  # while it grows
    assert "用户" not in window.seen()
    window.wait_for("用户：$")
    assert item_numbers(window.all_lines()) == list(range(10, 40))
    assert window.all_lines().count("ChatGLM：") == 1


def test_paragraph_that_is_taller_than_the_window_shows_its_end(open_window):
    window = open_window(answer=" ".join(f"w{i}" for i in range(300)))
    window.ask("go")
    window.wait_for(r"w[12]\d\d")
    window.wait_for("用户：$")
    assert re.findall(r"w\d+", window.all_lines()) == [f"w{i}" for i in range(300)]


def test_resizing_leaves_no_pieces_of_lines(open_window, tmp_path):
    """While nothing is drawn: tmux resizes its lines a quarter of a second before it tells the program."""
    sizes = [(25, 8), (60, 12), (33, 24), (40, 9)]
    text = "\v and on\n".join(f"{PARAGRAPHS}stop{i} and {'a line that wraps ' * 4}" for i in range(len(sizes) + 1))
    window = open_window(answer=text)
    window.ask("go")
    for columns, rows in sizes:
        while not (tmp_path / "paused").exists():
            time.sleep(0.02)
        time.sleep(0.5)  # until tmux has read what was drawn
        window.do("resize-window", "-x", str(columns), "-y", str(rows))
        time.sleep(1.5)
        (tmp_path / "paused").unlink()
    window.wait_for("用户：$")
    shown, expected = letters(window.all_lines().split("ChatGLM：")[1].split("用户：")[0]), letters(text)
    same = len(os.path.commonprefix([shown, expected]))
    assert shown == expected, (shown[same - 40 : same + 80], expected[same - 40 : same + 80])


def letters(text: str) -> str:
    return "".join(re.findall("[A-Za-z\u4e00-\u9fff]", text))


def test_interrupted_answer_is_shown_once(open_window):
    window = open_window(answer="The first line of it is longer than forty columns are.\n\n" + ITEMS)
    window.ask("go")
    window.wait_for(r"item number [23]\d")
    window.type("C-c")
    window.wait_for("用户：$")
    shown = window.all_lines()
    assert shown.count("The first line") == 1 and shown.count("…\n") == 1 and "^C" not in shown
    numbers = item_numbers(shown)
    assert numbers == list(range(10, numbers[-1] + 1)) and numbers[-1] < 39
    window.ask("again")
    window.wait_for("1 earlier, asked 'again'")  # the dialogue goes on


def test_keys_typed_during_an_answer_wait_for_the_prompt(open_window):
    window = open_window()
    window.ask("go")
    window.wait_for(r"item number [23]\d")
    window.type("-l", "typed early")
    window.type("Enter")
    window.wait_for("asked 'typed early'")
    assert item_numbers(window.all_lines()) == list(range(10, 40))


@pytest.mark.parametrize(
    "keys", [["C-c"], ["C-d"], ["/exit", "Enter"], ["exit", "Enter"], ["stop", "Enter"]], ids=" ".join
)
def test_ways_to_end(open_window, keys):
    window = open_window()
    window.wait_for("用户：$")
    window.type(*keys)
    window.wait_for("code 0")
    assert "Traceback" not in window.all_lines()


@pytest.mark.parametrize("seconds", [0.5, 2, 4])
def test_interrupt_while_loading_is_quiet(open_window, seconds):
    window = open_window(columns=100)
    window.wait_for("用户：$")
    window.type("C-d")
    window.wait_for("code 0")
    window.run(sys.executable, "-m", "examples.cli_chat")
    time.sleep(seconds)
    window.type("C-c")
    # 0: it was at the prompt already. Nothing but the shell's prompt: Python ended by the signal itself, as it does for an
    # interrupt within `exec`, which dataclasses use.
    window.wait_for("code (130|0)|[#$]$")
    assert "Traceback" not in window.all_lines() and "Error" not in window.all_lines()


def test_commands(open_window):
    window = open_window()
    window.ask("/help")
    window.wait_for("/clear +清空对话")
    window.ask("one")
    window.wait_for("0 earlier, asked 'one'")
    window.ask("two")
    window.wait_for("1 earlier, asked 'two'")
    window.ask("/clear")
    window.ask("three")
    window.wait_for("0 earlier, asked 'three'")


def test_input_of_several_lines(open_window):
    window = open_window(columns=80)
    for line in ('"""first', "second", 'third"""'):
        window.type("-l", line)
        window.type("Enter")
    window.wait_for(r"asked 'first\\nsecond\\nthird'")
    window.wait_for("用户：$")
    window.type('"""', "Enter", "draft", "Enter")
    window.wait_for("draft\n  …$")
    window.type("C-c")  # gives up what is typed, and not the chat
    window.ask("after")
    window.wait_for("1 earlier, asked 'after'")


def test_several_lines_that_are_pasted_are_one_query(open_window):
    window = open_window(columns=80)
    window.wait_for("用户：$")
    window.do("set-buffer", "first\nsecond")
    window.do("paste-buffer", "-p")
    window.wait_for("second")
    window.type("Enter")
    window.wait_for(r"0 earlier, asked 'first\\nsecond'")


def test_greeting_names_the_model(open_window):
    window = open_window(columns=80)
    window.wait_for("用户：$")
    window.type("C-d")
    window.wait_for("code 0")
    window.run(sys.executable, "-m", "examples.cli_chat", "--device", "cpu", "--quantization", "int8")
    window.wait_for(r"ChatGLM2 · tiny · INT8, \d+\.\d MB, cpu · 2,048 tokens")
    window.wait_for("Ctrl-C .*stop an answer")


# Without a terminal


@pytest.mark.parametrize(
    "text, blocks",
    [
        ("", [("", False)]),
        ("one\ntwo", [("one\ntwo", True)]),
        ("one\n\ntwo\n", [("one\n\n", True), ("two\n", True)]),
        ("- a\n  - b\n- c\n\nd", [("- a\n  - b\n", True), ("- c\n\n", False), ("d", True)]),
        ("```\n- a\n\nb\n", [("```\n- a\n\nb\n", True)]),
        ("\n\na\u2028b\x0c\n# c", [("\n\na\u2028b\x0c\n", False), ("# c", True)]),
    ],
)
def test_blocks_of_markdown(text, blocks):
    assert terminal.split_blocks(text) == blocks
