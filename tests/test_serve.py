"""`make serve`: OpenAI's API on the small model, asked by OpenAI's client, in both modes, and by clients that misbehave."""

import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoModel, AutoTokenizer

from conftest import ROOT, TINY


openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
psutil = pytest.importorskip("psutil")
pytest.importorskip("prometheus_client")

from examples import http_guard  # noqa: E402
from serving import __main__ as main  # noqa: E402
from serving import generation  # noqa: E402
from serving.prefix_cache import PrefixCache  # noqa: E402
from serving.server import Defaults, Service, build_app  # noqa: E402
from serving.shapes import Token  # noqa: E402
from serving.text import TextBuilder  # noqa: E402


pytestmark = pytest.mark.xdist_group("serve")  # the tests share their servers


JSON = {"Content-Type": "application/json"}


class Server:
    """A server in a process of its own, at any free port."""

    def __init__(self, *args):
        command = [sys.executable, "-m", "serving", "--port", "0", *args]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.said = []
        while not (found := re.search(r" at http://(.*):(\d+)$", line := self.process.stdout.readline())):
            self.said.append(line)
            assert self.process.poll() is None, self.said
        self.host, self.port = found[1], int(found[2])
        threading.Thread(target=lambda: self.said.extend(self.process.stdout), daemon=True).start()
        self.client = self.client_with("none")

    def client_with(self, key: str):
        return openai.OpenAI(base_url=f"http://{self.host}:{self.port}/v1", api_key=key, max_retries=0, timeout=120)

    def ask(self, content="你好", **options):
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        return self.client.chat.completions.create(
            **{"model": "tiny", "messages": messages, "temperature": 0, **options}
        )

    def post(self, body: bytes, path="/v1/chat/completions", **headers):
        """Returns status and JSON of the answer to raw bytes."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        connection.request("POST", path, body, {**JSON, **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def cpu_time(self, seconds: float) -> float:
        """How much of the CPU it uses in so many seconds."""
        process = psutil.Process(self.process.pid)
        before = process.cpu_times()
        time.sleep(seconds)
        after = process.cpu_times()
        return after.user + after.system - before.user - before.system

    def stop(self):
        self.process.terminate()
        self.process.wait(30)
        assert "Traceback" not in "".join(self.said)


@pytest.fixture(scope="module", params=[[], ["--continuous-batching"]], ids=["one_by_one", "continuous_batching"])
def server(request):
    server = Server(*request.param)
    server.batching = bool(request.param)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def answer():
    """What the model answers by `chat`, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    model = AutoModel.from_pretrained(TINY, trust_remote_code=True).float().eval()
    return lambda query, history=(): model.chat(tokenizer, query, list(history), do_sample=False)[0]


def text_of(stream) -> tuple[str, list]:
    chunks = list(stream)
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices), chunks


def test_models(server):
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'no/model' does not exist here; 'tiny' does"):
        server.client.models.retrieve("no/model")


@pytest.mark.parametrize("query", ["你好", "Who are you?"])
def test_answers_are_those_of_chat(server, answer, query):
    completion = server.ask(query)
    assert completion.choices[0].message.content.strip() == answer(query)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_streaming(server, answer):
    text, chunks = text_of(server.ask("你好", stream=True, stream_options={"include_usage": True}))
    assert text.strip() == answer("你好") and len(chunks) > 5
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == server.ask("你好").usage and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in text_of(server.ask("你好", stream=True))[1])


@pytest.mark.parametrize(
    "path, request_",
    [("chat/completions", {"messages": [{"role": "user", "content": "你好"}]}), ("completions", {"prompt": "a"})],
)
def test_events(server, path, request_):
    """What clients without a library read."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    connection.request("POST", f"/v1/{path}", json.dumps({**request_, "stream": True, "max_tokens": 5}), JSON)
    answer = connection.getresponse()
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    *events, end, rest = answer.read().decode().split("\n\n")
    assert end == "data: [DONE]" and rest == "" and len(events) > 1
    assert all(json.loads(event.removeprefix("data: "))["model"] == "tiny" for event in events)


def test_rounds_and_system_message(server, answer):
    first, second = "你好", "Who are you?"
    messages = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": first},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [{"type": "text", "text": second}]},
    ]
    said = server.ask(messages).choices[0].message.content.strip()
    assert said == answer(second, [("Be brief. " + first, "Hello.")])
    messages[0]["role"] = "developer"
    assert server.ask(messages).choices[0].message.content.strip() == said


def test_limits_of_the_answer(server):
    completion = server.ask("你好", max_tokens=3)
    assert completion.usage.completion_tokens == 3 and completion.choices[0].finish_reason == "length"
    assert server.ask("你好", max_completion_tokens=2).usage.completion_tokens == 2


def test_long_prompt(server, answer):
    completion = server.ask("word " * 1990, temperature=2, max_tokens=100_000)  # more than the context has
    assert completion.usage.prompt_tokens > 1990 and completion.usage.total_tokens <= 2048


@pytest.mark.parametrize("stream", [False, True])
def test_stop(server, answer, stream):
    """The answer ends before the stop, wherever in a token it begins."""
    whole = answer("Who are you?")
    stop = whole[9:14]
    completion = server.ask("Who are you?", stop=["no such text", stop], stream=stream)
    text = text_of(completion)[0] if stream else completion.choices[0].message.content
    assert text.lstrip() == whole[: whole.index(stop)].lstrip()
    unstopped = server.ask("Who are you?", stop="\x00never")
    assert unstopped.choices[0].message.content.strip() == whole


def test_sampling(server):
    def ask(**options):
        return server.ask("Tell me a story.", temperature=1.5, max_tokens=30, **options).choices[0].message

    if server.batching:
        with pytest.raises(openai.BadRequestError, match="seed"):
            ask(seed=3)
    else:
        with ThreadPoolExecutor(4) as pool:  # though others are answered at the same time
            answers = list(pool.map(lambda seed: ask(seed=seed).content, [3, 4, 3, 3]))
        assert answers[0] == answers[2] == answers[3] != answers[1]
    assert len({ask().content for _ in range(4)}) > 1
    assert ask(top_p=1e-6).content == ask(top_p=1e-6).content


@pytest.mark.parametrize("stream", [False, True])
def test_least_temperature(server, answer, stream):
    """Scores divided by it are infinite: it is greedy, and no end to the batch."""
    completion = server.ask("你好", temperature=1e-300, stream=stream)
    text = text_of(completion)[0] if stream else completion.choices[0].message.content
    assert text.strip() == answer("你好")


def test_values_without_effect(server):
    """What clients send who want nothing of it."""
    options = {
        "n": 1,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "logprobs": False,
        "user": "x",
    }
    options |= {"response_format": {"type": "text"}, "parallel_tool_calls": True, "metadata": {}, "store": False}
    assert server.ask("你好", max_tokens=3, **options).usage.completion_tokens == 3
    nothing = dict.fromkeys([*options, "temperature", "top_p", "max_tokens", "seed", "stop", "stream", "tools"])
    body = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 2, **nothing}
    assert server.post(json.dumps(body).encode())[0] == 200
    body = {"prompt": "a", "max_tokens": 2, "echo": False, "best_of": 1, "suffix": None, "logprobs": None}
    assert server.post(json.dumps(body).encode(), "/v1/completions")[0] == 200


def test_64_requests_at_once(server, answer):
    """Each gets its own answer, whatever the others ask with which settings."""
    queries = ["你好", "Who are you?", "hello", "你是谁？"]
    expected = {query: answer(query) for query in queries}

    def ask(i):
        query = queries[i % 4]
        if i % 8 == 7:  # noise among them
            return server.ask(query, temperature=1.5, max_tokens=6).choices[0].message.content is not None
        if i % 2:
            text = text_of(server.ask(query, stream=True, max_tokens=6))[0]
        else:
            text = server.ask(query, max_tokens=6).choices[0].message.content
        return text.strip() and expected[query].startswith(text.strip())

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(ask, range(64)))


def test_text_completions(server):
    completion = server.client.completions.create(model="tiny", prompt="Hello", max_tokens=5, temperature=0)
    assert completion.usage.completion_tokens <= 5 and completion.choices[0].text
    stream = server.client.completions.create(model="tiny", prompt="Hello", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == completion.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_hang_up(server, stream):
    """The generation for them stops."""
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 2, "max_tokens": 2000}
    connections = [http.client.HTTPConnection(server.host, server.port) for _ in range(24)]
    for connection in connections:
        connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": stream}), JSON)
    if stream:
        connections[0].getresponse().read(300)
    for connection in connections:
        connection.close()
    time.sleep(1)
    assert server.cpu_time(1) < 0.5
    assert server.ask("你好", max_tokens=3).usage.completion_tokens == 3


def test_nothing_is_left_of_a_request(server):
    """Threads and memory were, of each: a soak test found it."""
    process = psutil.Process(server.process.pid)
    before = process.num_threads()
    for _ in range(5):
        server.ask("你好", max_tokens=2)
    assert process.num_threads() <= before


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1}, "temperature: .* greater than or equal to 0, got '-1'"),
        ({"temperature": 3}, "temperature: .* less than or equal to 2, got '3'"),
        ({"temperature": "hot"}, "temperature: .* got 'hot'"),
        ({"top_p": 0}, "top_p: "),
        ({"top_p": -0.5}, "top_p: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": -5}, "max_tokens: "),
        ({"seed": 2**70}, "seed: "),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 60_000}, "stop"),  # each piece of text is looked at for it
        ({"stop": ["x"] * 100}, "stop"),
        ({"max_tokens": True}, "max_tokens: "),
        ({"logprobs": True}, "logprobs: "),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "n: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user"}]}, "messages.0.content: "),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages.0.role: "),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "roles must alternate"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "tokens long; the context of 2048"),
        ({"extra_body": {"generation_config": "{}"}}, "generation_config: "),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: "),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_bad_requests(server, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        server.ask(**options)


def test_unknown_model(server):
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist here; 'tiny' does"):
        server.ask(model="gpt-4")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"messages": "\xff\xfe"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:50]),
)
def test_malformed_bodies(server, body):
    status, answer = server.post(body)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    assert "Traceback" not in str(answer) and ".py" not in str(answer)
    assert server.ask("你好", max_tokens=2).usage.completion_tokens == 2  # it lives on


@pytest.mark.parametrize("kind", ["text/plain", ""])
def test_other_content_types(server, kind):
    status, answer = server.post(b'{"messages": [{"role": "user", "content": "hi"}]}', **{"Content-Type": kind})
    assert status == 415 and "Content-Type: application/json" in answer["error"]["message"]


def test_bodies_that_are_too_large(server):
    status, answer = server.post(b" " * (2 << 20))
    assert status == 413 and "1048576 bytes" in answer["error"]["message"]
    with socket.create_connection((server.host, server.port), timeout=30) as client:  # of a length that is not said
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        try:
            for _ in range(400):
                client.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        except OSError:
            pass
        assert b" 413 " in client.recv(100)


def test_other_paths(server):
    """Nothing that loads other models, whose code would run, or unloads this one."""
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/audio/transcriptions", "/nothing"):
        assert server.post(b'{"model": "someone/else"}', path)[0] == 404


def test_chosen_request_ids_do_not_collide(server, answer):

    def ask(query):
        return server.ask(query, extra_headers={"X-Request-ID": "mine"}).choices[0].message.content.strip()

    with ThreadPoolExecutor(8) as pool:
        queries = ["你好", "Who are you?"] * 4
        assert list(pool.map(ask, queries)) == [answer(query) for query in queries]


def test_api_key():
    server = Server("--api-key", "secret-键")
    try:
        for key in ("wrong", "secret", "", "x" * 5000):
            connection = http.client.HTTPConnection(server.host, server.port)
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert connection.getresponse().status == 401
        with pytest.raises(openai.AuthenticationError, match="API key"):
            server.ask()
        authorization = "Bearer secret-键".encode().decode("latin-1")
        status, answer = server.post(b"{}", Authorization=authorization)
        assert status == 400  # let in, and told what is missing
        connection = http.client.HTTPConnection(server.host, server.port)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
    finally:
        server.stop()


def test_bad_options(monkeypatch, capsys):
    def fails(*args):
        monkeypatch.setattr(sys, "argv", ["serve", *args])
        with pytest.raises(SystemExit) as exit:
            serve.main()
        return str(exit.value) if exit.value.code != 2 else capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "Address already in use. Choose another --port" in fails("--port", port, "--model", "no/model/here")
    assert "no model there" in fails("--port", "0", "--model", "no/model/here")
    assert "--device cuda:9" in fails("--port", "0", "--device", "cuda:9")
    assert "at most 65535" in fails("--port", "70000")
    assert "--host no.such.host.invalid" in fails("--host", "no.such.host.invalid")


@pytest.mark.parametrize("batching", [False, True])
def test_errors_inside_are_not_told(monkeypatch, tiny_tokenizer, caplog, batching):
    """A failure of the model is an error that says no more, and the next request is answered."""
    from fastapi.testclient import TestClient

    model = AutoModel.from_pretrained(TINY, trust_remote_code=True).float().eval()
    app = serve.build_app("tiny", model, tiny_tokenizer, 10, 1024, batching)
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    with TestClient(app, raise_server_exceptions=False) as client:
        for stream in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(model.transformer.encoder, "forward", lambda *args, **kw: 1 / 0)
                answer = client.post("/v1/chat/completions", json={**body, "stream": stream})
            if stream:
                *_, error, done, _ = answer.text.split("\n\n")
                assert done == "data: [DONE]"
                error = json.loads(error.removeprefix("data: "))
            else:
                assert answer.status_code == 500
                error = answer.json()
            assert error["error"]["message"] == serve.INTERNAL and error["error"]["type"] == "server_error"
            assert "division" not in answer.text and "division" in caplog.text
            assert client.get("/health").status_code == 200
            assert client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_prompts_longer_than_the_cache(tiny_tokenizer):
    from fastapi.testclient import TestClient

    model = AutoModel.from_pretrained(TINY, trust_remote_code=True).float().eval()
    app = serve.build_app("tiny", model, tiny_tokenizer, 2000, 300, True)  # two blocks
    with TestClient(app) as client:

        def ask(words: int):
            messages = [{"role": "user", "content": "word " * words}]
            return client.post("/v1/chat/completions", json={"messages": messages, "temperature": 2, "stop": "no such"})

        answer = ask(600)
        assert answer.status_code == 400 and "the cache (--cache-tokens) of 512 has no room" in answer.text
        assert ask(480).json()["usage"]["total_tokens"] <= 512
        assert ask(3).status_code == 200


class TestUntilStop:
    @pytest.mark.parametrize(
        "texts, stops, expected",
        [
            (["a", "b", "c"], [], "abc"),
            (["a", "b", "c"], ["b"], "a"),
            (["a", "bb", "bc", "d"], ["bbbc"], "a"),
            (["ab", "ab", "c"], ["abc"], "ab"),
            (["ab", "ab"], ["abc"], "abab"),
            (["x问", "题"], ["问答", "题"], "x问"),
        ],
    )
    def test_texts(self, texts, stops, expected):
        import asyncio

        class Streamer:
            cancelled = False

            def cancel(self):
                self.cancelled = True

        async def collect():
            queue, streamer = asyncio.Queue(), Streamer()
            for item in [*texts, None]:
                queue.put_nowait(item)
            until = serve.UntilStop(queue, streamer, stops)
            items = []
            while (item := await until.get()) is not None:
                items.append(item)
            assert streamer.cancelled == any(stop in "".join(texts) for stop in stops)
            return "".join(items)

        assert asyncio.run(collect()) == expected
