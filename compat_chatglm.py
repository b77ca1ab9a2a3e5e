"""What differs between the Transformers releases that this code runs on, one section each.

The other modules are written for the newest release. When a release leaves the range in setup.cfg, its section goes, and
nothing else changes.
"""

from dataclasses import fields

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging


logger = logging.get_logger(__name__)

RELEASE = tuple(int(number) for number in transformers.__version__.split(".")[:2])
NEWEST_TESTED = (5, 24)


# Until 5.23: the KV cache is called `past_key_values`, in arguments and outputs. Since 5.24 it is `cache`, and the old
# name gives a FutureWarning until it goes in 5.40. Here both names are accepted on every release.

CACHE_NAME = "cache" if "cache" in {f.name for f in fields(BaseModelOutputWithPast)} else "past_key_values"

BOTH_NAMES = "cache and past_key_values are two names of one argument: pass one of them."


def rename_cache(kwargs: dict) -> dict:
    """Returns `kwargs` with the KV cache, whichever of its two names it has, under the one of this release."""
    other_name = "past_key_values" if CACHE_NAME == "cache" else "cache"
    if kwargs.get(other_name) is None:
        return {name: value for name, value in kwargs.items() if name != other_name}
    if kwargs.get(CACHE_NAME) is not None:
        raise TypeError(BOTH_NAMES)
    return {CACHE_NAME if name == other_name else name: value for name, value in kwargs.items() if name != CACHE_NAME}


# Since 5.24: PEFT (0.21) looks for `past_key_values` among the inputs that the model prepares. Without it, it puts its
# prompt before every token.


def name_cache_for_peft(inputs: dict) -> dict:
    return {"past_key_values" if name == "cache" else name: value for name, value in inputs.items()}


# Until 5.23: the attention function updates the cache of continuous batching. Since 5.24 the attention layer does, as for
# every other cache.


def update_cache(
    cache: Cache, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Adds keys and values, `[batch, key-value heads, seq, head_dim]`, to a layer of the cache and returns all of its own.

    Args:
        kwargs: The arguments of the attention function, which the cache of continuous batching changes in place.
    """
    if CACHE_NAME == "cache":
        return cache.update(key, value, layer_idx, kwargs=kwargs)
    if not isinstance(cache, Cache):
        kwargs["cache"] = cache
        return key, value
    return cache.update(key, value, layer_idx)


CONTINUOUS_BATCHING_TAKES_A_PREFIX = CACHE_NAME == "cache"  # which is added to what the cache returns


# Until 5.20: the library's chunked prefill starts over when the cache already holds the beginning of the prompt. There,
# such a prompt is encoded in one piece.

CHUNKS_CONTINUE_A_CACHE = RELEASE >= (5, 21)


# Until 5.23: TextStreamer decodes each line by itself, and SentencePiece drops the first space of what it decodes. There,
# `generate` gives it a tokenizer that knows the line before (`LineTokenizer`).

STREAMED_LINES_LOSE_SPACES = RELEASE < (5, 24)


# Every release so far: assisted decoding and prompt lookup put the whole prompt behind what the cache holds already. The
# cache is emptied before.


def empty_for_assisted_decoding(cache: Cache | None):
    for layer in cache.layers if cache is not None else ():
        length = int(layer.get_seq_length())
        if length and hasattr(layer, "crop"):
            layer.crop(-length)
        elif length:
            layer.reset()


# Every release so far: Trainer shifts labels for `label_smoothing_factor` only if it knows the name of the class.

MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("chatglm", "ChatGLMForConditionalGeneration")
