"""Makes the dialogues that were written for the small model, from the templates in training/talk."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from .templates import SLOT, Templates, mistyped


TALK = Path(__file__).resolve().parent / "talk"
# Copies of each query of small_talk.json, of each intent without rows, and of each row of the other intents; then how many
# stories, poems and dialogues with memories are made in each language, and how many translations.
SMALL_TALK, INTENT, ROW, STORIES, POEMS, MEMORIES, TRANSLATIONS = 16, 200, 40, 6000, 3000, 8000, 16000
COINED = 0.4  # of the words that users say about themselves
COPIED = "name petname color food fruit job country city sport 名字 小名 颜色 食物 水果 职业 城市 爱好".split()
SYLLABLES = [consonant + vowel for consonant in "b ch d f g h j k l m n p r s sh t v w z".split() for vowel in "aeiou"]

Rounds = list[tuple[str, str]]


def read(name: str):
    return json.loads((TALK / f"{name}.json").read_text(encoding="utf-8"))


def small_talk(templates: Templates, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Returns queries and answers: greetings, identity, feelings, advice, knowledge."""
    for topic in read("small_talk"):
        for query in topic["queries"]:
            for _ in range(SMALL_TALK):
                yield mistyped(query, rng), rng.choice(topic["answers"])
    for intent in (*read("zh"), *read("en")):
        rows = intent.get("rows", [()])
        for row in rows:
            for _ in range(ROW if len(rows) > 1 else INTENT):
                query, answer = templates.talk(intent, row)
                yield mistyped(query, rng), answer


def stories(templates: Templates, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Requests for a story about somebody or something, and one about that."""
    for kind in read("stories").values():
        for _ in range(STORIES):
            plot = rng.choice(kind["plots"])
            values = dict(zip(("does", "do", "product"), rng.choice(plot.get("rows", [()]))))
            values["about"] = templates.phrase(rng.choice(plot["about"]), values)
            query = templates.fill(rng.choice(kind["ask" if rng.random() < 0.93 else "ask for any"]), values)
            yield mistyped(query, rng), templates.fill(plot["text"], values)


def poems(templates: Templates, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Requests for a poem about something, and one."""
    for kinds in read("poems").values():
        for _ in range(POEMS):
            kind, values = rng.choice(kinds), {}
            query = templates.fill(rng.choice(kind["ask"]), values)
            lines = [
                line[:1].upper() + line[1:] for line in templates.fill(rng.choice(kind["text"]), values).split("\n")
            ]
            yield mistyped(query, rng), "\n".join(lines)


def translations(templates: Templates, rng: random.Random) -> Iterator[dict[str, str]]:
    """Sentences, each in English (`en`) and in Chinese (`zh`)."""
    data = read("translations")
    for _ in range(TRANSLATIONS):
        english, chinese = rng.choice(data["sentences"])
        rows = {slot: rng.choice(data["words"][slot]) for slot in SLOT.findall(english)}
        chinese_words = {slot: row[1] for slot, row in rows.items()}
        if "thing" in rows:
            chinese_words["measure"] = rows["thing"][2]
        english_words = {slot: row[0] for slot, row in rows.items()}
        yield {"en": templates.fill(english, english_words), "zh": templates.fill(chinese, chinese_words)}


def coined(like: str, words: dict[str, list[str]], rng: random.Random) -> str:
    """
    Returns a word for the place of another one that cannot be guessed, only copied: it does not exist, or means something
    else. `words` are those of the templates.
    """
    copied = [word for slot in COPIED for word in words[slot] if word.isascii() == like.isascii() and word.isalpha()]
    if like.isascii():
        word = "".join(rng.sample(SYLLABLES, rng.choice([2, 2, 3]))) + rng.choice(["", "", "n", "l", "s", "x"])
        if rng.random() < 0.5:
            word = rng.choice(copied).lower()
        return word.capitalize() if like[0].isupper() else word
    first, second = rng.sample(sorted(set("".join(copied))), 2)
    if like[0] == like[-1]:
        return first * 2
    if like[0] in "小阿":
        return like[0] + first
    return first + second + ("色" if like[-1] == "色" else "")


def memories(templates: Templates, others: Rounds, rng: random.Random) -> Iterator[Rounds]:
    """Returns dialogues in which users say something about themselves and, after rounds of `others`, ask for it."""
    for kinds in read("memories").values():
        for _ in range(MEMORIES):
            facts = rng.sample(kinds, rng.choice([1, 1, 2, 2, 3]))
            values, rounds, asks = {}, [], []
            for fact in facts:
                for slot in SLOT.findall(fact["answer"][0]):
                    if slot in COPIED and rng.random() < COINED:
                        values[slot] = coined(rng.choice(templates.words[slot]), templates.words, rng)
                rounds.append(told(templates, fact, values, rng))
                rounds += rng.sample(others, rng.choice([0, 0, 1]))
                asks.append([templates.fill(rng.choice(fact[part]), values) for part in ("ask", "answer")])
            rounds += rng.sample(others, rng.choice([0, 0, 1]))
            rng.shuffle(asks)
            for query, answer in asks[: rng.choice([1, 1, 2])]:
                rounds.append((mistyped(query, rng), answer))
            yield rounds


def told(templates: Templates, fact: dict, values: dict, rng: random.Random) -> tuple[str, str]:
    query, reply = (templates.fill(rng.choice(fact[part]), values) for part in ("say", "reply"))
    return mistyped(query, rng) if rng.random() < 0.5 else query, reply
