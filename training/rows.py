"""
Reads rows of data files, and brings them into one of three forms:

- a pair, `{"query": text, "response": text or None, "history": [[query, answer], ...]}`;
- a dialogue, `{"rounds": [[query, answer], ...]}`; an answer of None is missing;
- a document, `{"text": text}`.

`datasets` is not used to read files, because it guesses types: in a CSV file it turns texts into numbers and dates, and `NA` into
nothing.
"""

import csv
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from gzip import BadGzipFile
from itertools import islice
from pathlib import Path
from typing import NamedTuple


FORMATS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
# ShareGPT's names, and those of OpenAI and the chat template
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


class Columns(NamedTuple):
    """The name of each column; None if there is no such column."""

    messages: str | None = None
    text: str | None = None
    prompt: str | None = None
    input: str | None = None
    response: str | None = None
    history: str | None = None
    system: str | None = None


def file_format(path: str) -> str:
    """
    Returns the ending of a file, which decides how it is read: one of `FORMATS`.

    Raises:
        ValueError: if there is no such file, or it has another ending.
    """
    kind = Path(path.lower().removesuffix(".gz")).suffix
    if kind not in FORMATS:
        raise ValueError(
            f"{path}: data files are {', '.join(FORMATS)}, all but .parquet also with .gz. Convert it first."
        )
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}.")
    return kind


def read_file(path: str) -> Iterator[dict]:
    """
    Yields the rows of a file unchanged. Cells of CSV and TSV are always texts.

    Raises:
        ValueError: if the file is missing, not UTF-8, damaged, or not in its format. The message names the line or row.
    """
    kind = file_format(path)
    try:
        if kind == ".parquet":
            yield from parquet_rows(path)
            return
        with gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb") as file:
            lines = decoded(file, path)
            yield from json_rows(lines, path) if kind.startswith(".json") else csv_rows(lines, path, kind)
    except (EOFError, BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def decoded(file: Iterable[bytes], path: str) -> Iterator[str]:
    """Yields the lines of a UTF-8 file, without a byte order mark at the beginning."""
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 in line {number} ({error.reason}). Convert it first.") from error


def json_rows(lines: Iterator[str], path: str) -> Iterator[dict]:
    """Yields the objects of a list, or one object per line."""
    number, first = next(((n, line) for n, line in enumerate(lines, start=1) if line.strip()), (0, ""))
    if first.lstrip().startswith("["):
        rows = enumerate(parse(first + "".join(lines), path), start=1)
        where = "row"
    else:
        found = [(number, first)] if number else []
        rest = ((n, line) for n, line in enumerate(lines, start=number + 1) if line.strip())
        rows = ((n, parse(line, f"{path}, line {n}")) for part in (found, rest) for n, line in part)
        where = "line"
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {where} {number} must be an object with columns, got {row!r:.60}.")
        yield row


def parse(text: str, where: str):
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{where} is not JSON: {error}. A file must have a list of objects, or one object per line."
        ) from error


def csv_rows(lines: Iterator[str], path: str, kind: str) -> Iterator[dict]:
    limit = csv.field_size_limit(2**31 - 1)  # the whole process's: a cell may be a document
    try:
        reader = csv.reader(lines, delimiter="\t" if kind == ".tsv" else ",", strict=True)
        columns = next(reader, None)
        if columns is None:
            return
        if len(set(columns)) < len(columns):
            raise ValueError(f"{path} names a column twice: {', '.join(columns)}.")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(columns):
                raise ValueError(
                    f"{path}, line {reader.line_num} ends a row of {len(cells)} cells, and there are {len(columns)} columns."
                )
            yield dict(zip(columns, cells))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} cannot be read as {kind[1:].upper()}: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def parquet_rows(path: str) -> Iterator[dict]:
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def read_rows(path: str, columns: Columns, limit: int | None = None, identity: tuple = ()) -> Iterator[dict]:
    """
    Yields the rows of a file in the form that `columns` describes.

    Args:
        limit: Read only this many rows, the first ones.
        identity: Not used here. It identifies the state of the file where rows are cached.

    Raises:
        ValueError: as in `read_file`, or if a row cannot be read. The message has the number of the row.
    """
    for number, row in enumerate(islice(read_file(path), limit)):
        yield read_row(row, number, columns)


def read_row(row: dict, number: int, columns: Columns) -> dict:
    """Returns a row, the `number`th from 0, in the form that `columns` describes."""
    try:
        if columns.text:
            return {"text": as_text(cell(row, columns.text), columns.text)}
        return {"rounds": dialogue(row, columns)} if columns.messages else pair(row, columns)
    except ValueError as error:
        raise ValueError(f"Row {number + 1} of the data cannot be read: {error}") from error


def cell(row: dict, column: str):
    if column not in row:
        raise ValueError(f"it has no {column}, but {', '.join(row)}.")
    return row[column]


def as_text(value, what: str) -> str:
    """
    Returns a text, or the joined texts of a list of parts, `{"type": "text", "text": ...}`. None gives the empty text.

    Raises:
        ValueError: if it is something else.
    """
    if isinstance(value, list):
        return "".join(part_text(part, what) for part in value)
    if not isinstance(value, str | None):
        raise ValueError(f"{what} must be a text, got {value!r:.60}.")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has half of a surrogate pair, which is no character: {value!r:.60}.") from error
    return value or ""


def part_text(part, what: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"{what} has a part that is not a text, {part!r:.60}: ChatGLM2 reads texts only.")


def as_list(value, what: str) -> list:
    """Returns a list, also from JSON text as in CSV and TSV. None and empty text give an empty list."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{what} must be a list, as JSON where cells are texts, got {value!r:.60}.") from error
    if value is None or isinstance(value, str):
        return []
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list, got {value!r:.60}.")
    return value


def pair(row: dict, columns: Columns) -> dict:
    query = as_text(cell(row, columns.prompt), columns.prompt)
    if columns.input and (added := as_text(row.get(columns.input), columns.input)).strip():
        query = f"{query}\n{added}"
    response = as_text(cell(row, columns.response), columns.response) if columns.response else None
    history = as_list(row.get(columns.history), columns.history) if columns.history else []
    rounds = [history_round(item, columns.history) for item in history] + [[query, response]]
    begin_with(rounds, row, columns)
    return {"query": rounds[-1][0], "response": response, "history": rounds[:-1]}


def history_round(item, what: str) -> list[str]:
    if not (isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item)):
        raise ValueError(f"{what} must be a list of [query, answer], two texts each, got {item!r:.60} in it.")
    return [as_text(text, what) for text in item]


def dialogue(row: dict, columns: Columns) -> list[list]:
    rounds = to_rounds(as_list(cell(row, columns.messages), columns.messages))
    begin_with(rounds, row, columns)
    return rounds


def begin_with(rounds: list[list], row: dict, columns: Columns):
    """Puts the system message of a row before its first query, as the chat template does."""
    if columns.system and rounds:
        rounds[0] = [as_text(row.get(columns.system), columns.system) + rounds[0][0], rounds[0][1]]


def to_rounds(messages: list) -> list[list]:
    """
    Returns rounds of [query, answer]. If the last query has no answer, it is None. A system message is put before the first
    query, as in the chat template.

    Args:
        messages: List of `{"role": ..., "content": ...}`, or of ShareGPT's `{"from": ..., "value": ...}`.

    Raises:
        ValueError: if messages have another form or role, or do not alternate.
    """
    turns = [turn(message) for message in messages]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    roles = [role for role, _ in turns]
    if roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise ValueError(f"after a system message, if any, user and assistant must alternate, got the roles {roles}.")
    texts = [text for _, text in turns] + [None] * (len(turns) % 2)
    rounds = [list(pair) for pair in zip(texts[::2], texts[1::2])]
    if rounds:
        rounds[0][0] = system + rounds[0][0]
    return rounds


def turn(message) -> tuple[str, str]:
    """Returns the role and the text of a message."""
    if not isinstance(message, dict):
        raise ValueError(f"a message must have role and content, got {message!r:.60}.")
    for role, content in (("role", "content"), ("from", "value")):
        if role in message and content in message:
            break
    else:
        raise ValueError(f"a message must have role and content, or from and value, got {', '.join(message)}.")
    if message[role] not in ROLES:
        raise ValueError(f"the role {message[role]!r} is unknown: there are {', '.join(ROLES)}.")
    if message.get("tool_calls"):
        raise ValueError("a message calls tools, which ChatGLM2 was not trained to do.")
    return ROLES[message[role]], as_text(message[content], content)


def unread(found: Iterable[str], columns: Columns) -> list[str]:
    """Returns the columns with content that is not read, except row numbers and the like."""
    return [name for name in found if name not in columns and not re.fullmatch(r"(row_?)?(id|idx|index)", name.lower())]
