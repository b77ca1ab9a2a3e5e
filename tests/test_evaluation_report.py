"""The report of an evaluation, word for word, from results that are written here; and what it refuses to read."""

import json

import pytest


pytest.importorskip("lm_eval", reason="the extra evaluation is not installed")

from evaluation import report


def choices(suite: str, subject: str, rows: list[tuple], cut: int = 0) -> dict:
    """The result of a task of questions with four choices; rows are (right, chosen, said in the text)."""
    answers = [
        {"id": i, "correct": int(chosen == right), "target": right, "choice": chosen, "answer": "...", "said": said}
        for i, (right, chosen, said) in enumerate(rows)
    ]
    correct = sum(answer["correct"] for answer in answers)
    about = {"suite": suite, "subject": subject, "samples": len(rows), "correct": correct}
    return {**about, "shots": {"0": len(rows)}, "cut": cut, "answers": answers}


ANATOMY = choices("mmlu", "anatomy", [("A", "A", "A"), ("B", "A", "B"), ("C", "C", None), ("D", "A", "A")])
ECONOMETRICS = choices("mmlu", "econometrics", [("A", "A", "A"), ("A", "B", None), ("B", "B", None)], cut=1)
LAW = choices("ceval", "law", [("D", "D", "D")])
GSM8K = {
    "suite": "gsm8k", "subject": None, "samples": 2, "correct": 1, "shots": {"8": 1, "5": 1}, "cut": 0,
    "answers": [
        {"id": 0, "correct": 1, "target": "18", "answer": "#### 18", "said": "18"},
        {"id": 1, "correct": 0, "target": "3", "answer": "?", "said": None},
    ],
}  # fmt: skip
TEXT = {"suite": "perplexity", "subject": "wikitext2", "tokens": 2000, "bytes": 9000, "perplexity": 12.345, "bits_per_byte": 0.87654}  # fmt: skip


def write_evaluation(folder, results: list[dict], **settings):
    (folder / "tasks").mkdir(parents=True)
    written = dict(
        name="tiny", protocol="chat", quantization=None, limit=4, data="/x/sets", device="cpu", lm_eval="0.4.13"
    )
    (folder / "settings.json").write_text(json.dumps({**written, **settings}))
    for i, result in enumerate(results):
        (folder / f"tasks/{i}.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def folders(tmp_path):
    blind = choices("mmlu", "anatomy", [("A", "B", None), ("B", "A", None), ("C", "A", None), ("D", "A", None)])
    return [
        write_evaluation(tmp_path / "float", [ANATOMY, ECONOMETRICS, LAW, GSM8K, TEXT]),
        write_evaluation(
            tmp_path / "int4", [blind, {**TEXT, "perplexity": 15.0}], quantization="int4", limit=None, data=None
        ),
    ]


BEGINNING = """\
# Evaluation

- **tiny, chat**: the first 4 questions of each subject, data from sets/, cpu, lm-evaluation-harness 0.4.13
- **tiny, INT4, chat**: all questions, data from the Hub, cpu, lm-evaluation-harness 0.4.13

Percent right, and in brackets the 95 % interval (Wilson). Averages count every question once.

## MMLU

|  | questions | Average | STEM | Social Sciences | Humanities | Others |
| --- | --- | --- | --- | --- | --- | --- |
| **tiny, chat** (measured, 55 subjects missing) | 7 | 57.14 (25.0 to 84.2) | 50.00 (15.0 to 85.0) | 66.67 (20.8 to 93.9) |  |  |
| **tiny, INT4, chat** (measured, 56 subjects missing) | 4 | 0.00 (0.0 to 49.0) | 0.00 (0.0 to 49.0) |  |  |  |
| ChatGLM-6B, published |  | 40.63 | 33.89 | 44.84 | 39.02 | 45.71 |
| ChatGLM2-6B (base), published |  | 47.86 | 41.20 | 54.44 | 43.66 | 54.46 |
| ChatGLM2-6B, published |  | 45.46 | 40.06 | 51.61 | 41.23 | 51.24 |
| ChatGLM2-12B (base), published |  | 56.18 | 48.18 | 65.13 | 52.58 | 60.93 |
| ChatGLM2-12B, published |  | 52.13 | 47.00 | 61.00 | 46.10 | 56.05 |
| ChatGLM2-6B, bfloat16, published |  | 45.47 |  |  |  |  |
| ChatGLM2-6B, INT4, published |  | 43.13 |  |  |  |  |

tiny, chat: prompts that did not fit even without examples, so their beginning was cut: 1.

tiny, chat: 4 of 7 generated texts contain an answer, 3 of them the right one. Only the choice in the second turn counts.

tiny, chat: chooses A in 57 %, B in 29 %, C in 14 %, D in 0 %. The same choices without reading the questions would score 34.69 %.

tiny, INT4, chat: 0 of 4 generated texts contain an answer, 0 of them the right one. Only the choice in the second turn counts.

tiny, INT4, chat: chooses A in 75 %, B in 25 %, C in 0 %, D in 0 %. The same choices without reading the questions would score 25.00 %.

<details><summary>By subject</summary>

| subject | category | questions | tiny, chat | tiny, INT4, chat |
| --- | --- | --- | --- | --- |
| abstract algebra | STEM |  |  |  |
| anatomy | STEM | 4 | 50.00 (15.0 to 85.0) | 0.00 (0.0 to 49.0) |
| astronomy | STEM |  |  |  |
"""
CEVAL = """\
## C-Eval

|  | questions | Average | STEM | Social Sciences | Humanities | Others |
| --- | --- | --- | --- | --- | --- | --- |
| **tiny, chat** (measured, 51 subjects missing) | 1 | 100.00 (20.7 to 100.0) |  |  | 100.00 (20.7 to 100.0) |  |
| ChatGLM-6B, published (test set) |  | 38.90 | 33.30 | 48.30 | 41.30 | 38.00 |
| ChatGLM2-6B (base), published (test set) |  | 51.70 | 48.60 | 60.50 | 51.30 | 49.80 |
| ChatGLM2-6B, published (test set) |  | 50.10 | 46.40 | 60.40 | 50.60 | 46.90 |
"""
END = """\
## GSM8K

|  | questions | Average |
| --- | --- | --- |
| **tiny, chat** (measured) | 2 | 50.00 (9.5 to 90.5) |
| ChatGLM-6B, published |  | 4.82 |
| ChatGLM2-6B (base), published |  | 32.37 |
| ChatGLM2-6B, published |  | 28.05 |
| ChatGLM2-12B (base), published |  | 40.94 |
| ChatGLM2-12B, published |  | 38.13 |

tiny, chat: examples that fit the context: 8 in 1, 5 in 1 prompts.

tiny, chat: 1 of 2 generated texts contain an answer.

## Perplexity

| text |  | tokens | perplexity, per token | bits per byte |
| --- | --- | --- | --- | --- |
| WikiText-2 (English) | tiny, chat | 2,000 | 12.35 | 0.8765 |
| WikiText-2 (English) | tiny, INT4, chat | 2,000 | 15.00 | 0.8765 |

Per token of the model's own tokenizer, in windows of its context (2,048 tokens at most) that overlap by half. Only bits per byte compare models with different tokenizers.

![Averages beside the published ones](report.png)

Published figures: README of THUDM/ChatGLM2-6B (https://github.com/THUDM/ChatGLM2-6B), percent. Base models"""


def test_page(folders, tmp_path):
    page = report.write_report(folders, tmp_path / "out").read_text(encoding="utf-8")
    assert page[: len(BEGINNING)] == BEGINNING
    assert CEVAL in page and END in page
    assert "Measured on the validation set, as the answers to the test set are not public" in page
    subjects = page.split("<details>")[1].split("</details>")[0]
    assert "| econometrics | Social Sciences | 3 | 66.67 (20.8 to 93.9) |  |\n" in subjects
    assert subjects.count("\n| ") == 2 + 57
    assert "##" not in page.split("Published figures")[1] and page.count("\n## ") == 4


def test_results_as_json(folders, tmp_path):
    report.write_report(folders, tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results) == ["tiny, chat", "tiny, INT4, chat"]
    assert list(results["tiny, chat"]) == ["mmlu", "ceval", "gsm8k", "perplexity"]
    average = results["tiny, chat"]["mmlu"]["Average"]
    assert (average["correct"], average["samples"]) == (4, 7) and average["percent"] == pytest.approx(400 / 7)
    assert average["interval"] == pytest.approx([25.05, 84.18], abs=0.01)
    assert set(results["tiny, chat"]["mmlu"]) == {"Average", "STEM", "Social Sciences"}
    assert results["tiny, INT4, chat"]["perplexity"] == {"wikitext2": {"perplexity": 15.0, "bits_per_byte": 0.87654}}


def test_plot(folders, tmp_path, monkeypatch):
    """Measured averages, then those of the three published models that people compare with; intervals; chance."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    report.write_report(folders, tmp_path / "out")
    mmlu, ceval, gsm8k = figures[0].axes
    assert [axis.get_title() for axis in figures[0].axes] == ["MMLU", "C-Eval", "GSM8K"]
    heights = [bar.get_height() for bar in mmlu.patches]
    assert heights == pytest.approx([400 / 7, 0, 40.63, 47.86, 45.46])
    labels = [text.get_text() for text in mmlu.get_xticklabels()]
    assert labels == ["tiny, chat", "tiny, INT4, chat", "ChatGLM-6B", "ChatGLM2-6B (base)", "ChatGLM2-6B"]
    (segment,) = mmlu.collections[0].get_segments()
    assert segment[:, 1] == pytest.approx([25.05, 84.18], abs=0.01)
    chance = [[line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"] for axis in figures[0].axes]
    assert chance == [[25], [25], []]
    assert [bar.get_height() for bar in gsm8k.patches] == pytest.approx([50, 4.82, 32.37, 28.05])


def test_same_names_are_told_apart(tmp_path):
    folders = [write_evaluation(tmp_path / name, [GSM8K]) for name in "ab"]
    page = report.write_report(folders, tmp_path / "out").read_text(encoding="utf-8")
    assert "| **tiny, chat (1)** (measured) |" in page and "| **tiny, chat (2)** (measured) |" in page


def test_validation_set_of_published_figures(tmp_path):
    """Those of bfloat16 and INT4 are of the validation set; the others' are of the test set."""
    page = report.write_report([write_evaluation(tmp_path / "a", [LAW])], tmp_path / "out").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if ", published" in line]
    of_test = [line.split(",")[0] for line in rows if "(test set)" in line]
    assert of_test and {
        line.split("|")[1].split(", published")[0].strip() for line in rows if "(test set)" not in line
    } == set(report.PUBLISHED["validation_set"])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("settings.json", "", "settings.json is empty. Choose another folder"),
        ("settings.json", '{"name": "ti', "settings.json is not JSON"),
        ("settings.json", "[]", "settings.json must hold a JSON object, got list"),
        ("settings.json", "{}", "settings.json has no name, protocol, quantization, limit, data, device, lm_eval"),
        ("tasks/0.json", "", "0.json is empty. Remove it: its task is then run again"),
        ("tasks/0.json", '{"suite": "mm', "0.json is not JSON .*Remove it: its task is then run again"),
        ("tasks/0.json", '{"suite": "mmlu", "subject": "anatomy"}', "0.json has no samples, correct, shots, cut, answers"),
        ("tasks/0.json", '{"suite": "perplexity"}', "0.json has no subject, tokens, perplexity, bits_per_byte"),
        ("settings.json", None, "has no evaluation. Pass the --output folder of evaluation.run"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(folders, tmp_path, name, content, message):
    path = folders[0] / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        report.write_report(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()
