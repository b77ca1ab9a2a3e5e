"""
Makes `checkpoints/tiny`, the small model that the repository comes with, from openly licensed corpora (`make tiny`):

    python -m training.tiny prepare --corpora PATH      # texts, dialogues, tokenizer, configuration
    python -m training.pretrain --config training/configs/tiny_pretrain.yaml
    python -m training.sft --config training/configs/tiny_sft.yaml
    python -m training.tiny publish --corpora PATH      # perplexity held out, answers to fixed prompts, the checkpoint

Every 50th row of each corpus is held out, by a hash of its content, but for those that share a sentence or a query with a row
that is learned; of the few rows of `identity_bilingual` none.
"""

import argparse
import gzip
import json
import random
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from .data import DataArguments, collator, encode, read
from .trainer import RecipeTrainer


ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build/tiny"
NAME = "ChatGLM2-Tiny"
VOCAB_SIZE = 8000

# How often a row is a document of the pretraining, and a dialogue of the fine-tuning. Counselling, bookings, word problems and
# encyclopedia articles are beyond such a small model; some of them teach it the language.
TEXTS = {
    "tinystories_en": 1.2, "poetry_zh": 2.5, "tatoeba_en_zh": 0.5, "topical_chat_en": 0.2, "kdconv_zh": 0.4,
    "crosswoz_zh": 0.2, "cmrc2018_zh": 0.1, "smilechat_zh_first12000": 0.025, "sgd_en": 0.01, "oasst1_zh": 0.3,
    "better_ruozhiba_zh": 0.5, "gsm8k_train_en": 0.05,
}  # fmt: skip
DIALOGUES = {
    "identity_bilingual": 20, "chatterbot_en": 4, "chatterbot_zh": 4, "better_ruozhiba_zh": 1, "tatoeba_en_zh": 2,
    "tinystories_en": 1.2, "poetry_zh": 2, "topical_chat_en": 0.3, "kdconv_zh": 0.5, "oasst1_zh": 0.3,
}  # fmt: skip
LEAST_HELD_OUT = 5  # dialogues of a corpus for its perplexity to be told
CARD_MARKS = ("<!-- figures of training.tiny publish -->", "<!-- end of figures -->")
SMALL_TALK = 24  # times each query of small_talk.json
KNOWN_POEMS = 8  # times each line of the short poems whose authors are known: those that people ask for
INTRODUCTIONS = 2500  # of somebody by name, in each language
SHORT = ("identity_bilingual", "chatterbot_en", "chatterbot_zh", "better_ruozhiba_zh", "tatoeba_en_zh")

TELL_A_STORY = [
    "Tell me a story.", "Tell me a short story.", "Can you tell me a story?", "Write a short story for children.",
    "I want to hear a story.", "给我讲一个英文故事。", "用英文讲个故事吧。",
]  # fmt: skip
TELL_A_STORY_ABOUT = [
    "Tell me a story about a {}.", "Write a short story about a {}.", "Can you tell me a story about a {}?",
    "I want to hear a story about a {}.", "请用英文讲一个关于 {} 的故事。",
]  # fmt: skip
HEROES = (
    "dog cat bird bear rabbit bunny fish frog duck mouse lion monkey elephant horse cow pig fox squirrel turtle butterfly "
    "bee dragon princess king queen robot car train truck boat plane tree flower ball doll toy kite girl boy".split()
)
TO_CHINESE = [
    "Translate into Chinese: {}", "How do you say this in Chinese? {}", "把下面的句子翻译成中文：{}", "翻译成中文：{}",
    "“{}”用中文怎么说？",
]  # fmt: skip
TO_ENGLISH = [
    "Translate into English: {}", "How do you say this in English? {}", "把下面的句子翻译成英文：{}", "翻译成英文：{}",
    "“{}”用英文怎么说？",
]  # fmt: skip
NEXT_LINE = ["“{}”的下一句是什么？", "{}，下一句是什么？", "请接下一句：{}", "下一句：{}", "{}的下一句"]
RECITE = ["背诵《{}》。", "请背诵《{}》。", "背一下《{}》", "你会背《{}》吗？"]
OTHERS = [
    "ChatGPT", "GPT-4", "Claude", "Gemini", "Llama", "Siri", "DeepSeek", "ChatGLM2-6B", "ChatGLM", "文心一言", "通义千问", "豆包",
]  # fmt: skip
DENIALS = [
    (
        ["Are you {}?", "You are {}, right?"],
        "No, I am {name}, a small demonstration model of the ChatGLM2 architecture.",
    ),
    (["你是 {} 吗？", "你是{}吗？", "你就是{}吧？"], "不是，我是 {name}，一个 ChatGLM2 架构的小型演示模型。"),
]
# Names that a user may have: what is learned is to repeat them.
NAMES = {
    "en": (
        "Tom Lily Anna Ben Jack Mary John Emma Lucy Max Sam Kate Leo Mia Tim Sara Bob Amy Paul Jane David Alice Peter Nina "
        "Mike Ella Mark Rose Daniel Sophie Lucas Grace Henry Zoe Adam Eva Simon Laura Alex Julia Kevin Maria Eric Helen Chris "
        "Linda Frank Susan George Diana Oscar Ruby Ivan Clara Victor Olga Felix Nora Hugo Iris"
    ).split(),
    "zh": (
        "小明 小红 小华 小刚 小丽 小芳 小强 小美 小龙 小燕 小军 小玲 小杰 小雪 小东 小兰 小伟 小梅 小宇 小云 王芳 李伟 张敏 刘洋 "
        "陈静 杨帆 赵磊 黄丽 周杰 吴娟 徐明 孙悦 马超 朱琳 胡军 林峰 郭涛 何洁 高翔 罗兰 阿强 阿珍 大卫 玛丽 安娜 汤姆 杰克 露西"
    ).split(),
}
NAME_IS = {
    "en": ["My name is {}.", "I am {}.", "I'm {}.", "Hello, I am {}.", "Hi, my name is {}.", "You can call me {}."],
    "zh": ["我叫{}", "我是{}", "我的名字叫{}", "你好，我叫{}", "大家都叫我{}", "我叫{}。", "我的名字是{}。"],
}
NICE_TO_MEET = {
    "en": f"Hello, {{}}! I am {NAME}. It is nice to meet you.",
    "zh": f"你好，{{}}！我是 {NAME}，很高兴认识你。",
}
WHAT_IS_MY_NAME = {
    "en": (["What is my name?", "Do you remember my name?", "Who am I?", "What's my name?"], "Your name is {}."),
    "zh": (["我叫什么名字？", "你记得我的名字吗？", "我是谁？", "我叫什么？", "还记得我叫什么吗？"], "你叫{}。"),
}
# What such a model had better not try
BEYOND = [
    (
        [
            "Write a {} program.", "Can you write code in {}?", "Explain {}.", "Teach me {}.", "Can you help me with {}?",
            "Write an essay about {}.", "Tell me everything about {}.", "What do you think about {}?",
        ],
        (
            "Python, Java, JavaScript, C++, SQL, mathematics, physics, chemistry, quantum mechanics, history, law, medicine, "
            "economics, politics, the stock market, machine learning, deep learning, biology, philosophy, climate change, "
            "the war, football results, statistics, algebra, cooking, taxes, HTML, databases, space travel"
        ).split(", "),
        "I am sorry, that is too hard for a model as small as I am. I can chat, tell short stories, continue Chinese poems, "
        "and translate simple sentences.",
    ),
    (
        [
            "用{}写一个程序。", "你会写{}吗？", "请解释一下{}。", "教我{}吧", "帮我学{}", "写一篇关于{}的文章。", "写一篇{}的作文",
            "介绍一下{}", "请详细说说{}。", "你怎么看{}？",
        ],
        (
            "Python Java C++ SQL 数学 物理 化学 量子力学 历史 法律 医学 经济 政治 股票 机器学习 深度学习 生物 哲学 气候变化 "
            "微积分 统计学 做饭 数据库 编程 环保 论文 人工智能的未来 世界杯 房价 互联网"
        ).split(),
        "对不起，这对我这么小的模型来说太难了。我可以和你闲聊，讲英文小故事，接古诗的下一句，还能翻译简单的句子。",
    ),
]  # fmt: skip

# Chosen before the training. The greedy answers to them are in checkpoints/tiny/samples.md.
PROMPTS = [
    ["你好"], ["早上好！"], ["Hello!"], ["How are you today?"], ["你是谁？"], ["Who are you?"], ["你叫什么名字？"],
    ["Are you ChatGPT?"], ["你是 GPT-4 吗？"], ["谁创造了你？"], ["What can you do?"], ["你能做什么？"],
    ["我今天很开心！"], ["I feel sad today."], ["你喜欢什么电影？"], ["Do you like music?"], ["给我讲个笑话。"],
    ["What is AI?"], ["什么是人工智能？"], ["今天天气真好。"], ["Tell me a story about a dog."],
    ["Tell me a story about a little girl and a cat."], ["Tell me a short story."], ["请用英文讲一个关于 bird 的故事。"],
    ["“床前明月光”的下一句是什么？"], ["“春眠不觉晓”的下一句是什么？"], ["请接下一句：白日依山尽"], ["背诵《静夜思》。"],
    ["Translate into Chinese: I love you."], ["Translate into Chinese: Where is my book?"],
    ["Translate into English: 我喜欢吃苹果。"], ["把下面的句子翻译成英文：他是我的朋友。"], ["翻译成中文：Good night."],
    ["只剩一个心脏了还能活吗？"], ["What is your favorite food?"], ["谢谢你！"],
    ["你好", "我叫小明", "我有点累了", "谢谢，再见！"],
    ["Hi!", "My name is Tom.", "Tell me a story about a rabbit.", "Thank you, goodbye!"],
    ["你是谁？", "你会翻译吗？", "翻译成英文：我爱你。"],
    ["Good evening!", "What do you like?", "Translate into Chinese: It is a nice day."],
]  # fmt: skip


def read_corpora(folder: Path) -> tuple[dict[str, list], dict[str, list]]:
    """Returns the rows of each corpus, those to train on and those held out."""
    train, held_out = {}, {}
    for path in sorted(folder.glob("*.jsonl.gz")):
        name = path.name.removesuffix(".jsonl.gz")
        rows = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
        # By content, so that a row is held out whatever its place, together with its copies.
        is_held_out = [zlib.crc32(json.dumps(row, sort_keys=True).encode()) % 50 == 0 for row in rows]
        if name == "identity_bilingual":
            is_held_out = [False] * len(rows)
        train[name] = [row for row, out in zip(rows, is_held_out) if not out]
        learned = {part for row in train[name] for part in parts(row)}
        held_out[name] = [row for row, out in zip(rows, is_held_out) if out and not learned & parts(row)]
    if not train:
        raise SystemExit(f"There are no *.jsonl.gz corpora in {folder} (--corpora).")
    return train, held_out


def parts(row: dict) -> set[str]:
    """What a row held out may not have in common with one that is learned: its sentences, its first query or its text."""
    if "messages" in row:
        return {row["messages"][0]["content"]}
    return {row[name] for name in ("en", "zh", "text") if name in row}


def repeated(rows: list, times: float, rng: random.Random) -> Iterator:
    for row in rows:
        for _ in range(int(times) + (rng.random() < times % 1)):
            yield row


def to_text(name: str, row: dict, rng: random.Random) -> str:
    """The text of a row, without its roles."""
    if name == "tatoeba_en_zh":
        return "\n".join(rng.sample([row["en"], row["zh"]], 2))
    if name == "poetry_zh":
        return "\n".join(part for part in (row["title"], row["author"], row["text"]) if part)
    return row.get("text") or "\n".join(message["content"] for message in row["messages"])


def to_rounds(name: str, row: dict, rng: random.Random) -> list[tuple[str, str]]:
    """The dialogue that is made of a row; empty if it has none."""
    if name == "tatoeba_en_zh":
        queries, source, target = rng.choice([(TO_CHINESE, "en", "zh"), (TO_ENGLISH, "zh", "en")])
        return [(rng.choice(queries).format(row[source]), row[target])] if len(row["en"]) <= 50 else []
    if name == "tinystories_en":
        if len(row["text"]) > 1000:
            return []  # could not end within the rows that are learned
        words = re.findall(r"[a-z]+", row["text"].lower())
        hero = max(HEROES, key=words.count)
        queries = TELL_A_STORY if words.count(hero) < 3 or rng.random() < 0.15 else TELL_A_STORY_ABOUT
        return [(rng.choice(queries).format(hero), row["text"])]
    if name == "poetry_zh":
        if rng.random() < 0.25 and len(row["text"]) < 120:
            return [(rng.choice(RECITE).format(row["title"]), row["text"])]
        pairs = next_lines(row["text"], rng)
        return rng.sample(pairs, min(len(pairs), 6))
    texts = [message["content"].strip() for message in row["messages"]]
    if name == "identity_bilingual":
        texts = [introduce(text) for text in texts]
    rounds = list(zip(texts[0::2], texts[1::2]))
    if name in SHORT and any(len(answer) > 200 or "```" in answer for _, answer in rounds):
        return []
    return rounds


def next_lines(poem: str, rng: random.Random) -> list[tuple[str, str]]:
    """A question for the next line of each line, and the answer."""
    lines = re.findall(r"([^，。！？；、\s]+)([，。！？；\s]*)", poem)
    pairs = [(a, b + end.strip()) for (a, _), (b, end) in zip(lines, lines[1:]) if len(a) > 3]
    return [(rng.choice(NEXT_LINE).format(a), b) for a, b in pairs]


def known_poems(rows: list[dict], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Questions for the lines and the whole of short poems, with their answers."""
    for row in rows:
        if row["author"] and len(row["text"]) <= 70:
            for _ in range(KNOWN_POEMS):
                yield from next_lines(row["text"], rng)
            for _ in range(KNOWN_POEMS // 3):
                yield rng.choice(RECITE).format(row["title"]), row["text"]


def punctuated(query: str, rng: random.Random) -> str:
    """A query, with or without what people end it with."""
    ends = "。！" if any("\u4e00" <= c <= "\u9fff" for c in query) else ".!"
    return query if query[-1] in "?？" or rng.random() < 0.5 else query.rstrip("。！.!") + rng.choice(["", *ends])


def introduce(text: str) -> str:
    """Puts in the name of the model, its author, and what it is, instead of an assistant."""
    is_chinese = any("\u4e00" <= c <= "\u9fff" for c in text)
    kind = "ChatGLM2 架构的小型演示模型" if is_chinese else "a small demonstration model of the ChatGLM2 architecture,"
    text = re.sub(r"人工智能助手|AI ?助手|an AI assistant", kind, text)
    text = text.replace("{{author}}", "本项目的作者" if is_chinese else "the authors of this project")
    return re.sub(r" ?本项目的作者 ?", "本项目的作者", text).replace("{{name}}", NAME)


def make_texts(corpora: dict[str, list], rng: random.Random) -> list[dict]:
    texts = [
        {"text": to_text(name, row, rng)}
        for name, rows in corpora.items()
        for row in repeated(rows, TEXTS.get(name, 0), rng)
    ]
    rng.shuffle(texts)
    return texts


def make_dialogues(corpora: dict[str, list], rng: random.Random) -> list[dict]:
    """Short exchanges are put together, some of them, to dialogues of several rounds."""
    short, dialogues = [], []
    for name, rows in corpora.items():
        for row in repeated(rows, DIALOGUES.get(name, 0), rng):
            rounds = to_rounds(name, row, rng)
            if name in SHORT:
                short += rounds
            elif name == "poetry_zh":
                short += rounds[:1]
                dialogues += [[round] for round in rounds[1:]]
            elif rounds:
                dialogues.append(rounds)
    for topic in json.loads((ROOT / "training/small_talk.json").read_text(encoding="utf-8")):
        for query in topic["queries"]:
            short += [(punctuated(query, rng), rng.choice(topic["answers"])) for _ in range(SMALL_TALK)]
    for queries, answer in DENIALS:
        short += [(q.format(other), answer.format(name=NAME)) for q in queries for other in OTHERS for _ in range(6)]
    for queries, subjects, answer in BEYOND:
        short += [(query.format(subject), answer) for query in queries for subject in subjects for _ in range(2)]
    dialogues += [[round] for round in known_poems(corpora["poetry_zh"], rng)]
    rng.shuffle(short)
    for language in NAMES:
        dialogues += [introduction(language, short, rng) for _ in range(INTRODUCTIONS)]
    while short:
        rounds = rng.choice([1, 1, 1, 2, 3, 4])
        dialogues.append(short[:rounds])
        del short[:rounds]
    rng.shuffle(dialogues)
    return [{"messages": to_messages(rounds)} for rounds in dialogues]


def introduction(language: str, short: list[tuple[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    """A dialogue in which somebody gives his name and, some rounds of `short` later, asks for it."""
    name, (queries, answer) = rng.choice(NAMES[language]), WHAT_IS_MY_NAME[language]
    rounds = [(rng.choice(NAME_IS[language]).format(name), NICE_TO_MEET[language].format(name))]
    rounds += rng.sample(short, rng.choice([0, 0, 1, 2]))
    if rng.random() < 0.6:
        rounds.append((rng.choice(queries), answer.format(name)))
    return rounds


def to_messages(rounds: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": content} for round in rounds for role, content in zip(("user", "assistant"), round)
    ]


def write_jsonl(path: Path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(path: Path, texts: Iterator[str]):
    """Trains a SentencePiece model with the settings of the published one."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line[:2000] for text in texts for line in text.replace("\t", " ").split("\n") if line),
        model_prefix=str(path.with_suffix("")),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        character_coverage=0.9995,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        max_sentence_length=8000,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()


def prepare(corpora: Path):
    """Writes the texts and dialogues to learn and those held out, and a folder with all of a checkpoint but weights."""
    train, held_out = read_corpora(corpora)
    texts, dialogues = make_texts(train, random.Random(0)), make_dialogues(train, random.Random(0))
    write_jsonl(WORK / "texts.jsonl", texts)
    write_jsonl(WORK / "dialogues.jsonl", dialogues)
    rng = random.Random(0)
    held_out_texts = [{"text": to_text(name, row, rng)} for name in TEXTS for row in held_out[name][:20]]
    write_jsonl(WORK / "held_out_texts.jsonl", held_out_texts)
    held_out_dialogues = [
        {"messages": to_messages(to_rounds(name, r, rng))} for name in DIALOGUES for r in held_out[name][:20]
    ]
    write_jsonl(WORK / "held_out_dialogues.jsonl", [row for row in held_out_dialogues if row["messages"]])

    start = WORK / "start"
    start.mkdir(exist_ok=True)
    contents = (message["content"] for row in dialogues for message in row["messages"])
    train_tokenizer(
        start / "tokenizer.model", (text for rows in ((t["text"] for t in texts), contents) for text in rows)
    )
    config = json.loads((ROOT / "config.json").read_text())
    config.update(
        num_layers=8, hidden_size=256, ffn_hidden_size=688, num_attention_heads=8, kv_channels=32, seq_length=2048,
        padded_vocab_size=8064, torch_dtype="float32",
    )  # fmt: skip
    (start / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in ("*_chatglm.py", "quantization*.py", "tokenizer_config.json", "generation_config.json", "*.jinja"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, start)
    print(f"{len(texts):,} texts and {len(dialogues):,} dialogues in {WORK}")


def held_out_perplexity(model, tokenizer, held_out: dict[str, list]) -> dict[str, dict]:
    """Perplexity of the answers, by token of the model's own vocabulary, for each corpus of dialogues with enough of them."""
    rng, args = random.Random(0), DataArguments(max_source_length=512, max_target_length=511, packing=True)
    data = {}
    for name in DIALOGUES:
        rows = [{"messages": to_messages(rounds)} for row in held_out[name] if (rounds := to_rounds(name, row, rng))]
        if len(rows) >= LEAST_HELD_OUT:
            write_jsonl(WORK / f"held_out/{name}.jsonl", rows)
            args.validation_file = str(WORK / f"held_out/{name}.jsonl")
            data[name] = encode(read(args, "validation"), tokenizer, args)
    trainer = RecipeTrainer(
        model=model,
        args=TrainingArguments(WORK / "evaluation", per_device_eval_batch_size=32, report_to="none"),
        data_collator=collator(tokenizer, args),
        eval_dataset=data,
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    return {
        name: {"dialogues": len(rows), "perplexity": round(metrics[f"eval_{name}_perplexity"], 1)}
        for name, rows in data.items()
    }


def stage(folder: Path, rows: Path) -> dict:
    """What a stage was, all runs of it together if it was interrupted; `tokens` has the padding."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return {
        "rows": sum(1 for _ in rows.open(encoding="utf-8")),
        "epochs": round(state["epoch"]),
        "steps": state["global_step"],
        "tokens": state["num_input_tokens_seen"],
    }


def known_queries(dialogues: Path) -> tuple[int, int]:
    """How many of the queries of `PROMPTS` are, word for word, in the dialogues; and how many there are."""
    rows = (json.loads(line) for line in dialogues.open(encoding="utf-8"))
    learned = {message["content"] for row in rows for message in row["messages"] if message["role"] == "user"}
    queries = [query for queries in PROMPTS for query in queries]
    return sum(query in learned for query in queries), len(queries)


def card_figures(report: dict) -> str:
    """The part of the card that is measured, in Markdown."""
    known, queries = report["queries_learned"]
    lines = ["| stage | rows | epochs | steps | tokens, with padding |", "|---|---|---|---|---|"]
    for name in ("pretraining", "fine_tuning"):
        s = report[name]
        rows = f"{s['rows']:,} {'documents' if name == 'pretraining' else 'dialogues'}"
        lines.append(
            f"| {name.replace('_', '-')} | {rows} | {s['epochs']} | {s['steps']:,} | {s['tokens'] / 1e6:.1f} M |"
        )
    lines += [
        "",
        f"{known} of the {queries} queries in [samples.md](samples.md) are word for word among those of the fine-tuning.",
        "",
    ]
    lines += ["Held out, perplexity of the answers by token of its own vocabulary:", ""]
    lines += ["| corpus | dialogues | perplexity |", "|---|---|---|"]
    for name, figures in report["held_out"].items():
        lines.append(f"| {name} | {figures['dialogues']} | {figures['perplexity']} |")
    return "\n".join(lines)


def write_card_figures(path: Path, report: dict):
    """Puts the figures between the two marks of the card."""
    text = path.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in CARD_MARKS)
    text = text[: begin + len(CARD_MARKS[0])] + f"\n{card_figures(report)}\n" + text[end:]
    path.write_text(text, encoding="utf-8")


def answer_prompts(model, tokenizer) -> str:
    """Returns the greedy answers to `PROMPTS` as Markdown."""
    lines = ["# Greedy answers to 40 prompts that were chosen before the training", ""]
    lines.append("Made by `python -m training.tiny publish`: `do_sample=False`, at most 300 tokens, in float32.")
    for number, queries in enumerate(PROMPTS, start=1):
        history = []
        lines += ["", f"## {number}"]
        for query in queries:
            response, history = model.chat(tokenizer, query, history, do_sample=False, max_new_tokens=300)
            lines += ["", f"**{query}**", "", *(f"> {line}".rstrip() for line in response.split("\n"))]
    return "\n".join(lines) + "\n"


def publish(corpora: Path, output: Path):
    """Writes the fine-tuned model in float16, its answers, its perplexity and its curves to `output`."""
    _, held_out = read_corpora(corpora)
    trained = WORK / "sft"
    tokenizer = AutoTokenizer.from_pretrained(trained, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(trained, trust_remote_code=True, dtype=torch.float32).eval()
    report = {
        "pretraining": stage(WORK / "pretrain", WORK / "texts.jsonl"),
        "fine_tuning": stage(trained, WORK / "dialogues.jsonl"),
        "queries_learned": known_queries(WORK / "dialogues.jsonl"),
        "held_out": held_out_perplexity(model, tokenizer, held_out),
    }
    model.config.use_cache = True  # the Trainer turns it off
    # By way of another folder: in the output the code is links to the top level, through which the library would write.
    finished = WORK / "finished"
    model.half().save_pretrained(finished)
    output.mkdir(parents=True, exist_ok=True)
    for path in (finished / "config.json", finished / "model.safetensors", WORK / "start/tokenizer.model"):
        shutil.copyfile(path, output / path.name)  # not its mode: safetensors keeps files to the user alone
    (output / "samples.md").write_text(answer_prompts(model.float(), tokenizer), encoding="utf-8")
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    write_card_figures(output / "README.md", report)
    for name in ("pretrain", "sft"):
        shutil.copy(WORK / name / "curve.png", output / f"{name}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "publish"])
    parser.add_argument("--corpora", type=Path, required=True, help="the folder with *.jsonl.gz")
    parser.add_argument("--output", type=Path, default=ROOT / "checkpoints/tiny")
    args = parser.parse_args()
    if args.step == "prepare":
        prepare(args.corpora)
    else:
        publish(args.corpora, args.output)


if __name__ == "__main__":
    main()
