"""
OpenAI's API, by the server of Transformers (`transformers serve`), which by itself does not load remote code.

    python -m examples.serve                                         # the small model, at http://127.0.0.1:8000/v1
    python -m examples.serve --model THUDM/chatglm2-6b --continuous-batching
    API_KEY=... python -m examples.serve --host 0.0.0.0

/v1/chat/completions, /v1/completions, /v1/models and /health. One request at a time, in order; with --continuous-batching
all at once, on a paged cache. See docs/serving.md.
"""

import argparse
import asyncio
import copy
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
from fastapi import HTTPException
from jinja2 import TemplateError
from pydantic import BaseModel, Field, ValidationError
from transformers import ContinuousBatchingConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import (
    CBGenerateManager,
    CBStreamer,
    CBWorkerDeadError,
    GenerateManager,
    GenerationState,
    Modality,
    _StreamError,
)

from examples.http_guard import (
    INTERNAL,
    add_server_options,
    answer_errors,
    check_unicode,
    error_body,
    error_response,
    listen,
    run,
    what_is_invalid,
)
from examples.load_model import add_model_options, at_least, load_model


logger = logging.getLogger(__name__)

BLOCK = 256  # tokens: what the cache of continuous batching is divided into
GREEDY_BELOW = 1e-3  # temperatures: divided by less, scores overflow, which would end the batch for all
TOP_K = 50  # what `generate` has where nothing else is said, and so `chat`
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")


# What a request may say. Whatever else the library's server would take is refused rather than ignored.


Text = Annotated[str, check_unicode]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Part(BaseModel):
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class TextFormat(BaseModel):
    type: Literal["text"]


class Sampling(BaseModel, extra="forbid", strict=True):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    # Without effect, at the values that clients send who want nothing of them
    n: Literal[1] | None = Field(None, exclude=True)
    frequency_penalty: Zero | None = Field(None, exclude=True)
    presence_penalty: Zero | None = Field(None, exclude=True)
    logit_bias: dict | None = Field(None, max_length=0, exclude=True)
    logprobs: Literal[False] | None = Field(None, exclude=True)
    user: str | None = Field(None, exclude=True)


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: TextFormat | None = Field(None, exclude=True)
    tools: list | None = Field(None, max_length=0, exclude=True)
    tool_choice: Literal["none", "auto"] | None = Field(None, exclude=True)
    parallel_tool_calls: bool | None = Field(None, exclude=True)
    metadata: dict | None = Field(None, exclude=True)
    store: Literal[False] | None = Field(None, exclude=True)


class TextRequest(Sampling):
    prompt: Text
    echo: Literal[False] | None = Field(None, exclude=True)
    best_of: Literal[1] | None = Field(None, exclude=True)
    suffix: Literal[""] | None = Field(None, exclude=True)


# Generation


class UntilStop:
    """A streamer's queue of texts, up to the first of the `stops`: there the streamer is cancelled."""

    def __init__(self, queue: asyncio.Queue, streamer, stops: list[str]):
        self.queue, self.streamer, self.stops = queue, streamer, stops
        self.held = ""  # what may be the beginning of a stop
        self.ended = False

    async def get(self) -> str | None | _StreamError:
        while (item := self.filter(await self.queue.get())) == "":
            pass
        return item

    def get_nowait(self) -> str | None | _StreamError:
        while (item := self.filter(self.queue.get_nowait())) == "":
            pass
        return item

    def filter(self, item):
        if isinstance(item, _StreamError):
            logger.error("A request failed: %s", item.msg)
            return _StreamError(INTERNAL)
        if not self.stops:
            return item
        if self.ended or item is None:
            text, self.held = self.held, ""
            if text:
                self.queue.put_nowait(None)  # the end, again, after the text
            return text or None
        text = self.held + item
        found = [(text.index(stop), stop) for stop in self.stops if stop in text]
        if found:
            self.ended, self.held = True, ""
            self.streamer.cancel()
            self.queue.put_nowait(None)
            return text[: min(found)[0]]
        length = max(n for stop in self.stops for n in range(min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        self.held = text[len(text) - length :]
        return text[: len(text) - length]


class Streaming:
    """Answers that are not streamed to the client are collected from a stream, so that they too can be cancelled."""

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        queue, streamer = self.start(model, processor, inputs, gen_config, request_id)
        return UntilStop(queue, streamer, gen_config.stops), streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        queue, streamer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        text = ""
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, _StreamError):
                    raise HTTPException(500, item.msg)
                text += item
        finally:
            streamer.cancel()
        input_ids = inputs["input_ids"]
        length = len(input_ids) if isinstance(input_ids, list) else input_ids.shape[-1]
        return text, length, range(streamer.total_tokens)  # the library counts the ids, no more


class OneByOne(Streaming, GenerateManager):
    """`generate`, in a thread, for one request after the other."""

    def start(self, model, processor, inputs, gen_config, request_id):
        if gen_config.seed is not None:
            self.submit(torch.manual_seed, gen_config.seed)  # by the same thread, just before
        return GenerateManager.generate_streaming(self, model, processor, inputs, gen_config, request_id)


class AllAtOnce(Streaming, CBGenerateManager):
    """The library's continuous batching, with temperature and top_p of each request rather than of the first."""

    def init_cb(self, model, gen_config):
        if not self.is_alive():  # what fails for one request ends the library's loop; another begins
            self.stop()
            self._cb = None
        # Values other than these defaults, so that there is a processor for each
        config = copy.deepcopy(gen_config)
        config.update(do_sample=True, temperature=0.8, top_p=0.8, top_k=TOP_K)
        super().init_cb(model, config)

    def start(self, model, processor, inputs, gen_config, request_id):
        self._check_alive(request_id)
        queue, loop = asyncio.Queue(), asyncio.get_running_loop()
        streamer = CBStreamer(self._cb, request_id, processor.tokenizer._tokenizer, loop, queue)

        def receive(output):
            if output.error is not None:
                queue.put_nowait(_StreamError(str(output.error)))
                return
            streamer.put(output)
            if output.is_finished():
                streamer.end()

        self._cb.register_result_handler(request_id, receive)
        greedy = not gen_config.do_sample
        self._cb.add_request(
            inputs["input_ids"],
            request_id=request_id,
            streaming=True,
            max_new_tokens=gen_config.max_new_tokens,
            eos_token_id=gen_config.eos_token_id,
            temperature=1.0 if greedy else gen_config.temperature,
            top_p=1.0 if greedy else gen_config.top_p,
            top_k=1 if greedy else TOP_K,
        )
        return queue, streamer


class Generation(GenerationState):
    cache_tokens = float("inf")  # of a request, that the cache of continuous batching has room for

    def is_cb_alive(self) -> bool:
        return True  # it begins anew with the next request

    def get_manager(self, model_id: str, use_cb: bool = False):
        if use_cb:
            self._cb_manager = self._cb_manager or AllAtOnce(self._cb_config)
            return self._cb_manager
        if model_id not in self._generate_managers:
            self._generate_managers[model_id] = OneByOne()  # which starts a thread
        return self._generate_managers[model_id]


# The library's server, for one model


class OneModel(ModelManager):
    """What the library's server asks about models: there is one, and no other can be loaded."""

    def __init__(self, name: str, model, tokenizer, max_tokens: int):
        super().__init__()
        self.name, self.model, self.max_tokens = name, model, max_tokens
        # The library takes the attribute `tokenizer` for the tokenizer of a processor, and ours has one: the published one.
        self.processor = SimpleNamespace(
            tokenizer=tokenizer, apply_chat_template=tokenizer.apply_chat_template, decode=tokenizer.decode
        )
        self.created = int(time.time())

    def get_gen_models(self, cache_dir=None) -> list[dict]:
        return [{"id": self.name, "object": "model", "created": self.created, "owned_by": "local"}]

    def check(self, name: str):
        if name != self.name:
            raise HTTPException(404, f"The model {name!a} does not exist here; {self.name!a} does.")

    def get_model_modality(self, model, processor=None) -> Modality:
        return Modality.LLM


async def as_openai_streams(events: AsyncIterator[str], include_usage: bool) -> AsyncIterator[str]:
    """The library's events with usage, if it is asked for, in one of its own, errors as objects, and `[DONE]` at the end."""
    async with aclosing(events):
        async for text in events:
            for event in text.split("\n\n")[:-1]:
                chunk = json.loads(event.removeprefix("data: "))
                if "error" in chunk:
                    chunk = error_body(500, chunk["error"])
                usage = chunk.pop("usage", None)
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
                if usage and include_usage:
                    yield f"data: {json.dumps({**chunk, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


class Checked:
    """Requests are checked before anything is done for them."""

    request_class: type[BaseModel]

    async def handle_request(self, body: dict, request_id: str):
        try:
            request = self.request_class.model_validate(body)
        except ValidationError as error:
            raise HTTPException(400, what_is_invalid(error.errors())) from None
        if request.seed is not None and self.generation_state._continuous_batching:
            raise HTTPException(
                400, "seed: has no meaning where requests are sampled together (--continuous-batching)."
            )
        body = request.model_dump(exclude_none=True)
        for message in body.get("messages", []):
            if message["role"] == "developer":  # what newer clients call the system
                message["role"] = "system"
        try:
            return await super().handle_request(body, request_id)
        except TemplateError as error:  # roles that do not alternate, say
            raise HTTPException(400, str(error)) from None

    def _validate_request(self, body: dict):
        pass  # it is

    def _resolve_model(self, body: dict):
        manager = self.model_manager
        manager.check(body.get("model", manager.name))
        return manager.name, manager.model, manager.processor

    def _build_generation_config(self, body: dict, model_generation_config, use_cb: bool = False):
        # Seed and stops are not the library's to handle: it seeds while others generate, and leaves the stop in the text.
        own = {name: body.get(name) for name in ("seed", "stop")}
        body = {name: value for name, value in body.items() if name not in own}
        if body.get("temperature", 1) < GREEDY_BELOW:
            body["temperature"] = 0
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        if body.get("max_completion_tokens") is None and body.get("max_tokens") is None:
            config.max_new_tokens = self.model_manager.max_tokens
        if not config.do_sample:
            config.update(temperature=1.0, top_p=1.0)
        config.seed = own["seed"]
        config.stops = [own["stop"]] if isinstance(own["stop"], str) else own["stop"] or []
        config.include_usage = body.get("stream_options", {}).get("include_usage", False)
        return config

    def _limit(self, model, inputs, config):
        """The answer ends where the context does, or the cache."""
        length = len(inputs["input_ids"]) if isinstance(inputs["input_ids"], list) else inputs["input_ids"].shape[-1]
        limit, what = model.config.seq_length, "context"
        if self.generation_state.cache_tokens < limit:
            limit, what = self.generation_state.cache_tokens, "cache (--cache-tokens)"
        if length >= limit:
            raise HTTPException(
                400, f"The prompt is {length} tokens long; the {what} of {limit} has no room for an answer."
            )
        config.max_new_tokens = min(config.max_new_tokens, limit - length, self.model_manager.max_tokens)

    def _streaming(self, request_id, model, processor, model_id, inputs, gen_config, *args, **kwargs):
        self._limit(model, inputs, gen_config)
        response = super()._streaming(request_id, model, processor, model_id, inputs, gen_config, *args, **kwargs)
        response.body_iterator = as_openai_streams(response.body_iterator, gen_config.include_usage)
        return response

    async def _non_streaming(self, request_id, model, processor, model_id, inputs, gen_config, *args, **kwargs):
        self._limit(model, inputs, gen_config)
        return await super()._non_streaming(request_id, model, processor, model_id, inputs, gen_config, *args, **kwargs)


class ChatHandler(Checked, ChatCompletionHandler):
    request_class = ChatRequest


class TextHandler(Checked, CompletionHandler):
    request_class = TextRequest


def build_app(name: str, model, tokenizer, max_tokens: int, cache_tokens: int | None, continuous_batching: bool):
    """Returns the FastAPI application."""
    blocks = {} if cache_tokens is None else {"num_blocks": -(-cache_tokens // BLOCK), "max_batch_tokens": 512}
    config = ContinuousBatchingConfig(page_size=BLOCK, per_request_processors=True, **blocks)
    manager = OneModel(name, model, tokenizer, max_tokens)
    state = Generation(continuous_batching=continuous_batching, cb_config=config)
    if blocks and continuous_batching:
        state.cache_tokens = blocks["num_blocks"] * BLOCK
    chat, text = ChatHandler(manager, state), TextHandler(manager, state)
    app = build_server(manager, chat, text, None, None, None, state)
    # The others load models by name, with their code, or unload this one.
    app.router.routes[:] = [route for route in app.routes if route.path in PATHS]

    @app.get("/v1/models/{name:path}")
    def retrieve_model(name: str):
        manager.check(name)
        return manager.get_gen_models()[0]

    answer_errors(app)

    @app.exception_handler(CBWorkerDeadError)
    async def failed(request, error):
        return error_response(503, INTERNAL)

    return app


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    add_server_options(parser, port=8000)
    parser.add_argument("--name", help="what clients call the model (default: the last part of --model)")
    parser.add_argument("--continuous-batching", action="store_true", help="answer all requests at once")
    parser.add_argument(
        "--cache-tokens",
        type=at_least(256, number=int),
        help="room of the cache of continuous batching (default: 32768 on the CPU, elsewhere what memory allows)",
    )
    parser.add_argument(
        "--max-tokens", type=at_least(1, number=int), default=2048, help="of an answer at most; default: %(default)s"
    )
    parser.add_argument("--top-p", type=at_least(0, above=True, maximum=1), default=0.8, help="default: %(default)s")
    parser.add_argument("--temperature", type=at_least(0), default=0.8, help="of requests that say none; default: 0.8")
    args = parser.parse_args()

    listener = listen(args.host, args.port)
    model, tokenizer = load_model(args)
    sampling = dict(do_sample=True, temperature=args.temperature, top_p=args.top_p)
    model.generation_config.update(**(sampling if args.temperature else dict(do_sample=False)))
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # it warns of each request
    name = args.name or Path(args.model).resolve().name
    if args.cache_tokens is None and model.device.type == "cpu":
        args.cache_tokens = 32768
    app = build_app(name, model, tokenizer, args.max_tokens, args.cache_tokens, args.continuous_batching)
    run(app, listener, f"{name}, by OpenAI's API (/v1)", args)


if __name__ == "__main__":
    main()
