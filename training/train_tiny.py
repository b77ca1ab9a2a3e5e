"""
Trains `checkpoints/tiny`, the small model that the repository comes with, from random weights.

    python -m training.train_tiny --corpora ../shared/data/corpora --output checkpoints/tiny

Takes about an hour and a half on two cores (1,250 steps of 8,192 tokens). Every 50th row of each corpus is held out; perplexity on them is printed at the end.
Killed and started again, it goes on from the last checkpoint in `--work`.
"""

import argparse
import gzip
import json
import math
import random
import shutil
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModel, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


ROOT = Path(__file__).resolve().parent.parent
NAME = "ChatGLM2-Tiny"
VOCAB_SIZE = 8000
BLOCK = 512


class Stage(NamedTuple):
    """One training run: how often a row of each corpus is used, for how many steps of 16 x 512 tokens, how fast."""

    name: str
    weights: dict[str, float]
    steps: int
    learning_rate: float


STAGES = [
    Stage(
        "general",
        {
            "identity_bilingual": 60,
            "chatterbot_en": 10,
            "chatterbot_zh": 12,
            "better_ruozhiba_zh": 4,
            "oasst1_zh": 1,
            "tatoeba_en_zh": 1,
            "tinystories_en": 1,
            "topical_chat_en": 0.7,
            "kdconv_zh": 1,
            "crosswoz_zh": 0.5,
            "poetry_zh": 2,
            "smilechat_zh_first12000": 0.15,
            "sgd_en": 0.05,
            "gsm8k_train_en": 0.1,
        },
        steps=1000,
        learning_rate=2e-3,
    ),
    # What a demonstration shows: greetings, who it is, short questions, translations, stories.
    Stage(
        "small_talk",
        {
            "identity_bilingual": 60,
            "chatterbot_en": 16,
            "chatterbot_zh": 20,
            "better_ruozhiba_zh": 3,
            "tatoeba_en_zh": 0.2,
            "tinystories_en": 0.1,
            "poetry_zh": 0.2,
            "kdconv_zh": 0.1,
        },
        steps=250,
        learning_rate=6e-4,
    ),
]
STORY_QUERIES = [
    "Tell me a story.",
    "Can you tell me a short story?",
    "Write a story for children.",
    "给我讲一个英文故事。",
]
SAMPLES = ["你好", "Who are you?", "What is AI?", "你喜欢什么电影？", "把下面的句子翻译成英文：我爱你。"]
TO_CHINESE = ["Translate into Chinese: {}", "How do you say this in Chinese? {}", "把下面的句子翻译成中文：{}"]
TO_ENGLISH = ["Translate into English: {}", "How do you say this in English? {}", "把下面的句子翻译成英文：{}"]


def read_corpora(folder: Path) -> tuple[dict[str, list], dict[str, list]]:
    """Returns the rows of each corpus, those to train on and those held out."""
    train, held_out = {}, {}
    for path in sorted(folder.glob("*.jsonl.gz")):
        name = path.name.removesuffix(".jsonl.gz")
        if name not in STAGES[0].weights:
            continue
        rows = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
        # By content, so that a row is held out whatever its place, together with its copies.
        is_held_out = [zlib.crc32(json.dumps(row, sort_keys=True).encode()) % 50 == 0 for row in rows]
        if name == "identity_bilingual":
            is_held_out = [False] * len(rows)
        train[name] = [row for row, out in zip(rows, is_held_out) if not out]
        held_out[name] = [row for row, out in zip(rows, is_held_out) if out]
    if not train:
        raise SystemExit(f"There are no *.jsonl.gz corpora in {folder}.")
    return train, held_out


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= c <= "\u9fff" for c in text)


def to_rounds(name: str, row: dict, rng: random.Random) -> list[tuple[str, str]] | None:
    """Returns the dialogue of a row as rounds, or None if it has none that can be used."""
    if name == "tatoeba_en_zh":
        queries, source, target = rng.choice([(TO_CHINESE, "en", "zh"), (TO_ENGLISH, "zh", "en")])
        return [(rng.choice(queries).format(row[source]), row[target])]
    if name == "tinystories_en":
        return [(rng.choice(STORY_QUERIES), row["text"])]
    if name == "poetry_zh":
        return [(f"背诵《{row['title']}》。", row["text"])]
    messages = row["messages"]
    roles = [m["role"] for m in messages]
    if roles[:2] != ["user", "assistant"]:
        return None
    texts = [m["content"].strip() for m in messages]
    if name == "identity_bilingual":
        author = "本仓库的作者" if is_chinese(" ".join(texts)) else "the authors of this repository"
        for old, new in ((" {{name}} ", NAME), ("{{name}}", NAME), (" {{author}} ", author), ("{{author}}", author)):
            if not is_chinese(" ".join(texts)):
                old = old.strip()
            texts = [t.replace(old, new) for t in texts]
    return list(zip(texts[0::2], texts[1::2]))


class PackedDialogues(Dataset):
    """Blocks of `BLOCK` tokens. Positions start at 0 with each dialogue, by which the mask keeps them apart."""

    def __init__(self, corpora: dict[str, list], tokenizer, weights: dict[str, float] | None = None):
        rng = random.Random(0)
        dialogues = []
        for name, rows in corpora.items():
            weight = 1 if weights is None else weights.get(name, 0)
            for row in rows:
                times = int(weight) + (rng.random() < weight % 1)
                dialogues += [rounds for _ in range(times) if (rounds := to_rounds(name, row, rng))]
        rng.shuffle(dialogues)
        columns = {"input_ids": [], "labels": [], "position_ids": []}
        for rounds in dialogues:
            ids, labels = self.encode(rounds, tokenizer)
            columns["input_ids"] += ids
            columns["labels"] += labels
            columns["position_ids"] += range(len(ids))
        self.tokens = len(columns["labels"])
        self.columns = {name: torch.tensor(column, dtype=torch.int32) for name, column in columns.items()}

    @staticmethod
    def encode(rounds: list[tuple[str, str]], tokenizer) -> tuple[list[int], list[int]]:
        """
        Ids of a dialogue as `chat` makes them round by round, at most a block, and what to predict at each place.
        After each answer that is </s>, also where the next round follows in the input.
        """
        ids, labels = tokenizer.get_prefix_tokens(), [-100, -100]
        for i, (query, answer) in enumerate(rounds, start=1):
            prompt = f"[Round {i}]\n\n问：{query}\n\n答："
            if i == 1:
                question = tokenizer.encode(prompt, add_special_tokens=False)
            else:
                question = tokenizer.encode("\n\n" + prompt, add_special_tokens=False)[1:]
            answer = tokenizer.encode(answer, add_special_tokens=False)
            if len(ids) + len(question) + len(answer) >= BLOCK:
                if i > 1:
                    break
                answer = answer[: max(BLOCK - len(ids) - len(question) - 1, 0)]
                return (ids + question + answer)[:BLOCK], (labels + question + answer)[:BLOCK]
            targets = question + answer
            if i > 1:
                targets[0] = tokenizer.eos_token_id
            ids += question + answer
            labels += targets
        return ids + [tokenizer.eos_token_id], labels + [tokenizer.eos_token_id]

    def __len__(self) -> int:
        return max(self.tokens // BLOCK, 1)  # what does not fill the last block is left out, unless it is all

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {name: column[i * BLOCK : (i + 1) * BLOCK].long() for name, column in self.columns.items()}


def make_checkpoint_folder(folder: Path, corpora: dict[str, list]):
    """Writes everything but the weights: tokenizer, configuration, code."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.model").exists():
        train_tokenizer(folder / "tokenizer.model", corpora)
    config = json.loads((ROOT / "config.json").read_text())
    config.update(
        num_layers=8,
        hidden_size=256,
        ffn_hidden_size=688,
        num_attention_heads=8,
        kv_channels=32,
        seq_length=2048,
        padded_vocab_size=8064,
        torch_dtype="float32",
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in ("*_chatglm.py", "quantization*.py", "tokenizer_config.json", "generation_config.json", "*.jinja"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)


def train_tokenizer(path: Path, corpora: dict[str, list]):
    """Trains a SentencePiece model with the settings of the published one."""
    rng = random.Random(0)

    def sentences():
        for name, rows in corpora.items():
            for row in rows:
                if rng.random() < 2 * STAGES[0].weights[name]:
                    for query, answer in to_rounds(name, row, rng) or ():
                        yield from (line[:2000] for line in f"{query}\n{answer}".replace("\t", " ").split("\n") if line)

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
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


class ShowSamples(TrainerCallback):
    """Prints what the model answers, with each checkpoint."""

    def __init__(self, samples: list[str], tokenizer):
        self.samples, self.tokenizer = samples, tokenizer

    def on_save(self, args, state, control, model=None, **kwargs):
        model.eval()
        for query in self.samples:
            response, _ = model.chat(self.tokenizer, query, do_sample=False, max_new_tokens=60)
            print(f"{state.global_step:6d} {query} -> {response}", flush=True)
        model.train()


def train(model, tokenizer, stage: Stage, rows: dict[str, list], run: Path) -> Trainer:
    """Trains `model` in place, going on from the last checkpoint in `run` if there is one."""
    dataset = PackedDialogues(rows, tokenizer, stage.weights)
    print(f"{stage.name}: {dataset.tokens:,} tokens a pass over the data", file=sys.stderr)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(run),
            max_steps=stage.steps,
            per_device_train_batch_size=16,
            learning_rate=stage.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=stage.steps // 10,
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=torch.backends.cpu.get_cpu_capability() == "AVX512",
            use_cpu=True,
            logging_steps=20,
            save_steps=50,
            save_total_limit=2,
            report_to=[],
            seed=0,
        ),
        train_dataset=dataset,
        callbacks=[ShowSamples(SAMPLES, tokenizer)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(run) if run.is_dir() else None)
    return trainer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, default=ROOT.parent / "shared/data/corpora")
    parser.add_argument("--output", type=Path, default=ROOT / "checkpoints/tiny")
    parser.add_argument("--work", type=Path, default=ROOT / "build/tiny", help="checkpoints while training")
    args = parser.parse_args()

    train_rows, held_out_rows = read_corpora(args.corpora)
    make_checkpoint_folder(args.work, train_rows)
    tokenizer = AutoTokenizer.from_pretrained(args.work, trust_remote_code=True)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(args.work, trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True)
    print(f"{model.num_parameters():,} parameters", file=sys.stderr)
    for stage in STAGES:
        trainer = train(model, tokenizer, stage, train_rows, args.work / stage.name)

    model.eval()
    for name, rows in held_out_rows.items():
        if rows:
            loss = trainer.evaluate(PackedDialogues({name: rows}, tokenizer))["eval_loss"]
            print(f"held out, {name}: perplexity {math.exp(loss):.1f}")
    # By way of another folder: in --output the code is links to the top level, through which the library would write.
    model.config.use_cache = True  # the Trainer turns it off
    finished = args.work / "finished"
    model.half().save_pretrained(finished)
    args.output.mkdir(parents=True, exist_ok=True)
    for path in (finished / "config.json", finished / "model.safetensors", args.work / "tokenizer.model"):
        shutil.copy(path, args.output)


if __name__ == "__main__":
    main()
