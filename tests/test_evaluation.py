"""
The evaluation: its data, prompts, scores and runs. The data sets are made here, in their formats and sizes; real ones are not
part of this repository.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch


pytest.importorskip("lm_eval", reason="the extra evaluation is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from transformers import AutoModel, AutoTokenizer

from common.files import only_run
from conftest import ROOT, TINY
from evaluation import data, protocol, report, run
from evaluation.model import EvaluatedModel, common_prefix
from evaluation.protocol import build


SOME = {
    "mmlu": ["anatomy", "econometrics"],
    "ceval": ["law"],
    "gsm8k": [None],
    "gsm8k_zh": [None],
    "bbh": ["navigate", "object_counting", "hyperbaton"],
}
TARGETS = {"navigate": ["Yes", "No"], "object_counting": ["7", "12"], "hyperbaton": ["(A)", "(B)"]}


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Data sets of the right sizes with other questions."""
    root = tmp_path_factory.mktemp("data")
    for subject in SOME["mmlu"]:  # one as first released, one with a header
        for split, n in (("dev", 5), ("test", data.SUBJECTS["mmlu"][subject]["questions"])):
            rows = [[f"What is {i} of {subject}?", f"it{i}", "B1", "C1", "D1"] for i in range(n)]
            path = root / f"mmlu/{split}/{subject}_{split}.csv"
            if subject == "anatomy":
                write_csv(path, None, [[*row, "ABCD"[i % 4]] for i, row in enumerate(rows)])
            else:
                header = ["question", *(f"choice{i}" for i in range(4)), "answer"]
                write_csv(path, header, [[*row, i % 4] for i, row in enumerate(rows)])
    for subject in data.SUBJECTS["ceval"]:
        for split, n in (("dev", 5), ("val", data.SUBJECTS["ceval"][subject]["questions"])):
            rows = [[i, f"第{i}题？", f"甲{i}", "乙", "丙", "丁", "ABCD"[i % 4]] for i in range(n)]
            write_csv(root / f"ceval/{split}/{subject}_{split}.csv", ["id", "question", *"ABCD", "answer"], rows)
    (root / "gsm8k").mkdir()
    rows = [{"question": f"What is {i} + 1000?", "answer": f"Add.\n#### {i + 1000:,}"} for i in range(1319)]
    (root / "gsm8k/test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (root / "mgsm").mkdir()
    rows = [f"{i}加1000等于多少？\t{i + 1000:,}" for i in range(5)]
    (root / "mgsm/mgsm_zh.tsv").write_text("\n".join(rows), encoding="utf-8")
    (root / "bbh").mkdir()
    for task in SOME["bbh"]:
        targets = TARGETS[task]
        n = data.SUBJECTS["bbh"][task]["questions"]
        examples = [{"input": f"Question {i}?", "target": targets[i % 2]} for i in range(n)]
        (root / f"bbh/{task}.json").write_text(json.dumps({"canary": "", "examples": examples}), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def tiny():
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    return AutoModel.from_pretrained(TINY, trust_remote_code=True).float().eval(), tokenizer


class Oracle(LM):
    """Knows the answers, and says them, or others, as `say` writes them."""

    def __init__(self, right: bool, say="So the answer is {}.", tokenizer=None):
        super().__init__()
        self.right, self.say, self.tokenizer, self.seen = right, say, tokenizer, []

    tokenizer_name = "oracle"

    def apply_chat_template(self, messages, add_generation_prompt=True):
        return f"问：{messages[-1]['content']}\n\n答："

    def loglikelihood(self, requests):
        self.seen += [request.args[0] for request in requests]
        likeliest = [(r.doc["answer"] + (not self.right)) % 4 for r in requests]
        return [(0.0 if r.args[1].strip() == "ABCD"[n] else -9.0, False) for r, n in zip(requests, likeliest)]

    def generate_until(self, requests):
        answers = [self.answer(request.doc) for request in requests]
        until = requests[0].args[1]["until"]
        return [postprocess_generated_text(answer, stop=until, think_end_token=None) for answer in answers]

    def answer(self, doc):
        target = doc.get("target")
        if target is None:
            return "Let me think."
        if not self.right:
            other = {"Yes": "No", "No": "Yes", "(A)": "(B)", "(B)": "(A)"}
            target = other.get(target, "1" + target)
        return self.say.format(target)

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


@pytest.mark.parametrize("suite", list(SOME))
@pytest.mark.parametrize("mode", protocol.PROTOCOLS)
def test_right_answers_score_all_and_wrong_ones_nothing(folder, suite, mode):
    for subject in SOME[suite]:
        for right in (True, False):
            result = run.run_task(build(suite, subject, mode, str(folder)), Oracle(right), limit=100)
            assert result["samples"] == len(result["answers"]) >= 5
            assert result["correct"] == (result["samples"] if right else 0), (suite, subject, mode)


@pytest.mark.parametrize(
    "say",
    [
        "#### {}",
        "Let's solve this step by step:\n\n1. 3 - 1 = 2\n\nThe answer is {}.",
        "根据问题：有3个苹果。\n\n答案是{}。",
        "答案是 {}。",
        "**{}**",
        r"\boxed{{{}}}",
        "2 + 2 = 4. The answer is ${}.00",
        "{} eggs",
    ],
)
def test_answers_in_odd_formats_score(folder, say):
    assert run.run_task(build("gsm8k", None, "chat", str(folder)), Oracle(True, say), limit=20)["correct"] == 20
    assert run.run_task(build("gsm8k", None, "chat", str(folder)), Oracle(False, say), limit=20)["correct"] == 0


# Prompts


def first_request(task, lm, i=0):
    task.set_fewshot_seed(0)
    task.build_all_requests(
        limit=1, apply_chat_template=task.chat, fewshot_as_multiturn=False, chat_template=lm.apply_chat_template
    )
    return task.instances[i]


def test_chat_prompts_of_choices_are_the_published_ones(folder, tiny):
    """The two turns of evaluate_ceval.py: ids of build_prompt(text), then of build_prompt(text + answer + "\\n" + ...)."""
    model, tokenizer = tiny
    lm = EvaluatedModel(model, tokenizer)
    text = "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n第0题？\nA. 甲0\nB. 乙\nC. 丙\nD. 丁\n答案：让我们一步一步思考，\n1. "
    task = build("ceval", "law", "chat", str(folder))
    first = first_request(task, lm)
    assert lm.tok_encode(first.args[0]) == tokenizer.encode(tokenizer.build_prompt(text))
    assert first.args[1]["max_gen_toks"] == 512 and not first.args[1]["do_sample"]
    first.resps.append("因为甲。")
    query = text + "因为甲。" + "\n" + "综上所述，ABCD中正确的选项是："
    for letter, second in zip("ABCD", task.instances[1:5]):
        context, continuation = lm._encode_pair(*second.args)
        assert context == tokenizer.encode(tokenizer.build_prompt(query))
        assert continuation == tokenizer.encode(letter, add_special_tokens=False)

    text = "The following is a multiple choice question about anatomy.\n\nWhat is 0 of anatomy?\nA. it0\nB. B1\nC. C1\nD. D1\nAnswer: Let's think step by step."
    first = first_request(build("mmlu", "anatomy", "chat", str(folder)), lm)
    assert lm.tok_encode(first.args[0]) == tokenizer.encode(tokenizer.build_prompt(text))


def test_texts_of_the_published_script_are_taken_as_they_are(tmp_path, tiny):
    rows = [{"inputs_pretokenized": f"题目{i}\n答案：", "label": i % 4} for i in range(24)]
    path = tmp_path / "ceval/val/Social_Science/law.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    lm = EvaluatedModel(*tiny)
    first = first_request(build("ceval", "law", "chat", str(tmp_path)), lm)
    assert lm.tok_encode(first.args[0]) == lm.tokenizer.encode(lm.tokenizer.build_prompt("题目0\n答案："))


def test_base_prompts_of_choices_are_the_published_ones(folder, tiny):
    lm = EvaluatedModel(*tiny)
    header = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    questions = [f"What is {i} of anatomy?\nA. it{i}\nB. B1\nC. C1\nD. D1\nAnswer:" for i in range(5)]
    shots = "".join(f"{question} {'ABCD'[i % 4]}\n\n" for i, question in enumerate(questions))
    request = first_request(build("mmlu", "anatomy", "base", str(folder)), lm)
    assert request.args == (header + shots + questions[0], " A")

    header = "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
    questions = [f"第{i}题？\nA. 甲{i}\nB. 乙\nC. 丙\nD. 丁\n答案：" for i in range(5)]
    shots = "".join(f"{question}{'ABCD'[i % 4]}\n\n" for i, question in enumerate(questions))
    request = first_request(build("ceval", "law", "base", str(folder)), lm)
    assert request.args == (header + shots + questions[0], "A")


def test_chains_of_thought_have_the_published_examples(folder, tiny):
    lm = EvaluatedModel(*tiny)
    prompt = first_request(build("gsm8k", None, "base", str(folder)), lm).args[0]
    assert prompt.startswith(
        "Q: There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, there "
        "will be 21 trees. How many trees did the grove workers plant today?\nA: There are 15 trees originally. Then there "
        "were 21 trees after some more were planted. So there must have been 21 - 15 = 6. The answer is 6.\n\nQ: If"
    )
    assert prompt.count("\nA: ") == 8 and prompt.endswith("The answer is 8.\n\nQ: What is 0 + 1000?\nA:")
    query = prompt
    prompt = first_request(build("gsm8k", None, "chat", str(folder)), lm).args[0]
    assert lm.tok_encode(prompt) == lm.tokenizer.encode(lm.tokenizer.build_prompt(query))

    prompt = first_request(build("gsm8k_zh", None, "base", str(folder)), lm).args[0]
    assert prompt.count("答案是") == 8 and prompt.endswith("答案是8。\n\n问题：0加1000等于多少？\n解答：")
    prompt = first_request(build("bbh", "navigate", "base", str(folder)), lm).args[0]
    assert prompt.count("A: Let's think step by step.\n") == 4
    assert prompt.endswith("So the answer is Yes.\n\nQ: Question 0?\nA: Let's think step by step.\n")


def test_published_prompts_token_for_token(shared, tiny):
    """GSM8K's and BBH's prompts as they were published, from the reference data."""
    lm = EvaluatedModel(*tiny)
    folder = shared / "eval"
    published = (folder / "gsm8k/gsm8k_cot_8shot.txt").read_text().strip()
    request = first_request(build("gsm8k", None, "base", str(folder)), lm)
    question = f"{published}\n\nQ: {request.doc['question']}\nA:"
    assert lm.tok_encode(request.args[0]) == lm.tokenizer.encode(question)
    for task in data.SUBJECTS["bbh"]:
        published = (folder / f"bbh/cot-prompts/{task}.txt").read_text().split("-----\n")[1].strip()
        request = first_request(build("bbh", task, "base", str(folder)), lm)
        question = f"{published}\n\nQ: {request.doc['input']}\nA: Let's think step by step."
        question += "" if task == "sports_understanding" else "\n"
        assert lm.tok_encode(request.args[0]) == lm.tokenizer.encode(question), task


def test_prompts_get_fewer_examples_where_the_context_is_small(folder):
    task = build("gsm8k", None, "base", str(folder))
    task.fit(lambda text: len(text.split()), context=512 + 300)
    prompt = first_request(task, Oracle(True)).args[0]
    assert len(prompt.split()) <= 300 and 0 < prompt.count("The answer is") < 8
    assert task.shots == Counter({prompt.count("The answer is"): 1}) and not task.cut
    task = build("gsm8k", None, "base", str(folder))
    task.fit(lambda text: len(text.split()), context=512 + 3)
    first_request(task, Oracle(True))
    assert task.shots == Counter({0: 1}) and task.cut == 1


def test_prompts_get_as_many_examples_as_fit(folder):
    counts = []
    for room in range(20, 1000, 20):
        task = build("gsm8k", None, "base", str(folder))
        task.fit(lambda text: len(text.split()), context=512 + room)
        prompt = first_request(task, Oracle(True)).args[0]
        assert len(prompt.split()) <= room
        counts.append(prompt.count("The answer is"))
    assert counts == sorted(counts) and set(counts) == set(range(9))


# The model


class PlainHarness(HFLM):
    """The harness's own model, with the prefix that every input begins with (see `EvaluatedModel.tok_encode`)."""

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return super().tok_encode(string, add_special_tokens is None or add_special_tokens, **kwargs)


@pytest.mark.parametrize("suite, subject", [("mmlu", "anatomy"), ("ceval", "law"), ("bbh", "navigate")])
@pytest.mark.parametrize("mode", protocol.PROTOCOLS)
def test_same_results_as_the_plain_harness(folder, tiny, suite, subject, mode):
    """Shared prefixes, batches that shrink and logits in few places change nothing."""
    results = []
    for lm in (EvaluatedModel(*tiny, batch_size=3), PlainHarness(pretrained=tiny[0], tokenizer=tiny[1], batch_size=2)):
        task = build(suite, subject, mode, str(folder))
        if task.config.generation_kwargs:
            task.config.generation_kwargs["max_gen_toks"] = 40
        results.append(run.run_task(task, lm, limit=4)["answers"])
    assert results[0] == results[1]


@pytest.mark.parametrize("suite, mode", [("gsm8k", "chat"), ("mmlu", "base")])
def test_prefix_of_ptuning(folder, tmp_path, tiny, suite, mode, capsys):
    """As the recipe saves it, beside its model; alone, it is no model."""
    model, tokenizer = tiny
    prefix = AutoModel.from_pretrained(TINY, trust_remote_code=True, pre_seq_len=16).float().eval()
    torch.nn.init.normal_(prefix.transformer.prefix_encoder.embedding.weight)
    state = {k: v for k, v in prefix.state_dict().items() if "prefix_encoder" in k}
    torch.save(state, tmp_path / "pytorch_model.bin")
    prefix.config.save_pretrained(tmp_path)
    options = command(folder, tmp_path / "out", "--suite", suite, "--protocol", mode, "--limit", 3)
    loaded, _ = run.load_model(run.parse_args([*options, "--ptuning_checkpoint", str(tmp_path)]))
    results = []
    for lm in (
        EvaluatedModel(loaded, tokenizer, batch_size=2),
        PlainHarness(pretrained=prefix, tokenizer=tokenizer, batch_size=1),
    ):
        task = build(suite, SOME[suite][0], mode, str(folder))
        if task.config.generation_kwargs:
            task.config.generation_kwargs["max_gen_toks"] = 40
        results.append(run.run_task(task, lm, limit=3)["answers"])
    assert results[0] == results[1]
    for path in TINY.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((TINY / "tokenizer_config.json").read_bytes())
    options[1] = str(tmp_path)
    with pytest.raises(
        ValueError, match="lacks transformer.embedding.* and [0-9]+ more, .*holds a P-Tuning prefix alone"
    ):
        run.load_model(run.parse_args(options))


def test_likelihoods_equal_those_of_the_plain_harness(tiny):
    long = "Once upon a time there was a little dog who lived in a small house near the sea and the hills. "
    pairs = [
        (long + "It", " was red."),
        (long + "The dog was", " happy"),
        (long, " 你好"),
        (long + "It", " is"),
        ("a", " b"),
    ]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    ours = EvaluatedModel(*tiny, batch_size=4).loglikelihood(requests)
    theirs = PlainHarness(pretrained=tiny[0], tokenizer=tiny[1], batch_size=2).loglikelihood(
        requests, disable_tqdm=True
    )
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert torch.allclose(torch.tensor([x for x, _ in ours]), torch.tensor([x for x, _ in theirs]), atol=1e-3)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_answers_to_prompts_of_different_lengths(tiny, batch_size):
    """Padded, with a shared beginning and without, they are those of each prompt alone."""
    model, tokenizer = tiny
    shared = "Translate the following sentences into Chinese, one after the other, and say nothing else: "
    queries = ["你好", "Tell me a story about a dog.", *(shared + "I love you. " * n for n in (1, 3, 6))]
    prompts = [tokenizer.build_prompt(query) for query in queries]
    options = {"max_gen_toks": 40, "until": ["."], "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, options), i) for i, prompt in enumerate(prompts)]
    answers = EvaluatedModel(model, tokenizer, batch_size).generate_until(requests)
    for prompt, answer in zip(prompts, answers):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(output, skip_special_tokens=True).split(".")[0]


def test_batches_that_do_not_fit_are_halved(folder, tiny, monkeypatch):
    model, tokenizer = tiny
    expected = run.run_task(build("mmlu", "anatomy", "chat", str(folder)), EvaluatedModel(model, tokenizer, 8), limit=8)
    forward, most = model.forward, 2

    def small(input_ids=None, **kwargs):
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", lambda self, input_ids=None, **kwargs: small(input_ids, **kwargs))
    lm = EvaluatedModel(model, tokenizer, 8)
    result = run.run_task(build("mmlu", "anatomy", "chat", str(folder)), lm, limit=8)
    assert result["answers"] == expected["answers"] and lm.batch_size == 2
    most = 0
    with pytest.raises(MemoryError, match="--quantization int4"):
        run.run_task(build("mmlu", "anatomy", "base", str(folder)), lm, limit=2)


def test_requests_of_a_task_are_all_counted(folder, tiny):
    """What the progress bar expects is what the model says that it has done."""
    for suite, mode in (("mmlu", "chat"), ("mmlu", "base"), ("bbh", "chat")):
        task = build(suite, SOME[suite][0], mode, str(folder))
        if task.config.generation_kwargs:
            task.config.generation_kwargs["max_gen_toks"] = 4
        done = []
        lm = EvaluatedModel(*tiny, batch_size=3, progress=done.append)
        expected = run.requests_of(task, lm, 4)
        run.run_task(task, lm, limit=4)
        assert sum(done) == expected == {"chat": 20, "base": 16}[mode] - 16 * (suite == "bbh")


def test_settings_have_all_that_results_depend_on(folder, tmp_path):
    options = command(folder, tmp_path / "out")
    before = run.settings_of(run.parse_args(options))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "a.tsv").write_text("a\t1")
    for option, value in (
        ("--ptuning_checkpoint", tmp_path), ("--protocol", "base"), ("--quantization", "int4"), ("--limit", 3),
        ("--data", tmp_path), ("--gsm8k_zh", tmp_path / "a.tsv"), ("--text", tmp_path / "a.tsv"), ("--dtype", "bfloat16"),
        ("--device", "meta"), ("--model", ROOT / "docs"),
    ):  # fmt: skip
        changed = run.settings_of(run.parse_args([*options, option, str(value)]))
        assert changed != before and changed.keys() == before.keys()
        differ = {name for name in before if changed[name] != before[name]} - {"weights"}
        assert differ == {option.removeprefix("--")}


def test_perplexity(tiny):
    model, tokenizer = tiny
    lm = EvaluatedModel(model, tokenizer)
    text = "The little dog was happy. 你好，今天天气很好。" * 3
    (score,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    ids = torch.tensor([tokenizer.encode(text)])
    special = len(tokenizer.encode(""))
    with torch.no_grad():
        logits = model(ids).logits[0, special - 1 : -1].log_softmax(-1)
    expected = logits.gather(1, ids[0, special:, None]).sum().item()
    assert score == pytest.approx(expected, rel=1e-4)
    figures = run.perplexity({"doc": {"text": text}, "perplexity": score}, lm)
    assert figures["perplexity"] == pytest.approx(2.718281828 ** (-expected / (ids.shape[1] - special)), rel=1e-3)
    assert figures["bits_per_byte"] * figures["bytes"] == pytest.approx(-expected / 0.6931472, rel=1e-3)


def test_limit_is_of_the_windows_of_a_text_too(tiny):
    """Perplexity is then that of the first windows, in tokens and bytes."""
    lm = EvaluatedModel(*tiny)
    text = "你好，今天天气很好。The little dog was happy. " * 300
    first, all_windows = lm.windows(text)[0], len(lm.windows(text))
    lm.max_windows = 1
    assert all_windows > 1 and lm.windows(text) == [first]
    (score,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    figures = run.perplexity({"doc": {"text": text}, "perplexity": score}, lm)
    assert figures["tokens"] == len(first[2]) and figures["bytes"] == len(lm.tokenizer.decode(first[2]).encode())


def test_windows_predict_every_token_once(tiny):
    lm = EvaluatedModel(*tiny)
    text = "你好，今天天气很好。The little dog was happy. " * 300
    windows = lm.windows(text)
    assert sum((targets for *_, targets in windows), []) == lm.tokenizer.encode(text, add_special_tokens=False)
    assert (
        max(len(context) + len(targets) for _, context, targets in windows) <= 2049
    )  # of which the last is only predicted
    assert all(context[:2] == lm.tokenizer.encode("") for _, context, _ in windows)
    assert min(len(context) for _, context, _ in windows[1:]) >= 1020


def test_common_prefix():
    assert common_prefix([(1, 2, 3, 4), (1, 2, 5)], 1) == (1, 2)
    assert common_prefix([(1, 2, 3), (1, 2, 3, 4)], 1) == (1, 2)  # what is to be computed stays
    assert common_prefix([(1, 2, 3), (2, 2, 3)], 1) == ()
    assert common_prefix([(1, 2, 3)], 2) == (1,)


# Data that are not as they should be


def broken(folder, tmp_path, name: str, change):
    """A folder with one file of `folder`, changed."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = change((folder / name).read_bytes())
    if content is not None:
        path.write_bytes(content)
    other = name.replace("_val", "_dev").replace("/val/", "/dev/")
    if other != name:
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_bytes((folder / other).read_bytes())
    return str(tmp_path)


LAW, GSM8K, NAVIGATE = "ceval/val/law_val.csv", "gsm8k/test.jsonl", "bbh/navigate.json"


@pytest.mark.parametrize(
    "suite, subject, name, change, error, message",
    [
        ("ceval", "law", LAW, lambda b: None, FileNotFoundError, "law_val.csv is missing. Complete the folder"),
        ("ceval", "law", LAW, lambda b: b"", ValueError, "law_val.csv is empty"),
        ("ceval", "law", LAW, lambda b: b.replace(b",A\r", b",E\r", 1), ValueError, "question 1: the answer is 'E', and must be"),
        ("ceval", "law", LAW, lambda b: b.replace(b",A\r", b",AB\r", 1), ValueError, "question 1: the answer is 'AB'"),
        ("ceval", "law", LAW, lambda b: b.replace(b",A\r", ",²\r".encode(), 1), ValueError, "question 1: the answer is '²'"),
        ("ceval", "law", LAW, lambda b: b.replace("丁".encode(), b" ", 1), ValueError, "one of its four choices is empty"),
        ("ceval", "law", LAW, lambda b: b.replace(b",A\r", b",\r", 1), ValueError, "question 1: the answer is ''"),
        ("ceval", "law", LAW, lambda b: b.replace(b"question", b"Question"), ValueError, "has the columns id, Question, A"),
        ("ceval", "law", LAW, lambda b: b.replace(b",answer", b",explanation"), ValueError, "has no column answer"),
        ("ceval", "law", LAW, lambda b: b.replace(b",A\r", b"\r", 1), ValueError, "question 1 has 6 cells for 7 columns"),
        ("ceval", "law", LAW, lambda b: b[: b.rindex(b"\r\n23,")], ValueError, "has 23 questions here, and 24 as published"),
        ("ceval", "law", LAW, lambda b: b.decode().encode("gb18030"), ValueError, "is not UTF-8"),
        ("gsm8k", None, GSM8K, lambda b: b.replace(b"#### 1,000", b"#### many", 1), ValueError, "question 1: the answer ends in 'many'"),
        ("gsm8k", None, GSM8K, lambda b: b.replace(b'"answer"', b'"reply"', 1), ValueError, "row 1 has no answer; there are"),
        ("gsm8k", None, GSM8K, lambda b: b.replace(b"#### 1,000", b"#### --5", 1), ValueError, "question 1: the answer ends in '--5'"),
        ("gsm8k", None, GSM8K, lambda b: b[:-5], ValueError, "line 1319 is not JSON"),
        ("bbh", "navigate", NAVIGATE, lambda b: b.replace(b'"target"', b'"label"'), ValueError, "has no target; there are input"),
        ("bbh", "navigate", NAVIGATE, lambda b: b"[]", ValueError, "must be a JSON object, got list"),
        ("bbh", "navigate", NAVIGATE, lambda b: b'{"examples": ["a"]}', ValueError, "must hold objects with input, target, got str"),
        ("bbh", "navigate", NAVIGATE, lambda b: b.replace(b'"Yes"', b"7", 1), ValueError, "input and target must be texts"),
        ("gsm8k_zh", None, "mgsm/mgsm_zh.tsv", lambda b: b"\n", ValueError, "has no questions of gsm8k_zh"),
        ("gsm8k_zh", None, "mgsm/mgsm_zh.tsv", lambda b: b.replace(b"\t", b" ", 1), ValueError, "line 1 has 1 columns"),
    ],
)  # fmt: skip
def test_broken_data_is_refused(folder, tmp_path, suite, subject, name, change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        data.load(suite, subject, broken(folder, tmp_path, name, change))


def test_texts_of_the_script_are_for_the_chat_model(tmp_path):
    for subject in data.SUBJECTS["ceval"]:
        rows = [
            {"inputs_pretokenized": f"题{i}", "label": 0} for i in range(data.SUBJECTS["ceval"][subject]["questions"])
        ]
        path = tmp_path / f"ceval/val/Other/{subject}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="give C-Eval's own CSV files for --protocol base"):
        build("ceval", "law", "base", str(tmp_path))
    text = data.load("perplexity", "ceval", str(tmp_path))["test"][0]["text"]
    assert text.startswith("题0\n题1\n") and "None" not in text


def test_other_wikitext_is_refused(tmp_path):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/wiki.test.raw").write_text("= Robert <unk> =\n")
    with pytest.raises(ValueError, match="the raw test set of WikiText-2 1,290,547"):
        data.load("perplexity", "wikitext2", str(tmp_path))


# Runs


def command(folder, output, *more):
    return ["--model", str(TINY), "--data", str(folder), "--output", str(output), *map(str, more)]


@pytest.fixture
def some_subjects(monkeypatch):
    monkeypatch.setattr(run, "SUITES", {**protocol.SUITES, **SOME, "perplexity": []})


def test_run_to_report(folder, tmp_path, some_subjects, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The little dog was happy.\n" * 5, encoding="utf-8")
    options = ("--suite", "published", "perplexity", "--limit", 1, "--text", text, "--batch_size", 4)
    run.main(command(folder, tmp_path / "float", *options))
    page = capsys.readouterr().out
    for title in ("## MMLU", "## C-Eval", "## GSM8K", "## GSM8K in Chinese", "## BBH", "## Perplexity"):
        assert title in page
    assert "| **tiny, chat** (measured, 55 subjects missing) | 2 |" in page
    assert "| ChatGLM-6B, published |  | 40.63 | 33.89 | 44.84 | 39.02 | 45.71 |" in page
    assert page.count("without reading the questions would score") == 2
    assert "28.05" in page and "20.45" in page and "bits per byte" in page
    assert (tmp_path / "float/report.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "float/results.json").read_text())["tiny, chat"]
    assert summary["bbh"]["Average"]["samples"] == 3 and summary["perplexity"]["text"]["perplexity"] > 1

    run.main(command(folder, tmp_path / "int4", *options, "--quantization", "int4", "--suite", "mmlu", "perplexity"))
    capsys.readouterr()
    path = report.write_report([tmp_path / "float", tmp_path / "int4"], tmp_path / "both")
    page = path.read_text(encoding="utf-8")
    assert page.count("| **tiny, INT4, chat** (measured") == 1 and page.count("| text | tiny") == 2


def test_base_protocol_runs(folder, tmp_path, some_subjects, capsys):
    run.main(command(folder, tmp_path / "out", "--suite", "mmlu", "ceval", "--protocol", "base", "--limit", 2))
    page = capsys.readouterr().out
    assert page == (tmp_path / "out/report.md").read_text(encoding="utf-8") + "\n"
    assert "| **tiny, base** (measured, 55 subjects missing) | 4 |" in page
    assert "| **tiny, base** (measured, 51 subjects missing) | 2 |" in page
    results = json.loads((tmp_path / "out/results.json").read_text())["tiny, base"]
    written = [json.loads(path.read_text()) for path in sorted((tmp_path / "out/tasks").glob("*.json"))]
    assert [result["subject"] for result in written] == ["law", "anatomy", "econometrics"]
    for suite in ("mmlu", "ceval"):
        rows = [row for result in written if result["suite"] == suite for row in result["answers"]]
        assert results[suite]["Average"]["samples"] == len(rows)
        assert results[suite]["Average"]["correct"] == sum(row["choice"] == row["target"] for row in rows)
    assert "generated texts contain an answer" not in page  # nothing is generated


def test_damaged_results_are_named_before_the_model_is_loaded(folder, tmp_path, some_subjects, monkeypatch):
    options = command(folder, tmp_path / "out", "--suite", "gsm8k", "--limit", 1)
    monkeypatch.setattr(run, "load_model", lambda args: pytest.fail("the model is loaded"))
    (tmp_path / "out/tasks").mkdir(parents=True)
    settings = tmp_path / "out/settings.json"
    for content in ("", '{"model": '):
        settings.write_text(content)
        with pytest.raises(ValueError, match="settings.json is .*Choose another --output"):
            run.main(options)
    settings.write_text(json.dumps(run.settings_of(run.parse_args(options))))
    (tmp_path / "out/tasks/gsm8k.json").write_text('{"suite": "gsm8k", "sub')
    with pytest.raises(ValueError, match="tasks/gsm8k.json is not JSON .*Remove it: its task is then run again"):
        run.main(options)


def test_second_run_into_the_same_folder_is_refused(folder, tmp_path, some_subjects):
    with only_run(tmp_path / "out", "--output"):
        with pytest.raises(ValueError, match="Another process is writing to .*out.*choose another --output"):
            run.main(command(folder, tmp_path / "out", "--suite", "gsm8k", "--limit", 1))


def test_killed_run_goes_on_without_losing_subjects(folder, tmp_path):
    """Killed as the system kills; what is finished stays, and the end is that of a run that was not killed."""
    options = ("--suite", "ceval", "--protocol", "base", "--limit", 2)

    def start(output):
        line = [sys.executable, "-m", "evaluation.run", *command(folder, output, *options)]
        return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = start(tmp_path / "killed")
    tasks = tmp_path / "killed/tasks"
    deadline = time.time() + 200
    while time.time() < deadline and len(list(tasks.glob("*.json"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished = {path.name: path.stat().st_mtime_ns for path in tasks.glob("*.json")}
    assert 3 <= len(finished) < 52
    (tasks / "ceval-law.json.part").write_text("{")  # as if it had been writing
    process = start(tmp_path / "killed")
    output, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    assert f"{len(finished)} of 52 tasks are finished" in errors
    assert "| **tiny, base** (measured) | 104 |" in output
    assert {name: (tasks / name).stat().st_mtime_ns for name in finished} == finished

    with pytest.raises(ValueError, match="other settings: limit 2, now 3"):
        run.main(command(folder, tmp_path / "killed", *options[:-1], 3))


@pytest.mark.parametrize(
    "options, message",
    [
        (("--limit", 0), "--limit must be at least 1, got 0"),
        (("--suite", "arithmetic"), "invalid choice: 'arithmetic'"),
        (("--data", "nowhere"), "there is no folder nowhere"),
        (("--gsm8k_zh", "nowhere.tsv"), "--gsm8k-zh: there is no file nowhere.tsv"),
        (("--ptuning_checkpoint", "nowhere"), "--ptuning-checkpoint: there is no file nowhere/pytorch_model.bin"),
        (("--model", "./nowhere"), "--model: there is no folder ./nowhere"),
        (("--output", str(ROOT / "setup.cfg")), "is a file, not a folder"),
    ],
)
def test_wrong_options_are_refused(folder, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        run.main(command(folder, tmp_path / "out", *options))
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_nothing_is_written_before_the_data_are_checked(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"abstract_algebra_(dev|test).csv is missing"):
        run.main(command(folder, tmp_path / "out", "--suite", "mmlu"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty, and has no evaluation"):
        run.main(command(folder, tmp_path / "other", "--suite", "gsm8k"))


def test_missing_chinese_questions_are_said(folder, tmp_path, some_subjects, capsys):
    for suite in ("mmlu", "ceval", "gsm8k", "bbh"):
        (tmp_path / suite).symlink_to(folder / suite)
    args = run.parse_args(command(tmp_path, tmp_path / "out"))
    assert run.chosen_suites(args) == ["mmlu", "ceval", "gsm8k", "bbh"]
    assert "gsm8k_zh is left out" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="mgsm_zh.tsv is missing"):
        run.build_tasks(run.parse_args(command(tmp_path, tmp_path / "out", "--suite", "gsm8k_zh")))


def test_intervals():
    """Of Wilson 1927, as statistics packages compute it."""
    assert report.wilson(5, 10) == pytest.approx((23.66, 76.34), abs=0.01)
    assert report.wilson(0, 20) == pytest.approx((0, 16.11), abs=0.01)
    low, high = report.wilson(20, 20)
    assert low == pytest.approx(83.89, abs=0.01) and high == pytest.approx(100)
    assert report.wilson(3510, 14042)[0] < 25 < report.wilson(3510, 14042)[1]
