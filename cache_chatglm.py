"""KV caches: they grow without being copied, and keep a record of the chat that is in them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """
    A layer of the KV cache with room to spare. A decoding step copies only the new token into it, where the library's layer
    copies the whole cache.

    `crop` leaves views of the same memory: what is appended afterwards overwrites what was cropped.
    """

    buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        is_empty = not self.is_initialized or self.keys.numel() == 0
        if is_empty or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        length, new = self.keys.shape[2], key_states.shape[2]
        keys, values = self.extended(new)
        keys[:, :, length:] = key_states
        values[:, :, length:] = value_states
        self.keys, self.values = keys, values
        return keys, values

    def extended(self, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values with `new` positions after them, whose content is still to be written."""
        if self.buffers is None or not (
            fits(self.keys, self.buffers[0], new) and fits(self.values, self.buffers[1], new)
        ):
            self.buffers = with_room(self.keys, new), with_room(self.values, new)
        end = self.keys.shape[2] + new
        return self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]


def fits(cached: torch.Tensor, buffer: torch.Tensor, new: int) -> bool:
    """Whether `cached` is still the beginning of `buffer`, and there is room for `new` positions after it."""
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return False  # torch does not allow writing to it
    is_beginning = cached.data_ptr() == buffer.data_ptr() and cached.stride() == buffer.stride()
    return is_beginning and buffer.shape[0] == cached.shape[0] and cached.shape[2] + new <= buffer.shape[2]


def with_room(cached: torch.Tensor, new: int) -> torch.Tensor:
    """Returns a buffer, `[batch, kv_heads, n, head_dim]`, that begins with `cached` and has room for `new` positions and more."""
    batch, kv_heads, length, head_dim = cached.shape
    buffer = cached.new_empty(batch, kv_heads, (length + new) * 5 // 4 + 64, head_dim)
    buffer[:, :, :length] = cached
    return buffer


def grow_in_place(cache: Cache | None) -> Cache | None:
    """Replaces the layers of a new, empty `DynamicCache` by `GrowingLayer`s. Returns other caches unchanged."""
    if type(cache) is DynamicCache and not cache.offloading:
        if all(type(layer) is DynamicLayer and not layer.is_initialized for layer in cache.layers):
            cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache


@dataclass
class ChatRecord:
    """
    What the cache of a chat holds, so that the next round can reuse the part that matches.

    Args:
        ids (`list[int]`): Every id of the context in order, those of answers as they were generated. The cache holds
            the keys and values of the first ones.
        rounds (`list[tuple[str, str]]`): The rounds, as returned in the history.
        ends (`list[int]`): `ids[:ends[i]]` are the rounds up to i.
        weights (`tuple`): Samples of the weights that computed the cache.
    """

    ids: list[int] = field(default_factory=list)
    rounds: list[tuple[str, str]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    weights: tuple = ()


def rounds_text(tokenizer, rounds: Sequence[tuple[str, str]]) -> str:
    """Text of complete rounds, up to the end of the last answer; `tokenizer.build_prompt` of one more begins with it."""
    *earlier, (query, response) = rounds
    return tokenizer.build_prompt(query, earlier) + response


def encode_continuation(tokenizer, text: str) -> list[int]:
    """Encodes text that follows other text: without the prefix, and the space that SentencePiece begins texts with."""
    return tokenizer.encode(text, add_special_tokens=False)[1:]


def continue_record(tokenizer, record: ChatRecord, query: str, history: Sequence[tuple[str, str]]) -> ChatRecord:
    """
    Returns the record of `history` and a new `query`. The rounds at its beginning that `record` knows keep the ids that
    they were generated with, which may differ from those of their text; the rest is encoded.

    It is encoded round by round, which gives the same ids as all at once: rounds begin with newlines, which are pieces
    of their own.
    """
    prompt = tokenizer.build_prompt(query, history)
    rounds = [tuple(pair) for pair in history]
    known = common_prefix(record.rounds, rounds)
    ids, ends = record.ids[: record.ends[known - 1]] if known else [], record.ends[:known]
    begin = len(rounds_text(tokenizer, rounds[:known])) if known else 0
    for i in range(known, len(rounds) + 1):
        end = len(rounds_text(tokenizer, rounds[: i + 1])) if i < len(rounds) else None
        text = prompt[begin:end]
        ids = ids + (encode_continuation(tokenizer, text) if i else tokenizer.encode(text))
        if end is not None:
            ends = [*ends, len(ids)]
            begin = end
    return ChatRecord(ids, rounds, ends, record.weights)


@torch.no_grad()
def sample_weights(model) -> tuple:
    """Returns a few numbers of each weight, which change when the weights do, and which adapters of PEFT are active."""
    samples = []
    for parameter in model.parameters():
        if parameter.device.type != "meta":  # offloaded
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            flat = local.detach().flatten()
            samples.append(flat[:: flat.numel() // 4 + 1].float().sum())
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    adapters = {(layer.disable_adapters, *layer.active_adapters) for layer in layers}
    return *(float(sample) for sample in samples), adapters


def crop_cache(cache: Cache, ids: list[int]):
    """Leaves in the cache what it holds of the beginning of `ids`, except for the last one, which has to be computed."""
    lengths = [int(layer.get_seq_length()) for layer in cache.layers]
    # An interrupted forward leaves layers of different length. Interrupted prompt lookup leaves rejected candidates at the
    # end and in the place of the last token.
    valid = min([*lengths, len(cache.chat_record.ids) - 1])
    kept = common_prefix(cache.chat_record.ids[:valid], ids[:-1])
    if all(type(layer) in (DynamicLayer, GrowingLayer) for layer in cache.layers):
        for layer, length in zip(cache.layers, lengths):
            if length > kept:
                layer.crop(kept - length)
    elif any(length != kept for length in lengths):  # a static cache cannot be cropped
        cache.reset()


def common_prefix(a: Sequence, b: Sequence) -> int:
    """Number of items at the beginning of `a` and `b` that are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
