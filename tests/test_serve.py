"""`make serve`: OpenAI's API on the small model, asked by OpenAI's client, in both modes, and by clients that misbehave."""

import asyncio
import collections
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, DynamicCache

from conftest import ROOT, TINY


openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
psutil = pytest.importorskip("psutil")

import httpx  # noqa: E402
from openai.types import Completion, CompletionUsage  # noqa: E402
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402

from common import http_guard  # noqa: E402
from common.http_errors import INTERNAL  # noqa: E402
from serving import __main__ as command  # noqa: E402
from serving.batching import Batched  # noqa: E402
from serving.generation import OneByOne, Sampling, Started  # noqa: E402
from serving.prefix_cache import MIN_PREFIX, PrefixCache  # noqa: E402
from serving.processors import Penalties  # noqa: E402
from serving.server import Defaults, Service, build_app  # noqa: E402
from serving.shapes import Token  # noqa: E402
from serving.text import TextBuilder, token_bytes  # noqa: E402


pytestmark = pytest.mark.xdist_group("serve")  # the tests share their servers

JSON = {"Content-Type": "application/json"}
HI = [{"role": "user", "content": "你好"}]


class Server:
    """A server in a process of its own, at any free port."""

    def __init__(self, *args):
        start = [sys.executable, "-m", "serving", "--model", str(TINY), "--port", "0", *args]
        self.process = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.said = []
        while not (found := re.search(r" at http://(.*):(\d+)$", line := self.process.stdout.readline())):
            self.said.append(line)
            assert self.process.poll() is None, self.said
        self.host, self.port = found[1], int(found[2])
        self.reader = threading.Thread(target=lambda: self.said.extend(self.process.stdout), daemon=True)
        self.reader.start()
        self.client = self.client_with("none")

    def client_with(self, key: str):
        return openai.OpenAI(base_url=f"http://{self.host}:{self.port}/v1", api_key=key, max_retries=0, timeout=120)

    def ask(self, content="你好", **options):
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        return self.client.chat.completions.create(
            **{"model": "tiny", "messages": messages, "temperature": 0, **options}
        )

    def complete(self, prompt, **options):
        return self.client.completions.create(**{"model": "tiny", "prompt": prompt, "temperature": 0, **options})

    def send(self, method: str, path: str, body: bytes | None = None, **headers) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        connection.request(method, path, body, headers)
        return connection.getresponse()

    def post(self, body: bytes, path="/v1/chat/completions", **headers):
        """Returns status and JSON of the answer to raw bytes."""
        answer = self.send("POST", path, body, **{**JSON, **headers})
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
        self.reader.join(10)
        assert "Traceback" not in "".join(self.said), "".join(self.said)


@pytest.fixture(scope="module", params=[[], ["--continuous-batching"]], ids=["one_by_one", "continuous_batching"])
def server(request):
    server = Server(*request.param)
    server.batching = bool(request.param)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def one_by_one():
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(TINY, trust_remote_code=True).float().eval()


@pytest.fixture(scope="module")
def answer(model, tiny_tokenizer):
    """What the model answers by `chat`, greedily."""
    return lambda query, history=(): model.chat(tiny_tokenizer, query, list(history), do_sample=False)[0]


def service_of(model, tokenizer, engine=None, max_tokens=10, **options) -> Service:
    return Service("tiny", model, tokenizer, engine or OneByOne(model, 4096), Defaults(max_tokens), **options)


def text_of(stream) -> tuple[str, list]:
    chunks = list(stream)
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices), chunks


def events_of(response: http.client.HTTPResponse) -> list:
    *events, rest = response.read().decode().split("\n\n")
    assert rest == "" and events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


# What is answered


def test_models(server):
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'no/model' does not exist here; 'tiny' does") as error:
        server.client.models.retrieve("no/model")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist here; 'tiny' does"):
        server.ask(model="gpt-4")


def test_load_model(server):
    """What `transformers chat` asks for first. Nothing is loaded."""
    answer = server.send("POST", "/load_model", b'{"model": "tiny"}', **JSON)
    assert json.loads(answer.read().decode().removeprefix("data: ")) == {"status": "ready", "cached": True}
    assert server.post(b'{"model": "someone/else"}', "/load_model")[0] == 404
    assert server.post(b"[]", "/load_model")[0] == 400


def test_trailing_slashes_and_head(server):
    assert server.send("GET", "/v1/models/").status == 200
    answer = server.send("HEAD", "/health")
    assert answer.status == 200 and answer.read() == b""
    assert server.post(json.dumps({"messages": HI, "max_tokens": 1}).encode(), "/v1/chat/completions/")[0] == 200


def test_any_model_name(model, tiny_tokenizer):
    service = service_of(model, tiny_tokenizer, any_model_name=True)
    body = json.dumps({"model": "gpt-3.5-turbo", "messages": HI}).encode()
    from serving.shapes import ChatRequest

    assert service.prepare(ChatRequest, body).answer.model == "gpt-3.5-turbo"  # as it was asked for
    assert service.prepare(ChatRequest, json.dumps({"messages": HI}).encode()).answer.model == "tiny"


@pytest.mark.parametrize("query", ["你好", "Who are you?"])
def test_answers_are_those_of_chat(server, answer, query):
    completion = server.ask(query)
    assert completion.choices[0].message.content == answer(query)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_streaming(server, answer):
    text, chunks = text_of(server.ask("你好", stream=True, stream_options={"include_usage": True}))
    assert text == answer("你好") and len(chunks) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    usage = server.ask("你好").usage
    assert chunks[-1].usage.completion_tokens == usage.completion_tokens and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in text_of(server.ask("你好", stream=True))[1])


@pytest.mark.parametrize(
    "path, request_, shape, chunk_shape",
    [
        ("chat/completions", {"messages": HI}, ChatCompletion, ChatCompletionChunk),
        ("completions", {"prompt": "a"}, Completion, Completion),
    ],
)
@pytest.mark.parametrize("logprobs", [False, True])
def test_shapes_are_those_of_the_client(server, path, request_, shape, chunk_shape, logprobs):
    """The client itself reads anything; its types, strictly, do not."""
    request_ = {**request_, "max_tokens": 5, "n": 2}
    if logprobs:
        if server.batching:
            pytest.skip("refused")
        request_ |= {"logprobs": True, "top_logprobs": 3} if path.startswith("chat") else {"logprobs": 3}
    status, whole = server.post(json.dumps(request_).encode(), f"/v1/{path}")
    assert status == 200 and len(whole["choices"]) == 2
    shape.model_validate(whole, strict=True, extra="forbid")
    CompletionUsage.model_validate(whole["usage"], strict=True)
    stream = {**request_, "stream": True, "stream_options": {"include_usage": True}}
    response = server.send("POST", f"/v1/{path}", json.dumps(stream).encode(), **JSON)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["Cache-Control"] == "no-cache" and response.headers["X-Accel-Buffering"] == "no"
    *chunks, last = events_of(response)
    reasons = {0: [], 1: []}
    for chunk in chunks:
        if shape is ChatCompletion:  # the type of the other has no chunks of its own, whose finish_reason may be null
            chunk_shape.model_validate(chunk, strict=True, extra="forbid")
        (choice,) = chunk["choices"]
        reasons[choice["index"]].append(choice["finish_reason"])
        assert chunk["usage"] is None
    assert all(reason in ("stop", "length") for *_, reason in reasons.values())
    assert all(reason is None for *before, _ in reasons.values() for reason in before)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] <= 10


def test_rounds_and_system_message(server, answer):
    first, second = "你好", "Who are you?"
    messages = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": first},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [{"type": "text", "text": second[:4]}, {"type": "text", "text": second[4:]}]},
    ]
    said = server.ask(messages).choices[0].message.content
    assert said == answer(second, [("Be brief. " + first, "Hello.")])
    messages[0]["role"] = "developer"
    assert server.ask(messages).choices[0].message.content == said


def test_last_message_of_the_assistant(server, answer):
    """Continued where that is asked for: never answered as if it were a question."""
    whole = answer("Who are you?")
    begun = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": whole[:12]}]
    with pytest.raises(openai.BadRequestError, match="continue_final_message=true"):
        server.ask(begun)
    said = server.ask(begun, max_tokens=20, extra_body={"continue_final_message": True, "add_generation_prompt": False})
    assert said.usage.prompt_tokens > server.ask("Who are you?", max_tokens=1).usage.prompt_tokens
    assert "[Round" not in said.choices[0].message.content
    begun[1]["content"] = "I am"
    said = server.ask(begun, max_tokens=5, extra_body={"continue_final_message": True})
    assert said.choices[0].message.content.startswith(" ")  # the next word's: "I am" goes on with it
    with pytest.raises(openai.BadRequestError, match="needs a last message of the assistant"):
        server.ask(extra_body={"continue_final_message": True})


def test_limits_of_the_answer(server):
    completion = server.ask("你好", max_tokens=3)
    assert completion.usage.completion_tokens == 3 and completion.choices[0].finish_reason == "length"
    prompt = completion.usage.prompt_tokens
    assert server.ask("你好", max_completion_tokens=2).usage.completion_tokens == 2
    assert server.ask("你好", extra_body={"max_length": prompt + 4}).usage.completion_tokens == 4
    with pytest.raises(openai.BadRequestError, match=f"max_length={prompt} counts the prompt too, which has {prompt}"):
        server.ask("你好", extra_body={"max_length": prompt})
    assert server.complete("a b c d", extra_body={"repetition_penalty": 1.0}).usage.completion_tokens <= 16


def test_long_prompt(server):
    completion = server.ask("word " * 1990, temperature=2, max_tokens=100_000)  # more than the context has
    assert completion.usage.prompt_tokens > 1990 and completion.usage.total_tokens <= 2048


@pytest.mark.parametrize("stream", [False, True])
def test_stop(server, answer, stream):
    """The answer ends before the stop, wherever in a token it begins."""
    whole = answer("Who are you?")
    stop = whole[9:14]
    completion = server.ask("Who are you?", stop=["no such text", stop], stream=stream)
    text = text_of(completion)[0] if stream else completion.choices[0].message.content
    assert text == whole[: whole.index(stop)]
    assert server.ask("Who are you?", stop="\x00never").choices[0].message.content == whole


def test_sampling(server):
    def ask(**options):
        return server.ask("Tell me a story.", **{"temperature": 1.5, "max_tokens": 30, **options}).choices[0].message

    if server.batching:
        with pytest.raises(openai.BadRequestError, match="'seed'.* without --continuous-batching"):
            ask(seed=3)
        assert ask(seed=3, temperature=0).content == ask(temperature=0).content  # to which it makes no difference
    else:
        with ThreadPoolExecutor(4) as pool:  # though others are answered at the same time
            answers = list(pool.map(lambda seed: ask(seed=seed).content, [3, 4, 3, 3]))
        assert answers[0] == answers[2] == answers[3] != answers[1]
    assert len({ask().content for _ in range(4)}) > 1
    greedy = ask(temperature=0).content
    assert ask(top_p=1e-6).content == ask(top_p=0).content == ask(extra_body={"top_k": 1}).content == greedy


def test_seeds_are_of_one_request(one_by_one):
    """What follows a request with a seed does not have the seed too."""
    answers = set()
    for _ in range(4):
        one_by_one.ask(max_tokens=2, seed=1, temperature=1)
        answers.add(
            one_by_one.ask("Tell me a story.", max_tokens=12, temperature=2, top_p=1).choices[0].message.content
        )
    assert len(answers) > 1


def test_top_k_of_everything(server):
    assert server.ask(max_tokens=2, temperature=1, extra_body={"top_k": 2**40}).usage.completion_tokens == 2
    assert server.ask(max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
def test_least_temperature(server, answer, stream):
    """Scores divided by it are infinite: it is greedy, and no end to the batch."""
    completion = server.ask("你好", temperature=1e-300, stream=stream)
    text = text_of(completion)[0] if stream else completion.choices[0].message.content
    assert text == answer("你好")


def test_generation_config(server):
    """By which `transformers chat` says how to generate."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=4).to_json_string()
    completion = server.ask("你好", temperature=1.5, extra_body={"generation_config": config})
    assert completion.choices[0].message.content == server.ask("你好", max_tokens=4).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="'num_beams'"):
        server.ask("你好", extra_body={"generation_config": GenerationConfig(num_beams=4).to_json_string()})
    with pytest.raises(openai.BadRequestError, match="must be the text of a JSON object"):
        server.ask("你好", extra_body={"generation_config": "nonsense"})


def test_n_answers(server):
    options = {"n": 3, "temperature": 1.5, "max_tokens": 20} | ({} if server.batching else {"seed": 1})
    completion = server.ask("Tell me a story.", **options)
    texts = [choice.message.content for choice in completion.choices]
    assert [choice.index for choice in completion.choices] == [0, 1, 2] and len(set(texts)) > 1
    assert completion.usage.prompt_tokens_details.cached_tokens <= completion.usage.prompt_tokens
    if not server.batching:
        again = server.ask("Tell me a story.", stream=True, **options)
        streamed = ["", "", ""]
        for chunk in again:
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert streamed == texts


def test_text_completions(server):
    completion = server.complete("Hello", max_tokens=5)
    assert completion.usage.completion_tokens <= 5 and completion.choices[0].text
    stream = server.complete("Hello", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == completion.choices[0].text
    echoed = server.complete("Hello", max_tokens=5, echo=True)
    assert echoed.choices[0].text == "Hello" + completion.choices[0].text


def test_forms_of_prompts(server, tiny_tokenizer):
    texts = ["Hello, who", "你好，我是"]
    ids = [tiny_tokenizer(text)["input_ids"] for text in texts]
    expected = [server.complete(text, max_tokens=8).choices[0].text for text in texts]
    for prompt in (texts, ids):
        completion = server.complete(prompt, max_tokens=8)
        assert [choice.text for choice in completion.choices] == expected
        assert completion.usage.prompt_tokens == sum(map(len, ids))
    assert server.complete(ids[0], max_tokens=8).choices[0].text == expected[0]
    completion = server.complete(texts, max_tokens=8, n=2, echo=True)
    assert [choice.text for choice in completion.choices] == [
        text + rest for text, rest in zip(texts, expected) for _ in range(2)
    ]


def test_words_go_on_with_their_space(server, tiny_tokenizer):
    """A text completion is what follows, and begins with the space that the model put there."""
    ids = tiny_tokenizer("My name is ChatGLM2-Tiny, a small demonstration model")["input_ids"]
    spaced = [i for i in range(3, len(ids)) if tiny_tokenizer.convert_ids_to_tokens(ids[i]).startswith("▁")]
    builder = TextBuilder(tiny_tokenizer, before=ids[: spaced[0]])
    assert builder.add(Token(ids[spaced[0]]))[0].startswith(" ")


# Log probabilities, penalties and grammars, one by one only


def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_logprobs_of_chat(one_by_one, model, tiny_tokenizer):
    for _ in range(2):  # the second time from the cache
        completion = one_by_one.ask(max_tokens=5, logprobs=True, top_logprobs=3, seed=1)
        content = completion.choices[0].logprobs.content
        prompt = tiny_tokenizer.apply_chat_template(HI, add_generation_prompt=True, return_dict=False)
        expected = log_probabilities(model, prompt)[-1]
        best = expected.topk(3)
        assert len(content) == 5 and content[0].logprob == pytest.approx(float(best.values[0]), abs=1e-4)
        assert [top.logprob for top in content[0].top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert (
            bytes(sum((entry.bytes for entry in content), [])).decode().lstrip()
            == completion.choices[0].message.content
        )
    assert one_by_one.ask(max_tokens=1).choices[0].logprobs is None


def test_logprobs_of_a_prompt(one_by_one, model, tiny_tokenizer):
    """What lm-eval asks for."""
    ids = tiny_tokenizer("你好，我是 ChatGLM2. " * 100)["input_ids"]  # more than one chunk
    assert len(ids) > 512
    completion = one_by_one.complete(ids, echo=True, logprobs=2, max_tokens=1)
    logprobs = completion.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    expected = log_probabilities(model, ids)
    assert logprobs.token_logprobs[1:-1] == pytest.approx(expected[range(len(ids) - 1), ids[1:]].tolist(), abs=1e-3)
    assert max(logprobs.top_logprobs[5].values()) == pytest.approx(float(expected[4].max()), abs=1e-3)
    assert len(logprobs.tokens) == len(ids) + 1 == len(logprobs.text_offset)
    text = completion.choices[0].text
    for token, offset in list(zip(logprobs.tokens, logprobs.text_offset))[2:20]:  # after [gMASK] and sop
        assert text[offset:].startswith(token.strip()) or text[offset:].startswith(token)
    ends = tiny_tokenizer("你好！")["input_ids"]  # with </s>: it counts as a token, too
    assert one_by_one.complete(ends, max_tokens=1).choices[0].text == ""
    logprobs_at_end = one_by_one.complete(ends, echo=True, logprobs=1, max_tokens=1).choices[0].logprobs
    assert logprobs_at_end.tokens[-1] == "</s>" and len(logprobs_at_end.tokens) == len(ends) + 1
    nothing_new = one_by_one.complete(ids, echo=True, logprobs=2, max_tokens=0)
    assert nothing_new.choices[0].logprobs.token_logprobs == logprobs.token_logprobs[:-1]
    assert nothing_new.usage.completion_tokens == 0


def test_logit_bias(one_by_one, tiny_tokenizer):
    ids = tiny_tokenizer.convert_tokens_to_ids(["是", "▁您好"])
    completion = one_by_one.ask(max_tokens=4, logit_bias={str(ids[0]): 100})
    assert completion.choices[0].message.content == "是是是是"
    assert one_by_one.ask(max_tokens=1, logit_bias={str(ids[1]): 5}).choices[0].message.content == "您好"
    assert one_by_one.ask(max_tokens=1, logit_bias={str(ids[1]): -100}).choices[0].message.content == "你好"


def test_penalties(one_by_one):
    repeated = one_by_one.ask(max_tokens=30, logit_bias={"5000": 20}).choices[0].message.content
    varied = one_by_one.ask(max_tokens=30, logit_bias={"5000": 20}, frequency_penalty=2, presence_penalty=2)
    assert len(set(varied.choices[0].message.content)) > len(set(repeated))
    scores = Penalties(prompt_length=2, frequency=0.5, presence=0.25)(
        torch.tensor([[3, 3, 1, 1, 2]]), torch.zeros(1, 4)
    )
    assert scores.tolist() == [[0, -1.25, -0.75, 0]]
    assert one_by_one.ask(max_tokens=9, extra_body={"repetition_penalty": 5.0}).usage.completion_tokens <= 9


def test_min_p(one_by_one):
    greedy = one_by_one.ask("Tell me a story.", max_tokens=20).choices[0].message.content
    sampled = one_by_one.ask("Tell me a story.", max_tokens=20, temperature=2, extra_body={"min_p": 1.0})
    assert sampled.choices[0].message.content == greedy


def test_json(one_by_one):
    pytest.importorskip("xgrammar")
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 9},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    for temperature in (0, 1.5):
        said = one_by_one.ask("Who are you?", response_format=format, temperature=temperature, max_tokens=300)
        person = json.loads(said.choices[0].message.content)
        assert (
            set(person) == {"name", "age"}
            and isinstance(person["age"], int)
            and said.choices[0].finish_reason == "stop"
        )
    content = one_by_one.ask(response_format={"type": "json_object"}, max_tokens=40).choices[0].message.content
    assert content.startswith("{")
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        one_by_one.ask(response_format=bad)
    endless = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    with pytest.raises(openai.BadRequestError, match="No text follows the schema"):
        one_by_one.ask(response_format=endless)
    with pytest.raises(openai.BadRequestError, match="'json_schema' is missing"):
        one_by_one.ask(response_format={"type": "json_schema"})


# What is ignored, and what is refused


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
    options |= {"service_tier": "auto", "modalities": ["text"], "tool_choice": "auto", "tools": []}
    options |= {"function_call": "auto", "reasoning_effort": "medium"}
    options["extra_body"] = {
        "best_of": 1,
        "ignore_eos": False,
        "stop_token_ids": [],
        "guided_json": None,
        "made_up": None,
        "num_beams": 1,
        "use_cache": True,
    }
    assert server.ask("你好", max_tokens=3, **options).usage.completion_tokens == 3
    nothing = dict.fromkeys([*options, "temperature", "top_p", "max_tokens", "seed", "stop", "stream", "functions"])
    message = {"role": "user", "content": "hi", "name": "Bob", "tool_calls": None}
    body = {"messages": [message], "max_completion_tokens": 2, **nothing}
    assert server.post(json.dumps(body).encode())[0] == 200
    body = {"prompt": "a", "max_tokens": 2, "echo": False, "best_of": 1, "suffix": None, "logprobs": None}
    assert server.post(json.dumps(body).encode(), "/v1/completions")[0] == 200


TOOL = {"type": "function", "function": {"name": "f"}}
IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    "options, param, code, message",
    [
        ({"temperature": -1}, "temperature", "invalid_value", "'temperature': must be at least 0, got -1"),
        ({"temperature": 3}, "temperature", "invalid_value", "must be at most 2, got 3"),
        ({"temperature": "hot"}, "temperature", "invalid_type", "expected a number, got a string instead"),
        ({"temperature": True}, "temperature", "invalid_type", "expected a number, got a boolean instead"),
        ({"top_p": -0.5}, "top_p", "invalid_value", "must be at least 0"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "must be at least 1, got 0"),
        ({"max_tokens": -5}, "max_tokens", "invalid_value", "must be at least"),
        ({"max_tokens": True}, "max_tokens", "invalid_type", "expected an integer"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type", "expected an integer, got a number"),
        ({"seed": 2**70}, "seed", "invalid_value", "must be less than"),
        ({"stop": ""}, "stop[0]", "invalid_value", "must be at least 1 long, got 0"),
        ({"stop": "x" * 60_000}, "stop[0]", "invalid_value", "must be at most 256 long, got 60000"),
        ({"stop": ["x"] * 100}, "stop", "invalid_value", "must be at most 16 long, got 100"),
        ({"stop": 5}, "stop", "invalid_type", "expected a list, got an integer"),
        ({"n": 1000}, "n", "invalid_value", "must be at most 128"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value", "its keys must be ids of tokens"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "invalid_value", "outside 0 to 8063"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value", "needs 'logprobs': true"),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type",
            "invalid_value",
            "expected 'text', 'json_object'",
        ),
        ({"messages": []}, "messages", "invalid_value", "must be at least 1 long, got 0"),
        ({"messages": "hi"}, "messages", "invalid_type", "expected a list, got a string"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter", "Missing required"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role", "invalid_value", "got 'wizard'"),
        (
            {"messages": [{"role": "user", "content": IMAGE}]},
            "messages[0].content",
            "invalid_value",
            "text only.*'image_url'",
        ),
        (
            {"messages": [HI[0], {"role": "assistant", "content": None, "tool_calls": [TOOL]}]},
            "messages[1].tool_calls",
            "unsupported_parameter",
            "tool_calls",
        ),
        ({"extra_body": {"web_search_options": {}}}, "web_search_options", "unsupported_parameter", "leave it out"),
        (
            {"extra_body": {"skip_special_tokens": False}},
            "skip_special_tokens",
            "unsupported_parameter",
            "leave it out",
        ),
        ({"extra_body": {"add_special_tokens": False}}, "add_special_tokens", "unsupported_parameter", "leave it out"),
        ({"extra_body": {"add_generation_prompt": False}}, "add_generation_prompt", "invalid_value", "needs"),
        ({"extra_body": {"generation_config": "[[1, 2]]"}}, "generation_config", "invalid_value", "a JSON object"),
        ({"extra_body": {"generation_config": "null"}}, "generation_config", "invalid_value", "a JSON object"),
        ({"extra_body": {"generation_config": "{"}}, "generation_config", "invalid_value", "a JSON object"),
        ({"messages": HI * 2}, "messages", "invalid_value", "roles must alternate"),
        ({"messages": [*HI, {"role": "system", "content": "x"}]}, "messages", "invalid_value", "roles must alternate"),
        (
            {"messages": [{"role": "assistant", "content": "x"}, *HI]},
            "messages",
            "invalid_value",
            "roles must alternate",
        ),
        (
            {"messages": [{"role": "user", "content": "word " * 3000}]},
            "messages",
            "context_length_exceeded",
            "is 2048 tokens",
        ),
        ({"messages": [{"role": "user", "content": "x" * 900_000}]}, "messages", "context_length_exceeded", "at least"),
        ({"extra_body": {"use_beam_search": True}}, "use_beam_search", "unsupported_parameter", "leave it out"),
        ({"tools": [TOOL]}, "tools", "unsupported_parameter", "'tools'"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter", "'tool_choice'"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter", "'modalities'"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type", "a boolean"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_requests(one_by_one, options, param, code, message):
    with pytest.raises(openai.BadRequestError, match=message) as error:
        one_by_one.ask(**options)
    assert error.value.type == "invalid_request_error"
    assert (error.value.param, error.value.code) == (param, code)
    assert not re.search(r"pydantic|function-|lambda|NoneType", str(error.value))


@pytest.mark.parametrize(
    "body, message",
    [
        ({}, "Missing required parameter: 'prompt'"),
        ({"prompt": 5}, "must be a text, a list of texts"),
        ({"prompt": [1, "a"]}, "each prompt must be a text or a list of token ids"),
        ({"prompt": [[]]}, "each prompt must be"),
        ({"prompt": []}, "must be at least 1 long"),
        ({"prompt": [8064]}, "token ids outside 0 to 8063"),
        ({"prompt": [-1]}, "token ids outside 0 to 8063"),
        ({"prompt": [36] * 2048}, "'prompt' has 2048 tokens"),
        ({"prompt": [[1]] * 200}, "at most 128 prompts at once, got 200"),
        ({"prompt": ["a"] * 20, "n": 20}, "at most 128 answers at once"),
        ({"prompt": "a", "max_tokens": 0}, "only with echo=true"),
        ({"prompt": "a", "best_of": 3}, "'best_of'"),
        ({"prompt": "a", "suffix": "b"}, "'suffix'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_text_requests(one_by_one, body, message):
    status, answer = one_by_one.post(json.dumps(body).encode(), "/v1/completions")
    assert status == 400 and message in answer["error"]["message"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", 1), ("min_p", 0.5), ("frequency_penalty", 1), ("presence_penalty", 1), ("repetition_penalty", 1.2),
        ("logit_bias", {"5": 1}), ("logprobs", True), ("response_format", {"type": "json_object"}),
    ],
)  # fmt: skip
def test_unsupported_with_continuous_batching(model, tiny_tokenizer, name, value):
    if name == "response_format":
        pytest.importorskip("xgrammar")
    service = service_of(model, tiny_tokenizer, Batched(model, 512))
    answer = in_process(build_app(service), {"messages": HI, name: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    assert "without --continuous-batching" in answer.json()["error"]["message"]


def in_process(app, body: dict, path="/v1/chat/completions") -> httpx.Response:
    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            return await client.post(path, json=body)

    return asyncio.run(send())


def test_grammars_without_xgrammar(model, tiny_tokenizer):
    service = service_of(model, tiny_tokenizer)
    service.grammars.is_installed = False
    answer = in_process(build_app(service), {"messages": HI, "response_format": {"type": "json_object"}})
    assert answer.status_code == 400 and "needs the package xgrammar" in answer.json()["error"]["message"]


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
        b'{"messages": [' + b"null," * 200_000 + b"null]}",
    ],
    ids=lambda body: repr(body[:50]),
)
def test_malformed_bodies(server, body):
    status, answer = server.post(body)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    assert "Traceback" not in str(answer) and ".py" not in str(answer) and len(str(answer)) < 1000
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
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        try:
            for _ in range(400):
                client.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        except OSError:
            pass
        assert b" 413 " in client.recv(100)


def test_other_paths(server):
    for path in ("/reset", "/v1/responses", "/v1/audio/transcriptions", "/nothing"):
        status, answer = server.post(b'{"model": "someone/else"}', path)
        assert status == 404 and path in answer["error"]["message"]
    assert server.send("GET", "/v1/completions").status == 405


# Under load


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
        return text and expected[query].startswith(text)

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(ask, range(64)))


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


def test_clients_that_hang_up_while_their_prompt_is_encoded(model):
    """The rest of the prompt is not, and what was is kept."""
    engine, prompt = OneByOne(model, 4096), list(range(100, 1600))

    async def ask():
        async for _ in engine.tokens(prompt, Sampling(1)):
            pass

    async def hang_up():
        task = asyncio.create_task(ask())
        while not chunks:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(engine.thread, lambda: None)  # after it

    chunks, forward = [], model.transformer.forward

    def watched(*args, **kwargs):
        chunks.append(1)
        time.sleep(0.2)  # so that it is seen
        return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.transformer, "forward", watched)
        asyncio.run(hang_up())
    assert len(chunks) == 1
    assert [len(entry.ids) for entry in engine.caches.entries] == [1024]
    assert engine.waiting == engine.running == 0
    engine.close()


def test_nothing_is_left_of_a_request(server):
    process = psutil.Process(server.process.pid)
    server.ask("你好", max_tokens=2)
    before = process.num_threads()
    for _ in range(5):
        server.ask("你好", max_tokens=2)
    assert process.num_threads() <= before


def test_encoding_does_not_hold_others(model, tiny_tokenizer):
    """A prompt that takes long to encode does so in a thread; one that cannot fit is not encoded at all."""

    class Slow:
        def __getattr__(self, name):
            return getattr(tiny_tokenizer, name)

        def __call__(self, text):
            time.sleep(1)
            return tiny_tokenizer(text)

    app = build_app(service_of(model, Slow()))

    async def measure():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            start = time.monotonic()
            slow = asyncio.create_task(client.post("/v1/completions", json={"prompt": "Hello"}))
            await asyncio.sleep(0.1)
            await client.get("/health")
            health = time.monotonic() - start
            assert (await slow).status_code == 200
            start = time.monotonic()
            refused = await client.post("/v1/completions", json={"prompt": "x" * 900_000})
            assert refused.json()["error"]["code"] == "context_length_exceeded"
            return health, time.monotonic() - start

    health, refusal = asyncio.run(measure())
    assert health < 0.9 and refusal < 0.9


@pytest.fixture
def guarded_port(monkeypatch):
    """Serves an application in a thread, with little patience. Yields the port."""
    monkeypatch.setattr(http_guard, "SECONDS", 0.5)
    monkeypatch.setattr(http_guard, "SECONDS_TO_READ", 0.5)
    monkeypatch.setattr(http_guard, "MAX_IDLE", 20)
    sent = []

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        if scope["path"] == "/flood":
            for _ in range(10_000):
                await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
                sent.append(1)
        await send({"type": "http.response.body", "body": b"ok"})

    listener = http_guard.listen("127.0.0.1", 0)
    config = http_guard.configuration(http_guard.guarded(app, None, 1 << 20))
    server = http_guard.Server(config, lambda: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1], sent
    server.should_exit = True
    thread.join(10)


def wait_until_closed(connection: socket.socket, seconds: float = 5) -> bytes:
    """Returns what is received until the other side closes the connection."""
    connection.settimeout(seconds)
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def ok(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/")
    return connection.getresponse().read() == b"ok"


def test_time_limits_of_connections(guarded_port):
    """For headers, for the rest of a body, and for a connection that says nothing."""
    port, _ = guarded_port
    idle, headers, body, again = (socket.create_connection(("127.0.0.1", port)) for _ in range(4))
    headers.sendall(b"GET / HTTP/1.1\r\nHost: loc")
    body.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf")
    again.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    time.sleep(0.2)
    again.sendall(b"GET / HT")  # the beginning of a second one, as slowly as can be
    assert wait_until_closed(idle) == wait_until_closed(headers) == b""
    assert b" 408 " in wait_until_closed(body)
    assert b"\r\nok\r\n" in wait_until_closed(again)
    assert ok(port)


def test_idle_connections_make_room(guarded_port):
    port, _ = guarded_port
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    assert ok(port)
    assert wait_until_closed(connections[0], 0.4) == b""  # sooner than by the time limit
    for connection in connections:
        connection.close()


def test_clients_that_do_not_read(guarded_port):
    port, sent = guarded_port
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(1.5)
        before = len(sent)
        time.sleep(0.5)
        assert len(sent) == before < 10_000
    assert ok(port)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("mode", [[], ["--continuous-batching"]], ids=["one_by_one", "continuous_batching"])
def test_the_end(how, mode):
    """Streams end with an error and [DONE], others get 503, and there is no traceback."""
    server = Server(*mode)
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 2000, "n": 3}
    body |= {"temperature": 2, "top_p": 1, "top_k": 0}
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(server.post, json.dumps(body).encode())
        stream = server.send("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}).encode(), **JSON)
        assert stream.read(100)
        half = socket.create_connection((server.host, server.port))
        half.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf")
        time.sleep(0.2)
        start = time.monotonic()
        server.process.send_signal(how)
        *_, last, done, _ = stream.read().decode().split("\n\n")
        assert time.monotonic() - start < 5
        assert done == "data: [DONE]" and "shutting down" in last
        status, answer = whole.result()
        assert status == 503 and "shutting down" in answer["error"]["message"]
        server.stop()
        half.close()


@pytest.mark.parametrize("batching", [False, True])
def test_errors_inside_are_not_told(model, monkeypatch, tiny_tokenizer, caplog, batching):
    """A failure of the model is an error that says no more, and the next request is answered."""
    from fastapi.testclient import TestClient

    app = build_app(service_of(model, tiny_tokenizer, Batched(model, 1024) if batching else None))
    body = {"messages": HI, "temperature": 0}
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
            assert error["error"]["message"] == INTERNAL and error["error"]["type"] == "server_error"
            assert "division" not in answer.text and (not stream or "division" in caplog.text)
            assert client.get("/health").status_code == 200
            assert client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_prompts_longer_than_the_cache(model, tiny_tokenizer):
    from fastapi.testclient import TestClient

    app = build_app(service_of(model, tiny_tokenizer, Batched(model, 300), max_tokens=2000))  # two blocks
    with TestClient(app) as client:

        def ask(words: int):
            messages = [{"role": "user", "content": "word " * words}]
            return client.post("/v1/chat/completions", json={"messages": messages, "temperature": 2, "stop": "no such"})

        answer = ask(600)
        assert answer.status_code == 400 and "maximum cache (--cache-tokens) length is 512 tokens" in answer.text
        assert ask(480).json()["usage"]["total_tokens"] <= 512
        assert ask(3).status_code == 200


# Who may ask


def test_api_key():
    server = Server("--api-key", "secret-键", "--cors", "https://page.example")
    try:
        for key in ("wrong", "secret", "", "x" * 5000):
            answer = server.send("GET", "/v1/models", Authorization=f"Bearer {key}")
            assert answer.status == 401 and json.loads(answer.read())["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError, match="API key"):
            server.ask()
        for scheme in ("Bearer", "bearer", "BEARER"):
            authorization = f"{scheme} secret-键".encode().decode("latin-1")
            status, answer = server.post(b"{}", Authorization=authorization)
            assert status == 400  # let in, and told what is missing
        assert server.send("GET", "/health").status == 200
        assert server.send("GET", "/metrics").status == 401
        # A browser asks without the key whether the page may send it.
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        answer = server.send("OPTIONS", "/v1/chat/completions", Origin="https://page.example", **asks)
        assert answer.status == 200 and answer.headers["Access-Control-Allow-Origin"] == "https://page.example"
        answer = server.send("OPTIONS", "/v1/chat/completions", Origin="https://other.example", **asks)
        assert "Access-Control-Allow-Origin" not in answer.headers
    finally:
        server.stop()


@pytest.mark.parametrize(
    "host, allowed, is_allowed",
    [
        ("localhost:8000", [], True),
        ("LOCALHOST", [], True),
        ("127.0.0.1:8000", [], True),
        ("[::1]:8000", [], True),
        ("192.168.0.7", [], True),
        ("evil.example:8000", [], False),
        ("127.0.0.1.evil.example", [], False),
        ("", [], False),
        ("12345", [], False),
        (":80", [], False),
        ("chat.example:443", ["chat.example"], True),
        ("evil.example", ["chat.example"], False),
        ("evil.example", ["*"], True),
    ],
)
def test_allowed_hosts(host, allowed, is_allowed):
    assert http_guard.Guard(None, allowed_hosts=allowed).is_allowed_host(host) == is_allowed


def test_names_of_other_hosts_are_refused(server):
    """The page of a site whose name was made to lead here (DNS rebinding) sends that name."""
    answer = server.send("GET", "/v1/models", Host="evil.example")
    assert answer.status == 403 and "--allowed-hosts" in json.loads(answer.read())["error"]["message"]
    assert "Access-Control-Allow-Origin" not in server.send("GET", "/v1/models", Origin="https://x.example").headers


def test_metrics_and_documentation(server):
    from prometheus_client.parser import text_string_to_metric_families

    def read() -> collections.Counter:
        text = server.send("GET", "/metrics").read().decode()
        families = text_string_to_metric_families(text)
        values = collections.Counter()  # of all statuses together
        for sample in (sample for family in families for sample in family.samples if "le" not in sample.labels):
            values[sample.name, sample.labels.get("path")] += sample.value
        return values

    def refusals() -> float:
        text = server.send("GET", "/metrics").read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        labels = {"path": "/health", "status": "403"}
        return sum(s.value for s in samples if s.name == "chatglm_requests_total" and s.labels == labels)

    refused = refusals()
    assert server.send("GET", "/health/", Host="evil.example").status == 403
    assert refusals() == refused + 1  # what the guard refuses counts, too
    before = read()
    usage = server.ask("你好").usage
    server.post(b"{}", "/made/up")
    after = read()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["chatglm_requests_total", "/v1/chat/completions"] == 1
    assert grown["chatglm_prompt_tokens_total", None] == usage.prompt_tokens
    assert grown["chatglm_answer_tokens_total", None] == usage.completion_tokens
    assert grown["chatglm_time_to_first_token_seconds_count", None] == 1
    assert grown["chatglm_time_per_token_seconds_count", None] == usage.completion_tokens - 1
    assert after["chatglm_answers_waiting", None] == after["chatglm_answers_running", None] == 0
    assert ("chatglm_requests_total", "/made/up") not in after

    page = json.loads(server.send("GET", "/openapi.json").read())
    assert not any("422" in operation["responses"] for path in page["paths"].values() for operation in path.values())
    answer = page["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/ChatCompletion"}
    schemas = page["components"]["schemas"]
    assert "messages" in schemas["ChatRequest"]["properties"] and "prompt" in schemas["TextRequest"]["properties"]
    assert server.send("GET", "/docs").status == 200
    ids = [server.send("GET", path).headers["x-request-id"] for path in ("/health", "/health", "/made/up")]
    assert all(id.startswith("req_") for id in ids) and len(set(ids)) == 3


def test_bad_options(monkeypatch, capsys):
    def fails(*args):
        monkeypatch.setattr(sys, "argv", ["serving", *args])
        with pytest.raises(SystemExit) as exit:
            command.main()
        return str(exit.value) if exit.value.code != 2 else capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "Address already in use. Choose another --port" in fails("--port", port, "--model", "no/model/here")
    assert "There is no folder no/model/here" in fails("--port", "0", "--model", "no/model/here")
    assert "--device cuda:9" in fails("--port", "0", "--device", "cuda:9")
    assert "at most 65535" in fails("--port", "70000")
    assert "--host no.such.host.invalid" in fails("--host", "no.such.host.invalid")
    assert "needs at least 256" in fails("--continuous-batching", "--cache-tokens", "100")


# Caches of dialogues


def test_rounds_reuse_the_cache(one_by_one):
    long = "Tell me about 你好. " * 60
    messages = [{"role": "user", "content": long}]
    first = one_by_one.ask(messages, max_tokens=20)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *HI]
    second = one_by_one.ask(messages, max_tokens=20)
    reused = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 5 <= reused < second.usage.prompt_tokens
    uncached = one_by_one.ask([{"role": "system", "content": ""}, *messages], max_tokens=20)  # the same prompt
    assert uncached.choices[0].message.content == second.choices[0].message.content


def test_cached_answers_are_the_same(model, tiny_tokenizer):
    """Greedy answers do not depend on what was asked before."""
    prompts = [
        tiny_tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in (
            "Who are you? " * 20,
            "Who are you? " * 20 + "你好",
            "Who are you? " * 10 + "hello",
            "Who are you? " * 20,
        )
    ]

    async def ask(engine: OneByOne):
        answers, cached = [], []
        for prompt in prompts:
            ids = []
            async for item in engine.tokens(prompt, Sampling(12)):
                if isinstance(item, Started):
                    cached.append(item.cached_tokens)
                else:
                    ids.append(item.id)
            answers.append(ids)
        return answers, cached

    without, with_cache = OneByOne(model, 0), OneByOne(model, 4096)
    expected, none = asyncio.run(ask(without))
    answers, cached = asyncio.run(ask(with_cache))
    assert answers == expected
    assert none == [0] * 4 and cached[0] == 0 and all(n > 50 for n in cached[1:]) and cached[3] == len(prompts[3]) - 1
    without.close()
    with_cache.close()


def test_continuous_batching_shares_prefixes(model, monkeypatch):
    """The library's: whole blocks of tokens with which an earlier prompt began are not computed again."""
    computed, forward = [], model.transformer.forward

    def counted(*args, **kwargs):
        computed.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.transformer, "forward", counted)
    engine, prompt = Batched(model, 4096), [i % 5000 + 100 for i in range(1000)]

    async def ask() -> list[int]:
        engine.start()
        totals = []
        for ids in (prompt, [*prompt, 200, 201]):
            computed.clear()
            async for _ in engine.tokens(ids, Sampling(2)):
                pass
            totals.append(sum(computed))
        await asyncio.to_thread(engine.close)
        return totals

    first, second = asyncio.run(ask())
    assert first >= 1000 and second < 300


def test_continuous_batching_ends_with_requests_in_it(model):
    """Also where they were cancelled just before."""
    engine = Batched(model, 4096)

    async def ask():
        async for _ in engine.tokens(list(range(100, 200)), Sampling(1500, temperature=2.0)):
            pass

    async def end():
        engine.start()
        tasks = [asyncio.create_task(ask()) for _ in range(4)]
        await asyncio.sleep(1)
        for task in tasks[:2]:
            task.cancel()
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.to_thread(engine.close), 20)
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(end())
    assert engine.running == 0


class TestPrefixCache:
    @staticmethod
    def filled(length: int) -> DynamicCache:
        cache = DynamicCache()
        positions = torch.arange(length, dtype=torch.float).view(1, 1, length, 1).expand(1, 2, length, 4).contiguous()
        for layer in range(2):
            cache.update(positions, positions, layer)
        return cache

    def test_least_recently_used_go_first(self):
        caches = PrefixCache(2 * 2 * 2 * 4 * 4 * 100, DynamicCache)  # bytes of 100 tokens
        for start in (1000, 2000, 3000):
            ids = list(range(start, start + 40))
            caches.put(ids, 40, self.filled(40))
        assert [entry.ids[0] for entry in caches.entries] == [2000, 3000]
        caches.put(list(range(101)), 101, self.filled(101))  # more than there is room for
        assert caches.entries == []

    def test_next_round_takes_the_cache(self):
        caches = PrefixCache(1 << 30, DynamicCache)
        caches.put(list(range(50)), 40, self.filled(50))
        cache = caches.take([*range(45), 7, 8])
        assert cache.get_seq_length() == 45 and caches.entries == []
        assert cache.layers[0].keys[0, 0, :, 0].tolist() == list(range(45))

    def test_another_dialogue_gets_a_copy(self):
        caches = PrefixCache(1 << 30, DynamicCache)
        caches.put(list(range(50)), 40, self.filled(50))
        cache = caches.take([*range(20), 7, 8])
        assert cache.get_seq_length() == 20 and len(caches.entries) == 1
        cache.layers[0].keys.zero_()
        assert caches.take([*range(41), 7]).layers[0].keys[0, 0, :, 0].tolist() == list(range(41))

    def test_the_last_token_is_never_cached(self):
        caches = PrefixCache(1 << 30, DynamicCache)
        caches.put(list(range(50)), 50, self.filled(50))
        assert caches.take(list(range(50))).get_seq_length() == 49

    def test_short_prefixes_are_not_worth_it(self):
        caches = PrefixCache(1 << 30, DynamicCache)
        caches.put(list(range(50)), 40, self.filled(50))
        assert caches.take([*range(MIN_PREFIX - 1), 99, 99]).get_seq_length() == 0


# Text


def build(tokenizer, ids, stops=()) -> tuple[str, TextBuilder]:
    builder, text = TextBuilder(tokenizer, stops), ""
    for id in ids:
        text += builder.add(Token(id))[0]
        if builder.is_stopped:
            break
    return text + builder.finish()[0], builder


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 8063), max_size=30))
def test_text_as_it_comes_is_that_of_all_tokens(tiny_tokenizer, ids):
    assert build(tiny_tokenizer, ids)[0] == tiny_tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab问答 ", max_size=20), stops=st.lists(st.text("ab问", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop(tiny_tokenizer, text, stops):
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tiny_tokenizer.decode(ids)
    said, builder = build(tiny_tokenizer, ids, stops)
    assert whole.startswith(said) and not any(stop in said for stop in stops)
    assert builder.is_stopped == any(stop in whole for stop in stops)
    assert whole[len(said) :].startswith(tuple(stops)) if builder.is_stopped else said == whole


def test_bytes_of_tokens(tiny_tokenizer):
    ids = tiny_tokenizer("Hello 你好 😀 é", add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tiny_tokenizer, id) for id in ids).decode() == " Hello 你好 😀 é"


@pytest.mark.timeout(600)
def test_benchmark_runs(shared, tmp_path):
    command = [sys.executable, "-m", "benchmarks.serving", "--quick", "--work", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for row in json.loads(result.stdout)["rows"]:
        assert row["one by one"]["tokens_s"] > 0 and row["continuous batching"]["first_token_s"] > 0
