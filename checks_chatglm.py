"""What is refused: arguments that nothing uses, releases that this code does not work on, and inputs that do not fit.

A forward must not swallow an argument that changes the result: that is how the published code and an earlier version of
this one came to answer nonsense on a newer release.
"""

import functools
import inspect
import threading
import warnings
from collections.abc import Callable

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.utils import logging

from .compat_chatglm import BOTH_NAMES, CACHE_NAME, NEWEST_TESTED, RELEASE


logger = logging.get_logger(__name__)

CONTEXT_REMEDY = (
    "Shorten the input, or extend the context with rope_parameters (yarn or linear with seq_length, or dynamic)."
)

# What the library passes through a model to its attention function and output hooks.
PASSED_THROUGH = {
    # any caller
    "full_attention_mask",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    # `generate`, for stop_strings
    "tokenizer",
    # Trainer; the latter for sequences that are divided over devices
    "num_items_in_batch",
    "shift_labels",
    # packed sequences (DataCollatorWithFlattening), and continuous batching
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    # continuous batching
    "block_table",
    "is_causal",
    "logits_indices",
    "logits_processor_args",
    "max_seqlen_k",  # until 5.18
    "max_seqlen_q",
    "read_index",
    "write_index",
}


def checked_arguments(forward: Callable) -> Callable:
    """
    Decorates the forward of a model: takes the KV cache by either name, and refuses arguments that nothing uses.

    On a release newer than the tested ones the model is first checked against itself (`check_release`). If that holds, an
    unknown argument is ignored with one warning: a new and harmless one must not break what works.

    Raises:
        TypeError: If an argument is unknown.
    """
    signature = inspect.signature(forward)
    known = PASSED_THROUGH | {name for name in signature.parameters if name != "kwargs"}

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        if RELEASE > NEWEST_TESTED:
            check_release()
        if "past_key_values" in kwargs:
            cache = kwargs.pop("past_key_values")
            if cache is not None and kwargs.get("cache") is not None:
                raise TypeError(BOTH_NAMES)
            kwargs["cache"] = kwargs.get("cache") if cache is None else cache
            if CACHE_NAME == "cache" and not torch.compiler.is_compiling():
                message = (
                    "`past_key_values` is deprecated since Transformers 5.24, and goes in 5.40. Use `cache` instead."
                )
                warnings.warn(message, FutureWarning, stacklevel=2)
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            message = f"{type(self).__name__}.forward() got an unexpected keyword argument {unknown[0]!r}"
            if RELEASE <= NEWEST_TESTED:
                raise TypeError(message)
            logger.warning_once(
                f"{message}. It is ignored: Transformers {transformers.__version__} is newer than this code."
            )
            kwargs = {name: value for name, value in kwargs.items() if name in known}
        return forward(self, *args, **kwargs)

    # The library looks up names in the signature.
    parameters = [p.replace(name=CACHE_NAME if p.name == "cache" else p.name) for p in signature.parameters.values()]
    wrapper.__signature__ = signature.replace(parameters=parameters)
    return wrapper


# Releases newer than the tested ones. The code is checked against itself once a process, on a small random model.

_language_model_class = None
_check_lock = threading.RLock()
_check_result: Exception | bool | None = None  # True while the check runs, and once it has held


def checked_on_newer_releases(language_model_class: type) -> type:
    """Decorates the class of the language model that `check_release` builds a small one of."""
    global _language_model_class
    _language_model_class = language_model_class
    return language_model_class


def check_release():
    """
    Checks that generation with the KV cache, in chunks, padded in a batch, and the plain forward agree.

    Raises:
        RuntimeError: If they do not: this release changed something that the code relies on.
    """
    global _check_result
    if _check_result is True or torch.compiler.is_compiling():
        return
    with _check_lock:
        if _check_result is None:
            _check_result = True
            try:
                compare_ways_to_generate()
            except Exception as error:
                _check_result = RuntimeError(
                    f"This ChatGLM2 code gives wrong results on Transformers {transformers.__version__}: it was tested up to "
                    f"{'.'.join(map(str, NEWEST_TESTED))}. Install that release, or a newer version of this code. ({error})"
                )
                _check_result.__cause__ = error
            else:
                logger.info(
                    f"Transformers {transformers.__version__} is newer than this code, which was checked against itself: "
                    "its ways to generate agree."
                )
        if isinstance(_check_result, Exception):
            raise _check_result


@torch.inference_mode(False)
@torch.no_grad()
def compare_ways_to_generate():
    """Raises `ValueError` if a two-layer random model generates other logits with a KV cache than without one."""
    config = _language_model_class.config_class(
        num_layers=2, padded_vocab_size=64, hidden_size=32, ffn_hidden_size=32, kv_channels=8, num_attention_heads=4,
        multi_query_attention=True, multi_query_group_num=2, add_qkv_bias=True, seq_length=64, initializer_range=0.5,
        dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        model = _language_model_class(config).float().eval()
        prompts = torch.randint(3, 64, (2, 9))
        mask = torch.ones_like(prompts)
        mask[1, :4] = 0
        settings = dict(
            max_new_tokens=4, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
        )

        def logits_of(inputs: torch.Tensor, mask: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
            output = model.generate(inputs, attention_mask=mask, **settings, **options)
            return torch.stack(output.logits, dim=1), output.sequences[:, inputs.shape[1] :]

        expected = [logits_of(row[m.bool()][None], m[m.bool()][None], use_cache=False) for row, m in zip(prompts, mask)]
        expected_logits, expected_ids = (torch.cat(parts) for parts in zip(*expected))
        whole = model(torch.cat((prompts[:1], expected_ids[:1]), dim=1)).logits[:, 8:-1]
        ways = {
            "a plain forward": (whole, expected_ids[:1]),
            "a KV cache": logits_of(prompts[:1], mask[:1]),
            "chunked prefill": logits_of(prompts[:1], mask[:1], prefill_chunk_size=4),
            "a padded batch": logits_of(prompts, mask),
        }
        for way, (logits, ids) in ways.items():
            rows = len(logits)
            if not torch.equal(ids, expected_ids[:rows]) or not torch.allclose(
                logits, expected_logits[:rows], atol=1e-3
            ):
                raise ValueError(f"{way} gives other logits than generation without a cache")


# Inputs


def check_prompt(length: int, config):
    """Raises `ValueError` for a prompt of more tokens than the context has."""
    if length > config.context_length:
        raise ValueError(
            f"The prompt has {length} tokens, the model's context {config.context_length} (seq_length). {CONTEXT_REMEDY}"
        )


def check_room(cache: Cache | None, length: int):
    """Raises `ValueError` if a static cache is too small for so many tokens."""
    room = min((getattr(layer, "max_cache_len", length) for layer in getattr(cache, "layers", ())), default=length)
    if length > room:
        raise ValueError(
            f"The cache has room for {room} tokens, and {length} would be in it. Make it with a larger max_cache_len, or "
            "lower max_new_tokens."
        )


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether its values can be looked at: on a GPU that would make the program wait, and while tracing there are none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def check_ids(input_ids: torch.Tensor, vocab_size: int):
    """Raises `ValueError` for ids outside the vocabulary."""
    if not is_readable(input_ids) or input_ids.numel() == 0:
        return
    low, high = (int(x) for x in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids must be in [0, {vocab_size}), the vocabulary (padded_vocab_size), got {low if low < 0 else high}. "
            "Was the text encoded with the tokenizer of another model?"
        )


def check_cache(cache: Cache | None, inputs_embeds: torch.Tensor):
    """Raises `ValueError` if a cache belongs to another batch size, or a static one has no room for `[batch, seq, hidden]`."""
    if not isinstance(cache, Cache) or not cache.layers or not is_readable(inputs_embeds):
        return
    batch, seq = inputs_embeds.shape[:2]
    check_room(cache, int(cache.get_seq_length()) + seq)
    keys = getattr(cache.layers[0], "keys", None)
    if keys is not None and keys.dim() == 4 and keys.shape[0] != batch:
        raise ValueError(
            f"The cache is of a batch of {keys.shape[0]}, the input of {batch}. Start with an empty cache, or select rows "
            "with its batch_select_indices or batch_repeat_interleave."
        )


def warn_beyond_context(position_ids: torch.Tensor, config):
    if is_readable(position_ids) and position_ids.numel() and int(position_ids.max()) >= config.context_length:
        logger.warning_once(
            f"There are positions beyond the {config.context_length} that this model was made for (seq_length): expect poor "
            f"text. {CONTEXT_REMEDY}"
        )
