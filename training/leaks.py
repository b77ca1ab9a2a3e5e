"""
Looks for copies and near copies of evaluation prompts in training data:

    python -m training.leaks build/tiny/texts.jsonl build/tiny/dialogues.jsonl

If a prompt of training/prompts.json, or a sentence that one asks to translate, is found, it is printed and the exit code is 1.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from common.options import Parser


PROMPTS = Path(__file__).resolve().parent / "prompts.json"
NEAR = 0.15  # edits for a near copy, of the characters of the prompt
SENTENCE = re.compile(r"[^.!?。！？；;\n]+")
WORD = re.compile(r"[^\W_]+(?:'[a-z]+)?")
HAN = re.compile(r"[\u3400-\u9fff]")


def read_prompts(path: Path = PROMPTS) -> list[dict]:
    """
    Returns prompts with `kind`, `language` and `queries` (several for a dialogue of several rounds). Translations also have
    `source`, the sentence to translate; some others have `about`, what the answer must contain.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def characters(text: str) -> str:
    """Returns only letters and digits, in one case and width. Copies are compared by these."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def words(text: str) -> tuple[str, ...]:
    """Returns the words in sorted order. Each Chinese character is a word."""
    text = HAN.sub(r" \g<0> ", unicodedata.normalize("NFKC", text).casefold())
    return tuple(sorted(WORD.findall(text)))


def distance_within(pattern: str, text: str) -> int:
    """Returns the smallest number of edits that turn a part of `text` into `pattern` (Myers 1999; Hyyrö 2003)."""
    places = {}
    for i, c in enumerate(pattern):
        places[c] = places.get(c, 0) | 1 << i
    everywhere, last = (1 << len(pattern)) - 1, 1 << len(pattern) - 1
    # Where the distance grows, and where it shrinks, from one row of the table to the next
    rises, falls = everywhere, 0
    best = score = len(pattern)
    for c in text:
        found = places.get(c, 0)
        diagonal = (((found & rises) + rises) ^ rises) | found | falls
        right_rises, right_falls = falls | ~(diagonal | rises) & everywhere, diagonal & rises
        score += bool(right_rises & last) - bool(right_falls & last)
        right_rises, right_falls = right_rises << 1 & everywhere, right_falls << 1 & everywhere
        rises, falls = right_falls | ~(diagonal | right_rises) & everywhere, right_rises & diagonal
        best = min(best, score)
    return best


class LeakFinder:
    """
    Finds near copies of prompts: a part of a text that differs from a prompt in at most a share of `NEAR` of its characters
    (ignoring case, width, spaces and punctuation), or a sentence with the same words in another order.
    """

    def __init__(self, prompts: Iterable[dict]):
        wanted = sorted({text for p in prompts for text in (*p["queries"], p.get("source")) if text})
        self.reordered = {words(text): text for text in wanted}
        self.prompts = {characters(text): text for text in wanted}
        self.edits = {pattern: max(1, int(len(pattern) * NEAR)) for pattern in self.prompts}
        # With k edits, one of k + 1 parts of a prompt stays as it is: where none is, no distance need be computed.
        self.parts: dict[int, dict[str, list[str]]] = {}  # by length, the patterns with a part
        for pattern, edits in self.edits.items():
            bounds = [len(pattern) * i // (edits + 1) for i in range(edits + 2)]
            for begin, end in zip(bounds, bounds[1:]):
                self.parts.setdefault(end - begin, {}).setdefault(pattern[begin:end], []).append(pattern)
        self.find = functools.cache(self.find)

    def find(self, text: str) -> str | None:
        """Returns the prompt that the text has a near copy of, or None."""
        for sentence in (text, *SENTENCE.findall(text)):
            if found := self.reordered.get(words(sentence)):
                return found
        text = characters(text)
        for length, parts in self.parts.items():
            for part in {text[i : i + length] for i in range(len(text) - length + 1)} & parts.keys():
                for begin in (match.start() for match in re.finditer(re.escape(part), text)):
                    for pattern in parts[part]:
                        reach = len(pattern) + self.edits[pattern]
                        around = text[max(0, begin - reach) : begin + reach]
                        if distance_within(pattern, around) <= self.edits[pattern]:
                            return self.prompts[pattern]
        return None

    def find_in_row(self, row: dict) -> str | None:
        """Returns the prompt that a row of training data has a near copy of, or None."""
        texts = (message["content"] for message in row["messages"]) if "messages" in row else row["text"].split("\n")
        return next(filter(None, map(self.find, texts)), None)


def main():
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines, each with a text or messages")
    finder, leaks = LeakFinder(read_prompts()), 0
    for path in parser.parse_args().files:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if prompt := finder.find_in_row(json.loads(line)):
                    leaks += 1
                    print(f"{path}, line {number}: near {prompt!r}")
    if leaks:
        raise SystemExit(f"{leaks} rows have a near copy of a prompt of the evaluation. Remove them from the data.")
    print("No row has a near copy of a prompt of the evaluation.")


if __name__ == "__main__":
    main()
