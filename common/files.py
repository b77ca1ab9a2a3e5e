"""Writes files and folders completely or not at all, and by one process at a time."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError


# The hidden folder in which an output is written, beside the output or, if that is an empty folder, in it
UNFINISHED = ".unfinished"
LOCK = ".lock"


def read_json(path: Path, remedy: str = "Download it again.") -> dict:
    """
    Returns the object in a JSON file.

    Raises:
        ValueError: if the file is missing, empty, truncated, not UTF-8 or not an object. The message names the
            file and ends with `remedy`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing. {remedy}") from None
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON ({error})" if path.stat().st_size else "is empty"
        raise ValueError(f"{path} {problem}. {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}. {remedy}")
    return content


def write_json(path: Path, value):
    """Writes a JSON file completely or not at all. Creates its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


@contextmanager
def only_run(folder: Path, option: str) -> Iterator[None]:
    """
    Locks a folder for one process. The lock ends with the process, even if that is killed.

    Raises:
        ValueError: if another process uses the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"Another process is writing to {folder}. Wait until it ends, or choose another {option}."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """
    Yields a folder to write to. It becomes `output` at the end; after an error it is removed.

    Raises:
        ValueError: if `output` exists and is not an empty folder, or if another process is writing it.
        OSError: if it cannot be written.
    """
    output = end_of_links(output)
    if output.exists() and not (output.is_dir() and {path.name for path in output.iterdir()} <= {UNFINISHED}):
        raise ValueError(f"{output} exists already. Give another --output, or remove it.")
    is_there = output.is_dir()
    with unfinished_folder(output / UNFINISHED if is_there else hidden(output), output) as folder:
        yield folder
        if is_there:  # A mount point cannot be replaced. config.json comes last, as nothing loads without it.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
                path.rename(output / path.name)
        else:
            folder.rename(output)


@contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """As `new_folder`, for a file."""
    output = end_of_links(output)
    if output.exists():
        raise ValueError(f"{output} exists already. Give another --output, or remove it.")
    with unfinished_folder(hidden(output), output) as folder:
        yield folder / output.name
        (folder / output.name).rename(output)


def end_of_links(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as error:  # before Python 3.13; an OSError since
        raise ValueError(f"{path} is a loop of symbolic links. Choose another --output.") from error


def hidden(output: Path) -> Path:
    return output.with_name(f".{output.name}{UNFINISHED}")


@contextmanager
def unfinished_folder(folder: Path, output: Path) -> Iterator[Path]:
    """Yields a folder in the hidden `folder`, which is removed at the end, with anything that killed processes left there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.glob(f".*{UNFINISHED}"):
        if other != folder:
            remove_left_over(other)
    with only_run(folder, "--output"):
        files = folder / "files"
        if files.exists():
            say_removed(files)
        files.mkdir()
        try:
            yield files
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{output} could not be written ({error}). If the disk is full, make room or choose another --output."
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_left_over(folder: Path):
    """Removes an unfinished folder unless its process still runs."""
    if not (folder / LOCK).exists():
        return
    try:
        with only_run(folder, "--output"):
            say_removed(folder)
    except (ValueError, OSError):
        pass  # it is being written, or is another user's


def say_removed(folder: Path):
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    print(f"Removed {size:,} bytes in {folder}, left by an interrupted run.", file=sys.stderr)
