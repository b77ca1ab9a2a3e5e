"""
From rows of data files to token ids and labels, as the fine-tuning script published with ChatGLM2-6B makes them.

A row holds one of

- a prompt, its response and, if a column is named for it, the history, a list of [query, answer]: the response is learned;
- messages, as in `{"messages": [{"role": "user", "content": "..."}, ...]}`: every answer is learned;
- a text, for pretraining.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from gzip import BadGzipFile
from typing import NamedTuple

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import DataCollatorForSeq2Seq
from transformers.utils import logging

from .objective import IGNORED, Sample, pack, to_batch


logger = logging.get_logger(__name__)

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv"}
# What became of a row
WHOLE, CUT, EMPTY = "whole", "cut", "empty"


@dataclass
class DataArguments:
    """Where the rows are, and how long they may be."""

    train_file: str | None = field(default=None, metadata={"help": "JSON, JSONL or CSV, also compressed (.gz)."})
    validation_file: str | None = field(default=None, metadata={"help": "For the loss and perplexity held out."})
    test_file: str | None = field(default=None, metadata={"help": "For generation, ROUGE and BLEU (--do_predict)."})
    dataset_name: str | None = field(default=None, metadata={"help": "On the Hub, or a folder, instead of files."})
    dataset_config_name: str | None = None
    prompt_column: str = "prompt"
    response_column: str = "response"
    history_column: str | None = field(
        default=None, metadata={"help": "With the rounds before, a list of [query, answer]."}
    )
    messages_column: str = field(default="messages", metadata={"help": "Read instead of prompts where there is one."})
    text_column: str = field(default="text", metadata={"help": "Of pretraining."})
    max_source_length: int = field(default=1024, metadata={"help": "Tokens of a prompt with its history."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a response."})
    packing: bool = field(
        default=False, metadata={"help": "Several examples a row, kept apart, instead of padding: for short ones."}
    )
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_predict_samples: int | None = None
    preprocessing_num_workers: int | None = None

    def __post_init__(self):
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 8:
                raise ValueError(f"{name} must be at least 8 tokens, got {getattr(self, name)}.")
        if self.dataset_name and self.train_file:
            raise ValueError("Both a dataset_name and a train_file are given; leave one of them out.")

    @property
    def max_length(self) -> int:
        """Tokens of an example in all: the prompt, the response and `</s>`."""
        return self.max_source_length + self.max_target_length + 1


def read(args: DataArguments, split: str, limit: int | None = None) -> Dataset:
    """
    Args:
        split: "train", "validation" or "test".
        limit: Rows to read, the first ones.

    Raises:
        ValueError: if there is no such data, it is not UTF-8, not in its format, or without rows.
    """
    path = getattr(args, f"{split}_file")
    if path is None and args.dataset_name:
        rows = load_dataset(args.dataset_name, args.dataset_config_name, split=split)
    elif path is None:
        raise ValueError(f"There is no data for this: give a --{split}_file, or a --dataset_name with that split.")
    else:
        suffixes = [suffix for suffix in FORMATS if path.removesuffix(".gz").endswith(suffix)]
        if not suffixes:
            raise ValueError(f"Data files are {', '.join(FORMATS)}, also with .gz, got {path!r}.")
        if not count_lines(path):
            raise ValueError(f"{path} has no rows.")
        try:
            rows = load_dataset(FORMATS[suffixes[0]], data_files={split: path}, split=split)
        except DatasetGenerationError as error:
            reason = error.__cause__ or error
            raise ValueError(f"{path} cannot be read as {FORMATS[suffixes[0]].upper()}: {reason}") from error
    if not len(rows):
        raise ValueError(f"{path or args.dataset_name} has no rows.")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def count_lines(path: str) -> int:
    """
    Returns the number of lines that are not blank.

    Raises:
        ValueError: if it is not UTF-8, which the reader of JSON would fill with replacements, or damaged.
    """
    import fsspec

    count, number = 0, 0
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            for number, line in enumerate(file, start=1):
                count += bool(line.decode().strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 in line {number} ({error.reason}). Convert it first.") from error
    except (EOFError, BadGzipFile) as error:
        raise ValueError(f"{path} is damaged after line {number}: {error}") from error
    return count


class Example(NamedTuple):
    """Token ids, the label that follows at each place, and whether they are whole, cut or empty."""

    input_ids: list[int]
    labels: list[int]
    outcome: str = WHOLE


def encode_prompt(tokenizer, query: str, history: Sequence, max_length: int) -> tuple[list[int], str]:
    """
    Returns the ids of the published prompt, and whether they are whole or cut.

    The published script cuts a long prompt at its end, by which the query is lost. Here the oldest rounds go, and then
    the beginning of the query.
    """
    history = list(history or [])
    ids, outcome = tokenizer.encode(tokenizer.build_prompt(query, history)), WHOLE
    while len(ids) > max_length and history:
        history, outcome = history[1:], CUT
        ids = tokenizer.encode(tokenizer.build_prompt(query, history))
    if len(ids) > max_length:
        prefix = tokenizer.get_prefix_tokens()
        ids, outcome = prefix + ids[len(prefix) - max_length :], CUT
    return ids, outcome


def encode_response(tokenizer, query: str, response: str, history: Sequence, args: DataArguments) -> Example:
    """
    The published encoding: the prompt with its history in one, the response on its own, `</s>`. Only the response and
    `</s>` are learned. What is cut from a response is not followed by `</s>`, unlike in the published script, for answers
    to be ended only where they end.
    """
    if not query.strip() or not response.strip():
        return Example([], [], EMPTY)
    source, outcome = encode_prompt(tokenizer, query, history, args.max_source_length)
    target = tokenizer.encode(response, add_special_tokens=False)
    if len(target) > args.max_target_length:
        target, outcome = target[: args.max_target_length], CUT
    else:
        target.append(tokenizer.eos_token_id)
    return Example(source + target, [IGNORED] * len(source) + target, outcome)


def encode_dialogue(tokenizer, messages: list[dict], args: DataArguments) -> Example:
    """
    All rounds in one, as `chat` leaves them in its cache, where an answer is not followed by `</s>` but by the next
    round. Its answers are learned, and `</s>` after each. Rounds that do not fit are left out.
    """
    ids, labels = list(tokenizer.get_prefix_tokens()), [IGNORED] * 2
    outcome, last = EMPTY, IGNORED
    for i, (query, answer) in enumerate(to_rounds(messages), start=1):
        if not query.strip() or not answer.strip():
            outcome = CUT if i > 1 else EMPTY
            break
        prompt = f"[Round {i}]\n\n问：{query}\n\n答："
        if i == 1:
            source = tokenizer.encode(prompt, add_special_tokens=False)
        else:
            source = tokenizer.encode("\n\n" + prompt, add_special_tokens=False)[1:]  # without the dummy space
        target = tokenizer.encode(answer, add_special_tokens=False)
        room = args.max_length - len(ids) - len(source) - 1
        if len(target) > room and (i > 1 or room < 8):
            outcome = CUT if i > 1 else EMPTY
            break
        labels += [last] + [IGNORED] * (len(source) - 1) + target[:room]
        ids += source + target[:room]
        outcome, last = WHOLE, tokenizer.eos_token_id
        if len(target) > room:
            return Example(ids, labels, CUT)
    if last == IGNORED:
        return Example([], [], EMPTY)
    return Example(ids + [last], labels + [last], outcome)


def to_rounds(messages: list[dict]) -> list[tuple[str, str]]:
    """Rounds of (query, answer). A system message begins the first query, as in the chat template."""
    turns = [(message["role"], as_text(message["content"])) for message in messages]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    roles = [role for role, _ in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise ValueError(f"After a system message, if any, user and assistant must alternate, got the roles {roles}.")
    contents = [content for _, content in turns]
    rounds = list(zip(contents[::2], contents[1::2]))  # without a last query that nobody answers
    if rounds and system:
        rounds[0] = (system + rounds[0][0], rounds[0][1])
    return rounds


def as_text(value) -> str:
    """
    Raises:
        ValueError: if a column holds something else than texts.
    """
    if not isinstance(value, str | None):
        raise ValueError(f"a text is expected, got {str(value)[:60]!r}.")
    return value or ""


def round_reader(rows: Dataset, args: DataArguments):
    """
    Returns what reads (query, response, history) from a row; of messages, the last round and those before.

    Raises:
        ValueError: if a column is missing.
    """
    if args.messages_column in rows.column_names:

        def read_round(row: dict) -> tuple:
            rounds = to_rounds(row[args.messages_column]) or [("", "")]
            return *rounds[-1], rounds[:-1]

        return read_round
    check_columns(rows, [args.prompt_column, args.response_column] + [args.history_column] * bool(args.history_column))
    return lambda row: (
        as_text(row[args.prompt_column]),
        as_text(row[args.response_column]),
        row[args.history_column] if args.history_column else [],
    )


def encode(rows: Dataset, tokenizer, args: DataArguments) -> Dataset:
    """
    Returns rows of `input_ids` and `labels` to learn answers from, and says how many rows were empty or had to be cut.

    Raises:
        ValueError: if a column is missing, or nothing is left.
    """
    read_round = round_reader(rows, args)

    def encode_row(row: dict) -> dict:
        if args.messages_column in row:
            return encode_dialogue(tokenizer, row[args.messages_column], args)._asdict()
        return encode_response(tokenizer, *read_round(row), args)._asdict()

    return keep_what_can_be_learned(mapped(rows, encode_row, args), f"{args.max_length} tokens")


def encode_texts(rows: Dataset, tokenizer, args: DataArguments, max_length: int) -> Dataset:
    """
    Returns rows for the mixed objective: `input_ids`, a document without special tokens, or a piece of one that is longer
    than `max_length`; and `ends`, whether the document ends there.
    """
    check_columns(rows, [args.text_column])

    def encode_row(row: dict) -> dict:
        ids = tokenizer.encode(as_text(row[args.text_column]), add_special_tokens=False)
        return {"input_ids": ids, "outcome": WHOLE if ids else EMPTY}

    def cut(batch: dict[str, list]) -> dict[str, list]:
        pieces = [
            (ids[begin : begin + max_length], begin + max_length >= len(ids))
            for ids in batch["input_ids"]
            for begin in range(0, len(ids), max_length)
        ]
        return dict(zip(("input_ids", "ends"), map(list, zip(*pieces))))

    documents = keep_what_can_be_learned(mapped(rows, encode_row, args))
    pieces = documents.map(cut, batched=True, num_proc=args.preprocessing_num_workers, desc="Cutting")
    if len(pieces) > len(documents):
        logger.warning(
            f"Documents of more than {max_length:,} tokens are cut: {len(documents):,} into {len(pieces):,}."
        )
    return pieces


def check_columns(rows: Dataset, columns: list[str]):
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"There is no column {', '.join(missing)} in the data; there are {', '.join(rows.column_names)}. "
            "Name those to read with --prompt_column, --response_column, --history_column, --messages_column or --text_column."
        )


def mapped(rows: Dataset, function, args: DataArguments) -> Dataset:
    def with_its_number(row: dict, number: int):
        try:
            return function(row)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"Row {number + 1} of the data cannot be read: {error}") from error

    workers = args.preprocessing_num_workers
    return rows.map(
        with_its_number, with_indices=True, remove_columns=rows.column_names, num_proc=workers, desc="Encoding"
    )


def keep_what_can_be_learned(rows: Dataset, limit: str = "") -> Dataset:
    outcomes = Counter(rows["outcome"])
    if outcomes[CUT]:
        logger.warning(
            f"{outcomes[CUT]:,} of {len(rows):,} rows are longer than {limit}, or have an empty round, and were cut; "
            "raise max_source_length or max_target_length to keep long ones whole."
        )
    if outcomes[EMPTY]:
        logger.warning(f"{outcomes[EMPTY]:,} of {len(rows):,} rows are left out: nothing in them can be learned.")
    if outcomes[EMPTY] == len(rows):
        raise ValueError("No row of the data can be learned from: all are empty, or cut before their answers.")
    kept = [i for i, outcome in enumerate(rows["outcome"]) if outcome != EMPTY]
    return rows.select(kept).remove_columns("outcome")


@dataclass
class PackedExamples:
    """A collator: examples in, rows of at most `block_size` tokens out, in which examples do not see each other."""

    tokenizer: object
    block_size: int

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        samples = [Sample(list(e["input_ids"]), list(e["labels"]), context=0) for e in examples]
        return to_batch(pack(samples, self.block_size), self.tokenizer.pad_token_id)


def collator(tokenizer, args: DataArguments):
    if args.packing:
        return PackedExamples(tokenizer, args.max_length)
    return DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
