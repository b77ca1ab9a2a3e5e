"""Shows answers: as Markdown in a terminal (with rich), elsewhere as plain text."""

import itertools
import os
import re
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


try:
    import termios
except ImportError:  # Windows
    termios = None

try:
    from markdown_it import MarkdownIt  # what rich reads Markdown with
    from rich.cells import chop_cells
    from rich.console import Console
    from rich.control import Control
    from rich.live import Live
    from rich.markdown import Markdown
    from rich.segment import ControlType, Segment
except ImportError:
    Console = None

SECONDS_BETWEEN_DRAWINGS = 0.08


def display_for_output():
    """Returns the display for the standard output: Markdown in a terminal if rich is installed, else plain text."""
    if not sys.stdout.isatty():
        return PlainDisplay()
    return PlainDisplay(printable) if Console is None else MarkdownDisplay()


def printable(text: str) -> str:
    """Returns a text without control characters, which the terminal would execute."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


class PlainDisplay:
    """
    Prints answers as they grow.

    Args:
        clean: Applied to the answer before it is printed.
    """

    def __init__(self, clean=str):
        self.clean = clean

    def __enter__(self):
        self.shown = ""
        return self

    def show(self, response: str):
        # What was shown stays: only what is added to it is printed.
        response = self.clean(response)
        print(response[len(self.shown) :], end="", flush=True)
        self.shown = response

    def interrupted(self):
        print(" …", end="")

    def __exit__(self, kind, *exception):
        if kind is None or not issubclass(kind, OSError):  # such as that of a full disk
            print()


class MarkdownDisplay:
    """
    Shows answers as Markdown while they grow.

    A block (a paragraph, a list item, a table) is printed once it is complete. The last, incomplete block is redrawn below
    it as it grows.
    """

    def __enter__(self):
        self.console = Console()
        self.text, self.printed, self.is_spaced = "", 0, False  # the answer, and how many of its characters are printed
        self.last, self.width, self.drawn_at = Block("", False), self.console.width, 0.0
        with ExitStack() as stack:
            stack.enter_context(without_echo())
            live = Live(
                self.last, console=self.console, auto_refresh=False, transient=True, vertical_overflow="visible"
            )
            self.live = stack.enter_context(live)
            self.opened = stack.pop_all()
        return self

    def show(self, response: str):
        self.text = printable(response)
        if time.monotonic() - self.drawn_at > SECONDS_BETWEEN_DRAWINGS:
            with delayed_interrupt():
                self.draw()

    def interrupted(self):
        self.text += " …"

    def draw(self, is_complete: bool = False):
        blocks = split_blocks(self.text[self.printed :])
        blocks[0] = (blocks[0][0], self.is_spaced)
        last = ("", False) if is_complete else blocks.pop()
        with self.console:  # writes all of it at once
            self.erase_wrapped_rows()
            self.last = Block(*last, is_growing=True)
            self.live.update(self.last, refresh=True)
            for block in blocks:
                self.console.print(Block(*block), end="")
        self.printed += sum(len(text) for text, _ in blocks)
        self.is_spaced = last[1]
        self.width, self.drawn_at = self.console.width, time.monotonic()

    def erase_wrapped_rows(self):
        """Erases rows that rich does not know of: a terminal that becomes narrower wraps its lines."""
        width = self.console.width
        if width < self.width:
            added = sum(len(chop_cells(line, width)) - 1 for line in self.last.lines if line)
            up = ((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)) * added
            self.console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), *up))

    def __exit__(self, *exception):
        with self.opened:
            if self.text[self.printed :].strip():
                with delayed_interrupt():
                    self.draw(is_complete=True)


def read_markdown(text: str) -> list:
    """Returns the Markdown tokens of an answer. As in a chat, line breaks are kept, and < is an ordinary character."""
    reader = MarkdownIt(options_update={"html": False}).enable("table")  # rich would leave HTML out
    return reader.parse(text.replace("\n", "  \n"))


def split_blocks(text: str) -> list[tuple[str, bool]]:
    """Splits Markdown into blocks and lists into items. Returns (block, whether an empty line comes before it)."""
    starts = {}
    for token in read_markdown(text):
        if token.map and (token.level == 0 or (token.level == 1 and token.type == "list_item_open")):
            starts.setdefault(token.map[0], token.level == 0)
    lines = re.split("(?<=\n)", text)
    numbers = [0, *list(starts)[1:], len(lines)]
    return [("".join(lines[start:end]), starts.get(start, False)) for start, end in itertools.pairwise(numbers)]


class Block:
    """
    A block of Markdown, without spaces at the end of its lines: a narrower window would wrap them into empty lines.

    Args:
        text: The block.
        is_spaced: Whether an empty line is before it.
        is_growing: Whether it is the last one, of which the end is shown, a third of the window at most. More would
            leave the window when that becomes narrower, and lines that have left it cannot be erased.
    """

    def __init__(self, text: str, is_spaced: bool, is_growing: bool = False):
        self.markdown = Markdown("")
        self.markdown.parsed = read_markdown(text)
        self.is_spaced, self.is_growing = is_spaced, is_growing
        self.lines = []  # the text of what was rendered last

    def __rich_console__(self, console, options):
        lines = [trim(line) for line in console.render_lines(self.markdown, options, pad=False)]
        filled = [number for number, line in enumerate(lines) if line]
        lines = lines[filled[0] : filled[-1] + 1] if filled else [[]]
        if self.is_spaced:
            lines.insert(0, [])
        if self.is_growing:
            lines = lines[-max(console.height // 3, 1) :]
        self.lines = ["".join(segment.text for segment in line) for line in lines]
        for line in lines:
            yield from line
            yield Segment.line()


def trim(line: list) -> list:
    """Returns the segments of a line without spaces at its end, unless they have a background."""
    line = list(line)
    while line and not line[-1].text.strip() and not (line[-1].style and line[-1].style.bgcolor):
        line.pop()
    if line and not (line[-1].style and line[-1].style.bgcolor):
        line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
    return line


@contextmanager
def without_echo() -> Iterator[None]:
    """Hides what is typed meanwhile (for example ^C), which would disturb the drawing. The next prompt reads it."""
    # From the background, setting it would stop the program.
    if termios is None or not sys.stdout.isatty() or os.tcgetpgrp(sys.stdout.fileno()) != os.getpgrp():
        yield
        return
    terminal = sys.stdout.fileno()
    settings = termios.tcgetattr(terminal)
    quiet = [*settings]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, settings)


@contextmanager
def delayed_interrupt() -> Iterator[None]:
    """Delays Ctrl-C until drawing has finished."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        signal.raise_signal(signal.SIGINT)
