"""A streamer, a stopping criterion, and processors of logits, `[1, vocab]`, for `generate`."""

import functools
import importlib.util
import threading
from collections.abc import Callable

import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from common.http_errors import ApiError

from .shapes import Token


def eos_ids(model) -> list[int]:
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [eos]


class Streamer(BaseStreamer):
    """Sends the tokens of `generate`. The prompt, which comes first, is left out."""

    def __init__(self, send: Callable, recorder: "Recorder | None", alternatives: int | None):
        self.send, self.recorder, self.alternatives = send, recorder, alternatives
        self.is_prompt = True

    def put(self, value: torch.Tensor):
        if self.is_prompt:
            self.is_prompt = False
            return
        id = int(value.reshape(-1)[0])
        self.send(Token(id) if self.recorder is None else score(self.recorder.logprobs, id, self.alternatives))

    def end(self):
        pass


class IsSet(StoppingCriteria):
    """Ends generation once the event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Recorder(LogitsProcessor):
    """Keeps the log probabilities of the next token, `[vocab]`, as the model has them."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.logprobs = scores[0].float().log_softmax(-1)
        return scores


class Penalties(LogitsProcessor):
    """OpenAI's frequency and presence penalties, on the tokens of the answer."""

    def __init__(self, prompt_length: int, frequency: float, presence: float):
        self.prompt_length, self.frequency, self.presence = prompt_length, frequency, presence

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        counts = torch.bincount(input_ids[0, self.prompt_length :], minlength=scores.shape[-1])
        return scores - self.frequency * counts - self.presence * (counts > 0)


class Satisfiable(LogitsProcessor):
    """Raises an error if a grammar allows no token: a schema can ask for what no text can be."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not torch.isfinite(scores).any():
            raise ApiError(400, "No text follows the schema.", "response_format", "invalid_value")
        return scores


def score(logprobs: torch.Tensor, id: int, alternatives: int) -> Token:
    """
    Args:
        logprobs: Log probabilities, `[vocab]`.
    """
    top = logprobs.topk(alternatives)
    return Token(id, float(logprobs[id]), dict(zip(top.indices.tolist(), top.values.tolist())))


# Grammars


class Grammars:
    """Compiles the grammars of `response_format`, by xgrammar, which is optional."""

    is_installed = importlib.util.find_spec("xgrammar") is not None

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @functools.cached_property
    def compiler(self):
        import xgrammar

        size, special = self.model.config.padded_vocab_size, set(self.tokenizer.all_special_ids)
        pieces = ["" if i in special else self.tokenizer.convert_ids_to_tokens(i) for i in range(size)]
        kind = xgrammar.VocabType.BYTE_FALLBACK
        info = xgrammar.TokenizerInfo(pieces, kind, vocab_size=size, stop_token_ids=eos_ids(self.model))
        return xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=64 << 20)

    def compile(self, schema: str | None):
        """
        Args:
            schema: A JSON schema; None: any JSON object.

        Raises:
            RuntimeError: If the schema is not one that xgrammar can follow.
        """
        # Without free white space, of which a model may write nothing but.
        return self.compiler.compile_json_schema(schema or '{"type": "object"}', any_whitespace=False)
