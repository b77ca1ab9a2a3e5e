"""
Tokens for requests: what an `Engine` is, and `OneByOne`, which calls `generate` for one request after the other. The other
engine is in batching.py.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
)

from common.checkpoint import CACHE
from common.package import module_of

from .prefix_cache import PrefixCache
from .processors import IsSet, Penalties, Recorder, Satisfiable, Streamer, score
from .shapes import Token


# Tokens of a prompt that are encoded at a time. Between chunks a client that has gone is noticed.
CHUNK = 1024
SCORED_CHUNK = 256  # where all logits are needed: 65,024 numbers for each token


@dataclass
class Sampling:
    """How to generate tokens, and what to report about them. `temperature` 0 is greedy, `top_k` 0 means all tokens."""

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


@dataclass
class Started:
    """Sent before the tokens: how many tokens of the prompt were cached, and their log probabilities if requested."""

    cached_tokens: int = 0
    prompt: list[Token] = field(default_factory=list)


class Engine:
    """
    Generates tokens for requests.

    Attributes:
        limit: Largest number of tokens of prompt and answer together.
        waiting, running: How many answers are.
    """

    limit_name = "context"
    why_unsupported = ""

    def __init__(self, model):
        self.model, self.limit = model, model.config.context_length
        self.waiting = self.running = 0

    def start(self):
        """Called in the event loop, before the first request."""

    def close(self):
        """Ends all threads."""

    def is_greedy(self, sampling: Sampling) -> bool:
        least = module_of(self.model, "generation_chatglm").LEAST_TEMPERATURE  # scores divided by less overflow
        return sampling.temperature < least or sampling.top_p < least

    def unsupported(self, sampling: Sampling) -> str | None:
        """Returns the name of a parameter that this engine cannot follow; `why_unsupported` says why."""
        return None

    def tokens(self, prompt: list[int], sampling: Sampling) -> AsyncIterator[Started | Token]:
        """Yields `Started`, and the tokens as they come, the one that ends the text too. Closing it ends the generation."""
        raise NotImplementedError


class Cancelled(Exception):
    """The client has disconnected."""


class OneByOne(Engine):
    """
    Args:
        cache_tokens: Number of tokens of earlier dialogues that are kept in caches. 0: none.
    """

    why_unsupported = "with a P-Tuning prefix or RoPE that depends on the length: leave it out"

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
        if not self.is_greedy(sampling):
            options = dict(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
            options["min_p"] = sampling.min_p or None
        # The generator is everybody's: without a new seed, the answers after a seeded one would be the same each time.
        if sampling.seed is None:
            torch.seed()
        else:
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
