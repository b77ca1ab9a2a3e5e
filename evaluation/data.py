"""
Reads the questions from a folder or from the Hub, checks them, and returns rows in one format.

| suite | in the folder | on the Hub |
|---|---|---|
| mmlu | `mmlu/{dev,test}/SUBJECT_{dev,test}.csv`, as first released (no header) or with one | cais/mmlu |
| ceval | `ceval/{dev,val}/SUBJECT_{dev,val}.csv`, or the published script's `ceval/val/**/SUBJECT.jsonl` | ceval/ceval-exam |
| gsm8k | `gsm8k/test.jsonl` | openai/gsm8k |
| gsm8k_zh | `mgsm/mgsm_zh.tsv`, or a file of one's own: .tsv as MGSM's, .jsonl as GSM8K's | juletxara/mgsm |
| bbh | `bbh/TASK.json` | SaylorTwift/bbh |
| perplexity | `wikitext2/wiki.test.raw`, C-Eval's questions, or a file of one's own: .txt, or .jsonl with `text` | Salesforce/wikitext |
"""

import csv
import json
import re
from collections.abc import Iterable
from gzip import BadGzipFile
from pathlib import Path

from datasets import Dataset, load_dataset


SUBJECTS = json.loads(Path(__file__).with_name("subjects.json").read_text(encoding="utf-8"))
GSM8K_QUESTIONS = 1319
WIKITEXT2_BYTES = 1290547  # of wiki.test.raw
LETTERS = "ABCD"


def load(
    suite: str, subject: str | None = None, data: str | None = None, file: str | None = None, protocol: str = "chat"
) -> dict[str, Dataset]:
    """
    Returns the rows of a suite's subject: `test`, and `dev` for the examples of MMLU and C-Eval.

    Args:
        data: The folder; the Hub if None.
        file: For gsm8k_zh and perplexity, a file instead of either.
        protocol: "chat" or "base". The published script's texts are for the chat model only.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if it is not UTF-8, or has other columns, an impossible answer, or not the published number of
            questions.
    """
    folder = Path(data) if data else None
    if suite in ("mmlu", "ceval"):
        splits = {"dev": "dev", "test": "test" if suite == "mmlu" else "val"}
        rows = {name: choices(suite, subject, split, folder) for name, split in splits.items()}
        check_count(f"{suite} {subject}", rows["test"], SUBJECTS[suite][subject]["questions"])
        if protocol == "base" and rows["test"][0]["query"]:
            raise ValueError(
                f"{folder}/ceval holds the published script's texts, which are for the chat model: give C-Eval's own CSV files for "
                "--protocol base."
            )
    elif suite == "gsm8k":
        rows = {"test": gsm8k(folder)}
        check_count(suite, rows["test"], GSM8K_QUESTIONS)
    elif suite == "gsm8k_zh":
        rows = {"test": gsm8k_zh(folder, file)}
    elif suite == "bbh":
        rows = {"test": bbh(subject, folder)}
        check_count(f"{suite} {subject}", rows["test"], SUBJECTS[suite][subject]["questions"])
    else:
        rows = {"test": [{"text": text(subject, folder, file)}]}
    if not rows["test"]:
        raise ValueError(f"{file or folder} has no questions of {suite}.")
    return {name: Dataset.from_list(split) for name, split in rows.items() if split}


def choices(suite: str, subject: str, split: str, folder: Path | None) -> list[dict]:
    """Returns rows of `question`, `choices` (four), `answer` (0 to 3) and `query` (the published script's text, if used)."""
    if folder is None:
        name = {"mmlu": "cais/mmlu", "ceval": "ceval/ceval-exam"}[suite]
        rows, where = from_hub(name, subject, split), f"{name} {subject}"
    else:
        path = folder / suite / split / f"{subject}_{split}.csv"
        scripted = sorted((folder / suite / split).glob(f"**/{subject}.jsonl")) if suite == "ceval" else []
        if scripted:
            rows, where = read_jsonl(scripted[0], ["inputs_pretokenized", "label"]), str(scripted[0])
        elif suite == "ceval" and split == "dev" and not path.exists() and any(folder.glob("ceval/val/**/*.jsonl")):
            return []  # the script's folder has no examples, which the chat model does not need
        else:
            rows, where = read_choices(path), str(path)
    return [to_choice(row, f"{where}, question {i}") for i, row in enumerate(rows, start=1)]


ANSWERS = {str(name): i for i, letter in enumerate(LETTERS) for name in (letter, letter.lower(), i)}


def to_choice(row: dict, where: str) -> dict:
    answer = row.get("answer", row.get("label"))
    number = ANSWERS.get(str(answer).strip())
    if number is None:
        raise ValueError(
            f"{where}: the answer is {answer!r}, but it must be one of A, B, C, D or 0 to 3. Correct the file."
        )
    if "inputs_pretokenized" in row:
        return {"question": "", "choices": [], "answer": number, "query": row["inputs_pretokenized"]}
    options = row.get("choices") or [row.get(f"choice{i}", row.get(letter)) for i, letter in enumerate(LETTERS)]
    texts = [row["question"].strip(), *map(str, options)]
    if len(texts) != 5 or not all(text.strip() for text in texts):
        raise ValueError(f"{where}: the question or one of its four choices is empty. Correct the file.")
    return {"question": texts[0], "choices": texts[1:], "answer": number, "query": ""}


def read_choices(path: Path) -> list[dict]:
    """Returns the rows of a CSV with a header, or without one as in MMLU's first release: question, four choices, letter."""
    with open_text(path) as file:
        lines = list(csv.reader(file))
    if not lines:
        raise ValueError(f"{path} is empty. Download it again.")
    if len(lines[0]) == 6 and lines[0][5].strip() in LETTERS:
        columns = ["question", *LETTERS, "answer"]
    else:
        columns = lines.pop(0)
        known = (["question", *LETTERS], ["question", *(f"choice{i}" for i in range(4))])
        if not any(set(names) <= set(columns) for names in known):
            raise ValueError(
                f"{path} has the columns {', '.join(columns)}, and needs question, A, B, C, D, answer (or choice0 to "
                "choice3 for the four). Is it of another data set, or another version?"
            )
        if "answer" not in columns:
            raise ValueError(
                f"{path} has no column answer: it is a test set whose answers are not public. Take C-Eval's val."
            )
    for i, line in enumerate(lines, start=1):
        if len(line) != len(columns):
            raise ValueError(
                f"{path}, question {i} has {len(line)} cells for {len(columns)} columns. Download it again."
            )
    return [dict(zip(columns, line)) for line in lines]


def gsm8k(folder: Path | None) -> list[dict]:
    """Rows of `question` and `target`, the number after `####`."""
    if folder is None:
        rows, where = from_hub("openai/gsm8k", "main", "test"), "openai/gsm8k"
    else:
        path = folder / "gsm8k/test.jsonl"
        rows, where = read_jsonl(path, ["question", "answer"]), str(path)
    return [worked(row, f"{where}, question {i}") for i, row in enumerate(rows, start=1)]


def gsm8k_zh(folder: Path | None, file: str | None) -> list[dict]:
    if file is None and folder is None:
        rows = from_hub("juletxara/mgsm", "zh", "test")
        return [{"question": row["question"], "target": str(row["answer_number"])} for row in rows]
    path = Path(file) if file else folder / "mgsm/mgsm_zh.tsv"
    if ".tsv" not in path.suffixes:
        rows = read_jsonl(path, ["question", "answer"])
        return [worked(row, f"{path}, question {i}") for i, row in enumerate(rows, start=1)]
    with open_text(path) as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines if line.strip()]
    for i, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise ValueError(
                f"{path}, line {i} has {len(row)} columns, and must have two: the question and its number."
            )
    return [worked({"question": q, "answer": a}, f"{path}, line {i}") for i, (q, a) in enumerate(rows, start=1)]


def worked(row: dict, where: str) -> dict:
    target = str(row["answer"]).split("####")[-1].strip()
    if not re.fullmatch(r"-?[0-9,]*[0-9](\.[0-9]+)?", target) or not isinstance(row["question"], str):
        raise ValueError(
            f"{where}: the answer ends in {target!r}, and must end in a number, after #### if it is worked out."
        )
    return {"question": row["question"], "target": target}


def bbh(task: str, folder: Path | None) -> list[dict]:
    if folder is None:
        rows, where = from_hub("SaylorTwift/bbh", task, "test"), f"SaylorTwift/bbh {task}"
    else:
        path = folder / f"bbh/{task}.json"
        with open_text(path) as file:
            rows, where = parse(file.read(), path).get("examples", []), str(path)
    for row in rows:
        check_columns(row, ["input", "target"], where)
        if not all(isinstance(row[column], str) and row[column].strip() for column in ("input", "target")):
            raise ValueError(
                f"{where}: input and target must be texts, got {row['input']!r:.60} and {row['target']!r:.60}."
            )
    return [{"input": row["input"], "target": row["target"]} for row in rows]


def text(name: str, folder: Path | None, file: str | None) -> str:
    if name == "wikitext2":
        if folder is None:
            return "".join(row["text"] for row in from_hub("Salesforce/wikitext", "wikitext-2-raw-v1", "test"))
        path = folder / "wikitext2/wiki.test.raw"
        with open_text(path) as lines:
            content = lines.read()
        if len(content.encode()) != WIKITEXT2_BYTES:
            raise ValueError(
                f"{path} has {len(content.encode()):,} bytes, and the raw test set of WikiText-2 {WIKITEXT2_BYTES:,}. Take "
                "wikitext-2-raw-v1; the one with <unk> is another."
            )
        return content
    if name == "ceval":
        subjects = [choices("ceval", subject, "val", folder) for subject in SUBJECTS["ceval"]]
        return "\n".join(
            "\n".join([row["query"] or row["question"], *row["choices"]]) for rows in subjects for row in rows
        )
    path = Path(file)
    if ".jsonl" in path.suffixes:
        content = "\n".join(row["text"] or "" for row in read_jsonl(path, ["text"]))
    else:
        with open_text(path) as lines:
            content = lines.read()
    if not content.strip():
        raise ValueError(f"{path} has no text.")
    return content


def from_hub(name: str, config: str, split: str) -> Iterable[dict]:
    try:
        return load_dataset(name, config, split=split)
    except (ConnectionError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} ({config}, {split}) could not be read from the Hub: {error}. Check the network, or give a folder with --data."
        ) from error


def open_text(path: Path):
    """
    Opens a file, unpacked if it ends in .gz.

    Raises:
        FileNotFoundError: with what to do.
        ValueError: if it is not UTF-8.
    """
    import fsspec

    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. Complete the folder (see docs/evaluate.md), or leave --data out to use the Hub."
        )
    options = dict(encoding="utf-8-sig", newline="", compression="infer")
    try:
        with fsspec.open(str(path), "rt", **options) as file:
            for _ in file:
                pass
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Convert it first.") from error
    except (EOFError, BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}. Download it again.") from error
    return fsspec.open(str(path), "rt", **options).open()


def read_jsonl(path: Path, columns: list[str]) -> list[dict]:
    with open_text(path) as file:
        rows = [parse(line, f"{path}, line {i}") for i, line in enumerate(file, start=1) if line.strip()]
    for i, row in enumerate(rows, start=1):
        check_columns(row, columns, f"{path}, row {i}")
    return rows


def parse(content: str, where) -> dict:
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(value).__name__}.")
    return value


def check_columns(row: dict, columns: list[str], where: str):
    if not isinstance(row, dict):
        raise ValueError(f"{where} must hold objects with {', '.join(columns)}, got {type(row).__name__}.")
    missing = [column for column in columns if column not in row]
    if missing:
        raise ValueError(
            f"{where} has no {', '.join(missing)}; there are {', '.join(row)}. Is it of another data set, or another version?"
        )


def check_count(name: str, rows: list, published: int):
    if len(rows) != published:
        raise ValueError(
            f"{name} has {len(rows):,} questions here, and {published:,} as published: the data are of another version, or "
            "incomplete. Scores on them could not be compared. Download them again (docs/evaluate.md names the sources)."
        )
