"""How the small model's data and card are made."""

import gzip
import json
import random

import pytest

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
