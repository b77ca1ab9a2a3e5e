"""The first-party API's contract (examples/api.py): what it answers, and what it says to bad input."""

import asyncio
import json
import re
import threading
import time

import pytest
from transformers import AutoModel, AutoTokenizer

from conftest import TINY


pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
from common import http_guard  # noqa: E402
from examples import api  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(TINY, trust_remote_code=True).float().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)


@pytest.fixture(scope="module")
def post(model, tokenizer):
    """Posts JSON or bytes, and returns the response."""
    app = http_guard.Guard(api.build_app(model, tokenizer), max_body=1 << 20, allowed_hosts=["test"])

    async def send(body, path="/", kind="application/json"):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(path, content=content, headers={"Content-Type": kind})

    return lambda body, **options: asyncio.run(send(body, **options))


def test_contract(post, model, tokenizer):
    expected, history = model.chat(tokenizer, "你好", do_sample=False)
    answer = post({"prompt": "你好", "temperature": 1e-6}).json()
    assert set(answer) == {"response", "history", "status", "time"}
    assert answer["response"] == expected and answer["history"] == [["你好", expected]] and answer["status"] == 200
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", answer["time"])
    # What the first-party client sends next
    second = post({"prompt": "Who are you?", "history": answer["history"], "temperature": 1e-6}).json()
    assert second["response"] == model.chat(tokenizer, "Who are you?", history, do_sample=False)[0]
    assert len(second["history"]) == 2


def test_defaults_are_the_first_partys(post, model, monkeypatch):
    options = {}

    def stream_chat(tokenizer, prompt, history, **given):
        options.update(given)
        yield "ok", [(prompt, "ok")]

    monkeypatch.setattr(model, "stream_chat", stream_chat)
    published = {"max_length": 2048, "top_p": 0.7, "temperature": 0.95}
    post({"prompt": "hi", "history": None, "max_length": None, "top_p": None})
    assert options == published
    post({"prompt": "hi", "max_length": 0, "top_p": 0, "temperature": 0, "stream": False, "other": 1})
    assert options == published
    post({"prompt": "hi", "max_length": 9, "top_p": 0.1, "temperature": 0.2})
    assert options == {"max_length": 9, "top_p": 0.1, "temperature": 0.2}


def test_empty_prompt_is_answered(post):
    assert post({"prompt": "", "max_length": 30}).status_code == 200


@pytest.mark.parametrize(
    "body, message",
    [
        ({}, "Missing required parameter: 'prompt'"),
        ({"prompt": 5}, "'prompt': expected a string, got an integer"),
        ({"prompt": "hi", "temperature": -1}, "'temperature': must be at least 0, got -1"),
        ({"prompt": "hi", "top_p": 1.5}, "'top_p': must be at most 1, got 1.5"),
        ({"prompt": "hi", "max_length": -1}, "'max_length'"),
        ({"prompt": "hi", "stream": True}, "stream: this API cannot stream"),
        ({"prompt": "hi", "history": "no"}, "'history': expected a list"),
        ({"prompt": "hi", "history": [["one"]]}, "history"),
        ({"prompt": "word " * 3000}, "Shorten it"),
        (b"{", "JSON"),
        (b"", "JSON"),
        (b'{"prompt": "\xff"}', "JSON"),
        (b'{"prompt": "\\ud800"}', "JSON"),
        (b'{"prompt": "hi", "temperature": Infinity}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_input(post, body, message):
    response = post(body)
    assert response.status_code == 400 and message in response.json()["error"]["message"]
    assert "Traceback" not in response.text


def test_any_content_type(post):
    """As the first party's, which reads the body whatever its type."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert post({"prompt": "hi"}, kind=kind).status_code == 200


def test_other_statuses(post):
    assert post(b"x" * (1 << 20) + b"x").status_code == 413
    assert post({}, path="/nothing").status_code == 404


def test_failures_are_not_told(post, model, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(model, "generate", fail)
    response = post({"prompt": "hi"})
    assert response.status_code == 500 and "secret" not in response.text


def test_clients_that_hang_up_and_those_that_wait(model, tokenizer, monkeypatch):
    """The generation for one that is gone ends, and the next in the line is answered."""
    closed = threading.Event()

    def stream_chat(tokenizer, prompt, history, **options):
        try:
            for i in range(1 if prompt == "short" else 10**6):
                yield "word", [(prompt, "word")]
                time.sleep(0.01)
        finally:
            closed.set()

    monkeypatch.setattr(model, "stream_chat", stream_chat)
    app = http_guard.Guard(api.build_app(model, tokenizer))

    async def request(prompt: str, hang_up_after: float | None):
        body = json.dumps({"prompt": prompt}).encode()
        messages, sent = [{"type": "http.request", "body": body}], []
        headers = [(b"content-type", b"application/json")]
        scope = dict(type="http", http_version="1.1", method="POST", path="/", raw_path=b"/", query_string=b"")
        scope |= dict(headers=headers, server=("test", 80), client=("test", 1), scheme="http", root_path="")

        async def receive():
            if messages:
                return messages.pop()
            await asyncio.sleep(hang_up_after or 1000)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)
        return sent

    async def both():
        long = asyncio.create_task(request("long", 0.5))
        await asyncio.sleep(0.1)
        short = asyncio.create_task(request("short", None))
        return await asyncio.wait_for(asyncio.gather(long, short), 20)

    gone, answered = asyncio.run(both())
    assert closed.is_set() and gone == [] and answered[0]["status"] == 200
