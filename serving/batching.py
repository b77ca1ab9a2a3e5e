"""Tokens for all requests at once, by the continuous batching of Transformers."""

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from .generation import Engine, Sampling, Started
from .processors import eos_ids
from .shapes import Token


BLOCK = 256  # tokens: what the library divides its cache into
LAST = "last"  # the request that precedes the end of the library's loop
SECONDS_TO_END = 10


class Batched(Engine):
    """
    Args:
        cache_tokens: Size of the cache that all requests share. None: as many as the library has room for.
    """

    why_unsupported = "with continuous batching: leave it out, or start the server without --continuous-batching"

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
        self.manager, self.thread, self.is_empty = None, None, threading.Event()
        self.routes: dict[str, tuple[Any, asyncio.Queue]] = {}  # request: its manager, and where its outputs go

    def start(self):
        """Starts the library's loop, or another after an error has ended it."""
        if self.manager is not None and self.manager.is_running():
            return
        self.close()
        self.is_empty.clear()
        self.manager = self.model.init_continuous_batching(self.generation_config, self.config)
        self.manager.start()
        arguments = (self.manager, asyncio.get_running_loop())
        self.thread = threading.Thread(target=self.deliver, args=arguments, daemon=True)
        self.thread.start()

    def close(self):
        if self.manager is None:
            return
        for request in list(self.routes):
            self.manager.cancel_request(request)
        if self.manager.is_running():
            # Until 5.16 a loop that is stopped with requests in it never ends, and forgets what was cancelled. It has
            # come to the cancellations when it has answered another request.
            self.manager.add_request([0], request_id=LAST, max_new_tokens=1)
            self.is_empty.wait(SECONDS_TO_END)
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
            if output.request_id == LAST:
                self.is_empty.set()
            else:
                loop.call_soon_threadsafe(put, output)
        if not loop.is_closed():
            loop.call_soon_threadsafe(end)

    def unsupported(self, sampling: Sampling) -> str | None:
        asked = {
            "seed": sampling.seed is not None and not self.is_greedy(sampling),
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
        state = "waiting"
        request, manager, outputs, received, is_finished = uuid.uuid4().hex, self.manager, asyncio.Queue(), 0, False
        self.routes[request] = manager, outputs
        self.waiting += 1
        is_greedy, vocabulary = self.is_greedy(sampling), self.model.config.padded_vocab_size
        try:
            manager.add_request(
                prompt,
                request_id=request,
                streaming=True,
                max_new_tokens=sampling.max_new_tokens,
                temperature=1.0 if is_greedy else float(sampling.temperature),
                top_p=1.0 if is_greedy else float(sampling.top_p),
                top_k=1 if is_greedy else min(sampling.top_k or vocabulary, vocabulary),
            )
            while not is_finished:
                output = await outputs.get()
                if output is None or output.error is not None:
                    raise RuntimeError(f"Continuous batching failed: {output.error if output else 'it has ended'}")
                if state == "waiting":
                    self.waiting, self.running, state = self.waiting - 1, self.running + 1, "running"
                is_finished = output.is_finished()
                for id in output.generated_tokens[received:]:
                    yield Token(id)
                received = len(output.generated_tokens)
        finally:
            setattr(self, state, getattr(self, state) - 1)
            del self.routes[request]
            if not is_finished:
                manager.cancel_request(request)
