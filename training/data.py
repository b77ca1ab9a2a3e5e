"""
Turns rows of data into token ids and labels, as the fine-tuning script published with ChatGLM2-6B does.

A row has one of these forms:

- a prompt, its response and, if a column is named for it, the history (a list of [query, answer]). The loss is on the response.
- messages, as in `{"messages": [{"role": "user", "content": "..."}, ...]}`. The loss is on every answer.
- a text, for pretraining.

training/rows.py reads them.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import DataCollatorForSeq2Seq
from transformers.utils import logging

from .arguments import DataArguments
from .objective import IGNORED, Sample, pack, to_batch
from .rows import Columns, file_format, read_file, read_row, read_rows, to_rounds, unread


logger = logging.get_logger(__name__)

# What became of a row
WHOLE, CUT, EMPTY = "whole", "cut", "empty"
TEXT = Value("string")
ROUNDS = [[TEXT]]
FORMS = {
    "text": Features({"text": TEXT}),
    "rounds": Features({"rounds": ROUNDS}),
    "pair": Features({"query": TEXT, "response": TEXT, "history": ROUNDS}),
}
READER = 1  # to be raised when training/rows.py reads a file otherwise: rows are cached


def read(args: DataArguments, split: str, limit: int | None = None, documents: bool = False) -> Dataset:
    """
    Returns rows in one of the forms of training/rows.py.

    Args:
        split: "train", "validation" or "test". Rows of "test" need no response.
        limit: Read only this many rows, the first ones.
        documents: Whether the rows are texts (`text_column`), not dialogues.

    Raises:
        ValueError: if the data do not exist, are not UTF-8 or not in their format, have no rows or lack a column, or a row
            cannot be read.
    """
    path = getattr(args, f"{split}_file")
    if path is None and args.dataset_name:
        rows = load_dataset(args.dataset_name, args.dataset_config_name, split=split)
        columns, form = choose_columns(args, rows.column_names, split == "test", documents)
        chosen = rows.select(range(min(limit or len(rows), len(rows))))
        options = dict(fn_kwargs={"columns": columns}, features=FORMS[form], remove_columns=rows.column_names)
        found = chosen.map(read_row, with_indices=True, load_from_cache_file=not args.overwrite_cache, **options)
    elif path is None:
        raise ValueError(f"There is no {split} data: pass --{split}-file, or --dataset-name with that split.")
    else:
        file_format(path)
        first = next(read_file(path), None)
        if first is None:
            raise ValueError(f"{path} has no rows.")
        columns, form = choose_columns(args, list(first), split == "test", documents)
        state = Path(path).stat()
        identity = (READER, state.st_size, state.st_mtime_ns, time.time_ns() if args.overwrite_cache else 0)
        options = {"path": str(Path(path).resolve()), "columns": columns, "limit": limit, "identity": identity}
        try:
            found = Dataset.from_generator(read_rows, features=FORMS[form], gen_kwargs=options)
        except DatasetGenerationError as error:
            raise ValueError(str(error.__cause__ or error)) from None
    if not len(found):
        raise ValueError(f"{path or args.dataset_name} has no rows.")
    return found


def choose_columns(args: DataArguments, found: list[str], is_test: bool, documents: bool) -> tuple[Columns, str]:
    """
    Returns the columns to read, and the form of the rows.

    Raises:
        ValueError: if a column is missing.
    """
    if documents:
        check_columns(found, [args.text_column])
        return Columns(text=args.text_column), "text"
    system = "system" if "system" in found else None
    is_sharegpt = "conversations" in found and args.prompt_column not in found
    if args.messages_column in found or is_sharegpt:
        name = args.messages_column if args.messages_column in found else "conversations"
        columns, form = Columns(messages=name, system=system), "rounds"
    else:
        names = [args.prompt_column, args.response_column, args.history_column, args.input_column]
        if names == ["prompt", "response", None, None] and "prompt" not in found and "instruction" in found:
            names = ["instruction", "output", "history" if "history" in found else None, None]
        prompt, response, history, added = names
        if prompt == "instruction" and added is None and "input" in found:
            added = "input"
        if is_test and response not in found:
            response = None
        check_columns(found, [name for name in (prompt, response, history, added) if name])
        system = system if prompt == "instruction" else None
        columns, form = Columns(None, None, prompt, added, response, history, system), "pair"
    if columns != Columns(prompt="prompt", response="response"):
        logger.warning(f"Columns that are read: {', '.join(name for name in columns if name)}.")
    if left := unread(found, columns):
        logger.warning(
            f"Columns that are not read: {', '.join(left)}. To read one, pass --history-column or --input-column."
        )
    return columns, form


class Example(NamedTuple):
    """Token ids, the label at each position (the next token), and whether the example is whole, cut or empty."""

    input_ids: list[int]
    labels: list[int]
    outcome: str = WHOLE


def encode_prompt(tokenizer, query: str, history: Sequence, max_length: int) -> tuple[list[int], str]:
    """
    Returns the ids of the published prompt, and whether they are whole or cut.

    The published script cuts the end of a long prompt, and so loses the query. Here the oldest rounds are removed first,
    then the beginning of the query.
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
    The published encoding: the prompt with its history together, the response separately, `</s>`. The loss is on the
    response and `</s>`. Unlike in the published script, a response that was cut gets no `</s>`, so that the model learns to
    stop only at the end of an answer.
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
    """`encode_rounds` of messages with roles."""
    return encode_rounds(tokenizer, to_rounds(messages), args)


def encode_rounds(tokenizer, rounds: list[list], args: DataArguments) -> Example:
    """
    Encodes all rounds together, as `chat` has them in its cache: there an answer is followed by the next round, not by
    `</s>`. The loss is on the answers and on `</s>` after each. Rounds that do not fit are left out.

    Args:
        rounds: List of [query, answer]. A last query without an answer (None) is left out.
    """
    ids, labels = list(tokenizer.get_prefix_tokens()), [IGNORED] * 2
    outcome, last = EMPTY, IGNORED
    history, text = [], ""  # what is encoded so far
    for i, (query, answer) in enumerate(rounds, start=1):
        if answer is None:
            break
        if not query.strip() or not answer.strip():
            outcome = CUT if i > 1 else EMPTY
            break
        prompt = tokenizer.build_prompt(query, history)
        source = tokenizer.encode(prompt[len(text) :], add_special_tokens=False)[int(i > 1) :]  # one dummy space in all
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
        history, text = [*history, (query, answer)], prompt + answer
    if last == IGNORED:
        return Example([], [], EMPTY)
    return Example(ids + [last], labels + [last], outcome)


def encode(rows: Dataset, tokenizer, args: DataArguments) -> Dataset:
    """
    Returns rows of `input_ids` and `labels`, and logs the number of truncated and empty rows.

    Args:
        rows: As `read` returns them.

    Raises:
        ValueError: if nothing is left.
    """

    def encode_row(row: dict) -> dict:
        if "rounds" in row:
            return encode_rounds(tokenizer, row["rounds"], args)._asdict()
        return encode_response(tokenizer, row["query"], row["response"], row["history"], args)._asdict()

    return keep_what_can_be_learned(mapped(rows, encode_row, args), f"{args.max_length} tokens")


def to_answer(row: dict) -> tuple[str, str | None, list]:
    """Returns the query of a row, the response to compare with (None if there is none), and the earlier rounds."""
    if "rounds" in row:
        *history, (query, response) = row["rounds"] or [["", None]]
        return query, response, history
    return row["query"], row["response"], row["history"]


def encode_texts(rows: Dataset, tokenizer, args: DataArguments, max_length: int) -> Dataset:
    """
    Returns rows for the mixed objective: `input_ids` of a document without special tokens, or of a piece of a document that is
    longer than `max_length`; and `ends`, whether the document ends there.
    """

    def encode_row(row: dict) -> dict:
        ids = tokenizer.encode(row["text"], add_special_tokens=False)
        return {"input_ids": ids, "outcome": WHOLE if ids else EMPTY}

    def cut(batch: dict[str, list]) -> dict[str, list]:
        pieces = [
            (ids[begin : begin + max_length], begin + max_length >= len(ids))
            for ids in batch["input_ids"]
            for begin in range(0, len(ids), max_length)
        ]
        return dict(zip(("input_ids", "ends"), map(list, zip(*pieces))))

    documents = keep_what_can_be_learned(mapped(rows, encode_row, args))
    pieces = mapped(documents, cut, args, batched=True, desc="Cutting")
    if len(pieces) > len(documents):
        logger.warning(
            f"Documents of more than {max_length:,} tokens are cut: {len(documents):,} into {len(pieces):,}."
        )
    return pieces


def check_columns(found: list[str], wanted: list[str]):
    missing = [column for column in wanted if column not in found]
    if missing:
        raise ValueError(
            f"There is no column {', '.join(missing)} in the data; there are {', '.join(found)}. Name those to read with "
            "--prompt-column, --response-column, --history-column, --input-column, --messages-column or --text-column."
        )


def mapped(rows: Dataset, function, args: DataArguments, desc: str = "Encoding", **options) -> Dataset:
    options |= dict(num_proc=args.preprocessing_num_workers, load_from_cache_file=not args.overwrite_cache)
    return rows.map(function, remove_columns=rows.column_names, desc=desc, **options)


def keep_what_can_be_learned(rows: Dataset, limit: str = "") -> Dataset:
    outcomes = Counter(rows["outcome"])
    if outcomes[CUT]:
        logger.warning(
            f"{outcomes[CUT]:,} of {len(rows):,} rows are longer than {limit}, or have an empty round, and were cut; "
            "raise max_source_length or max_target_length to keep long ones whole."
        )
    if outcomes[EMPTY]:
        logger.warning(f"{outcomes[EMPTY]:,} of {len(rows):,} rows are left out: they have nothing to train on.")
    if outcomes[EMPTY] == len(rows):
        raise ValueError("No row of the data can be used: all are empty, or are cut before their answers.")
    kept = [i for i, outcome in enumerate(rows["outcome"]) if outcome != EMPTY]
    return rows.select(kept).remove_columns("outcome")


@dataclass
class PackedExamples:
    """A collator that packs examples into rows of at most `block_size` tokens. They cannot attend to each other."""

    tokenizer: object
    block_size: int

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        samples = [Sample(list(e["input_ids"]), list(e["labels"]), context=0) for e in examples]
        return to_batch(pack(samples, self.block_size), self.tokenizer.pad_token_id)


def collator(tokenizer, args: DataArguments):
    if args.packing:
        return PackedExamples(tokenizer, args.max_length)
    return DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
