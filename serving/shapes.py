"""
The shapes of OpenAI's API: what requests may say, and what answers look like.

A field that is null is ignored. A field that asks for nothing (`tools: []`, `n: 1`) is accepted whatever its name is; one that
asks for what this server cannot do is refused by name.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError, from_json

from common.http_errors import ApiError, type_of


MAX_CHOICES = 128  # answers of one request: prompts times n
ANY = object()

# Fields without effect here, and the values that they may have
WITHOUT_EFFECT = {
    "add_special_tokens": [True],
    "best_of": [1],
    "function_call": ["none", "auto"],
    "length_penalty": [1],
    "metadata": ANY,
    "modalities": [["text"]],
    "num_beams": [1],
    "parallel_tool_calls": [True],
    "prompt_cache_key": ANY,
    "prompt_cache_retention": ANY,
    "reasoning_effort": ["medium"],
    "safety_identifier": ANY,
    "service_tier": ["auto", "default"],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "tool_choice": ["none", "auto"],
    "typical_p": [1],
    "use_cache": [True],
    "user": ANY,
    "verbosity": ["medium"],
}
# Of all others, what is false, 0 or empty asks for nothing. These are on by default, or turned on by being there.
ASKED_FOR_IF_FALSE = {"add_special_tokens", "skip_special_tokens", "web_search_options"}


# Requests


class Shape(BaseModel, extra="allow", strict=True):
    @model_validator(mode="before")
    @classmethod
    def leave_out_null(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def refuse_unknown(self):
        for name, value in self.model_extra.items():
            accepted = WITHOUT_EFFECT.get(name, [])
            is_asked_for = value or name in ASKED_FOR_IF_FALSE
            if is_asked_for and accepted is not ANY and value not in accepted:
                raise PydanticCustomError("unsupported", "unsupported", {"name": name})
        return self


def text_of_parts(content: Any) -> Any:
    """Returns the text of a message whose content is a list of parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type_of(part)
            raise ValueError(
                f"the model reads text only, in parts {{'type': 'text', 'text': ...}}; got one of type {kind!r}"
            )
        texts.append(part["text"])
    return "".join(texts)


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def token_biases(value: Any) -> Any:
    """Returns the biases with the ids of tokens as integers, which JSON can only have as texts."""
    if not isinstance(value, dict):
        return value
    if not all(isinstance(key, int) or re.fullmatch(r"\d{1,9}", key) for key in value):
        raise ValueError("its keys must be ids of tokens")
    return {int(key): bias for key, bias in value.items()}


def prompts_of(value: Any) -> Any:
    """Returns a list of prompts, each a text or a list of ids, from any of the four forms that a prompt can have."""
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(
            f"must be a text, a list of texts, a list of token ids, or a list of those, not {type_of(value)}"
        )
    if len(value) > MAX_CHOICES:
        raise ValueError(f"at most {MAX_CHOICES} prompts at once, got {len(value)}")
    for prompt in value:
        is_ids = isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
        if not (isinstance(prompt, str) or is_ids):
            raise ValueError("each prompt must be a text or a list of token ids, with at least one")
    return value


def from_generation_config(data: Any) -> Any:
    """Returns a request of `transformers chat`, which says how to generate in a text of its own, as one of OpenAI's."""
    if not isinstance(data, dict) or not isinstance(data.get("generation_config"), str):
        return data
    try:
        config = from_json(data["generation_config"])
    except ValueError:
        config = None
    if not isinstance(config, dict):
        message = "Invalid value for 'generation_config': must be the text of a JSON object."
        raise ApiError(400, message, "generation_config", "invalid_value")
    config = {name: value for name, value in config.items() if not name.startswith(("_", "transformers_"))}
    if config.pop("do_sample", None) is False:
        config["temperature"] = 0
    if "max_new_tokens" in config:
        config["max_tokens"] = config.pop("max_new_tokens")
    return {**{name: value for name, value in data.items() if name != "generation_config"}, **config}


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Message(Shape):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(text_of_parts)]
    name: str = ""  # of several users: the prompt has no place for it

    @model_validator(mode="before")
    @classmethod
    def refuse_calls(cls, data: Any) -> Any:
        """Before it is said that `content` is missing, as it is in a message that calls a tool."""
        for name in ("tool_calls", "function_call"):
            if isinstance(data, dict) and data.get(name):
                raise PydanticCustomError("unsupported", "unsupported", {"name": name})
        return data


class StreamOptions(Shape):
    include_usage: bool = False


class JsonSchema(Shape):
    name: str = ""
    description: str = ""
    schema_: dict = Field({}, alias="schema")  # none: any JSON
    strict: bool = False


class ResponseFormat(Shape):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self):
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("'json_schema' is missing")
        return self


class ModelRequest(Shape):
    model: str = ""


class SamplingRequest(ModelRequest):
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=0)
    max_length: int | None = Field(None, ge=1)  # of prompt and answer together, as in the published openai_api.py
    stop: Annotated[list[Stop], BeforeValidator(as_list), Field(max_length=16)] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)  # 0 and -1: all
    min_p: float = Field(0, ge=0, le=1)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    presence_penalty: float = Field(0, ge=-2, le=2)
    repetition_penalty: float = Field(1, gt=0, le=10)
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(token_biases)] = {}
    response_format: ResponseFormat = ResponseFormat(type="text")


class ChatRequest(SamplingRequest):
    read_generation_config = model_validator(mode="before")(from_generation_config)

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    continue_final_message: bool = False
    add_generation_prompt: bool = True  # as vLLM has it; only continue_final_message can do without
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def check(self):
        if self.max_tokens == 0:
            raise ApiError(
                400, "Invalid value for 'max_tokens': must be at least 1, got 0.", "max_tokens", "invalid_value"
            )
        if not self.add_generation_prompt and not self.continue_final_message:
            message = "'add_generation_prompt': false needs 'continue_final_message': true."
            raise ApiError(400, message, "add_generation_prompt", "invalid_value")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs': true.", "top_logprobs", "invalid_value")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to each token to tell, with log probabilities; None: no log probabilities."""
        return self.top_logprobs if self.logprobs else None


class TextRequest(SamplingRequest):
    prompt: Annotated[list[str | list[int]], BeforeValidator(prompts_of)] = Field(min_length=1)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="before")
    @classmethod
    def leave_out_false(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("logprobs") is False:
            data = {**data, "logprobs": None}
        return data

    @model_validator(mode="after")
    def check(self):
        if len(self.prompt) * self.n > MAX_CHOICES:
            message = f"{len(self.prompt)} prompts with n={self.n}: at most {MAX_CHOICES} answers at once."
            raise ApiError(400, message, "prompt", "invalid_value")
        if self.max_tokens == 0 and not self.echo:
            message = "max_tokens=0 gives something only with echo=true."
            raise ApiError(400, message, "max_tokens", "invalid_value")
        return self

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


# Answers


@dataclass
class Token:
    """A token with its log probability, None if it has none (the first of a text) or nobody asked."""

    id: int
    logprob: float | None = None
    top: dict[int, float] = field(default_factory=dict)  # the likeliest ones


@dataclass
class Piece:
    """A part of the answer with number `index`, the last of it if there is a `finish_reason`."""

    index: int
    text: str
    tokens: list[Token]
    finish_reason: Literal["stop", "length"] | None = None


@dataclass
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def to_json(self) -> dict:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answer:
    """
    An answer, whole or as the chunks of a stream.

    Args:
        bytes_of: Returns the bytes of a token.
        alternatives: As in the request.
        special: Ids of the tokens that texts do not show.
    """

    object: str
    chunk_object: str

    def __init__(self, id: str, model: str, bytes_of, alternatives: int | None, special: Sequence[int] = ()):
        self.id, self.model, self.bytes_of, self.alternatives, self.special = id, model, bytes_of, alternatives, special
        self.created = int(time.time())
        self.offsets: dict[int, int] = {}  # of each choice, where its next token begins

    def frame(self, object: str, choices: list[dict], **fields) -> dict:
        return {
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices, **fields
        }  # fmt: skip

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict:
        choices = [self.choice(piece) for piece in sorted(pieces, key=lambda piece: piece.index)]
        return self.frame(self.object, choices, usage=usage.to_json())

    def chunk(self, piece: Piece, **fields) -> dict:
        return self.frame(self.chunk_object, [self.choice(piece, is_chunk=True)], **fields)

    def last_chunk(self, usage: Usage) -> dict:
        return self.frame(self.chunk_object, [], usage=usage.to_json())

    def choice(self, piece: Piece, is_chunk: bool = False) -> dict:
        raise NotImplementedError

    def text_of(self, id: int) -> str:
        token = self.bytes_of(id)
        try:
            return token.decode()
        except UnicodeDecodeError:  # a part of a character, as OpenAI writes it
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


class ChatAnswer(Answer):
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def first_chunks(self, choices: int) -> list[dict]:
        delta = {"role": "assistant", "content": ""}
        frames = [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(choices)]
        return [self.frame(self.chunk_object, [choice]) for choice in frames]

    def choice(self, piece: Piece, is_chunk: bool = False) -> dict:
        if is_chunk:
            content = {"delta": {"content": piece.text} if piece.text else {}}
        else:
            content = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
        return {
            "index": piece.index, **content, "logprobs": self.logprobs(piece), "finish_reason": piece.finish_reason
        }  # fmt: skip

    def logprobs(self, piece: Piece) -> dict | None:
        if self.alternatives is None:
            return None
        content = []
        for token in piece.tokens:
            top = [self.entry(id, logprob) for id, logprob in token.top.items()]
            content.append({**self.entry(token.id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def entry(self, id: int, logprob: float) -> dict:
        return {"token": self.text_of(id), "logprob": logprob, "bytes": list(self.bytes_of(id))}


class TextAnswer(Answer):
    object = chunk_object = "text_completion"

    def first_chunks(self, choices: int) -> list[dict]:
        return []

    def choice(self, piece: Piece, is_chunk: bool = False) -> dict:
        return {
            "index": piece.index, "text": piece.text, "logprobs": self.logprobs(piece),
            "finish_reason": piece.finish_reason,
        }  # fmt: skip

    def logprobs(self, piece: Piece) -> dict | None:
        if self.alternatives is None:
            return None
        tokens, offsets, offset = [], [], self.offsets.get(piece.index, 0)
        is_prompt = bool(piece.tokens) and piece.tokens[0].logprob is None
        for token in piece.tokens:
            tokens.append(self.text_of(token.id))
            offsets.append(offset)
            shown = "" if token.id in self.special else tokens[-1]
            # The first word of a prompt has a space in its token, but not in the text.
            offset += len(shown.removeprefix(" ") if is_prompt and not offset else shown)
        self.offsets[piece.index] = offset
        # The token itself is among them, as one more if it is not one of the likeliest.
        tops = [
            {self.text_of(id): logprob for id, logprob in (token.top | {token.id: token.logprob}).items()}
            if token.top
            else None
            for token in piece.tokens
        ]
        return {
            "tokens": tokens,
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": tops if self.alternatives else None,
            "text_offset": offsets,
        }
