"""Chat and generation: what ChatGLM2's language model can do beyond the library's `generate`.

`ChatGLMGenerationMixin` is mixed into the language model in modeling_chatglm.py. Sampling, beam search, assisted decoding
and the encoding of long prompts in chunks are the library's.
"""

import bisect
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import TextStreamer
from transformers.utils import logging

from .cache_chatglm import ChatRecord, continue_record, crop_cache, encode_continuation, rounds_text, sample_weights
from .checks_chatglm import check_prompt, check_room
from .compat_chatglm import (
    CACHE_NAME,
    CHUNKS_CONTINUE_A_CACHE,
    STREAMED_LINES_LOSE_SPACES,
    empty_for_assisted_decoding,
    name_cache_for_peft,
    rename_cache,
)
from .streaming_chatglm import TokenStreamer, keep_indentation


logger = logging.get_logger(__name__)

# How many tokens of a long prompt `chat` encodes at a time. In the 6B shape 1,024 take 0.7 GB for intermediate results in
# float32, and more are not faster.
PREFILL_CHUNK_SIZE = 1024
LEAST_TEMPERATURE = 1e-3  # scores divided by less overflow in half precision: lower temperatures are greedy
CHAT_DEFAULTS = dict(max_length=8192, num_beams=1, do_sample=True, top_p=0.8, temperature=0.8)
# Arguments that make `generate` guess tokens ahead
ASSISTED_DECODING = {"assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens"}


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """
    Ends the rows whose logits are NaN or infinite, with a warning. The other rows continue. A logit of minus
    infinity is valid: another processor forbids that token.

    Args:
        eos_token_id (`int`): The token that ends a row.
    """

    supports_continuous_batching = True  # it looks at the scores alone

    def __init__(self, eos_token_id: int):
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        invalid = ~torch.isfinite(scores.amax(dim=-1))  # the maximum of a row with NaN is NaN
        if not invalid.any():
            return scores
        logger.warning(
            f"The model's logits are NaN or infinite in row(s) {invalid.nonzero().flatten().tolist()}, which end here. "
            "Check the weights; on a device where float16 overflows use bfloat16 or float32."
        )
        end = torch.full_like(scores, -torch.inf)
        end[:, self.eos_token_id] = 0
        return torch.where(invalid[:, None], end, scores)


class ChatGLMGenerationMixin(GenerationMixin):
    """`chat`, `stream_chat` and `stream_generate`, and what `generate` needs to know about this model."""

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """
        The library's method. The KV cache can be passed as `past_key_values` or `cache`, on every release.

        Raises:
            ValueError: If the prompt is longer than the context.
        """
        kwargs = rename_cache(kwargs)
        prompts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("attention_mask"))
        length = max((p.shape[1] for p in prompts if isinstance(p, torch.Tensor) and p.dim() > 1), default=0)
        check_room(kwargs.get(CACHE_NAME), length)
        if length and not getattr(generation_config, "is_assistant", False):  # whose context may be shorter
            mask = kwargs.get("attention_mask")
            is_mask = isinstance(mask, torch.Tensor) and mask.dim() == 2
            check_prompt(int(mask.sum(-1).max()) if is_mask else length, self.config)  # padding does not count
        chunk_size, cache = kwargs.get("prefill_chunk_size"), kwargs.get(CACHE_NAME)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"prefill_chunk_size must be at least 1, got {chunk_size}.")
        starts_over = cache is not None and int(cache.get_seq_length()) > 0 and not CHUNKS_CONTINUE_A_CACHE
        needs_all = self.needs_the_whole_prompt(length, generation_config, kwargs)
        if starts_over or (chunk_size is None and needs_all):
            kwargs["prefill_chunk_size"] = None
        if ASSISTED_DECODING & kwargs.keys():
            empty_for_assisted_decoding(cache)
        if isinstance(kwargs.get("streamer"), TextStreamer) and STREAMED_LINES_LOSE_SPACES:
            kwargs["streamer"] = keep_indentation(kwargs["streamer"])
        return super().generate(inputs, generation_config, *args, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return name_cache_for_peft(inputs) if prepares_inputs_elsewhere(self) else inputs

    def needs_the_whole_prompt(self, length: int, generation_config, kwargs: dict) -> bool:
        """Whether a prompt of `length` tokens cannot be encoded in chunks with the same result, or should not be."""
        setting = functools.partial(self._setting, options=kwargs, generation_config=generation_config)
        cache = kwargs.get(CACHE_NAME)
        is_static = setting("cache_implementation") == "static" or getattr(cache, "is_compileable", False)
        return (
            setting("use_cache") is False
            or kwargs.get("inputs_embeds") is not None
            or bool(setting("output_hidden_states") or setting("output_attentions"))
            # Frequencies that depend on the length, which has to be known from the first token on
            or self.config.rope_parameters["rope_type"] in ("dynamic", "longrope")
            # Ranks that shard the weights would wait for each other, if their prompts take different numbers of chunks
            or (torch.distributed.is_available() and torch.distributed.is_initialized())
            # On a GPU the library would compile the forward for the length of each short prompt
            or (is_static and length <= (setting("prefill_chunk_size") or PREFILL_CHUNK_SIZE))
            or prepares_inputs_elsewhere(self)  # PEFT would put its prompt before every chunk
        )

    def _setting(self, name: str, options: dict, generation_config=None):
        """Returns an argument of `generate`: that in `options`, or else in a generation configuration, or else None."""
        configs = (generation_config, self.generation_config)
        values = [options.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    def process_response(self, response: str) -> str:
        """Cleans an answer as published: strips it, and fills in the one placeholder of the training data."""
        return response.strip().replace("[[训练时间]]", "2023年")

    @property
    def input_device(self) -> torch.device:
        """Where inputs belong. Offloaded weights are on no device: Accelerate takes inputs from the CPU."""
        return torch.device("cpu") if self.device.type == "meta" else self.device

    def build_inputs(self, tokenizer, query: str, history: list[tuple[str, str]] | None = None):
        """Returns the encoded prompt of a dialogue, on the model's device."""
        return tokenizer([tokenizer.build_prompt(query, history)], return_tensors="pt").to(self.input_device)

    def build_stream_inputs(self, tokenizer, query: str, history: list[tuple[str, str]] | None = None):
        """Returns the encoded prompt of the newest round alone, to continue a cache that holds the `history`."""
        prompt = tokenizer.build_prompt(query, history)
        if not history:
            return tokenizer([prompt], return_tensors="pt").to(self.input_device)
        ids = encode_continuation(tokenizer, prompt[len(rounds_text(tokenizer, history)) :])
        return tokenizer.pad({"input_ids": [ids]}, return_tensors="pt").to(self.input_device)

    @torch.no_grad()
    def chat(
        self,
        tokenizer,
        query: str | list[str],
        history: list[tuple[str, str]] | list[list[tuple[str, str]]] | None = None,
        max_length: int | None = None,
        num_beams: int | None = None,
        do_sample: bool | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor: LogitsProcessorList | None = None,
        past_key_values: Cache | None = None,
        return_past_key_values: bool = False,
        **kwargs,
    ):
        """
        Answers a query.

        Args:
            tokenizer (`ChatGLMTokenizer`): The model's tokenizer.
            query (`str`): The user's message, or a list of messages that are answered as one batch.
            history (`list[tuple[str, str]]`): Earlier rounds as (query, response) pairs. For a list of queries, a list of
                histories. If the dialogue is too long, the oldest rounds are left out, with a warning.
            max_length (`int`, defaults to 8192): Limit of prompt and answer together, in tokens. `max_new_tokens` limits
                the answer alone.
            num_beams (`int`, defaults to 1): Number of beams.
            do_sample (`bool`, defaults to `True`): Whether to sample.
            top_p (`float`, defaults to 0.8): Sample from the likeliest tokens whose probabilities add up to this.
            temperature (`float`, defaults to 0.8): Temperature. Below 0.001, decoding is greedy.
            logits_processor (`LogitsProcessorList`): Processors that are applied before sampling. The list is not changed.
            past_key_values (`Cache`): The cache that the last call returned. The part that matches the history is reused.
            return_past_key_values (`bool`): Whether to return a cache for the next round.
            kwargs: Other arguments of `generate`. With a `generation_config`, the defaults above do not apply.

        Returns:
            The response, the history with this round appended, and the cache if `return_past_key_values`. For a list of
            queries: a list of responses and a list of histories.

        Raises:
            ValueError: If the query is not a string or does not fit into the context, the history has another shape, or the
                cache was not returned by `chat` or was computed with other weights.
        """
        options = dict(
            max_length=max_length, num_beams=num_beams, do_sample=do_sample, top_p=top_p, temperature=temperature
        )
        cache = kwargs.pop("cache", None) if past_key_values is None else past_key_values
        options = self._chat_options(tokenizer, options, logits_processor, kwargs)
        if isinstance(query, (list, tuple)):
            if cache is not None or return_past_key_values:
                raise ValueError("A batch of queries cannot use a cache: leave it out, or chat one by one.")
            with evaluating(self):
                return self._chat_batch(tokenizer, query, history, options)

        history = list_of_rounds(tokenizer, query, history)
        cache = self._chat_cache(cache, return_past_key_values, options)
        record, options = self._start_round(tokenizer, query, history, cache, options)
        prompt_length = len(record.ids)
        with evaluating(self):
            output = self.generate(**options)
        ids = (output if isinstance(output, torch.Tensor) else output.sequences)[0].tolist()
        self._warn_if_cut(tokenizer, ids)
        response = self._finish_round(tokenizer, query, record, ids, prompt_length)
        history.append((query, response))
        return (response, history, cache) if return_past_key_values else (response, history)

    @torch.no_grad()
    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        past_key_values: Cache | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor: LogitsProcessorList | None = None,
        return_past_key_values: bool = False,
        **kwargs,
    ) -> Iterator:
        """
        Answers a query, and yields after each token what `chat` would return: the response so far, the history with it
        and, if asked for, the cache. If you stop early, the next round can still reuse the cache.

        The arguments and errors are those of `chat`.
        """
        options = dict(max_length=max_length, do_sample=do_sample, top_p=top_p, temperature=temperature)
        cache = kwargs.pop("cache", None) if past_key_values is None else past_key_values
        options = self._chat_options(tokenizer, options, logits_processor, kwargs)
        history = list_of_rounds(tokenizer, query, history)
        cache = self._chat_cache(cache, return_past_key_values, options)
        record, options = self._start_round(tokenizer, query, history, cache, options)
        prompt_length = len(record.ids)

        def item(response: str):
            new_history = [*history, (query, response)]
            return (response, new_history, cache) if return_past_key_values else (response, new_history)

        response = None
        with evaluating(self):
            for output in self.stream_generate(**options):
                ids = output[0].tolist()
                text = tokenizer.decode(answer_ids(tokenizer, ids[prompt_length:]), skip_special_tokens=True)
                # The bytes of one character can come as several tokens.
                if text and not text.endswith("\ufffd"):
                    response = self._finish_round(tokenizer, query, record, ids, prompt_length)
                    yield item(response)
                else:
                    record.ids = ids
        self._warn_if_cut(tokenizer, ids)
        last = self._finish_round(tokenizer, query, record, ids, prompt_length)
        if last != response:
            yield item(last)

    @torch.no_grad()
    def stream_generate(
        self,
        input_ids: torch.LongTensor,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        return_past_key_values: bool = False,
        **kwargs,
    ) -> Iterator:
        """
        The library's `generate`, step by step: yields `[batch, seq]`, the prompt and all tokens so far, after each step
        (and the cache, if asked for). A row that has ended is filled with `pad_token_id`.

        Args:
            input_ids (`torch.LongTensor`): The prompt, `[batch, seq]`.
            return_past_key_values (`bool`): Whether to yield the cache too. It holds all tokens but the last.
            kwargs: Any other argument of `generate`.
        """
        if "streamer" in kwargs:
            raise ValueError("Streaming has a streamer of its own. To use another, pass it to chat or generate.")
        if (self._setting("num_beams", kwargs, generation_config) or 1) > 1:
            raise ValueError("Beam search changes earlier tokens, and cannot be streamed: use num_beams=1, or chat.")
        kwargs = rename_cache(kwargs)
        if return_past_key_values and kwargs.get(CACHE_NAME) is None:
            kwargs[CACHE_NAME] = DynamicCache(config=self.config)

        def generate(streamer):
            self.generate(
                input_ids,
                generation_config=generation_config,
                logits_processor=LogitsProcessorList(logits_processor or ()),
                stopping_criteria=stopping_criteria,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                streamer=streamer,
                **kwargs,
            )

        output = input_ids
        for tokens in TokenStreamer().run(generate):
            tokens = tokens.view(input_ids.shape[0], -1).to(input_ids.device)
            output = torch.cat((output, tokens), dim=1)
            yield (output, kwargs[CACHE_NAME]) if return_past_key_values else output

    def _chat_options(self, tokenizer, options: dict, logits_processor, kwargs: dict) -> dict:
        """Merges the arguments of `chat` into those of `generate`."""
        generation_config = kwargs.get("generation_config")
        options = {name: value for name, value in options.items() if value is not None}
        options.update(kwargs)
        for name in ("max_new_tokens", "max_length"):
            if options.get(name) is None:
                options.pop(name, None)
            elif options[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {options[name]}.")
        if generation_config is None:
            options = {**CHAT_DEFAULTS, **options}
        if options.get("do_sample") is False or options.get("temperature", 1.0) < LEAST_TEMPERATURE:
            options.update(do_sample=False, top_p=1.0, temperature=1.0)
        if (options.get("num_return_sequences") or 1) > 1:
            raise ValueError("chat gives one answer. For several, call it several times, without num_return_sequences.")
        if self._setting("stop_strings", options, generation_config):
            options["tokenizer"] = tokenizer  # by which `generate` finds them
        end = self._setting("eos_token_id", options, generation_config)
        end = tokenizer.eos_token_id if end is None else end
        invalid_scores = InvalidScoreLogitsProcessor(end[0] if isinstance(end, list) else end)
        options["logits_processor"] = LogitsProcessorList([invalid_scores, *(logits_processor or ())])
        return options

    def _chat_cache(self, cache: Cache | None, return_past_key_values: bool, options: dict) -> Cache | None:
        """Returns the cache of a chat, with a `ChatRecord` of what is in it."""
        if cache is None:
            if not return_past_key_values:
                return None
            cache = DynamicCache(config=self.config)
        if (options.get("num_beams") or 1) > 1 or options.get("use_cache") is False:
            raise ValueError(
                "With num_beams > 1 or use_cache=False there is no cache to keep for the next round: leave out "
                "past_key_values and return_past_key_values."
            )
        if not isinstance(cache, Cache):
            raise ValueError(
                f"past_key_values must be what chat or stream_chat returned, got {type(cache).__name__}. Start with "
                "past_key_values=None."
            )
        weights = sample_weights(self)
        if not hasattr(cache, "chat_record"):
            if int(cache.get_seq_length()):
                raise ValueError(
                    "past_key_values is not empty, and was not returned by chat or stream_chat: what it holds is not "
                    "known. Start with past_key_values=None or an empty cache."
                )
            cache.chat_record = ChatRecord(weights=weights)
        if cache.chat_record.weights != weights:
            raise ValueError(
                "past_key_values was computed with other weights: by another model, or before this one was changed (trained, "
                "quantized, cast). Start with past_key_values=None."
            )
        return cache

    def _start_round(
        self, tokenizer, query: str, history: list[tuple[str, str]], cache: Cache | None, options: dict
    ) -> tuple[ChatRecord, dict]:
        """
        Prepares a round: fits the dialogue into the limits, and crops the cache to what can be reused.

        Returns:
            The record of the context, and the arguments for `generate`.
        """
        self._check_chat(tokenizer, query)
        old_record = cache.chat_record if cache is not None else ChatRecord()
        history_limit, prompt_limit, options = self._limit_length(options, cache)

        def continue_from(start: int) -> ChatRecord:
            return continue_record(tokenizer, old_record, query, history[start:])

        start, record = 0, continue_from(0)
        if len(record.ids) > history_limit:  # leave out as few of the oldest rounds as possible
            start = bisect.bisect_left(
                range(len(history)), True, key=lambda start: len(continue_from(start).ids) <= history_limit
            )
            record = continue_from(start)
        if len(record.ids) > prompt_limit:
            raise ValueError(
                f"The query is {len(record.ids)} tokens long; at most {prompt_limit} fit (context "
                f"{self.config.context_length}, max_length {options['max_length']}). Shorten it, or raise max_length."
            )
        if start:
            logger.warning(
                f"The dialogue is too long for a context of {options['max_length']} tokens: its {start} oldest of "
                f"{len(history)} rounds are left out of what the model reads."
            )
        if "max_new_tokens" in options:
            limit = len(record.ids) + options.pop("max_new_tokens")
            options["max_length"] = min(limit, options["max_length"])
        if cache is not None:
            crop_cache(cache, record.ids)
            cache.chat_record = record
            options[CACHE_NAME] = cache
        if options.get("generation_config") is None and not self.needs_the_whole_prompt(len(record.ids), None, options):
            options.setdefault("prefill_chunk_size", PREFILL_CHUNK_SIZE)
        options["input_ids"] = torch.tensor([record.ids], device=self.input_device)
        options["attention_mask"] = torch.ones_like(options["input_ids"])
        return record, options

    def _check_chat(self, tokenizer, query: str):
        if len(tokenizer) > self.config.padded_vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, the model {self.config.padded_vocab_size} "
                "(padded_vocab_size): they do not belong together. After adding tokens, call resize_token_embeddings."
            )
        if "chatglm3" in self.config._published_name.lower():
            logger.warning_once(
                "This is a ChatGLM3 checkpoint. It was trained on another prompt format than ChatGLM2's, which chat "
                "uses: expect poor answers."
            )
        if query == "":
            logger.warning("The query is empty: the model has nothing to answer.")

    def _limit_length(self, options: dict, cache: Cache | None = None) -> tuple[int, int, dict]:
        """
        Caps the lengths in `options` by the context.

        Returns:
            The largest length of a prompt with history, which leaves room for an answer; the largest length of any prompt;
            and the options.
        """
        options, context = dict(options), self.config.context_length
        for layer in cache.layers if cache is not None else ():
            context = min(context, getattr(layer, "max_cache_len", context))  # of a static cache
        generation_config = options.get("generation_config")
        for name in ("max_new_tokens", "max_length"):
            if name not in options and getattr(generation_config, name, None) is not None:
                options[name] = getattr(generation_config, name)
        if "max_new_tokens" in options:
            options["max_length"] = context
            return max(context - options["max_new_tokens"], context // 2), context - 1, options
        max_length = options.get("max_length", CHAT_DEFAULTS["max_length"])
        if max_length > context and max_length != CHAT_DEFAULTS["max_length"]:
            logger.warning(
                f"max_length={max_length} is beyond the context of {context} tokens (seq_length): the dialogue is kept "
                f"within {context}."
            )
        max_length = options["max_length"] = min(max_length, context)
        return max_length - min(max_length // 4, 512), max_length - 1, options

    def _warn_if_cut(self, tokenizer, ids: list[int]):
        if len(ids) >= self.config.context_length and ids[-1] != tokenizer.eos_token_id:
            logger.warning(f"The answer was cut at the end of the context of {len(ids)} tokens (seq_length).")

    def _finish_round(self, tokenizer, query: str, record: ChatRecord, ids: list[int], prompt_length: int) -> str:
        """Enters an answer, complete or not, into the record, and returns its text."""
        answer = answer_ids(tokenizer, ids[prompt_length:])
        response = self.process_response(tokenizer.decode(answer, skip_special_tokens=True))
        if record.ends and record.ends[-1] >= prompt_length:  # the answer as it was one step ago
            record.rounds.pop()
            record.ends.pop()
        record.ids = ids
        record.rounds.append((query, response))
        record.ends.append(prompt_length + len(answer))
        return response

    def _chat_batch(self, tokenizer, queries: Sequence[str], histories, options: dict):
        """Answers several queries at once, left-padded; see `chat`."""
        histories = [None] * len(queries) if histories is None else histories
        if len(histories) != len(queries):
            raise ValueError(f"There are {len(queries)} queries but {len(histories)} histories; give one for each.")
        histories = [list_of_rounds(tokenizer, query, history) for query, history in zip(queries, histories)]
        if not queries:
            return [], []
        rounds = [
            self._start_round(tokenizer, query, history, None, options) for query, history in zip(queries, histories)
        ]
        prompts = [record.ids for record, _ in rounds]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(self.input_device)
        prompt_length = inputs["input_ids"].shape[1]
        # The limits of a round count from the beginning of its prompt: padding does not shorten the answers.
        *_, options = self._limit_length(options)
        options.setdefault("max_new_tokens", options.pop("max_length") - min(map(len, prompts)))
        outputs = self.generate(**inputs, **options)
        outputs = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        responses = []
        for (record, single), query, history, output in zip(rounds, queries, histories, outputs.tolist(), strict=True):
            ids = (record.ids + output[prompt_length:])[: single["max_length"]]
            responses.append(self._finish_round(tokenizer, query, record, ids, len(record.ids)))
            history.append((query, responses[-1]))
        return responses, histories


def prepares_inputs_elsewhere(model) -> bool:
    """Whether another program has replaced `prepare_inputs_for_generation`, as PEFT does for prompt and prefix tuning."""
    return getattr(model.prepare_inputs_for_generation, "__self__", model) is not model


@contextmanager
def evaluating(model):
    """Switches a model in training mode to evaluation: with dropout or gradient checkpointing it would answer nonsense."""
    if not model.training:
        yield
        return
    logger.warning_once("The model is in training mode. chat answers in evaluation mode; call model.eval() first.")
    model.eval()
    try:
        yield
    finally:
        model.train()


def list_of_rounds(tokenizer, query: str, history) -> list[tuple[str, str]]:
    """Returns a copy of a history; raises `ValueError` for a query or a history of another shape."""
    tokenizer.build_prompt(query, history)
    return list(history or ())


def answer_ids(tokenizer, ids: list[int]) -> list[int]:
    """Cuts generated ids before the first `</s>`."""
    return ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
