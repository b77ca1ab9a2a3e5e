"""
Templates for the small model's dialogues (training/talk/*.json). `[one|or another|]` means one of these; `<word>` is drawn from a
list of words or from a row, and stays the same in the whole dialogue.
"""

import random
import re


CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"<([^<>\s]+)>")
VOWEL = re.compile(r"\b([Aa]) (?=[aeio])")
PRONOUNS = {
    "girl": {"he": "she", "He": "She", "his": "her", "him": "her"},
    "boy": {"he": "he", "He": "He", "his": "his", "him": "him"},
}


class Templates:
    """
    Args:
        words: The possible words of each slot. `name2` is drawn like `name`, but differs from it.
        rng: The random number generator.
    """

    def __init__(self, words: dict[str, list[str]], rng: random.Random):
        self.words, self.rng = words, rng

    def fill(self, template: str, values: dict[str, str]) -> str:
        """Returns a sentence from the template. Words that are drawn are added to `values`, for the next template."""
        text = self.phrase(template, values).strip()
        return text[:1].upper() + text[1:] if text[:1].isascii() else text

    def phrase(self, template: str, values: dict[str, str]) -> str:
        """`fill` for a part of a sentence."""
        while CHOICE.search(template):
            template = CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), template)
        text = SLOT.sub(lambda match: self.value(match[1], values), template)
        return VOWEL.sub(r"\1n ", text)

    def value(self, slot: str, values: dict[str, str]) -> str:
        if slot not in values:
            if slot in PRONOUNS["boy"] or slot == "child":
                self.value("name", values)
                child = "girl" if values["name"] in self.words["girl"] else "boy"
                values.update(PRONOUNS[child] | {"child": child})
            else:
                free = [word for word in self.words[slot.rstrip("23")] if word not in values.values()]
                values[slot] = self.rng.choice(free)
        return values[slot]

    def talk(self, intent: dict, row: list[str] = ()) -> tuple[str, str]:
        """Returns a query and an answer of an intent with `queries` and `answers`; `<0>` is the first of a row, and so on."""
        values = {str(i): self.phrase(text, {}) for i, text in enumerate(row)}
        return tuple(self.fill(self.rng.choice(intent[part]), values) for part in ("queries", "answers"))


def mistyped(query: str, rng: random.Random) -> str:
    """Returns the query as people type it: often without final punctuation or capitals, sometimes with a typing error."""
    if rng.random() < 0.5:
        query = query.rstrip("。！？.!?") or query
    is_chinese = any("\u4e00" <= c <= "\u9fff" for c in query)
    if rng.random() < 0.15 and not is_chinese:
        query = query.lower()
    if rng.random() < 0.06 and len(query) > 8:
        place = rng.randrange(1, len(query) - 1)
        if query[place : place + 2].isalpha() and not is_chinese:
            slips = [query[place + 1] + query[place], query[place], query[place] * 2 + query[place + 1]]
            query = query[:place] + rng.choice(slips) + query[place + 2 :]
    if rng.random() < 0.12 and is_chinese and query[-1] not in "。！？呀啊吧呢吗":
        query += rng.choice(["？", "？", "呀", "呢", "～", "。。"])
    return query
