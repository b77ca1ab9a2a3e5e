"""Makes the dialogues that were written for the small model, from the templates in training/talk."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from .templates import Templates, mistyped


TALK = Path(__file__).resolve().parent / "talk"
# Copies of each query of small_talk.json, of each intent without rows, and of each row of the other intents; then how many
# stories, poems and dialogues with memories are made in each language.
SMALL_TALK, INTENT, ROW, STORIES, POEMS, MEMORIES = 16, 200, 40, 6000, 2500, 7000

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


def memories(templates: Templates, others: Rounds, rng: random.Random) -> Iterator[Rounds]:
    """Returns dialogues in which users say something about themselves and, after rounds of `others`, ask for it."""
    for kinds in read("memories").values():
        for _ in range(MEMORIES):
            facts = rng.sample(kinds, rng.choice([1, 1, 2, 2, 3]))
            values, rounds, asks = {}, [], []
            for fact in facts:
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
