"""
Compares `evaluation.model` with lm_eval's own `HFLM`, in turn, on the same tasks, questions and model: seconds, and scores.

    python -m evaluation.compare --data ../shared/data/eval --output compared.json
"""

import contextlib
import io
import logging
import statistics
import time
from pathlib import Path

import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from common.checkpoint import load, load_tokenizer
from common.errors import plain_errors
from common.files import write_json
from common.options import Parser
from common.package import TINY

from .model import EvaluatedModel
from .protocol import build


TASKS = {  # a suite's task, and its protocol
    "MMLU, base (5 examples, answer only)": ("mmlu", "high_school_geography", "base"),
    "C-Eval, base (5 examples, answer only)": ("ceval", "high_school_politics", "base"),
    "MMLU, chat (chain of thought, two turns)": ("mmlu", "high_school_geography", "chat"),
    "BBH (3 examples, chain of thought)": ("bbh", "navigate", "chat"),
    "GSM8K (8 examples, chain of thought)": ("gsm8k", None, "chat"),
}
BATCH_SIZE = 16


def timed_scores(lm, task, limit: int) -> tuple[float, list[float]]:
    """Evaluates a task, from its rows to its scores. Returns the seconds, and the score of each question."""
    start = time.perf_counter()
    task.set_fewshot_seed(0)
    task.fit(lambda text: len(lm.tok_encode(text)), lm.max_length)
    with contextlib.redirect_stderr(io.StringIO()):
        output = evaluate(
            lm, {"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=0, apply_chat_template=task.chat,
            fewshot_as_multiturn=False,
        )  # fmt: skip
    return time.perf_counter() - start, [sample["acc"] for sample in output["samples"][task.task_name]]


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the data sets")
    parser.add_argument("--limit", type=int, default=32, help="questions of each task (32)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the two take turns (3)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    args = parser.parse_args(argv)
    if not args.data.is_dir():
        parser.error(f"there is no folder {args.data}: give that of the data sets with --data")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    model, tokenizer = load(AutoModelForCausalLM, TINY, dtype=torch.float32).eval(), load_tokenizer(TINY)
    systems = {
        "this": EvaluatedModel(model, tokenizer, BATCH_SIZE),
        "lm-evaluation-harness": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE, backend="causal"),
    }
    rows = []
    for name, task in TASKS.items():
        times, scores = {system: [] for system in systems}, {}
        for _ in range(args.rounds):
            for system, lm in systems.items():
                seconds, scores[system] = timed_scores(lm, build(*task, str(args.data)), args.limit)
                times[system].append(seconds)
        medians = {system: statistics.median(values) for system, values in times.items()}
        same = sum(a == b for a, b in zip(*scores.values(), strict=True))
        row = {"task": name, "questions": len(scores["this"]), "seconds": medians, "same_scores": same}
        rows.append({**row, "ratio": medians["lm-evaluation-harness"] / medians["this"]})
    total = {system: sum(row["seconds"][system] for row in rows) for system in systems}
    ratio = total["lm-evaluation-harness"] / total["this"]
    write_json(args.output, {"batch_size": BATCH_SIZE, "rows": rows, "seconds": total, "ratio": ratio})


if __name__ == "__main__":
    with plain_errors("evaluation"):
        main()
