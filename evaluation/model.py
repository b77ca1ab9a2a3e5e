"""
The harness's model for Transformers, but faster, with the same results. Requests with the same examples share the encoding of
those. Finished answers leave their batch. Logits are only computed where they are needed. A batch that does not fit in memory
is halved.
"""

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import DynamicCache
from transformers.utils import logging

from common.checkpoint import CACHE


logger = logging.get_logger(__name__)

LEAST_PREFIX = 16  # common tokens for which a separate cache is worthwhile
LEAST_SHARE = 4  # a quarter: if no more rows of a batch are left, they continue together with those of others
STEPS = 32  # decoding steps between two checks for finished answers
TOKENS_AT_ONCE = 8192  # of prompts that are only encoded: more would not be faster, and their logits take memory
WINDOW = 2048  # tokens that perplexity is measured over at most, for models to be compared


class EvaluatedModel(HFLM):
    """
    Args:
        model, tokenizer: As loaded by Transformers.
        batch_size: Number of requests at once. It is halved if memory runs out.
        progress: Called with the number of finished requests.
    """

    def __init__(self, model, tokenizer, batch_size: int = 16, progress: Callable[[int], None] = lambda n: None):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self.progress = progress

    def count_tokens(self, text: str) -> int:
        return len(self.tok_encode(text))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        # By default with the prefix that every input begins with. The harness leaves it out if the text begins with the
        # text of the end-of-text token, which is empty here: `decode` leaves special tokens out.
        key = (string, add_special_tokens is None or add_special_tokens)
        # The harness would ask the tokenizer twice for each of four choices of the same prompt.
        if key not in self._encoded:
            if len(self._encoded) > 256:
                self._encoded.clear()
            self._encoded[key] = super().tok_encode(*key, **kwargs)
        return list(self._encoded[key])

    @property
    def _encoded(self) -> dict:
        return self.__dict__.setdefault("_encoded_texts", {})

    # Choices and perplexity

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._by_shots(
            requests, lambda group: super(EvaluatedModel, self).loglikelihood(group, disable_tqdm=True)
        )

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        """
        The log-likelihood of whole texts, in windows that overlap by half: each token but the first ones is predicted from
        at least half a window before it. Each window begins with the special tokens that a text begins with.
        """
        texts = (request.args[0] for request in requests)
        return [sum(score for score, _ in self._loglikelihood_tokens(self.windows(text))) for text in texts]

    max_windows = None  # of a text: the first ones only

    def windows(self, text: str) -> list[tuple[None, list[int], list[int]]]:
        """Returns (None, ids before, ids to predict) for each window; together they predict every token once, of the first
        `max_windows` if that is set."""
        special = self.tokenizer.encode("")
        size = min(WINDOW, self.max_length) - len(special)
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        windows = map(make_disjoint_window, get_rolling_token_windows(tokens, special[-1], size, size // 2))
        windows = [(None, special + context[context[:1] == special[-1:] :], targets) for context, targets in windows]
        return windows[: self.max_windows]

    def _by_shots(self, requests: list, run: Callable) -> list:
        """Runs requests with the same number of examples together, for they have those in common."""
        groups = defaultdict(list)
        for i, request in enumerate(requests):
            groups[getattr(request, "shots", None)].append(i)
        results = [None] * len(requests)
        for group in groups.values():
            for i, result in zip(group, run([requests[i] for i in group])):
                results[i] = result
        return results

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = True, **kwargs
    ) -> list[tuple[float, bool]]:
        """Requests are (texts, ids of the context, ids of the continuation); see `HFLM`."""
        rows = defaultdict(list)  # what has to be encoded -> the requests that it answers: often four letters
        for i, (_, context, continuation) in enumerate(requests):
            rows[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(i)
        results = [None] * len(requests)

        def run(batch: list[tuple], prefix: tuple, cache: DynamicCache | None):
            rests = [row[len(prefix) :] for row in batch]
            longest = max(map(len, rests))
            ids = torch.tensor([[*rest, *[0] * (longest - len(rest))] for rest in rests], device=self.device)
            most = [max(len(requests[i][2]) for i in rows[row]) for row in batch]
            first = min(len(rest) - n for rest, n in zip(rests, most))
            keep = torch.arange(max(first, 0), longest, device=self.device)  # logits of these positions
            positions = torch.arange(len(prefix), len(prefix) + longest, device=self.device)[None].expand(
                len(batch), -1
            )
            with torch.inference_mode():
                options = {CACHE: cache, "use_cache": cache is not None, "logits_to_keep": keep}
                logits = self.model(ids, position_ids=positions, **options).logits
            for row, rest, scores in zip(batch, rests, logits):
                for i in rows[row]:
                    continuation = torch.tensor(requests[i][2], device=self.device)
                    end = len(rest) - int(keep[0])
                    chosen = scores[end - len(continuation) : end].float().log_softmax(-1)
                    likelihood = chosen.gather(1, continuation[:, None]).sum().item()
                    results[i] = likelihood, bool((chosen.argmax(-1) == continuation).all())
            self.progress(sum(len(rows[row]) for row in batch))

        room = max((len(continuation) for _, _, continuation in requests), default=0)
        self._in_batches(list(rows), run, room, TOKENS_AT_ONCE)
        return results

    # Answers

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        return self._by_shots(requests, self._generate_group)

    def _generate_group(self, requests: list) -> list[str]:
        texts, options = [request.args[0] for request in requests], requests[0].args[1]
        limit, until = options["max_gen_toks"], options["until"]
        if options.get("do_sample") or any(request.args[1] != options for request in requests):
            raise ValueError(f"The answers of a task are generated greedily and with the same options, got {options}.")
        special = self.tokenizer.encode("")
        room = self.max_length - limit
        if room <= len(special):
            raise ValueError(
                f"max_gen_toks is {limit}, and must leave room for a prompt in the context of {self.max_length}."
            )
        rows = defaultdict(list)
        for i, ids in enumerate(map(self.tok_encode, texts)):
            if len(ids) > room:  # as the harness does, from the left, but not what a prompt begins with
                ids = special + ids[len(special) - room :]
            rows[tuple(ids)].append(i)
        results = [None] * len(requests)
        begun = {row: row for row in rows}  # the ids so far, and the prompt that they begin with
        later = {}

        def run(batch: list[tuple], prefix: tuple, cache: DynamicCache | None):
            prompts = [begun[ids] for ids in batch]
            least = len(batch) // LEAST_SHARE if len(begun) > len(batch) else 0
            finished = 0
            for i, ids, answer in self._answers(batch, prompts, prefix, cache, limit, until, least):
                if answer is None:
                    later[ids] = prompts[i]
                    continue
                for request in rows[prompts[i]]:
                    results[request] = answer
                finished += len(rows[prompts[i]])
            self.progress(finished)

        while begun:
            self._in_batches(list(begun), run, 1)
            begun.clear()
            begun.update(later)
            later.clear()
        return results

    def _answers(
        self, batch: list[tuple], prompts: list[tuple], prefix: tuple, cache, limit: int, until: list[str], least: int
    ) -> Iterator[tuple[int, tuple, str | None]]:
        """
        Yields (index in the batch, ids, answer) when an answer is finished. If only `least` or fewer are left, they are
        yielded with the answer None, to be continued together with others.

        Args:
            batch: Ids of each row: the prompt, and the tokens generated so far.
            limit: Largest number of tokens of an answer.
        """
        longest = max(map(len, batch))
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        # Padding stands behind the prefix.
        gaps = [longest - len(row) for row in batch]
        ids = torch.tensor([[*prefix, *[pad] * gap, *row[len(prefix) :]] for row, gap in zip(batch, gaps)])
        mask = torch.tensor(
            [[1] * len(prefix) + [0] * gap + [1] * (len(row) - len(prefix)) for row, gap in zip(batch, gaps)]
        )
        ids, mask = ids.to(self.device), mask.to(self.device)
        begins = [gap + len(prompt) for gap, prompt in zip(gaps, prompts)]  # of the answers
        left = list(range(len(batch)))
        while left:
            room = limit - max(ids.shape[1] - begins[i] for i in left)
            output = self.model.generate(
                ids, attention_mask=mask, do_sample=False, pad_token_id=pad, eos_token_id=eos,
                max_new_tokens=min(STEPS, room), return_dict_in_generate=True, **{CACHE: cache},
            )  # fmt: skip
            ids, cache = output.sequences, getattr(output, CACHE)
            generated = [row[begins[i] :] for i, row in zip(left, ids.tolist())]
            texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
            kept = []
            for place, (i, tokens, text) in enumerate(zip(left, generated, texts)):
                if len(tokens) >= limit or eos in tokens or any(stop in text for stop in until):
                    yield i, batch[i], postprocess_generated_text(text, stop=until, think_end_token=None)
                else:
                    kept.append(place)
            if len(kept) <= least:
                for place in kept:
                    yield left[place], (*prompts[left[place]], *generated[place]), None
                return
            if len(kept) < len(left):
                chosen = torch.tensor(kept, device=self.device)
                ids, mask = ids[chosen], mask[chosen]
                cache.batch_select_indices(chosen)
                left = [left[place] for place in kept]
            mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], dim=1)

    # Both

    def _in_batches(self, rows: list[tuple], run: Callable, room: int, most_tokens: int = sys.maxsize):
        """
        Calls `run(batch, prefix, cache)` for batches of rows of token ids of similar length, the longest first.

        Args:
            room: Number of tokens at the end of each row that stay out of the prefix.
            most_tokens: Largest number of tokens in a batch of several rows, without the prefix.
        """
        rows = sorted(rows, key=lambda row: (-len(row), row))
        prefix = common_prefix(rows, room)
        if len(rows) == 1 or len(prefix) < LEAST_PREFIX:
            prefix = ()
        start = 0
        shared = None
        while start < len(rows):
            fitting = max(min(most_tokens // (len(rows[start]) - len(prefix)), self.batch_size_per_gpu), 1)
            batch = rows[start : start + fitting]
            try:
                if prefix and shared is None:
                    shared = self._encode_prefix(prefix)
                cache = copy.deepcopy(shared)
                if cache is not None:
                    cache.batch_repeat_interleave(len(batch))
                run(batch, prefix, cache)
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
                if len(batch) == 1:
                    raise MemoryError(
                        f"A single request of {len(batch[0]):,} tokens does not fit in memory. Quantize the model "
                        "(--quantization int4), choose a smaller --dtype, or another --device."
                    ) from error
                self.batch_size_per_gpu = len(batch) // 2
                logger.warning(
                    f"{len(batch)} requests at once do not fit in memory. Continuing with {len(batch) // 2}."
                )
            else:
                start += len(batch)
                continue
            cache = None
            clear_device_cache(garbage_collection=True)  # here, where the error holds no tensors any more

    def _encode_prefix(self, prefix: tuple) -> DynamicCache:
        """By `generate`, which makes this model's cache one that grows in place."""
        ids = torch.tensor([prefix], device=self.device)
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, return_dict_in_generate=True,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return getattr(output, CACHE)


def common_prefix(rows: list[tuple], room: int) -> tuple:
    """Returns the common beginning of all rows. At least `room` tokens, and at least one, remain in each row."""
    least, most = min(rows), max(rows)  # in the order of the alphabet, so all others are between them
    length = min(map(len, rows)) - max(room, 1)
    same = next((i for i, (a, b) in enumerate(zip(least, most)) if a != b), min(len(least), len(most)))
    return least[: max(min(same, length), 0)]
