"""Ends commands: an error that the user can fix is one line, not a traceback."""

import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .package import ROOT


# What was typed instead of `python -m MODULE`, set by chatglm2.py
command: str | None = None


@contextmanager
def plain_errors(extra: str):
    """
    Runs a command. An expected error ends it with one line and exit code 1. SIGTERM and SIGHUP end it as Ctrl-C does, so
    that unfinished files are removed.

    Args:
        extra: The extra of setup.cfg with the packages that the command needs.
    """
    ours = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP; if nohup ignores it, it stays ignored
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                ours[number] = signal.signal(number, end)
    try:
        with needs_extra(extra):
            yield
    except (ValueError, OSError, MemoryError, FloatingPointError, SafetensorError) as error:
        raise SystemExit(one_line(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


@contextmanager
def needs_extra(extra: str):
    """Imports the packages of a command. If one is not installed, ends with one line that names the extra."""
    try:
        yield
    except ImportError as error:
        raise SystemExit(f"{one_line(error)}. {how_to_install(extra)}") from error


def how_to_install(extra: str) -> str:
    """Returns the command that installs an extra of setup.cfg from this repository."""
    return f"pip install -e '{'.' if Path.cwd() == ROOT else ROOT}[{extra}]'"


def end(number: int, frame):
    """A signal handler that ends the program with an exception, so that `finally` blocks run."""
    raise SystemExit(128 + number)


def one_line(error: Exception) -> str:
    """Returns the message of an error on one line, after the name of the program."""
    return f"{program_name()}: {' '.join(str(error).split()) or type(error).__name__}"


def program_name() -> str:
    """Returns the name as the user typed it, for example `conversion.to_glm` or `chatglm2 convert to_glm`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return command or (spec.name.removesuffix(".__main__") if spec is not None else "error")
