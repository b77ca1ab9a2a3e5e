"""
Programs that people use, each in one conversation with the server (or with examples/api.py): `make test-clients`.

They have an environment of their own, without PyTorch. The server runs in that of $SERVER_PYTHON.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest


pytest.importorskip("litellm", reason="the clients are not installed here: make test-clients")

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "checkpoints/tiny"
QUESTION = "你好"


def start(*command: str):
    """Starts a server, yields its address, and stops it."""
    python = os.environ.get("SERVER_PYTHON", sys.executable)
    command = [python, "-m", *command, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(r" at (http://\S+)$", line):
            break
    else:
        pytest.fail("".join(said))
    threading.Thread(target=process.stdout.read, daemon=True).start()
    yield found[1]
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module", params=[[], ["--continuous-batching"]], ids=["one_by_one", "continuous_batching"])
def address(request):
    yield from start("serving", "--temperature", "0", *request.param)


@pytest.fixture(scope="module")
def one_by_one():
    yield from start("serving", "--temperature", "0")


@pytest.fixture(scope="module")
def first_party():
    yield from start("examples.api")


def test_openai(address):
    import openai

    messages = [{"role": "user", "content": QUESTION}]
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    answer = client.chat.completions.create(model="tiny", messages=messages)
    text = answer.choices[0].message.content
    messages += [answer.choices[0].message, {"role": "user", "content": "Who are you?"}]  # the client's own object
    second = client.chat.completions.create(model="tiny", messages=messages, stream=True)
    assert text and "".join(chunk.choices[0].delta.content or "" for chunk in second)
    with client.chat.completions.stream(model="tiny", messages=messages[:1]) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == text


def test_openai_async(address):
    import openai

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            create = client.chat.completions.create
            messages = [{"role": "user", "content": QUESTION}]
            return await asyncio.gather(*(create(model="tiny", messages=messages) for _ in range(4)))

    assert len({answer.choices[0].message.content for answer in asyncio.run(ask())}) == 1


def test_langchain_chat(address):
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{address}/v1", api_key="none", model="tiny")
    answer = chat.invoke(QUESTION)
    assert (
        answer.content
        and answer.response_metadata["finish_reason"] == "stop"
        and answer.usage_metadata["output_tokens"]
    )
    assert "".join(chunk.content for chunk in chat.stream([("human", QUESTION), answer, ("human", "Who are you?")]))


def test_langchain_text(address):
    from langchain_openai import OpenAI

    model = OpenAI(base_url=f"{address}/v1", api_key="none", model="tiny", temperature=0, max_tokens=9)
    assert model.generate(["Hello", QUESTION]).generations[1][0].text == model.invoke(QUESTION)


def test_langchain_structured_output(one_by_one):
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel, Field

    class Person(BaseModel):
        name: str = Field(max_length=10)
        age: int = Field(ge=0, le=99)

    chat = ChatOpenAI(base_url=f"{one_by_one}/v1", api_key="none", model="tiny")
    assert isinstance(chat.with_structured_output(Person, method="json_schema").invoke("Who are you?"), Person)


def test_llama_index(address):
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(api_base=f"{address}/v1", api_key="none", model="tiny", is_chat_model=True)
    answer = model.chat([ChatMessage(role="user", content=QUESTION)])
    rest = [answer.message, ChatMessage(role="user", content="Who are you?")]
    assert answer.message.content
    assert list(model.stream_chat([ChatMessage(role="user", content=QUESTION), *rest]))[-1].message.content
    text_model = OpenAILike(api_base=f"{address}/v1", api_key="none", model="tiny", is_chat_model=False)
    assert text_model.complete("Hello").text


def test_litellm(address):
    import litellm

    options = dict(model="openai/tiny", api_base=f"{address}/v1", api_key="none")
    answer = litellm.completion(messages=[{"role": "user", "content": QUESTION}], **options)
    assert answer.choices[0].message.content
    stream = litellm.completion(messages=[{"role": "user", "content": QUESTION}], stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.choices[0].message.content
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 3000}], **options)


TASK = """
task: greeting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""


@pytest.mark.parametrize(
    "kind, output_type",
    [
        ("local-completions", "multiple_choice"),
        ("local-completions", "generate_until"),
        ("local-chat-completions", "generate_until"),
    ],
)
def test_lm_eval(one_by_one, tmp_path, kind, output_type):
    rows = [{"question": "1 + 1 =", "answer": answer, "choices": [" 2", " 3"]} for answer in (" 2", " 3")]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    more = (
        'doc_to_choice: "{{choices}}"' if output_type == "multiple_choice" else "generation_kwargs: {max_gen_toks: 8}"
    )
    (tmp_path / "greeting.yaml").write_text(TASK.format(data=data, output_type=output_type, more=more))
    is_chat = "chat" in kind
    path = "chat/completions" if is_chat else "completions"
    arguments = f"model=tiny,base_url={one_by_one}/v1/{path},num_concurrent=2,max_length=2048"
    arguments += ",tokenizer_backend=None" if is_chat else f",tokenizer={TINY},tokenizer_backend=huggingface"
    arguments += "" if is_chat else ",trust_remote_code=True"
    command = [sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", arguments, "--tasks", "greeting"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    command += ["--apply_chat_template"] if is_chat else ["--batch_size", "2"]
    environment = {**os.environ, "OPENAI_API_KEY": "none", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    environment["HF_HOME"] = str(tmp_path / "home")
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    answers = [json.loads(line)["resps"] for line in samples.read_text().splitlines()]
    assert len(answers) == 2
    if output_type == "multiple_choice":
        assert all(float(choice[0][0]) < 0 for answer in answers for choice in answer)


def test_transformers_chat(address, tmp_path):
    command = [str(Path(sys.executable).with_name("transformers")), "chat", "tiny", f"{address}/v1", "do_sample=False"]
    said = subprocess.run(
        command, input=f"{QUESTION}\nWho are you?\n!exit\n", cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert said.returncode == 0 and said.stdout.count("ChatGLM2-Tiny") >= 2, said.stdout + said.stderr


def test_langchain_chatglm(first_party):
    from langchain_community.llms import ChatGLM

    assert ChatGLM(endpoint_url=first_party, max_token=200, top_p=0.7, with_history=True).invoke(QUESTION)
