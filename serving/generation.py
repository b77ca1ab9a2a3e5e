"""
Tokens for requests, in two ways: `OneByOne` calls `generate` for one request after the other, `Batched` has the library's
continuous batching answer all at once.

Both have `tokens(prompt, sampling)`, an asynchronous generator. Closing it ends the generation.
"""

import asyncio
import functools
import importlib.util
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from examples.http_errors import ApiError

from .prefix_cache import PrefixCache
from .shapes import Token


# What `generate` and `forward` call the KV cache
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
CHUNK = (
    1024  # tokens of a prompt that are encoded at a time; between chunks it is seen whether the client is still there
)
SCORED_CHUNK = 256  # where all logits are needed: 65,024 numbers for each token
BLOCK = 256  # tokens: what the library divides the cache of continuous batching into
GREEDY_BELOW = 1e-3  # temperatures and top_p: divided by less, scores overflow


@dataclass
class Sampling:
    """How to generate, and what to tell about it. `temperature` 0 is greedy, `top_k` 0 is all."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    alternatives: int | None = None  # to each token, with log probabilities; None: no log probabilities
    score_prompt: bool = False  # log probabilities of the prompt's tokens too
    grammar: Any = None  # compiled, see `Grammars`

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_p < GREEDY_BELOW


@dataclass
class Started:
    """Precedes the tokens: how many of the prompt's were cached, and their log probabilities if they were asked for."""

    cached_tokens: int = 0
    prompt: list[Token] = field(default_factory=list)


def context_length(config) -> int:
    """Returns how many tokens prompt and answer can have."""
    if config.rope_parameters["rope_type"] == "dynamic":
        return int(config.seq_length * config.rope_parameters["factor"])
    return config.seq_length


def eos_ids(model) -> list[int]:
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [eos]


class Engine:
    """What both ways have in common. `waiting` and `running` count requests."""

    limit: int  # tokens of prompt and answer together
    limit_name = "context"

    def __init__(self, model):
        self.model, self.limit = model, context_length(model.config)
        self.waiting = self.running = 0

    def start(self):
        """Called in the event loop, before the first request."""

    def close(self):
        """Ends all threads."""

    def unsupported(self, sampling: Sampling) -> str | None:
        """Returns the name of a parameter that this way cannot follow."""
        return None

    async def tokens(self, prompt: list[int], sampling: Sampling) -> AsyncIterator[Started | Token]:
        raise NotImplementedError
        yield


# One by one


class Cancelled(Exception):
    """The client is gone."""


class OneByOne(Engine):
    """
    Args:
        cache_tokens: How many tokens of earlier dialogues are kept in caches; 0: none.
    """

    def __init__(self, model, cache_tokens: int = 0):
        super().__init__(model)
        config = model.config
        # Frequencies that depend on the length, and a P-Tuning prefix, need the whole prompt at once.
        self.can_split = config.rope_parameters["rope_type"] not in ("dynamic", "longrope") and not config.pre_seq_len
        self.bytes_per_token = (
            2 * config.num_layers * config.num_key_value_heads * config.kv_channels * model.dtype.itemsize
        )
        self.caches = PrefixCache(cache_tokens * self.bytes_per_token, lambda: DynamicCache(config=config))
        self.thread = ThreadPoolExecutor(1, "generate")  # all that the model does, it does here

    def close(self):
        self.thread.shutdown(wait=True, cancel_futures=True)

    def unsupported(self, sampling: Sampling) -> str | None:
        return "echo with logprobs" if sampling.score_prompt and not self.can_split else None

    async def tokens(self, prompt: list[int], sampling: Sampling) -> AsyncIterator[Started | Token]:
        loop, items, cancelled = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def send(item):
            loop.call_soon_threadsafe(items.put_nowait, item)

        def work():
            try:
                self.generate(prompt, sampling, send, cancelled)
                send(None)
            except Exception as error:
                send(error)

        state = "waiting"
        self.waiting += 1
        try:
            self.thread.submit(work)
            while (item := await items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, Started):
                    self.waiting, self.running, state = self.waiting - 1, self.running + 1, "running"
                yield item
        finally:
            cancelled.set()
            setattr(self, state, getattr(self, state) - 1)

    @torch.inference_mode()
    def generate(self, prompt: list[int], sampling: Sampling, send: Callable, cancelled: threading.Event):
        """Sends `Started`, and the tokens as they come."""
        if cancelled.is_set():
            return
        cache, started, ids = None, Started(), prompt
        try:
            if self.can_split:
                # Log probabilities are not kept: where those of the prompt are wanted, it has to be encoded again.
                cache = self.caches.new_cache() if sampling.score_prompt else self.caches.take(prompt)
                started.cached_tokens = int(cache.get_seq_length())
                started.prompt = self.encode(prompt, cache, sampling, cancelled)
            send(started)
            if sampling.max_new_tokens:
                ids = self.continue_from(prompt, cache, sampling, send, cancelled)
        except Cancelled:
            pass
        if cache is not None:
            self.caches.put(ids, len(prompt), cache)

    def encode(
        self, prompt: list[int], cache: DynamicCache, sampling: Sampling, cancelled: threading.Event
    ) -> list[Token]:
        """Encodes all of the prompt but its last token into the cache, and returns the prompt's tokens if they are scored."""
        scored = [Token(prompt[0])]
        chunk = SCORED_CHUNK if sampling.score_prompt else CHUNK
        for begin in range(int(cache.get_seq_length()), len(prompt) - 1, chunk):
            if cancelled.is_set():
                raise Cancelled
            ids = torch.tensor([prompt[begin : min(begin + chunk, len(prompt) - 1)]], device=self.model.device)
            keep = 0 if sampling.score_prompt else 1
            logits = self.model(input_ids=ids, use_cache=True, logits_to_keep=keep, **{CACHE: cache}).logits
            if sampling.score_prompt:
                logprobs = logits[0].float().log_softmax(-1)
                scored += [score(row, id, sampling.alternatives) for row, id in zip(logprobs, prompt[begin + 1 :])]
        return scored if sampling.score_prompt else []

    def continue_from(
        self,
        prompt: list[int],
        cache: DynamicCache | None,
        sampling: Sampling,
        send: Callable,
        cancelled: threading.Event,
    ) -> list[int]:
        """Returns the ids of prompt and answer."""
        processors, recorder = LogitsProcessorList(), None
        if sampling.alternatives is not None:
            recorder = Recorder()
            processors.append(recorder)  # the first, so that it sees what the model says
        if sampling.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if sampling.frequency_penalty or sampling.presence_penalty:
            processors.append(Penalties(len(prompt), sampling.frequency_penalty, sampling.presence_penalty))
        if sampling.logit_bias:
            processors.append(SequenceBiasLogitsProcessor({(id,): float(b) for id, b in sampling.logit_bias.items()}))
        if sampling.grammar is not None:
            from xgrammar.contrib.hf import LogitsProcessor as GrammarLogitsProcessor

            processors += [GrammarLogitsProcessor(sampling.grammar), Satisfiable()]
        options = dict(do_sample=False)
        if not sampling.is_greedy:
            options = dict(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
            options["min_p"] = sampling.min_p or None
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        input_ids = torch.tensor([prompt], device=self.model.device)
        output = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=sampling.max_new_tokens,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([IsSet(cancelled)]),
            streamer=Streamer(send, recorder, sampling.alternatives),
            **({CACHE: cache} if cache is not None else {}),
            **options,
        )
        return output[0].tolist()


class Streamer(BaseStreamer):
    """Sends the tokens of `generate`, without the prompt, which comes first."""

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
    """Sees that a grammar has left a token to choose: a schema may ask for what no text can be."""

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


# All at once


class Batched(Engine):
    """
    Args:
        cache_tokens: Of the cache that all requests share; None: as many as the library sees room for.
    """

    def __init__(self, model, cache_tokens: int | None = None):
        super().__init__(model)
        if model.config.pre_seq_len:
            raise ValueError("Continuous batching has no place for a P-Tuning prefix (pre_seq_len).")
        options = {}
        if cache_tokens is not None:
            options = dict(num_blocks=-(-cache_tokens // BLOCK), max_batch_tokens=512)
            if options["num_blocks"] * BLOCK < self.limit:
                self.limit, self.limit_name = options["num_blocks"] * BLOCK, "cache (--cache-tokens)"
        self.config = ContinuousBatchingConfig(per_request_processors=True, **options)
        # Other values than the library's defaults, so that there is a processor for each, with which requests have their own
        self.generation_config = GenerationConfig(
            do_sample=True, temperature=0.8, top_p=0.8, top_k=50, eos_token_id=eos_ids(model), pad_token_id=0
        )
        self.manager, self.thread = None, None
        self.routes: dict[str, tuple[Any, asyncio.Queue]] = {}  # request: its manager, and where its outputs go

    def start(self):
        """Starts the library's loop, or another after an error has ended it."""
        if self.thread is not None and self.thread.is_alive():
            return
        self.close()
        self.manager = self.model.init_continuous_batching(self.generation_config, self.config)
        self.manager.start()
        arguments = (self.manager, asyncio.get_running_loop())
        self.thread = threading.Thread(target=self.deliver, args=arguments, daemon=True)
        self.thread.start()

    def close(self):
        if self.manager is not None:
            for request in self.routes:
                self.manager.cancel_request(request)
            self.manager.stop(block=True)
            self.thread.join()
            self.manager = None

    def deliver(self, manager, loop: asyncio.AbstractEventLoop):
        """Runs in a thread while the manager does."""

        def put(output):
            if output.request_id in self.routes:  # else it was cancelled
                self.routes[output.request_id][1].put_nowait(output)

        def end():
            for of_manager, outputs in self.routes.values():
                if of_manager is manager:
                    outputs.put_nowait(None)

        for output in manager:
            loop.call_soon_threadsafe(put, output)
        if not loop.is_closed():
            loop.call_soon_threadsafe(end)

    def unsupported(self, sampling: Sampling) -> str | None:
        asked = {
            "seed": sampling.seed is not None and not sampling.is_greedy,
            "min_p": sampling.min_p,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "repetition_penalty": sampling.repetition_penalty != 1,
            "logit_bias": sampling.logit_bias,
            "logprobs": sampling.alternatives is not None,
            "response_format": sampling.grammar is not None,
        }
        return next((name for name, is_asked in asked.items() if is_asked), None)

    async def tokens(self, prompt: list[int], sampling: Sampling) -> AsyncIterator[Started | Token]:
        yield Started()
        if not sampling.max_new_tokens:
            return
        self.start()
        request, manager, outputs, received, is_finished = uuid.uuid4().hex, self.manager, asyncio.Queue(), 0, False
        self.routes[request] = manager, outputs
        self.running += 1
        try:
            manager.add_request(
                prompt,
                request_id=request,
                streaming=True,
                max_new_tokens=sampling.max_new_tokens,
                temperature=1.0 if sampling.is_greedy else float(sampling.temperature),
                top_p=1.0 if sampling.is_greedy else float(sampling.top_p),
                top_k=1 if sampling.is_greedy else sampling.top_k or self.model.config.padded_vocab_size,
            )
            while not is_finished:
                output = await outputs.get()
                if output is None or output.error is not None:
                    raise RuntimeError(f"Continuous batching failed: {output.error if output else 'it has ended'}")
                is_finished = output.is_finished()
                for id in output.generated_tokens[received:]:
                    yield Token(id)
                received = len(output.generated_tokens)
        finally:
            self.running -= 1
            del self.routes[request]
            if not is_finished:
                manager.cancel_request(request)
