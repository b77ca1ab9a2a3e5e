"""
Writes a report (Markdown and a plot) of one or more evaluations, with the published figures.

    python -m evaluation.report build/evaluation/float build/evaluation/int4 --output build/evaluation/report
"""

from pathlib import Path

from common.options import Parser, add_output_option


def options() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of evaluation.run")
    add_output_option(parser)
    return parser


if __name__ == "__main__":
    options().parse_args()  # answers --help and wrong options before the slow imports below


import json
from collections import Counter
from math import sqrt

from common.errors import plain_errors
from common.files import read_json, write_json

from .data import SUBJECTS
from .protocol import CHOICES, SUITES


PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
TITLES = {
    "mmlu": "MMLU",
    "ceval": "C-Eval",
    "gsm8k": "GSM8K",
    "gsm8k_zh": "GSM8K in Chinese",
    "bbh": "BBH",
}
TEXTS = {"wikitext2": "WikiText-2 (English)", "ceval": "C-Eval's questions (Chinese)"}
CHANCE = {"mmlu": 25, "ceval": 25}  # percent
SETTINGS = ("name", "protocol", "quantization", "limit", "data", "device", "lm_eval")  # that the report states


def wilson(correct: int, samples: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a share (Wilson 1927), in percent."""
    share = correct / samples
    middle = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z * sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples)) / (1 + z * z / samples)
    return 100 * max(middle - half, 0), 100 * min(middle + half, 1)


def read(folder: Path) -> tuple[dict, list[dict]]:
    """
    Returns the settings of an evaluation and its tasks' results.

    Raises:
        ValueError: if the folder has none, or a file is damaged.
    """
    path = folder / "settings.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no evaluation. Pass the --output folder of evaluation.run.")
    settings = read_json(path, f"Choose another folder than {folder}.")
    missing = [name for name in SETTINGS if name not in settings]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: it is damaged, or not written by evaluation.run.")
    return settings, list(finished_tasks(folder).values())


def finished_tasks(folder: Path) -> dict[str, dict]:
    """
    Returns the results in a folder, by the names of their tasks.

    Raises:
        ValueError: if a file is damaged; the message names it.
    """
    results = {}
    for path in sorted((folder / "tasks").glob("*.json")):
        results[path.stem] = result = read_json(path, "Remove it: its task is then run again.")
        missing = [name for name in needed(result.get("suite")) if name not in result]
        if missing:
            raise ValueError(f"{path} has no {', '.join(missing)}. Remove it: its task is then run again.")
    return results


def needed(suite: str | None) -> tuple[str, ...]:
    """Returns the fields of a result that the report reads."""
    if suite == "perplexity":
        return ("suite", "subject", "tokens", "perplexity", "bits_per_byte")
    return ("suite", "subject", "samples", "correct", "shots", "cut", "answers")


def columns_of(suite: str, results: list[dict]) -> dict[str, tuple[int, int]]:
    """Returns (correct, samples) for each published column: all questions, and each category."""
    sums = {name: (0, 0) for name in PUBLISHED["columns"][suite]}
    for result in results:
        names = ["Average"]
        if suite in CHOICES:
            names.append(SUBJECTS[suite][result["subject"]]["category"])
        for name in names:
            sums[name] = (sums[name][0] + result["correct"], sums[name][1] + result["samples"])
    return sums


def cell(correct: int, samples: int) -> str:
    if not samples:
        return ""
    low, high = wilson(correct, samples)
    return f"{100 * correct / samples:.2f} ({low:.1f} to {high:.1f})"


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def label_of(settings: dict) -> str:
    parts = [settings["name"], {"int4": "INT4", "int8": "INT8"}.get(settings["quantization"]), settings["protocol"]]
    return ", ".join(part for part in parts if part)


def labels_of(evaluations: list[tuple[dict, list]]) -> list[str]:
    """Returns a different name for each evaluation."""
    labels = [label_of(settings) for settings, _ in evaluations]
    counts = Counter(labels)
    return [f"{label} ({i})" if counts[label] > 1 else label for i, label in enumerate(labels, start=1)]


def suite_section(suite: str, evaluations: list[tuple[str, list[dict]]]) -> list[str]:
    columns = PUBLISHED["columns"][suite]
    rows = []
    for label, results in evaluations:
        sums = columns_of(suite, results)
        missing = len(SUITES[suite]) - len(results)
        note = f", {missing} subjects missing" if missing else ""
        rows.append(
            [f"**{label}** (measured{note})", f"{sums['Average'][1]:,}", *(cell(*sums[name]) for name in columns)]
        )
    for model, figures in PUBLISHED["models"].items():
        if suite in figures:
            values = [f"{value:.2f}" for value in figures[suite]]
            split = ("", " (test set)")[suite == "ceval" and model not in PUBLISHED["validation_set"]]
            rows.append([f"{model}, published{split}", "", *values, *[""] * (len(columns) - len(values))])
    lines = [f"## {TITLES[suite]}", "", table(["", "questions", *columns], rows), ""]
    if suite == "ceval":
        lines += [
            "Measured on the validation set, as the answers to the test set are not public; its authors found them close.",
            "",
        ]
    for label, results in evaluations:
        shots = Counter()
        for result in results:
            shots.update({int(n): count for n, count in result["shots"].items()})
        cut = sum(result["cut"] for result in results)
        if len(shots) > 1:
            counts = ", ".join(f"{n} in {count:,}" for n, count in sorted(shots.items(), reverse=True))
            lines += [f"{label}: examples that fit the context: {counts} prompts.", ""]
        if cut:
            lines += [
                f"{label}: prompts that did not fit even without examples, so their beginning was cut: {cut:,}.",
                "",
            ]
        lines += said_lines(suite, label, results)
        if suite in CHOICES:
            lines += [f"{label}: {preference(results)}", ""]
    if len(SUITES[suite]) > 1:
        lines += ["<details><summary>By subject</summary>", "", subject_table(suite, evaluations), "", "</details>", ""]
    return lines


def said_lines(suite: str, label: str, results: list[dict]) -> list[str]:
    """Says how often an answer was found in the generated text."""
    rows = [row for result in results for row in result["answers"] if "answer" in row]
    if not rows:
        return []
    said = [row for row in rows if row["said"]]
    line = f"{label}: {len(said):,} of {len(rows):,} generated texts contain an answer"
    if suite in CHOICES:
        right = sum(row["said"] == row["target"] for row in said)
        line += f", {right:,} of them the right one. Only the choice in the second turn counts"
    return [line + ".", ""]


def preference(results: list[dict]) -> str:
    """Says which letters are chosen, and what the same choices without reading the questions would score."""
    rows = [row for result in results for row in result["answers"]]
    chosen, right = (Counter(row[key] for row in rows) for key in ("choice", "target"))
    blind = sum(chosen[letter] * right[letter] for letter in "ABCD") / len(rows) ** 2
    shares = ", ".join(f"{letter} in {100 * chosen[letter] / len(rows):.0f} %" for letter in "ABCD")
    return f"chooses {shares}. The same choices without reading the questions would score {100 * blind:.2f} %."


def subject_table(suite: str, evaluations: list[tuple[str, list[dict]]]) -> str:
    rows = []
    for subject, about in SUBJECTS[suite].items():
        cells = []
        for _, results in evaluations:
            found = [result for result in results if result["subject"] == subject]
            cells.append(cell(found[0]["correct"], found[0]["samples"]) if found else "")
        samples = next((r["samples"] for _, results in evaluations for r in results if r["subject"] == subject), "")
        rows.append([about["name"], about.get("category", ""), samples, *cells])
    return table(["subject", "category", "questions", *(label for label, _ in evaluations)], rows)


def perplexity_section(evaluations: list[tuple[str, list[dict]]]) -> list[str]:
    rows = [
        [
            TEXTS.get(r["subject"], r["subject"]),
            label,
            f"{r['tokens']:,}",
            f"{r['perplexity']:.2f}",
            f"{r['bits_per_byte']:.4f}",
        ]
        for label, results in evaluations
        for r in results
    ]
    return [
        "## Perplexity",
        "",
        table(["text", "", "tokens", "perplexity, per token", "bits per byte"], sorted(rows, key=lambda row: row[0])),
        "",
        "Per token of the model's own tokenizer, in windows of its context (2,048 tokens at most) that overlap by half. Only "
        "bits per byte compare models with different tokenizers.",
        "",
    ]


def plot(suites: dict, path: Path):
    """Plots the averages as bars: the measured ones with intervals, and the published ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(3.2 * len(suites), 5), 4.5), layout="constrained")
    for axis, (suite, evaluations) in zip(figure.subplots(1, len(suites), squeeze=False)[0], suites.items()):
        names = []
        for label, results in evaluations:
            correct, samples = columns_of(suite, results)["Average"]
            value, (low, high) = 100 * correct / samples, wilson(correct, samples)
            errors = [[max(value - low, 0)], [max(high - value, 0)]]
            label_of_bars = "measured, with the 95 % interval" if not names else None
            axis.bar(len(names), value, color="#0072b2", yerr=errors, capsize=3, label=label_of_bars)
            names.append(label)
        for model in ("ChatGLM-6B", "ChatGLM2-6B (base)", "ChatGLM2-6B"):
            label_of_bars = "published" if model == "ChatGLM-6B" else None
            axis.bar(len(names), PUBLISHED["models"][model][suite][0], color="#999999", label=label_of_bars)
            names.append(model)
        if suite in CHANCE:
            axis.axhline(CHANCE[suite], color="#d55e00", linestyle=":", linewidth=1.5, label="chance")
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axis.set_title(TITLES[suite])
    figure.axes[0].set_ylabel("percent right")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=200)


def write_report(folders: list[Path], output: Path) -> Path:
    """Writes report.md, report.png and results.json to `output`, and returns the first."""
    evaluations = [read(folder) for folder in folders]
    labels = labels_of(evaluations)
    lines = ["# Evaluation", ""]
    for label, (settings, _) in zip(labels, evaluations):
        limit = f"the first {settings['limit']} questions of each subject" if settings["limit"] else "all questions"
        where = f"data from {Path(settings['data']).name}/" if settings["data"] else "data from the Hub"
        lines.append(
            f"- **{label}**: {limit}, {where}, {settings['device']}, lm-evaluation-harness {settings['lm_eval']}"
        )
    lines += ["", "Percent right, and in brackets the 95 % interval (Wilson). Averages count every question once.", ""]
    suites, summary = {}, {label: {} for label in labels}
    for suite in SUITES:
        found = [
            (label, [r for r in results if r["suite"] == suite]) for label, (_, results) in zip(labels, evaluations)
        ]
        found = [(label, results) for label, results in found if results]
        if not found:
            continue
        if suite == "perplexity":
            lines += perplexity_section(found)
            for label, results in found:
                summary[label][suite] = {
                    r["subject"]: {k: r[k] for k in ("perplexity", "bits_per_byte")} for r in results
                }
            continue
        suites[suite] = found
        lines += suite_section(suite, found)
        for label, results in found:
            sums = {name: pair for name, pair in columns_of(suite, results).items() if pair[1]}
            summary[label][suite] = {
                name: {"correct": c, "samples": n, "percent": 100 * c / n, "interval": wilson(c, n)}
                for name, (c, n) in sums.items()
            }
    output.mkdir(parents=True, exist_ok=True)
    if suites:
        plot(suites, output / "report.png")
        lines += ["![Averages beside the published ones](report.png)", ""]
    lines += [f"Published figures: {PUBLISHED['source']}"]
    write_json(output / "results.json", summary)
    path = output / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main():
    args = options().parse_args()
    with plain_errors("evaluation"):
        print(write_report(args.folders, args.output))


if __name__ == "__main__":
    main()
