"""
Evaluates a model with the published protocols, and writes a report with the published figures.

    python -m evaluation.run --model PATH --suite published --output build/evaluation/mine
    python -m evaluation.run --model PATH --suite mmlu ceval --quantization int4 --data DIR --limit 10 --output ...

Each finished subject is stored in the output folder. After an interruption, the same command continues. See docs/evaluate.md.
"""

from pathlib import Path

from common.options import QUANTIZATIONS, Parser, add_model_options


PUBLISHED = ["mmlu", "ceval", "gsm8k", "gsm8k_zh", "bbh"]


def options() -> Parser:
    parser = Parser(__doc__)
    add_model_options(parser, default=None)
    parser.add_argument(
        "--suite",
        nargs="+",
        default=["published"],
        choices=["published", *PUBLISHED, "perplexity"],
        help="benchmarks to run; 'published' is everything but perplexity",
    )
    parser.add_argument(
        "--protocol",
        choices=["chat", "base"],
        default="chat",
        help="protocol for a chat model (default) or a base model",
    )
    parser.add_argument("--ptuning-checkpoint", metavar="DIR", help="folder with a P-Tuning prefix for the model")
    parser.add_argument(
        "--limit", type=int, help="use only this many questions of each subject, and windows of each text"
    )
    parser.add_argument("--data", help="folder with the data sets (default: the Hub)")
    parser.add_argument("--gsm8k-zh", metavar="FILE", help="Chinese GSM8K: .tsv like MGSM's, or .jsonl like GSM8K's")
    parser.add_argument("--text", metavar="FILE", help="your own text for perplexity, .txt or .jsonl")
    parser.add_argument("--output", required=True, type=Path, help="folder for results; existing results are continued")
    parser.add_argument("--name", help="name of the model in the report (default: the last part of --model)")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="number of requests at once; halved if memory runs out (default: 16)"
    )
    return parser


if __name__ == "__main__":
    options().parse_args()  # answers --help and wrong options before the slow imports below


import argparse
import contextlib
import io
import logging
import os
import sys
import time
from importlib.metadata import version
from math import exp, log

from lm_eval import evaluate
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import WEIGHTS_NAME

from common.checkpoint import load, load_config, load_tokenizer
from common.errors import plain_errors
from common.files import LOCK, only_run, write_json
from common.hub import is_hub_name
from common.load_model import default_device
from common.prefix import load_prefix
from common.settings import check_settings, weights_fingerprint

from . import answers
from .model import EvaluatedModel
from .protocol import SUITES, build
from .report import finished_tasks, write_report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options()
    args = parser.parse_args(argv)
    for name in ("limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.data and not Path(args.data).is_dir():
        parser.error(
            f"there is no folder {args.data}: pass the folder with the data sets as --data, or leave it out to use the Hub"
        )
    prefix = args.ptuning_checkpoint and str(Path(args.ptuning_checkpoint, WEIGHTS_NAME))
    for name, path in (("gsm8k_zh", args.gsm8k_zh), ("text", args.text), ("ptuning_checkpoint", prefix)):
        if path and not Path(path).is_file():
            parser.error(f"--{name.replace('_', '-')}: there is no file {path}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output: {args.output} is a file, not a folder")
    args.device = args.device or default_device()
    if Path(args.model).is_dir():
        args.model = os.path.relpath(args.model)  # however it is written, the same when a run goes on
    elif not is_hub_name(args.model):
        parser.error(f"--model: there is no folder {args.model}, and a name on the Hub is OWNER/NAME")
    return args


def chosen_suites(args: argparse.Namespace) -> list[str]:
    """Returns the suites to run. If the folder has no Chinese GSM8K, it is left out of "published"."""
    names = [name for suite in args.suite for name in (PUBLISHED if suite == "published" else [suite])]
    names = list(dict.fromkeys(names))
    there = args.gsm8k_zh or not args.data or Path(args.data, "mgsm/mgsm_zh.tsv").is_file()
    if "gsm8k_zh" in names and not there and "gsm8k_zh" not in args.suite:
        print(
            f"gsm8k_zh is left out: {args.data} has no mgsm/mgsm_zh.tsv. Give a file with --gsm8k-zh.", file=sys.stderr
        )
        names.remove("gsm8k_zh")
    return names


def build_tasks(args: argparse.Namespace) -> list:
    """Returns all tasks, with their data read and checked."""
    tasks = []
    for suite in chosen_suites(args):
        subjects = SUITES[suite] + (["text"] if suite == "perplexity" and args.text else [])
        for subject in tqdm(subjects, desc=f"Reading {suite}", leave=False, disable=len(subjects) < 5):
            file = args.gsm8k_zh if suite == "gsm8k_zh" else args.text if subject == "text" else None
            tasks.append(build(suite, subject, args.protocol, args.data, file))
    return tasks


def settings_of(args: argparse.Namespace) -> dict:
    """Returns the settings that the results depend on, in JSON's types. (More suites can be added to a folder.)"""
    names = (
        "model",
        "ptuning_checkpoint",
        "protocol",
        "quantization",
        "limit",
        "data",
        "gsm8k_zh",
        "text",
        "dtype",
        "device",
        "checkpoint_code",
    )
    settings = {name: getattr(args, name) for name in names}
    return {
        **settings,
        "weights": [
            file for folder in (args.model, args.ptuning_checkpoint) if folder for file in weights_fingerprint(folder)
        ],
        "lm_eval": version("lm_eval"),
        "transformers": version("transformers"),
    }


def check_output(output: Path, settings: dict):
    """
    Raises:
        ValueError: if the folder holds results of other settings, or something that is not an evaluation.
    """
    path = output / "settings.json"
    if path.exists():
        check_settings(path, settings, "--output")
    elif output.exists() and any(other.name != LOCK and other.suffix != ".part" for other in output.iterdir()):
        raise ValueError(f"{output} is not empty, and has no evaluation. Choose another --output.")


def load_model(args: argparse.Namespace):
    tokenizer = load_tokenizer(args.model, args.checkpoint_code)
    dtype = args.dtype or ("float32" if args.device == "cpu" else "auto")
    options = {"device_map": "auto"} if args.device == "auto" else {}
    if args.quantization:
        options["quantization_config"] = {"quant_method": "chatglm", "bits": QUANTIZATIONS[args.quantization]}
    if args.ptuning_checkpoint:
        prefix = load_config(args.ptuning_checkpoint)
        fields = {"pre_seq_len": prefix.pre_seq_len, "prefix_projection": prefix.prefix_projection}
        options["config"] = load_config(args.model, args.checkpoint_code, **fields)
    may_lack = ("prefix_encoder",) if args.ptuning_checkpoint else ()
    model = load(AutoModelForCausalLM, args.model, may_lack, args.checkpoint_code, dtype=dtype, **options)
    if args.ptuning_checkpoint:
        load_prefix(model, args.ptuning_checkpoint)
    return (model if args.device == "auto" else model.to(args.device)).eval(), tokenizer


def requests_of(task, lm, limit: int | None) -> int:
    """Returns the number of requests of a task: for a question one answer, four choices, or both; for a text its windows."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return sum(len(lm.windows(doc["text"])) for doc in task.eval_docs)
    questions = min(len(task.eval_docs), limit or len(task.eval_docs))
    each = {"generate_until": 1, "multiple_choice": 4}[task.OUTPUT_TYPE]
    return questions * (each + 4 * hasattr(task, "conclusion"))


def run_task(task, lm, limit: int | None = None) -> dict:
    """Returns the result of a task: the number of samples, the number of correct ones, and every answer."""
    start = time.perf_counter()
    task.set_fewshot_seed(0)
    if hasattr(lm, "count_tokens"):
        task.fit(lm.count_tokens, lm.max_length)
    with contextlib.redirect_stderr(io.StringIO()):  # the harness's progress bars; there is one for all
        output = evaluate(
            lm, {"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=0, apply_chat_template=task.chat,
            fewshot_as_multiturn=False,
        )  # fmt: skip
    samples = output["samples"][task.task_name]
    suite, subject = task.config.metadata["suite"], task.config.metadata["subject"]
    result = {"suite": suite, "subject": subject}
    if suite == "perplexity":
        result |= perplexity(samples[0], lm)
    else:
        rows = [describe(task, sample) for sample in samples]
        result |= {"samples": len(rows), "correct": sum(row["correct"] for row in rows)}
        result |= {"shots": dict(task.shots), "cut": task.cut, "answers": rows}
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


def describe(task, sample: dict) -> dict:
    """A sample as the report keeps it. `said` is what the text says, whether that decides (GSM8K, BBH) or not."""
    row = {"id": sample["doc_id"], "correct": int(sample["acc"])}
    responses = [response[0] for response in sample["resps"]]
    if task.OUTPUT_TYPE == "generate_until":
        target = str(sample["target"])
        text = responses.pop(0)
        said = answers.choice(text) if responses else answers.read(text, target)
        row |= {"target": target, "answer": text, "said": None if said is None else str(said)}
    if responses:
        scores = [score for score, _ in responses]
        row |= {"target": "ABCD"[sample["doc"]["answer"]], "choice": "ABCD"[scores.index(max(scores))]}
    return row


def perplexity(sample: dict, lm) -> dict:
    """Of a text, for each token of this tokenizer, and in bits for each byte, by which tokenizers can be compared."""
    text, likelihood = sample["doc"]["text"], sample["perplexity"]
    ids = [token for _, _, targets in lm.windows(text) for token in targets]
    tokens = len(ids)
    if lm.max_windows is not None:
        text = lm.tokenizer.decode(ids)
    size = len(text.encode())
    return {
        "tokens": tokens,
        "bytes": size,
        "perplexity": exp(min(-likelihood / tokens, 700)),
        "bits_per_byte": -likelihood / size / log(2),
    }


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    settings = settings_of(args)
    check_output(args.output, settings)
    tasks = build_tasks(args)
    with only_run(args.output, "--output"):
        results = finished_tasks(args.output)
        left = [task for task in tasks if task.task_name not in results]
        if len(left) < len(tasks):
            print(f"{len(tasks) - len(left)} of {len(tasks)} tasks are finished in {args.output}.", file=sys.stderr)
        if left:
            lm = EvaluatedModel(*load_model(args), args.batch_size)
            lm.max_windows = args.limit
            name = args.name or Path(args.model).resolve().name
            write_json(args.output / "settings.json", {**settings, "name": name})
            total = sum(requests_of(task, lm, args.limit) for task in left)
            with tqdm(total=total, unit="request", smoothing=0.05) as bar:
                lm.progress = bar.update
                for task in left:
                    bar.set_description(task.task_name)
                    result = run_task(task, lm, args.limit)
                    write_json(args.output / "tasks" / f"{task.task_name}.json", result)
        page = write_report([args.output], args.output)
    print(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    with plain_errors("evaluation"):
        main()
