"""How the small model's data and card are made."""

import gzip
import json
import math
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.files import read_json
from conftest import ROOT, STORED, TINY
from training import leaks, pretrain, sft, tiny, tiny_dialogues
from training.templates import SLOT, Templates, mistyped


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


def test_rows_for_benchmarks(tmp_path, monkeypatch):
    """In files, of dialogues packed together, those to learn and those held out."""
    chats = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(500)
    ]
    write_corpus(tmp_path, "chatterbot_en", chats)
    monkeypatch.setattr(tiny, "WORK", tmp_path)
    tiny.main(["rows", "--corpora", str(tmp_path), "--output", str(TINY), "--limit", "3"])
    train, held_out = (read_json(tmp_path / f"rows/{name}.json") for name in ("train", "held_out"))
    assert len(train["input_ids"]) == len(train["labels"]) == 3 and len(held_out["input_ids"]) in (1, 2, 3)
    assert max(map(len, train["input_ids"])) <= 256 and train["position_ids"][0].count(0) > 1  # several dialogues


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


@pytest.mark.parametrize("remembered, expected", [(100, 100), (0, 0)])
def test_recalled(tiny_tokenizer, monkeypatch, remembered, expected):
    """A model that repeats the first of the dialogue knows every fact; one that does not, none."""
    monkeypatch.setattr(tiny, "RECALL_DISTANCES", (0, 40))
    monkeypatch.setattr(tiny, "RECALLED_FACTS", 10)
    histories = []

    def chat(tokenizer, query, history, **kwargs):
        histories.append(history)
        return " ".join(history[0])[:remembered], history

    row = {"en": "It is raining.", "zh": "下雨了。"}
    assert tiny.recalled(SimpleNamespace(chat=chat), tiny_tokenizer, {"tatoeba_en_zh": [row]}) == {
        0: expected,
        40: expected,
    }
    assert {len(history) for history in histories[:20]} == {1} and min(map(len, histories[20:])) > 2
    facts = [fact for kinds in tiny_dialogues.read("memories").values() for fact in kinds]
    assert all(SLOT.search(fact["answer"][0]) for fact in facts)


def test_card(tmp_path):
    stage = {"rows": 25701, "epochs": 4, "steps": 2572, "tokens": 13_700_000}
    report = {"pretraining": stage, "fine_tuning": stage, "second_fine_tuning": stage, "parameters": 19_573_120}
    forms = {"float32": 12.5, "INT8": 12.7}
    report["held_out"] = {f: {"tatoeba_en_zh": {"dialogues": 429, "perplexity": p}} for f, p in forms.items()}
    report["recalled"] = {"0": 98.0, "1024": 12.0}
    path = tmp_path / "README.md"
    path.write_text("before\n" + "\nold\n".join(tiny.CARD_MARKS) + "\nafter\n")
    (tmp_path / "training.json").write_text(json.dumps(report))
    (tmp_path / "samples.md").write_text("the answers")
    answers = [{"fits": i % 10 < 7} for i in range(100)]
    judgements = {"samples": tiny.fingerprint(tmp_path / "samples.md"), "answers": answers}
    (tmp_path / "judgements.json").write_text(json.dumps(judgements))
    for _ in range(2):  # again, it stays as it is
        tiny.card(tmp_path)
        text = path.read_text(encoding="utf-8")
        assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
        assert "| 0 | 1024 |\n|---|---|\n| 98.0 | 12.0 |" in text
        assert "| tatoeba_en_zh | 429 | 12.5 | 12.7 |" in text and text.count("25,701") == 3
        assert "\n70 answers fit, as judged by a reader" in text and "| 7 | 7 |" in text
    (tmp_path / "samples.md").write_text("other answers")
    tiny.card(tmp_path)
    assert "has not been judged yet" in path.read_text(encoding="utf-8")


def test_published_answers_are_judged():
    """All of them, and those of the samples that are published; the card has the count."""
    fits = tiny.judged(STORED)
    assert fits is not None, (
        "samples.md is not what judgements.json judges: read it again, and run `training.tiny card`."
    )
    answers = json.loads((STORED / "judgements.json").read_text(encoding="utf-8"))["answers"]
    assert [answer["query"] for answer in answers] == [prompt["queries"][-1] for prompt in leaks.read_prompts()]
    report = json.loads((STORED / "training.json").read_text(encoding="utf-8"))
    assert tiny.card_figures(report, fits) in (STORED / "README.md").read_text(encoding="utf-8")


def test_prompts_are_a_hundred_of_ten_kinds():
    prompts = leaks.read_prompts()
    kinds = {}
    for prompt in prompts:
        kinds.setdefault(prompt["kind"], []).append(prompt)
    assert len(kinds) == 10 and {len(of_kind) for of_kind in kinds.values()} == {10}
    assert all((prompt["kind"] == "memory") == (len(prompt["queries"]) > 2) for prompt in prompts)
    for prompt in kinds["translation"]:
        assert leaks.characters(prompt["source"]) in leaks.characters(prompt["queries"][0])


@pytest.fixture(scope="module")
def finder():
    return leaks.LeakFinder(leaks.read_prompts())


@pytest.mark.parametrize(
    "text",
    [
        "Which planet do we live on?",
        "which planet do  WE live on",
        "Which planet do you live on?",  # another word
        "Well, tell me: which planet do we live on? I forgot.",  # within a longer text
        "On which planet do we live?",  # in another order
        "一个星期总共有几天？",
        "一个星期一共有几天",
        "We were late. The library closes at nine tonight.",  # a sentence to translate
    ],
)
def test_leak_finder_finds_near_copies(finder, text):
    assert finder.find(text)
    assert finder.find_in_row(
        {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": text}]}
    )
    assert finder.find_in_row({"text": f"Before.\n{text}\nAfter."})


@pytest.mark.parametrize(
    "text", ["你好", "What do planets look like?", "一年总共有多少天", "How many legs has a dog?", ""]
)
def test_leak_finder_leaves_other_texts(finder, text):
    assert finder.find(text) is None


def test_edit_distance_to_a_part_of_a_text():
    def by_table(pattern, text):
        row = [0] * (len(text) + 1)
        for i, a in enumerate(pattern, start=1):
            new = [i]
            for j, b in enumerate(text, start=1):
                new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (a != b)))
            row = new
        return min(row)

    rng = random.Random(0)
    for _ in range(500):
        pattern, text = ("".join(rng.choices("abc", k=rng.randint(*ends))) for ends in ((1, 80), (0, 120)))
        assert leaks.distance_within(pattern, text) == by_table(pattern, text)


def test_leak_check_names_a_planted_copy(tmp_path):
    path = tmp_path / "dialogues.jsonl"
    rows = [{"text": "Nothing."}, {"messages": [{"role": "user", "content": "so, what shuold I call you?"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = subprocess.run([sys.executable, "-m", "training.leaks", path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "dialogues.jsonl, line 2: near 'So what should I call you?'" in run.stdout
    assert "1 rows have a near copy" in run.stderr
    path.write_text(json.dumps(rows[0]) + "\n")
    run = subprocess.run([sys.executable, "-m", "training.leaks", path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_prepared_dialogues_have_no_leaks(tmp_path, monkeypatch, finder):
    """All that the templates make, and a planted copy in a corpus; the same at every run."""
    poem = {"title": "登鹳雀楼", "author": "王之涣", "text": "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。"}
    chat = {"messages": [{"role": "user", "content": "Are you ready?"}, {"role": "assistant", "content": "Yes."}]}
    leak = {"messages": [{"role": "user", "content": "Is there anything you can't see?"}, chat["messages"][1]]}
    corpora = tmp_path / "corpora"
    corpora.mkdir()
    for name in tiny.DIALOGUES:
        write_corpus(corpora, name, [])
    write_corpus(corpora, "poetry_zh", [poem])
    write_corpus(corpora, "chatterbot_en", [chat, leak] * 10)
    for name in ("SMALL_TALK", "INTENT", "ROW"):
        monkeypatch.setattr(tiny_dialogues, name, 2)
    for name in ("STORIES", "POEMS", "MEMORIES", "TRANSLATIONS"):
        monkeypatch.setattr(tiny_dialogues, name, 100)
    made = []
    for run in ("a", "b"):
        monkeypatch.setattr(tiny, "WORK", tmp_path / run)
        tiny.prepare_dialogues(corpora)
        made.append((tmp_path / run / "dialogues.jsonl").read_text(encoding="utf-8"))
    assert made[0] == made[1]
    assert "Are you ready?" in made[0] and "anything you can't see" not in made[0]
    rows = [json.loads(line) for line in made[0].splitlines()]
    assert len(rows) > 1000 and not any(finder.find_in_row(row) for row in rows)
    contents = "".join(message["content"] for row in rows for message in row["messages"])
    assert not any(mark in contents for mark in "<>[]|")  # no template is left unfilled


def test_templates():
    templates = Templates({"animal": ["owl", "fox"], "name": ["Ann", "Bob"], "girl": ["Ann"]}, random.Random(0))
    for _ in range(20):
        values = {}
        query = templates.fill("[a story|a tale] about a <animal> who met a <animal2>", values)
        assert query.startswith(("A story about", "A tale about")) and {values["animal"], values["animal2"]} == {
            "owl",
            "fox",
        }
        assert ("an owl" in query) and ("a fox" in query)
        expected = {"Ann": "She is Ann, a girl.", "Bob": "He is Bob, a boy."}
        assert templates.fill("<He> is <name>, a <child>.", values) == expected[values["name"]]
    intent = {"queries": ["capital of <0>?"], "answers": ["<1>."]}
    assert templates.talk(intent, ["France", "Paris"]) == ("Capital of France?", "Paris.")
    assert templates.talk(intent, ["[France|France]", "Paris"]) == ("Capital of France?", "Paris.")


def test_coined_words_are_made_like_others():
    rng = random.Random(0)
    words = tiny.talk_templates(rng).words
    coined = {
        like: {tiny_dialogues.coined(like, words, rng) for _ in range(50)}
        for like in ("red", "Max", "毛毛", "小明", "红色", "苹果")
    }
    assert all(len(words) > 20 for words in coined.values())
    assert all(word.isascii() and word.islower() for word in coined["red"])
    assert all(word.isascii() and word.istitle() for word in coined["Max"])
    assert all(word[0] == word[1] for word in coined["毛毛"]) and all(word[0] == "小" for word in coined["小明"])
    assert all(word[2] == "色" for word in coined["红色"]) and all(len(word) == 2 for word in coined["苹果"])


def test_memories_ask_for_what_was_coined(monkeypatch):
    """A word that only one dialogue has is in what was said and in the last answer."""
    monkeypatch.setattr(tiny_dialogues, "MEMORIES", 200)
    rng = random.Random(0)
    dialogues = list(tiny_dialogues.memories(tiny.talk_templates(rng), [("Hello.", "Hi.")], rng))
    known = " ".join(sum(tiny.talk_templates(rng).words.values(), [])).lower()
    new = [d for d in dialogues if not all(word in known for word in re.findall(r"[a-z]+x\b", d[-1][1].lower()))]
    assert len(new) > 2
    for dialogue in new:
        word = re.search(r"[a-z]+x\b", dialogue[-1][1].lower())[0]
        assert any(word in query.lower() for query, _ in dialogue[:-1])


def test_translations_fit_each_other():
    """Each template of a translation has the same slots in both languages, and each noun its measure word."""
    data = tiny_dialogues.read("translations")
    for english, chinese in data["sentences"]:
        assert set(SLOT.findall(chinese)) - {"measure"} == set(SLOT.findall(english)) <= set(data["words"]), english
        assert "<thing>" in chinese or "<measure>" not in chinese
    assert all(len(row) == (3 if slot == "thing" else 2) for slot, rows in data["words"].items() for row in rows)


def test_mistyped_queries_stay_readable():
    rng = random.Random(0)
    queries = {mistyped("What is your name?", rng) for _ in range(300)}
    assert "What is your name?" in queries and "What is your name" in queries and "what is your name" in queries
    assert all(abs(len(query) - len("What is your name?")) <= 2 for query in queries)


def test_stories_get_other_names():
    story = "Lily met Tom. Lily said: Will you play? Tom and Spot ran."
    renamed = tiny.renamed(story, random.Random(0))
    girl, boy = renamed.split()[0], renamed.split()[2].rstrip(".")
    assert girl in tiny.GIRLS and boy in tiny.BOYS
    assert renamed == story.replace("Lily", girl).replace("Tom", boy)


def test_what_is_told_names_hero_and_thing():
    assert (
        tiny.what_is_told("Lily had a ball. The ball was red. Lily and the ball went out.")
        == "a girl named Lily and a ball"
    )
    assert tiny.what_is_told("An apple. The apple fell.") == "an apple"
    assert tiny.what_is_told("Nothing much.") == ""


def test_all_stages(tmp_path, monkeypatch):
    """As docs/training.md has them, with few rows and steps: the checkpoint is in INT8 and answers."""
    corpora, output = tmp_path / "corpora", tmp_path / "published"
    rounds = [("What is 1?", "1 is a number."), ("What is 2?", "2 is a number.")]
    chats = [{"messages": tiny.to_messages([round])} for round in rounds for _ in range(60)]
    for i, chat in enumerate(chats):
        chat["messages"][0]["content"] += f" {i}"
    pairs = [{"en": f"It is {i}.", "zh": f"这是{i}。", "text": f"It is {i}.\t这是{i}。"} for i in range(100)]
    corpora.mkdir()
    for name in tiny.DIALOGUES | tiny.TEXTS:
        write_corpus(corpora, name, {"chatterbot_en": chats, "tatoeba_en_zh": pairs}.get(name, []))
    for name in ("SMALL_TALK", "INTENT", "ROW", "STORIES", "POEMS", "MEMORIES", "TRANSLATIONS"):
        monkeypatch.setattr(tiny_dialogues, name, 1)
    monkeypatch.setattr(tiny, "WORK", tmp_path / "build/tiny")
    monkeypatch.setattr(tiny, "LEAST_HELD_OUT", 1)
    monkeypatch.setattr(tiny, "RECALLED_FACTS", 1)
    prompts = [leaks.read_prompts()[0], leaks.read_prompts()[-1]]
    monkeypatch.setattr(tiny, "read_prompts", lambda: prompts)
    monkeypatch.chdir(tmp_path)
    output.mkdir()
    (output / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    (output / "README.md").write_text("\n".join(tiny.CARD_MARKS))
    few = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--torch_compile", "False", "--logging_steps", "1"]
    few += ["--max_eval_samples", "2", "--warmup_steps", "1", "--bf16", "False"]
    for arguments in (["texts"], ["dialogues"]):
        tiny.main([*arguments, "--corpora", str(corpora), "--output", str(output)])
    config = str(ROOT / "training/configs/tiny_{}.yaml")
    pretrain.main(["--config", config.format("pretrain"), *few])
    sft.main(["--config", config.format("sft"), *few, "--lr_scheduler_kwargs", '{"num_decay_steps": 1}'])
    tiny.main(["average"])
    weights = [tiny.load(tiny.WORK / name)[0].state_dict() for name in ("pretrain", "sft", "average")]
    for pretrained, tuned, mean in zip(*(w.values() for w in weights), strict=True):
        torch.testing.assert_close(mean, 0.3 * pretrained + 0.7 * tuned)
    sft.main(["--config", config.format("polish"), *few, "--lr_scheduler_kwargs", '{"num_decay_steps": 1}'])
    tiny.main(["publish", "--corpora", str(corpora), "--output", str(output)])
    stored = json.loads((output / "config.json").read_text())["quantization_config"]
    assert stored["bits"] == 8 and stored["quantize_embeddings"]
    assert (output / "model.safetensors").stat().st_size < 20_000_000
    report = json.loads((output / "training.json").read_text())
    assert 19e6 < report["parameters"] < 21e6 and set(report["held_out"]) == {"float32", "INT8, as stored"}
    figures = [form["chatterbot_en"]["perplexity"] for form in report["held_out"].values()]
    assert figures[0] == pytest.approx(figures[1], rel=0.02)
    samples = (output / "samples.md").read_text(encoding="utf-8")
    assert all(f"**{query}**" in samples for prompt in prompts for query in prompt["queries"])
    tiny.main(["answers", "--output", "build/tiny/finished", "--samples", str(tmp_path / "again.md")])
    assert (tmp_path / "again.md").read_text(encoding="utf-8") == samples
    with pytest.raises(SystemExit):
        tiny.main(["texts"])
