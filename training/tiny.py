"""
Makes `checkpoints/tiny`, the small model in the repository, from openly licensed corpora (`make tiny`):

    python -m training.tiny texts --corpora PATH        # texts for training, tokenizer, configuration
    python -m training.pretrain --config training/configs/tiny_pretrain.yaml
    python -m training.tiny dialogues --corpora PATH    # dialogues for training
    python -m training.sft --config training/configs/tiny_sft.yaml
    python -m training.tiny average                     # the weights of both stages, from which the last one starts
    python -m training.sft --config training/configs/tiny_polish.yaml
    python -m training.tiny publish --corpora PATH      # the checkpoint in INT8, its answers, its perplexity
    python -m training.tiny card                        # the figures in its README, once the answers are judged
    python -m training.tiny rows --corpora PATH         # dialogues to learn and held out, encoded, for benchmarks

Every 50th row of each corpus is held out, chosen by a hash of its content, except from the few rows of `identity_bilingual`.
Held-out rows that share a sentence or a query with a training row are dropped. Rows that nearly copy a prompt of
training/prompts.json are left out.
"""

import gzip
import hashlib
import json
import math
import random
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.files import write_json
from common.options import Parser

from .data import DataArguments, PackedExamples, collator, encode, encode_dialogue, read
from .leaks import LeakFinder, read_prompts
from .objective import IGNORED
from .templates import SLOT, Templates
from .tiny_dialogues import memories, poems, small_talk, stories, told, translations
from .tiny_dialogues import read as read_talk


ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build/tiny"
NAME = "ChatGLM2-Tiny"
VOCAB_SIZE = 8000

# How often a row is a document of the pretraining, which is one epoch, and a dialogue of the fine-tuning. Large corpora are
# taken in part, small ones several times.
TEXTS = {
    "tinystories_en": 10, "poetry_zh": 12, "tatoeba_en_zh": 8, "topical_chat_en": 3, "kdconv_zh": 8, "crosswoz_zh": 3,
    "cmrc2018_zh": 1.7, "smilechat_zh_first12000": 1.6, "sgd_en": 0.3, "oasst1_zh": 8, "better_ruozhiba_zh": 8,
    "gsm8k_train_en": 0.3, "chatterbot_en": 8, "chatterbot_zh": 8,
}  # fmt: skip
DIALOGUES = {
    "identity_bilingual": 10, "chatterbot_en": 1, "chatterbot_zh": 1, "better_ruozhiba_zh": 1, "tatoeba_en_zh": 2,
    "tinystories_en": 1, "poetry_zh": 1, "topical_chat_en": 0.6, "kdconv_zh": 1, "oasst1_zh": 0.5,
}  # fmt: skip
# Fine-tuning forgets what its data do not repeat; a mean of the weights before and after has most of what both know (Wortsman et
# al. 2022, arXiv 2109.01903). The last stage starts from a mean with this share of the pretraining; what is published is a mean
# with that share of what the last stage started from. With more, perplexity is lower and more answers are wrong.
PRETRAINED, STARTED = 0.3, 0.17
RECALL_DISTANCES = 0, 128, 512, 1024  # tokens
RECALLED_FACTS = 25  # for each distance and language
LEAST_HELD_OUT = 5  # dialogues of a corpus for its perplexity to be told
CARD_MARKS = ("<!-- figures of training.tiny publish -->", "<!-- end of figures -->")
KNOWN_POEMS = 8  # times each line of the short poems whose authors are known: those that people ask for
SHORT = ("identity_bilingual", "chatterbot_en", "chatterbot_zh", "better_ruozhiba_zh", "tatoeba_en_zh")

TELL_A_STORY = [
    "Tell me a story.", "Tell me a short story.", "Can you tell me a story?", "Write a short story for children.",
    "I want to hear a story.", "给我讲一个英文故事。", "用英文讲个故事吧。",
]  # fmt: skip
TELL_A_STORY_ABOUT = [
    "Tell me a story about {}.", "Write a short story about {}.", "Can you tell me a story about {}?", "Please tell us about {}.",
    "I want to hear a story about {}.", "A story about {}, please.", "Do you know a story with {}?", "请用英文讲一个关于 {} 的故事。",
]  # fmt: skip
HEROES = (
    "dog cat bird bear rabbit bunny fish frog duck mouse lion monkey elephant horse cow pig fox squirrel turtle butterfly "
    "bee dragon princess king queen robot car train truck boat plane tree flower ball doll toy kite girl boy box book cake "
    "cookie apple hat bike bell balloon block bag bed bug boot cup chair crab castle cloud coat dress drum egg fire flag garden "
    "gift goat house ice jar jam key lamp leaf letter map moon nest owl pie picture park rock ring river rose sheep shell ship "
    "shoe slide snake snow soup spider spoon star stick sun swing tiger tower wagon whale wolf worm zebra zoo puppy kitten "
    "umbrella ant lizard penguin dolphin owl octopus seed stone storm mirror magnet medicine microscope helicopter".split()
)
TO_CHINESE = [
    "Translate into Chinese: {}", "How do you say this in Chinese? {}", "把下面的句子翻译成中文：{}", "翻译成中文：{}",
    "“{}”用中文怎么说？", "Translate to Chinese: {}", "Say this in Chinese: {}", "In Chinese, please: {}", "{} 翻译成中文",
    "How would you say “{}” in Chinese?", "What does “{}” mean in Chinese?", "“{}”是什么意思？", "“{}” 的中文是什么？",
    "Please translate “{}” into Chinese.", "请把这句译成中文：{}", "用汉语怎么说：{}", "中文：{}", "Chinese for “{}”?",
]  # fmt: skip
TO_ENGLISH = [
    "Translate into English: {}", "How do you say this in English? {}", "把下面的句子翻译成英文：{}", "翻译成英文：{}",
    "“{}”用英文怎么说？", "Translate to English: {}", "Say this in English: {}", "In English, please: {}", "{} 翻译成英文",
    "What does “{}” mean in English?", "“{}”用英语怎么讲？", "“{}”的英文是什么？", "请把这句译成英文：{}", "英语：{}",
    "Please translate “{}” into English.", "帮我翻译成英语：{}", "English for “{}”?", "这句话英语怎么说：{}",
]  # fmt: skip
# The queries, and which parts of a row are the sentence and its translation
DIRECTIONS = [(TO_CHINESE, "en", "zh"), (TO_ENGLISH, "zh", "en")]
NEXT_LINE = [
    "“{}”的下一句是什么？", "{}，下一句是什么？", "请接下一句：{}", "下一句：{}", "{}的下一句", "“{}”后面是什么？", "“{}”后一句是什么",
    "你知道“{}”的下一句吗？", "{}，后面呢？", "接着背：{}", "“{}”接下来是什么",
]  # fmt: skip
RECITE = [
    "背诵《{title}》。", "请背诵《{title}》。", "背一下《{title}》", "你会背《{title}》吗？", "{author}的《{title}》怎么背？",
    "背一首{author}的《{title}》", "我想听《{title}》", "《{title}》的全文是什么？", "请把{author}的《{title}》背一遍", "把《{title}》念给我听",
]  # fmt: skip
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
# People in stories: each time that a story is learned, they have other names.
GIRLS = (
    "Lily Anna Mary Emma Lucy Kate Mia Sara Sarah Amy Jane Alice Nina Ella Sophie Zoe Eva Laura Julia Maria Helen Linda "
    "Susan Diana Ruby Clara Olga Nora Iris Sue Molly Jill Lila Bella Daisy Amelia Hannah Leah Priya Aisha Mei Yuki Fatima Ingrid "
    "Chloe Penny Rita Vera Wendy Abby Beth Carla Dora Elsa Fiona Gina Hazel Ivy Judy Kim Lola Mona Naomi Paula Tina Ada"
).split()
BOYS = (
    "Tom Ben Jack John Leo Tim Bob Paul David Peter Mike Mark Daniel Lucas Henry Adam Simon Kevin Eric Frank George Oscar Ivan "
    "Victor Felix Hugo Timmy Tommy Billy Jimmy Bobby Fred Joe Ahmed Ravi Chen Kenji Pablo Lars Noah Ethan Liam Owen Dylan Carl "
    "Dan Ed Gus Harry Ian Jake Kurt Luke Matt Nick Otto Pete Rob Steve Ted Vince Zack Andy Bruno Omar Samir"
).split()
CHINESE_NAMES = (
    "小明 小红 小华 小刚 小丽 小芳 小强 小美 小龙 小燕 小军 小玲 小杰 小雪 小东 小兰 小伟 小梅 小宇 小云 王芳 李伟 张敏 刘洋 "
    "陈静 杨帆 赵磊 黄丽 周杰 吴娟 徐明 孙悦 马超 朱琳 胡军 林峰 郭涛 何洁 高翔 罗兰 阿强 阿珍 大卫 玛丽 安娜 汤姆 杰克 露西"
).split()
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
        "I am sorry, that is too hard for a model as small as I am.",
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
        "对不起，这对我这么小的模型来说太难了。",
    ),
]  # fmt: skip


def read_corpora(folder: Path) -> tuple[dict[str, list], dict[str, list]]:
    """Returns the training rows and the held-out rows of each corpus."""
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
    """Returns what a held-out row may not share with a training row: its sentences, its first query or its text."""
    if "messages" in row:
        return {row["messages"][0]["content"]}
    return {row[name] for name in ("en", "zh", "text") if name in row}


def repeated(rows: list, times: float, rng: random.Random) -> Iterator:
    for row in rows:
        for _ in range(int(times) + (rng.random() < times % 1)):
            yield row


def renamed(story: str, rng: random.Random) -> str:
    """Returns a story with other names of girls and boys, as most stories have the same few names."""
    for names in (GIRLS, BOYS):
        found = set(re.findall(r"\b[A-Z][a-z]+\b", story)) & set(names)
        others = dict(zip(sorted(found), rng.sample(names, len(found))))
        story = re.sub(r"\b[A-Z][a-z]+\b", lambda match, others=others: others.get(match[0], match[0]), story)
    return story


def to_text(name: str, row: dict, rng: random.Random) -> str:
    """Returns the text of a row, without roles."""
    if name == "tatoeba_en_zh":
        return "\n".join(rng.sample([row["en"], row["zh"]], 2))
    if name == "poetry_zh":
        return "\n".join(part for part in (row["title"], row["author"], row["text"]) if part)
    texts = [introduce(m["content"]) for m in row["messages"]] if "messages" in row else [row["text"]]
    return "\n".join(texts)


def to_rounds(name: str, row: dict, rng: random.Random) -> list[tuple[str, str]]:
    """Returns the dialogue in a row; empty if there is none."""
    if name == "tatoeba_en_zh":
        queries, source, target = rng.choice(DIRECTIONS)
        return [(rng.choice(queries).format(row[source]), row[target])] if len(row["en"]) <= 50 else []
    if name == "tinystories_en":
        if len(row["text"]) > 1000:
            return []  # could not end within the rows that are learned
        about = what_is_told(row["text"])
        query = (
            rng.choice(TELL_A_STORY_ABOUT).format(about) if about and rng.random() < 0.9 else rng.choice(TELL_A_STORY)
        )
        return [(query, row["text"])]
    if name == "poetry_zh":
        if rng.random() < 0.25 and len(row["text"]) < 120:
            return [(rng.choice(RECITE).format(title=row["title"], author=row["author"] or "古人"), row["text"])]
        pairs = next_lines(row["text"], rng)
        return rng.sample(pairs, min(len(pairs), 6))
    texts = [message["content"].strip() for message in row["messages"]]
    if name == "identity_bilingual":
        texts = [introduce(text) for text in texts]
    rounds = list(zip(texts[0::2], texts[1::2]))
    if name in SHORT and any(len(answer) > 200 or "```" in answer for _, answer in rounds):
        return []
    return rounds


def what_is_told(story: str) -> str:
    """Returns who and what a story is about, as in a request: "a girl named Lily and a dog". Empty if that is unclear."""
    words = re.findall(r"[A-Za-z]+", story)
    name = max(GIRLS + BOYS, key=words.count)
    thing = max(HEROES, key=lambda hero: words.count(hero) if hero not in ("girl", "boy") else 0)
    told = []
    if words.count(name) >= 2:
        told.append(f"a {'girl' if name in GIRLS else 'boy'} named {name}")
    if words.count(thing) >= 2:
        told.append(f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}")
    return " and ".join(told)


def next_lines(poem: str, rng: random.Random) -> list[tuple[str, str]]:
    """Returns questions for the line after each line, and the answers."""
    lines = re.findall(r"([^，。！？；、\s]+)([，。！？；\s]*)", poem)
    pairs = [(a, b + end.strip()) for (a, _), (b, end) in zip(lines, lines[1:]) if len(a) > 3]
    return [(rng.choice(NEXT_LINE).format(a), b) for a, b in pairs]


def known_poems(rows: list[dict], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Returns questions for the lines of short poems and for whole poems, with the answers."""
    for row in rows:
        if row["author"] and len(row["text"]) <= 70:
            for _ in range(KNOWN_POEMS):
                yield from next_lines(row["text"], rng)
            for _ in range(KNOWN_POEMS // 3):
                yield rng.choice(RECITE).format(title=row["title"], author=row["author"] or "古人"), row["text"]


def introduce(text: str) -> str:
    """Replaces the assistant's name, author and description with the model's."""
    is_chinese = any("\u4e00" <= c <= "\u9fff" for c in text)
    kind = "ChatGLM2 架构的小型演示模型" if is_chinese else "a small demonstration model of the ChatGLM2 architecture,"
    text = re.sub(r"人工智能助手|AI ?助手|an AI assistant", kind, text)
    text = text.replace("{{author}}", "本项目的作者" if is_chinese else "the authors of this project")
    return re.sub(r" ?本项目的作者 ?", "本项目的作者", text).replace("{{name}}", NAME)


def make_texts(corpora: dict[str, list], rng: random.Random) -> Iterator[dict]:
    for name, rows in corpora.items():
        for row in repeated(rows, TEXTS.get(name, 0), rng):
            text = to_text(name, row, rng)
            yield {"text": renamed(text, rng) if name == "tinystories_en" and rng.random() < 0.9 else text}


def talk_templates(rng: random.Random) -> Templates:
    return Templates(read_talk("words") | {"name": GIRLS + BOYS, "girl": GIRLS, "名字": CHINESE_NAMES}, rng)


def make_dialogues(corpora: dict[str, list], rng: random.Random) -> list[dict]:
    """Returns the dialogues. Some of the short exchanges are combined into dialogues of several rounds."""
    short, dialogues = [], []
    for name, rows in corpora.items():
        for row in repeated(rows, DIALOGUES.get(name, 0), rng):
            if name == "tinystories_en" and rng.random() < 0.9:
                row = row | {"text": renamed(row["text"], rng)}
            rounds = to_rounds(name, row, rng)
            if name in SHORT:
                short += rounds
            elif name == "poetry_zh":
                short += rounds[:1]
                dialogues += [[round] for round in rounds[1:]]
            elif rounds:
                dialogues.append(rounds)
    templates = talk_templates(rng)
    short += small_talk(templates, rng)
    for row in translations(templates, rng):
        queries, source, target = rng.choice(DIRECTIONS)
        short.append((rng.choice(queries).format(row[source]), row[target]))
    for queries, answer in DENIALS:
        short += [(q.format(other), answer.format(name=NAME)) for q in queries for other in OTHERS for _ in range(6)]
    for queries, subjects, answer in BEYOND:
        short += [(query.format(subject), answer) for query in queries for subject in subjects if rng.random() < 0.7]
    dialogues += [[round] for round in known_poems(corpora["poetry_zh"], rng)]
    dialogues += [[round] for maker in (stories, poems) for round in maker(templates, rng)]
    rng.shuffle(short)
    dialogues += memories(templates, short[:20000], rng)
    while short:
        rounds = rng.choice([1, 1, 1, 2, 3, 4])
        dialogues.append(short[:rounds])
        del short[:rounds]
    rng.shuffle(dialogues)
    return [{"messages": to_messages(rounds)} for rounds in dialogues]


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


def without_leaks(rows: Iterable[dict], finder: LeakFinder) -> list[dict]:
    """Returns the rows without a near copy of a prompt of the evaluation."""
    rows = list(rows)
    kept = [row for row in rows if not finder.find_in_row(row)]
    print(
        f"{len(rows) - len(kept):,} of {len(rows):,} rows are left out because they nearly copy a prompt of the evaluation."
    )
    return kept


def prepare_texts(corpora: Path, tokenizer: Path):
    """
    Writes the training texts and the held-out texts, and a checkpoint folder without weights.

    Args:
        tokenizer: The `tokenizer.model` to use. If it does not exist, one is trained. The tokenizer of the published small
            model is kept, so that the losses of different runs can be compared.
    """
    train, held_out = read_corpora(corpora)
    rng = random.Random(0)
    texts = without_leaks(make_texts(train, rng), LeakFinder(read_prompts()))
    rng.shuffle(texts)
    write_jsonl(WORK / "texts.jsonl", texts)
    rng = random.Random(0)
    held_out_texts = [{"text": to_text(name, row, rng)} for name in TEXTS for row in held_out[name][:20]]
    write_jsonl(WORK / "held_out_texts.jsonl", held_out_texts)

    start = WORK / "start"
    start.mkdir(exist_ok=True)
    if tokenizer.exists():
        shutil.copyfile(tokenizer, start / "tokenizer.model")
    else:
        train_tokenizer(start / "tokenizer.model", (row["text"] for row in texts))
    config = json.loads((ROOT / "config.json").read_text())
    config.update(
        num_layers=8, hidden_size=384, ffn_hidden_size=1152, num_attention_heads=12, kv_channels=32, seq_length=2048,
        padded_vocab_size=8064, torch_dtype="float32",
    )  # fmt: skip
    (start / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in ("*_chatglm.py", "quantization*.py", "tokenizer_config.json", "generation_config.json", "*.jinja"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, start)
    print(f"{len(texts):,} texts in {WORK}")


def prepare_dialogues(corpora: Path):
    """Writes the training dialogues and the held-out dialogues."""
    train, held_out = read_corpora(corpora)
    dialogues = without_leaks(make_dialogues(train, random.Random(0)), LeakFinder(read_prompts()))
    write_jsonl(WORK / "dialogues.jsonl", dialogues)
    rng = random.Random(0)
    held_out_dialogues = [
        {"messages": to_messages(to_rounds(name, r, rng))} for name in DIALOGUES for r in held_out[name][:20]
    ]
    write_jsonl(WORK / "held_out_dialogues.jsonl", [row for row in held_out_dialogues if row["messages"]])
    print(f"{len(dialogues):,} dialogues in {WORK}")


@torch.inference_mode()
def held_out_perplexity(model, tokenizer, held_out: dict[str, list]) -> dict[str, dict]:
    """Returns the perplexity of the answers, per token of the model's own vocabulary, for each corpus with enough dialogues."""
    rng, args = random.Random(0), DataArguments(max_source_length=512, max_target_length=511, packing=True)
    figures = {}
    for name in DIALOGUES:
        rows = [{"messages": to_messages(rounds)} for row in held_out[name] if (rounds := to_rounds(name, row, rng))]
        if len(rows) < LEAST_HELD_OUT:
            continue
        write_jsonl(WORK / f"held_out/{name}.jsonl", rows)
        args.validation_file = str(WORK / f"held_out/{name}.jsonl")
        examples = encode(read(args, "validation"), tokenizer, args)
        total = tokens = 0
        for batch in DataLoader(examples, batch_size=32, collate_fn=collator(tokenizer, args)):
            learned = int((batch["labels"][:, 1:] != IGNORED).sum())
            # With a cache, the examples of a packed row would see each other.
            total, tokens = total + learned * model(**batch, use_cache=False).loss.item(), tokens + learned
        figures[name] = {"dialogues": len(rows), "perplexity": round(math.exp(total / tokens), 1)}
    return figures


@torch.inference_mode()
def recalled(model, tokenizer, held_out: dict[str, list]) -> dict[int, float]:
    """
    Returns the percentage of facts that the model recalls, by about how many tokens of other rounds ago they were told. The
    facts are like those of its training, the other rounds are held-out translations.
    """
    rng = random.Random(0)
    templates, facts = talk_templates(rng), read_talk("memories")
    others = [round for row in held_out["tatoeba_en_zh"] for round in to_rounds("tatoeba_en_zh", row, rng)]
    figures = {}
    for distance in RECALL_DISTANCES:
        right = 0
        for fact in (rng.choice(kinds) for kinds in facts.values() for _ in range(RECALLED_FACTS)):
            values, tokens = {}, 0
            history = [told(templates, fact, values, rng)]
            while tokens < distance:
                history.append(rng.choice(others))
                tokens += len(tokenizer.encode("".join(history[-1]), add_special_tokens=False))
            query = templates.fill(rng.choice(fact["ask"]), values)
            wanted = [values[slot].lower() for slot in SLOT.findall(fact["answer"][0])]
            response, _ = model.chat(tokenizer, query, history, do_sample=False, max_new_tokens=40)
            right += all(word in response.lower() for word in wanted)
        figures[distance] = round(100 * right / (RECALLED_FACTS * len(facts)), 1)
    return figures


def stage(folder: Path, rows: Path) -> dict:
    """Returns the figures of a training stage, of all its runs if it was interrupted. `tokens` includes padding."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return {
        "rows": sum(1 for _ in rows.open(encoding="utf-8")),
        "epochs": round(state["epoch"], 2),
        "steps": state["global_step"],
        "tokens": state["num_input_tokens_seen"],
    }


def judged(output: Path) -> dict[str, int] | None:
    """
    Returns the number of fitting answers of each kind from judgements.json, or None if that was written for another samples.md
    (by its hash).
    """
    path = output / "judgements.json"
    judgements = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if judgements.get("samples") != fingerprint(output / "samples.md"):
        return None
    fits = Counter()
    for prompt, judgement in zip(read_prompts(), judgements["answers"], strict=True):
        fits[prompt["kind"]] += judgement["fits"]
    return dict(fits)


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def card_figures(report: dict, fits: dict[str, int] | None) -> str:
    """Returns the measured part of the card, in Markdown."""
    lines = ["| stage | rows | epochs | steps | tokens, with padding |", "|---|---|---|---|---|"]
    for name in ("pretraining", "fine_tuning", "second_fine_tuning"):
        s = report[name]
        rows = f"{s['rows']:,} {'documents' if name == 'pretraining' else 'dialogues'}"
        lines.append(
            f"| {name.replace('fine_', 'fine-').replace('_', ' ')} | {rows} | {s['epochs']} | {s['steps']:,} | {s['tokens'] / 1e6:.1f} M |"
        )
    lines += ["", f"{report['parameters'] / 1e6:.1f} million parameters.", ""]
    lines += ["Perplexity of the held-out answers, per token of the model's own vocabulary:", ""]
    forms = report["held_out"]
    lines += [f"| corpus | dialogues | {' | '.join(forms)} |", "|---|---" + "|---" * len(forms) + "|"]
    for name, figures in next(iter(forms.values())).items():
        cells = [name, figures["dialogues"], *(form[name]["perplexity"] for form in forms.values())]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "Percentage of facts that the model recalls (the user's name, pet, job), by the tokens of other rounds in between:",
    ]
    lines += ["", f"| {' | '.join(report['recalled'])} |", "|---" * len(report["recalled"]) + "|"]
    lines += [f"| {' | '.join(map(str, report['recalled'].values()))} |"]
    lines += [
        "",
        "The model answered the 100 prompts of `training/prompts.json` greedily ([all answers](samples.md)).",
    ]
    if fits is None:
        return "\n".join([*lines, "How many answers fit has not been judged yet."])
    lines += [
        f"{sum(fits.values())} answers fit, as judged by a reader ([judgements.json](judgements.json)). By kind, out of ten:",
        "",
    ]
    lines += [f"| {' | '.join(fits)} |", "|---" * len(fits) + "|", f"| {' | '.join(map(str, fits.values()))} |"]
    return "\n".join(lines)


def write_card_figures(path: Path, report: dict, fits: dict[str, int] | None):
    """Writes the figures between the two marks of the card."""
    text = path.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in CARD_MARKS)
    text = text[: begin + len(CARD_MARKS[0])] + f"\n{card_figures(report, fits)}\n" + text[end:]
    path.write_text(text, encoding="utf-8")


def answer_prompts(model, tokenizer) -> str:
    """Returns the greedy answers to the prompts of the evaluation as Markdown."""
    lines = ["# Greedy answers to the 100 prompts of training/prompts.json", ""]
    lines.append(
        "Made by `python -m training.tiny answers`: `do_sample=False`, at most 300 tokens, with activations in float32. All are shown."
    )
    kind = None
    for number, prompt in enumerate(read_prompts(), start=1):
        if prompt["kind"] != kind:
            kind = prompt["kind"]
            lines += ["", f"## {kind.capitalize()}"]
        history = []
        lines += ["", f"### {number}"]
        for query in prompt["queries"]:
            response, history = model.chat(tokenizer, query, history, do_sample=False, max_new_tokens=300)
            lines += ["", f"**{query}**", "", *(f"> {line}".rstrip() for line in response.split("\n"))]
    return "\n".join(lines) + "\n"


def load(folder: Path):
    """Returns the model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    model.config.use_cache = True  # the Trainer turns it off
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@torch.no_grad()
def mean(before: Path, after: Path, share: float):
    """Returns the model with the mean of both folders' weights, `share` of it from `before`; and the tokenizer."""
    model, tokenizer = load(after)
    for weight, other in zip(model.parameters(), load(before)[0].parameters(), strict=True):
        weight.lerp_(other, share)
    return model, tokenizer


def average():
    """Writes what the last stage starts from."""
    model, tokenizer = mean(WORK / "pretrain", WORK / "sft", PRETRAINED)
    model.save_pretrained(WORK / "average")
    tokenizer.save_pretrained(WORK / "average")


def publish(corpora: Path, output: Path):
    """Writes the fine-tuned model in INT8, its answers, its perplexity and its curves to `output`."""
    _, held_out = read_corpora(corpora)
    model, tokenizer = mean(WORK / "average", WORK / "polish", STARTED)
    report = {
        "pretraining": stage(WORK / "pretrain", WORK / "texts.jsonl"),
        "fine_tuning": stage(WORK / "sft", WORK / "dialogues.jsonl"),
        "second_fine_tuning": stage(WORK / "polish", WORK / "dialogues.jsonl"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out": {"float32": held_out_perplexity(model, tokenizer, held_out)},
    }
    # By way of another folder: in the output the code is links to the top level, through which the library would write.
    finished = WORK / "finished"
    model.half().quantize(8, quantize_embeddings=True, scale_search=True).save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    output.mkdir(parents=True, exist_ok=True)
    for path in (finished / "config.json", finished / "model.safetensors", WORK / "start/tokenizer.model"):
        shutil.copyfile(path, output / path.name)  # not its mode: safetensors keeps files to the user alone
    model, tokenizer = load(finished)
    report["held_out"]["INT8, as stored"] = held_out_perplexity(model, tokenizer, held_out)
    report["recalled"] = recalled(model, tokenizer, held_out)
    (output / "samples.md").write_text(answer_prompts(model, tokenizer), encoding="utf-8")
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    for name in ("pretrain", "sft", "polish"):
        shutil.copy(WORK / name / "curve.png", output / f"{name}.png")
    card(output)


def card(output: Path):
    """Writes the figures of training.json and judgements.json into the card."""
    report = json.loads((output / "training.json").read_text(encoding="utf-8"))
    write_card_figures(output / "README.md", report, judged(output))


def encoded_rows(corpora: dict[str, list], tokenizer, limit: int) -> dict[str, list]:
    """Returns `limit` rows of 256 tokens at most, of dialogues packed together, 200 or fewer of each corpus."""
    rng, args = random.Random(0), DataArguments(max_source_length=128, max_target_length=127)
    examples = []
    for name, corpus in corpora.items():
        for row in rng.sample(corpus, min(200, len(corpus))):
            example = encode_dialogue(tokenizer, to_messages(to_rounds(name, row, rng)), args)
            if example.input_ids:
                examples.append({"input_ids": example.input_ids, "labels": example.labels})
    rng.shuffle(examples)
    packed = PackedExamples(tokenizer, args.max_length)(examples)
    chosen = rng.sample(range(len(packed["input_ids"])), min(limit, len(packed["input_ids"])))
    return {name: values[chosen].tolist() for name, values in packed.items()}


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("step", choices=["texts", "dialogues", "average", "publish", "answers", "card", "rows"])
    parser.add_argument("--corpora", type=Path, help="folder with *.jsonl.gz")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "checkpoints/tiny", help="folder of the checkpoint (default: %(default)s)"
    )
    parser.add_argument("--samples", type=Path, help="file for the answers (default: samples.md in the checkpoint)")
    parser.add_argument("--limit", type=int, default=160, help="number of rows of each kind (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.step in ("texts", "dialogues", "publish", "rows") and args.corpora is None:
        parser.error(f"{args.step} needs --corpora, the folder with *.jsonl.gz.")
    if args.step == "texts":
        prepare_texts(args.corpora, args.output / "tokenizer.model")
    elif args.step == "dialogues":
        prepare_dialogues(args.corpora)
    elif args.step == "average":
        average()
    elif args.step == "publish":
        publish(args.corpora, args.output)
    elif args.step == "answers":
        answers = answer_prompts(*load(args.output))
        (args.samples or args.output / "samples.md").write_text(answers, encoding="utf-8")
    elif args.step == "rows":
        tokenizer = AutoTokenizer.from_pretrained(args.output, trust_remote_code=True)
        for name, corpora in zip(("train", "held_out"), read_corpora(args.corpora)):
            write_json(WORK / "rows" / f"{name}.json", encoded_rows(corpora, tokenizer, args.limit))
    else:
        card(args.output)


if __name__ == "__main__":
    main()
