"""OpenAI's API over HTTP: requests are checked and encoded, and answers sent, whole or as they come."""

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from common.http_errors import INTERNAL, ApiError, answer_errors, parse

from .generation import Engine, Sampling, Started
from .metrics import Clock, Metrics
from .processors import Grammars, eos_ids
from .shapes import ChatAnswer, ChatRequest, ModelRequest, Piece, SamplingRequest, TextAnswer, TextRequest, Token, Usage
from .text import TextBuilder, token_bytes


logger = logging.getLogger(__name__)

TEXT_TOKENS = 16  # of a text completion that does not say how many, as OpenAI has it
LOG_PREFIX = re.compile(r"^\[[\d:]+\] \S+:\d+: ")  # of xgrammar's errors: the time, and where in its source
MAX_SCHEMA = 1 << 16  # characters of a JSON schema
REFERENCE = "#/components/schemas/{model}"


@dataclass
class Defaults:
    """Defaults for requests."""

    max_tokens: int = 2048  # of an answer, and at most
    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 50


@dataclass
class Job:
    """A request that was checked and encoded. `prompts` has each one `n` times."""

    request: SamplingRequest
    answer: ChatAnswer | TextAnswer
    prompts: list[list[int]]
    samplings: list[Sampling]
    echoes: list[str]  # what the answers begin with
    usage: Usage = field(default_factory=Usage)
    arrival: float = 0.0  # by time.perf_counter


class Service:
    """
    Args:
        name: What clients call the model.
        any_model_name: Whether they may call it anything else, too.
    """

    def __init__(self, name: str, model, tokenizer, engine: Engine, defaults: Defaults, any_model_name: bool = False):
        self.name, self.tokenizer, self.engine, self.defaults = name, tokenizer, engine, defaults
        self.any_model_name, self.created = any_model_name, int(time.time())
        self.eos, self.vocabulary = set(eos_ids(model)), model.config.padded_vocab_size
        self.longest_token = max(len(tokenizer.convert_ids_to_tokens(i)) for i in range(self.vocabulary))
        self.grammars, self.metrics = Grammars(model, tokenizer), Metrics(engine)
        self.encoder = ThreadPoolExecutor(1, "encode")  # one: the tokenizer is not for several threads
        self.loop: asyncio.AbstractEventLoop | None = None
        self.answering: set[asyncio.Queue] = set()

    def models(self) -> list[dict]:
        return [{"id": self.name, "object": "model", "created": self.created, "owned_by": "local"}]

    def check_model(self, name: str):
        if name and name != self.name and not self.any_model_name:
            message = f"The model {name[:100]!r} does not exist here; {self.name!r} does."
            raise ApiError(404, message, "model", "model_not_found")

    # Requests to jobs, in a thread

    def prepare(self, kind: type[SamplingRequest], body: bytes) -> Job:
        """
        Raises:
            ApiError: If the request asks for what cannot be done.
        """
        request = parse(kind, body)
        self.check_model(request.model)
        is_chat = isinstance(request, ChatRequest)
        if is_chat:
            prompts, echoes = [self.encode_chat(request)], [""]
        else:
            prompts = [self.encode_prompt(prompt) for prompt in request.prompt]
            echoes = [self.echo(request, prompt, ids) for prompt, ids in zip(request.prompt, prompts)]
        samplings = [self.sampling(request, len(prompt)) for prompt in prompts]
        if (name := self.engine.unsupported(samplings[0])) is not None:
            message = f"Unsupported parameter: '{name}' is not available {self.engine.why_unsupported}."
            raise ApiError(400, message, name, "unsupported_parameter")
        answer_type, prefix = (ChatAnswer, "chatcmpl") if is_chat else (TextAnswer, "cmpl")
        name = request.model or self.name  # the one that was asked for, with --any-model-name
        answer = answer_type(
            f"{prefix}-{uuid.uuid4().hex}", name, lambda id: token_bytes(self.tokenizer, id), request.alternatives,
            self.tokenizer.all_special_ids,
        )  # fmt: skip
        usage = Usage(prompt_tokens=sum(map(len, prompts)))
        job = Job(request, answer, [], [], [], usage)
        for prompt, sampling, echo in zip(prompts, samplings, echoes):
            for i in range(request.n):
                seed = None if sampling.seed is None else sampling.seed + i
                job.prompts.append(prompt)
                job.samplings.append(replace(sampling, seed=seed))
                job.echoes.append(echo)
        return job

    def encode_chat(self, request: ChatRequest) -> list[int]:
        messages = [{"role": m.role.replace("developer", "system"), "content": m.content} for m in request.messages]
        self.check_size(sum(len(message["content"]) for message in messages) + len(messages), "messages")
        continues = request.continue_final_message
        if (messages[-1]["role"] == "assistant") != continues:
            message = "continue_final_message needs a last message of the assistant."
            if not continues:
                message = (
                    "The last message is the assistant's. To have it continued, set continue_final_message=true; "
                    "otherwise end with a message of the user."
                )
            raise ApiError(400, message, "messages", "invalid_value")
        try:
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=not continues, continue_final_message=continues, return_dict=False
            )
        except (TemplateError, ValueError) as error:  # roles that do not alternate, say
            raise ApiError(400, str(error), "messages", "invalid_value") from None
        self.check_length(len(ids), "messages")
        return ids

    def encode_prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self.check_size(len(prompt), "prompt")
            prompt = self.tokenizer(prompt)["input_ids"]
        elif not all(0 <= id < self.vocabulary for id in prompt):
            message = (
                f"A prompt has token ids outside 0 to {self.vocabulary - 1}: they are of another model's tokenizer."
            )
            raise ApiError(400, message, "prompt", "invalid_value")
        self.check_length(len(prompt), "prompt")
        return prompt

    def echo(self, request: TextRequest, prompt: str | list[int], ids: list[int]) -> str:
        if not request.echo:
            return ""
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(ids, skip_special_tokens=True)

    def check_size(self, characters: int, param: str):
        """Refuses a text that is too long however it is split into tokens, before it is encoded."""
        least = characters // self.longest_token
        if least >= self.engine.limit:
            self.check_length(least, param, "at least ")

    def check_length(self, tokens: int, param: str, how: str = ""):
        limit, what = self.engine.limit, self.engine.limit_name
        if tokens >= limit:
            message = (
                f"This model's maximum {what} length is {limit} tokens, of which at least one is for the answer. "
                f"'{param}' has {how}{tokens} tokens: shorten it."
            )
            raise ApiError(400, message, param, "context_length_exceeded")

    def sampling(self, request: SamplingRequest, prompt_length: int) -> Sampling:
        defaults, is_chat = self.defaults, isinstance(request, ChatRequest)
        asked = request.max_completion_tokens if is_chat and request.max_completion_tokens else request.max_tokens
        if asked is None:
            asked = defaults.max_tokens if is_chat or request.max_length else TEXT_TOKENS
        room = self.engine.limit - prompt_length
        if request.max_length is not None:
            room = min(room, request.max_length - prompt_length)
            if room < 1:
                message = f"max_length={request.max_length} counts the prompt too, which has {prompt_length} tokens: raise it."
                raise ApiError(400, message, "max_length", "invalid_value")
        if any(not 0 <= id < self.vocabulary for id in request.logit_bias):
            message = f"logit_bias has token ids outside 0 to {self.vocabulary - 1}."
            raise ApiError(400, message, "logit_bias", "invalid_value")
        return Sampling(
            max_new_tokens=min(asked, defaults.max_tokens, room),
            temperature=defaults.temperature if request.temperature is None else request.temperature,
            top_p=defaults.top_p if request.top_p is None else request.top_p,
            top_k=defaults.top_k if request.top_k is None else max(request.top_k, 0),
            min_p=request.min_p,
            seed=request.seed,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=request.logit_bias,
            alternatives=request.alternatives,
            score_prompt=not is_chat and request.echo and request.logprobs is not None,
            grammar=self.grammar(request),
        )

    def grammar(self, request: SamplingRequest):
        kind = request.response_format.type
        if kind == "text":
            return None
        if not self.grammars.is_installed:
            message = f"response_format {kind!r} needs the package xgrammar, which this server does not have installed."
            raise ApiError(400, message, "response_format", "unsupported_parameter")
        schema = json.dumps(request.response_format.json_schema.schema_) if kind == "json_schema" else None
        if schema and len(schema) > MAX_SCHEMA:
            message = f"The schema has {len(schema)} characters; {MAX_SCHEMA} at most."
            raise ApiError(400, message, "response_format", "invalid_value")
        try:
            return self.grammars.compile(schema)
        except RuntimeError as error:
            reason = LOG_PREFIX.sub("", str(error))
            raise ApiError(
                400, f"The schema cannot be followed: {reason}", "response_format", "invalid_value"
            ) from None

    # Jobs to answers

    async def respond(self, kind: type[SamplingRequest], request: Request) -> Response:
        if "json" not in request.headers.get("content-type", ""):
            # A page of another site can send a body without a type without being asked.
            raise ApiError(415, "The body must be JSON, and say so: Content-Type: application/json.")
        arrival, body = time.perf_counter(), await request.body()
        job = await asyncio.get_running_loop().run_in_executor(self.encoder, self.prepare, kind, body)
        job.arrival = arrival
        self.metrics.prompt_tokens.inc(job.usage.prompt_tokens)
        if job.request.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would wait for all of it
            return StreamingResponse(self.events(job), media_type="text/event-stream", headers=headers)
        wholes = [Piece(i, "", []) for i in range(len(job.prompts))]
        async with aclosing(self.pieces(job)) as pieces:
            async for piece in pieces:
                whole = wholes[piece.index]
                whole.text += piece.text
                whole.tokens += piece.tokens
                whole.finish_reason = piece.finish_reason
        return JSONResponse(job.answer.whole(wholes, job.usage))

    async def events(self, job: Job) -> AsyncIterator[str]:
        """Yields the server-sent events of a stream. Errors are events, too."""

        def event(data: dict) -> str:
            return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

        include_usage = job.request.stream_options.include_usage
        fields = {"usage": None} if include_usage else {}
        try:
            for chunk in job.answer.first_chunks(len(job.prompts)):
                yield event({**chunk, **fields})
            async with aclosing(self.pieces(job)) as pieces:
                async for piece in pieces:
                    yield event(job.answer.chunk(piece, **fields))
            if include_usage:
                yield event(job.answer.last_chunk(job.usage))
        except ApiError as error:
            yield event(error.body())
        except Exception:
            logger.exception("A request failed")
            yield event(ApiError(500, INTERNAL).body())
        yield "data: [DONE]\n\n"

    async def pieces(self, job: Job) -> AsyncIterator[Piece]:
        """Yields the pieces of all answers of a job, each answer's in order."""
        queue = asyncio.Queue()

        async def answer(index: int):
            try:
                async with aclosing(self.pieces_of(job, index)) as pieces:
                    async for piece in pieces:
                        queue.put_nowait(piece)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(answer(i)) for i in range(len(job.prompts))]
        self.answering.add(queue)
        try:
            unfinished = len(tasks)
            while unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                unfinished -= item.finish_reason is not None
                yield item
        finally:
            self.answering.discard(queue)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def pieces_of(self, job: Job, index: int) -> AsyncIterator[Piece]:
        prompt, sampling, clock = job.prompts[index], job.samplings[index], Clock(self.metrics, job.arrival)
        # A text goes on where its prompt ends, as a message that is continued does; an answer begins by itself.
        goes_on = isinstance(job.request, TextRequest) or job.request.continue_final_message
        before = prompt if goes_on else ()
        builder, reason = TextBuilder(self.tokenizer, job.request.stop, before), "length"
        end: list[Token] = []
        async with aclosing(self.engine.tokens(prompt, sampling)) as tokens:
            async for token in tokens:
                if isinstance(token, Started):
                    if index % job.request.n == 0:  # a prompt counts once
                        job.usage.cached_tokens += token.cached_tokens
                    self.metrics.cached_tokens.inc(token.cached_tokens)
                    if job.echoes[index] or token.prompt:
                        yield Piece(index, job.echoes[index], token.prompt)
                    continue
                clock.tick()
                job.usage.completion_tokens += 1
                if token.id in self.eos:
                    reason = "stop"
                    end = [token]
                    break
                text, certain = builder.add(token)
                if builder.is_stopped:
                    yield Piece(index, text, certain, "stop")
                    return
                if text or certain:
                    yield Piece(index, text, certain)
        text, rest = builder.finish()
        yield Piece(index, text, rest + end, reason)

    def stop(self):
        """Ends the answers in progress, with an error that says why. May be called from a signal handler."""

        def end():
            for queue in self.answering:
                queue.put_nowait(ApiError(503, "The server is shutting down."))

        if self.loop is not None:
            self.loop.call_soon_threadsafe(end)


def build_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI):
        service.loop = asyncio.get_running_loop()
        service.engine.start()
        yield
        await asyncio.to_thread(service.engine.close)

    app = FastAPI(title=f"{service.name}, by OpenAI's API", lifespan=lifespan, redoc_url=None)
    answer_errors(app)

    # For /openapi.json. Answers have the shapes of OpenAI's own client, of which this server fills a part.
    def described(kind: type[SamplingRequest], answer: type[BaseModel]) -> dict:
        schema = {"$ref": REFERENCE.format(model=kind.__name__)}
        body = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        return {"openapi_extra": body, "responses": {200: {"model": answer}}}

    @app.post("/v1/chat/completions", **described(ChatRequest, ChatCompletion))
    async def chat_completions(request: Request):
        return await service.respond(ChatRequest, request)

    @app.post("/v1/completions", **described(TextRequest, Completion))
    async def completions(request: Request):
        return await service.respond(TextRequest, request)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name:path}", responses={200: {"model": Model}})
    async def model(name: str):
        service.check_model(name)
        return service.models()[0]

    @app.post("/load_model", include_in_schema=False)
    async def load_model(request: Request):
        """`transformers chat` asks for this first. The model is there already, and no other can be loaded."""
        service.check_model(parse(ModelRequest, await request.body()).model)
        return StreamingResponse(
            iter(['data: {"status": "ready", "cached": true}\n\n']), media_type="text/event-stream"
        )

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics():
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def openapi() -> dict:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            kinds = [(ChatRequest, "validation"), (TextRequest, "validation")]
            schemas = models_json_schema(kinds, ref_template=REFERENCE)[1]["$defs"]
            for path in app.openapi_schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # FastAPI's own, which never comes
            components = app.openapi_schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(schemas)
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema["security"] = [{"key": []}, {}]  # with or without
        return app.openapi_schema

    app.openapi = openapi
    return app
