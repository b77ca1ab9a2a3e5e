"""
Compares the evaluation with the plain harness: the same tasks, model and questions with `evaluation.model` and with lm_eval's own
`HFLM`, in turn, and checks that the scores are the same.

    python -m benchmarks.evaluation --data ../shared/data/eval
"""

import contextlib
import io
import logging
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModel, AutoTokenizer

from common.package import TINY
from evaluation.model import EvaluatedModel
from evaluation.protocol import build

from .measure import SHARED, in_turn, options, report


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


def main():
    parser = options(__doc__, rounds=3)
    parser.add_argument("--data", type=Path, default=SHARED / "eval")
    parser.add_argument("--limit", type=int, default=32, help="questions of each task (32)")
    args = parser.parse_args()
    if not args.data.is_dir():
        raise SystemExit(f"{args.data} is missing: pass the folder with the data sets as --data.")
    if args.quick:
        args.limit, args.rounds = 2, 1
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    model = AutoModel.from_pretrained(TINY, trust_remote_code=True, dtype=torch.float32).eval()
    systems = {
        "this": EvaluatedModel(model, tokenizer, BATCH_SIZE),
        "lm-evaluation-harness": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE, backend="causal"),
    }
    rows = []
    for name, task in TASKS.items():
        runs = {
            system: partial(timed_scores, lm, build(*task, str(args.data)), args.limit)
            for system, lm in systems.items()
        }
        results = in_turn(runs, args.rounds)
        medians = {system: statistics.median(time for time, _ in values) for system, values in results.items()}
        scores = [values[-1][1] for values in results.values()]
        same = sum(a == b for a, b in zip(*scores))
        row = {"task": name, "questions": len(scores[0]), "seconds": medians, "same_scores": same}
        rows.append({**row, "ratio": medians["lm-evaluation-harness"] / medians["this"]})
    total = {system: sum(row["seconds"][system] for row in rows) for system in systems}
    ratio = total["lm-evaluation-harness"] / total["this"]
    report({"batch_size": BATCH_SIZE, "rows": rows, "seconds": total, "ratio": ratio}, args.output)


if __name__ == "__main__":
    main()
