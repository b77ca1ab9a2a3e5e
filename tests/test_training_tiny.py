"""How the small model's data and card are made."""

import gzip
import json
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import TINY
from training import tiny


def write_corpus(folder, name, rows):
    with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_held_out_rows_share_nothing_with_learned_ones(tmp_path):
    pairs = [{"en": f"This is {i}.", "zh": f"这是{i % 40}。"} for i in range(2000)]
    chats = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(500)
    ]
    write_corpus(tmp_path, "tatoeba_en_zh", pairs)
    write_corpus(tmp_path, "chatterbot_en", chats)
    train, held_out = tiny.read_corpora(tmp_path)
    assert not held_out["tatoeba_en_zh"]  # each Chinese sentence is in fifty rows
    assert 2 < len(held_out["chatterbot_en"]) < 25 and len(train["chatterbot_en"]) > 450
    queries = {
        name: {row["messages"][0]["content"] for row in rows["chatterbot_en"]}
        for name, rows in (("a", train), ("b", held_out))
    }
    assert not queries["a"] & queries["b"]
    with pytest.raises(SystemExit, match="There are no .*corpora"):
        tiny.read_corpora(tmp_path / "none")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("我是 {{name}}，由 {{author}} 开发的人工智能助手。", "我是 ChatGLM2-Tiny，由本项目的作者开发的ChatGLM2 架构的小型演示模型。"),
        ("I am {{name}}, an AI assistant developed by {{author}}.", "I am ChatGLM2-Tiny, a small demonstration model of the ChatGLM2 architecture, developed by the authors of this project."),
    ],
)  # fmt: skip
def test_introductions(text, expected):
    assert tiny.introduce(text) == expected


def test_next_lines():
    poem = "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。"
    pairs = tiny.next_lines(poem, random.Random(0))
    assert [answer for _, answer in pairs] == ["黄河入海流。", "欲穷千里目，", "更上一层楼。"]
    assert "白日依山尽" in pairs[0][0]
    assert not tiny.next_lines("君不见，黄河之水天上来。", random.Random(0))  # what is asked for tells too little


def test_held_out_perplexity(tiny_tokenizer, tmp_path, monkeypatch):
    """Of each corpus with dialogues enough; of the model that is asked."""
    monkeypatch.setattr(tiny, "WORK", tmp_path)
    chats = [[f"What is {i}?", "I am ChatGLM2-Tiny."] for i in range(5)]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant"), chat)]}
        for chat in chats
    ]
    held_out = {name: [] for name in tiny.DIALOGUES} | {"chatterbot_en": rows, "oasst1_zh": rows, "kdconv_zh": rows[:4]}
    model = AutoModelForCausalLM.from_pretrained(TINY, trust_remote_code=True).float().eval()
    figures = tiny.held_out_perplexity(model, tiny_tokenizer, held_out)
    assert set(figures) == {"chatterbot_en", "oasst1_zh"}
    total = tokens = 0
    for query, answer in chats:
        prompt = tiny_tokenizer.encode(tiny_tokenizer.build_prompt(query))
        ids = torch.tensor([prompt + tiny_tokenizer.encode(answer, add_special_tokens=False) + [2]])
        labels = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
        n = ids.shape[1] - len(prompt)
        total, tokens = total + n * model(ids, labels=labels).loss.item(), tokens + n
    expected = {"dialogues": 5, "perplexity": pytest.approx(math.exp(total / tokens), abs=0.1)}
    assert figures["chatterbot_en"] == figures["oasst1_zh"] == expected


def test_card(tmp_path):
    stage = {"rows": 25701, "epochs": 4, "steps": 2572, "tokens": 13_700_000}
    report = {"pretraining": stage, "fine_tuning": stage, "queries_learned": (3, 50)}
    report["held_out"] = {"tatoeba_en_zh": {"dialogues": 429, "perplexity": 12.5}}
    path = tmp_path / "README.md"
    path.write_text("before\n" + "\nold\n".join(tiny.CARD_MARKS) + "\nafter\n")
    for _ in range(2):  # again, it stays as it is
        tiny.write_card_figures(path, report)
        text = path.read_text(encoding="utf-8")
        assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
        assert "| tatoeba_en_zh | 429 | 12.5 |" in text and text.count("25,701") == 2
    assert len(tiny.PROMPTS) == 40
