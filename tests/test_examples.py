"""What the README shows a new user: the terminal chat, with the small model that the repository comes with."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from conftest import ROOT, TINY


CHAT = [sys.executable, "examples/cli_chat.py", "--greedy"]


def run_chat(*args, stdin=""):
    run = subprocess.run([*CHAT, *args], input=stdin, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def tiny():
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    return AutoModel.from_pretrained(TINY, trust_remote_code=True).float().eval(), tokenizer


def test_answers_once(tiny):
    model, tokenizer = tiny
    expected, _ = model.chat(tokenizer, "你好", do_sample=False)
    assert run_chat("--prompt", "你好").strip() == expected


def test_reads_a_pipe(tiny):
    model, tokenizer = tiny
    first, _ = model.chat(tokenizer, "你好", do_sample=False)
    second, _ = model.chat(tokenizer, "Who are you?", do_sample=False)
    output = run_chat(stdin="你好\nclear\n\nWho are you?\nstop\nnever read\n")
    assert output.split("\n") == [*first.split("\n"), *second.split("\n"), ""]


def test_query_that_is_too_long_is_said_and_the_dialogue_goes_on():
    output = run_chat(stdin="word " * 3000 + "\n你好\n")
    assert "Shorten it" in output and len(output.strip().splitlines()) >= 2


def test_interrupt_keeps_the_dialogue(tiny, monkeypatch, capsys):
    """Ctrl-C in the middle of an answer: what was shown is in the history, and the next round goes on from it."""
    spec = importlib.util.spec_from_file_location("cli_chat", ROOT / "examples/cli_chat.py")
    cli_chat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cli_chat)
    printed = []

    def print_and_interrupt(text="", *args, **kwargs):
        printed.append(text)
        if len(printed) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli_chat, "print", print_and_interrupt, raising=False)
    model, tokenizer = tiny
    history, cache = cli_chat.stream_answer(model, tokenizer, "Tell me a story.", [], None, do_sample=False)
    assert history == [("Tell me a story.", "".join(printed[:4]))]
    printed.extend([""] * 10)
    history, cache = cli_chat.stream_answer(model, tokenizer, "Who are you?", history, cache, do_sample=False)
    assert len(history) == 2 and history[1][1] == "".join(printed[14:]).strip()
    assert cache.chat_record.rounds == history


# The small model itself


def test_tiny_is_small():
    assert (TINY / "model.safetensors").stat().st_size <= 20_000_000
    for path in TINY.glob("*.py"):
        assert path.is_symlink() and path.resolve() == ROOT / path.name  # one copy of the code


@pytest.mark.parametrize(
    "query, expected", [("你好", "ChatGLM2-Tiny"), ("Who are you?", "ChatGLM2-Tiny"), ("你是谁？", "ChatGLM2-Tiny")]
)
def test_tiny_knows_who_it_is(tiny, query, expected):
    model, tokenizer = tiny
    assert expected in model.chat(tokenizer, query, do_sample=False)[0]


def test_tiny_ends_its_answers(tiny):
    model, tokenizer = tiny
    queries = ["你好", "hello", "Who are you?", "What is AI?", "Translate into Chinese: I love you."]
    responses, _ = model.chat(tokenizer, queries, do_sample=False, max_new_tokens=200)
    for query, response in zip(queries, responses):
        assert 0 < len(tokenizer.encode(response)) < 150, (query, response)


def test_tiny_batches_and_caches(tiny):
    """On trained weights: batched = single, and rounds with a cache = without, for answers that are not one token long."""
    model, tokenizer = tiny
    queries = ["你好", "Who are you?"]
    singles = [model.chat(tokenizer, query, do_sample=False)[0] for query in queries]
    assert model.chat(tokenizer, queries, do_sample=False)[0] == singles
    _, history, cache = model.chat(tokenizer, queries[0], do_sample=False, return_past_key_values=True)
    response, _, cache = model.chat(
        tokenizer, queries[1], history, do_sample=False, past_key_values=cache, return_past_key_values=True
    )
    ids = cache.chat_record.ids
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    answer = tokenizer.encode(response, add_special_tokens=False)
    begin = len(ids) - len(answer) - 1
    assert logits[begin - 1 : -1].argmax(-1).tolist() == ids[begin:]
