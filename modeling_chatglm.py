"""ChatGLM2: the network, in the order data flows through it, and chat on top of it.

Module and parameter names are those of the published checkpoint. Hidden states are `[batch, seq, hidden]` throughout;
the published layout, `[seq, batch, ...]`, appears only where a legacy cache tuple is converted.
"""

import bisect
import copy
import functools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import LayerNorm
from transformers import ContinuousBatchingConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_chatglm import ChatGLMConfig
from .quantization import QUANT_METHOD, init_quantized, quantize
from .quantization_kernels import chunked_linear


logger = logging.get_logger(__name__)

# How many tokens of a long prompt `generate` encodes at a time, unless its `prefill_chunk_size` says otherwise. In the 6B
# shape 1,024 keep 0.7 GB of intermediate results in float32, and are as fast as more.
PREFILL_CHUNK_SIZE = 1024
LEAST_TEMPERATURE = 1e-3  # divided by less, scores overflow in half precision: what is lower is greedy
CONTEXT_REMEDY = (
    "Shorten the input, or extend the context with rope_parameters (yarn or linear with seq_length, or dynamic)."
)

# Past keys and values as the published code has them: per layer (key, value), each [seq, batch, groups, head_dim].
LegacyCache = Sequence[tuple[torch.Tensor, torch.Tensor]]


@functools.cache
def rows_for_float32(dtype: torch.dtype) -> float:
    """
    Returns for how many rows or more the CPU multiplies float16 or bfloat16 weights faster in float32, cast chunk by chunk.

    Measured for 512 rows of a 4096 x 27392 weight, two cores: without oneDNN's products for the dtype 6 to 10 times faster
    (AVX2 only, or oneDNN switched off), with those for bfloat16 1.6 times unless there is AMX, for float16 not at all.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return float("inf")
    try:
        has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        has_float16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    except (AttributeError, RuntimeError):  # torch without oneDNN
        has_bfloat16 = has_float16 = False
    if dtype == torch.float16:
        return float("inf") if has_float16 else 16
    if has_bfloat16:
        return float("inf") if torch.cpu._is_amx_tile_supported() else 128
    return 16


def linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """
    `layer(x)`. On the CPU, half precision takes the faster way for long inputs.

    Not a subclass of `nn.Linear`, as other libraries (bitsandbytes) replace layers of that very type alone.
    """
    # First, as the compiler cannot trace rows_for_float32.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return layer(x)
    if x.device.type != "cpu" or x.shape[:-1].numel() < rows_for_float32(x.dtype) or type(layer) is not nn.Linear:
        return layer(x)
    weight, bias = layer.weight, layer.bias
    is_plain = type(weight) is nn.Parameter and type(x) is torch.Tensor and weight.dtype == x.dtype
    is_hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)  # accelerate's, say
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not is_plain or is_hooked or needs_gradient:
        return layer(x)
    output = chunked_linear(x.reshape(-1, x.shape[-1]), len(weight), lambda rows: weight[rows].float(), bias)
    return output.view(*x.shape[:-1], len(weight))


class Embedding(nn.Module):
    """Token embedding."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        return self.word_embeddings(input_ids)


class PrefixEncoder(nn.Module):
    """
    Trainable keys and values that precede the text in every layer (P-Tuning v2: Liu et al. 2021, arXiv 2110.07602).

    Input: prefix indices, `[batch, pre_seq_len]`. Output: `[batch, pre_seq_len, num_layers * 2 * groups * head_dim]`.
    """

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.prefix_projection = config.prefix_projection
        kv_size = config.num_layers * 2 * config.num_key_value_heads * config.kv_channels
        # As published: as wide as the output also where an MLP comes between.
        self.embedding = nn.Embedding(config.pre_seq_len, kv_size)
        if self.prefix_projection:
            self.trans = nn.Sequential(
                nn.Linear(kv_size, config.hidden_size), nn.Tanh(), nn.Linear(config.hidden_size, kv_size)
            )

    def forward(self, prefix: torch.LongTensor) -> torch.Tensor:
        past_key_values = self.embedding(prefix)
        return self.trans(past_key_values) if self.prefix_projection else past_key_values


class RotaryEmbedding(nn.Module):
    """
    Angles of rotary position embedding (Su et al. 2021, arXiv 2104.09864) for the first half of each head.

    Computed in float32 whatever the model's dtype: the published code computes them in float16, where positions above
    2,048 are no longer told apart.
    """

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.seq_length
        self.original_max_seq_len = config.seq_length
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        # The checkpoint holds inv_freq in float16. It is computed anew rather than loaded.
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: ChatGLMConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Returns the inverse frequencies, float32 `[rotary_dim / 2]`, and the factor for cos and sin (1)."""
        dim = int(config.kv_channels * config.rope_parameters["partial_rotary_factor"])
        exponents = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    def _apply(self, fn, recurse=True):
        # model.half() and the like would round the frequencies, and with them every angle: they change device only.
        frequencies = {name: buffer for name, buffer in self._buffers.items() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in frequencies.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns cos and sin in the dtype of `x`, each `[batch, 1, seq, head_dim]`, every angle twice in a row, the sine
        first with a minus. The channels that are not rotated have 1 and 0: fewer operations in each layer than to take
        them apart.
        """
        angles = position_ids[:, None, :, None].float() * self.inv_freq.to(x.device, torch.float)
        angles = angles.repeat_interleave(2, dim=-1)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        sin[..., 0::2].neg_()
        rest = self.config.kv_channels - angles.shape[-1]
        cos, sin = nn.functional.pad(cos, (0, rest), value=1.0), nn.functional.pad(sin, (0, rest))
        return cos.to(x.dtype), sin.to(x.dtype)


def apply_rotary_pos_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (0, 1), (2, 3), ... of channels of `x`, `[batch, heads, seq, head_dim]`."""
    x_swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * cos + x_swapped * sin


class RMSNorm(nn.Module):
    """RMS normalization (Zhang and Sennrich 2019, arXiv 1910.07467) over the last dimension."""

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        # Unlike LLaMA's, the weight multiplies before the downcast.
        normed = nn.functional.rms_norm(hidden_states.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)
        return normed.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention in plain torch. Keys and values are not copied per head: the query heads that share a group become rows
    of one product.

    Args:
        query: `[batch, heads, q_len, head_dim]`.
        key, value: `[batch, groups, kv_len, head_dim]`.
        attention_mask: Added to the scores, or boolean with true where attended, `[batch, 1, q_len, kv_len]`.

    Returns:
        The output, `[batch, q_len, heads, head_dim]`, and the weights, `[batch, heads, q_len, kv_len]`.
    """
    batch, heads, q_len, head_dim = query.shape
    groups, kv_len = key.shape[1], key.shape[2]
    folded = query.reshape(batch, groups, heads // groups * q_len, head_dim)
    scores = torch.matmul(folded, key.transpose(2, 3)).view(batch, heads, q_len, kv_len) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=softmax_dtype).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights.view(batch, groups, heads // groups * q_len, kv_len), value)
    return output.view(batch, heads, q_len, head_dim).transpose(1, 2).contiguous(), weights


def can_group_sdpa(query: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether `grouped_sdpa_forward` takes these: off the CPU several tokens would cost more, and so it is the library's."""
    has_one_mask = attention_mask is None or attention_mask.shape[1] == 1  # for all heads
    return has_one_mask if query.shape[2] == 1 else query.device.type == "cpu"


def grouped_sdpa_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    torch's scaled_dot_product_attention where the library would have it read keys and values once for each head: for one
    token everywhere (the query heads that share a group become rows of one product), for more on the CPU.

    Arguments and output are those of `eager_attention_forward`, without the weights.
    """
    batch, heads, q_len, head_dim = query.shape
    groups = key.shape[1]
    options = dict(attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
    if q_len == 1:
        folded = query.reshape(batch, groups, heads // groups, head_dim)
        output = nn.functional.scaled_dot_product_attention(folded, key, value, **options)
        return output.reshape(batch, 1, heads, head_dim), None
    is_causal = (module.is_causal if is_causal is None else is_causal) and attention_mask is None
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, enable_gqa=heads != groups, **options
    )
    return output.transpose(1, 2).contiguous(), None


class SelfAttention(nn.Module):
    """Multi-query attention in groups; `query_key_value` is fused as in the checkpoint."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.multi_query_attention = config.multi_query_attention
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        qkv_size = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        qkv_bias = config.add_bias_linear or config.add_qkv_bias
        self.query_key_value = nn.Linear(config.hidden_size, qkv_size, bias=qkv_bias)
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.add_bias_linear)

    def split_qkv(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Splits `[batch, seq, qkv_size]` into query, key and value, each `[batch, heads or groups, seq, head_dim]`, query
        and key rotated.
        """
        batch, seq = qkv.shape[:2]
        if self.multi_query_attention:
            groups = self.num_key_value_heads
            heads = qkv.view(batch, seq, -1, self.head_dim).transpose(1, 2)
            rotated = apply_rotary_pos_emb(heads[:, :-groups], cos, sin)  # together
            return rotated[:, :-groups], rotated[:, -groups:], heads[:, -groups:]
        # Without multi-query attention the checkpoint has query, key and value of each head side by side.
        heads = qkv.view(batch, seq, self.num_heads, 3 * self.head_dim).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)
        return apply_rotary_pos_emb(query, cos, sin), apply_rotary_pos_emb(key, cos, sin), value

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        prefix_key: torch.Tensor | None = None,
        prefix_value: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.split_qkv(linear(self.query_key_value, hidden_states), *position_embeddings)
        if prefix_key is not None:
            key = torch.cat((prefix_key, key), dim=2)
            value = torch.cat((prefix_value, value), dim=2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        is_paged = kwargs.get("cache") is not None  # continuous batching, whose cache the library's sdpa updates
        if self.config._attn_implementation == "sdpa" and not is_paged and can_group_sdpa(query, attention_mask):
            attention_interface = grouped_sdpa_forward
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return linear(self.dense, output.reshape(*hidden_states.shape[:-1], -1)), weights


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202); gate and up projection are fused."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        bias = config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = linear(self.dense_h_to_4h, hidden_states).chunk(2, dim=-1)
        return linear(self.dense_4h_to_h, nn.functional.silu(gate) * up)


def build_norm(config: ChatGLMConfig) -> nn.Module:
    return (RMSNorm if config.rmsnorm else LayerNorm)(config.hidden_size, eps=config.layernorm_epsilon)


class GLMBlock(GradientCheckpointingLayer):
    """One transformer layer. Input and output: `[batch, seq, hidden]`."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.residual_post_layernorm = config.apply_residual_connection_post_layernorm
        self.fp32_residual_connection = config.fp32_residual_connection
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = build_norm(config)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = build_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix_key: torch.Tensor | None = None,
        prefix_value: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        hidden_states, normed = self.pre_norm(self.input_layernorm, hidden_states)
        output, _ = self.self_attention(normed, prefix_key=prefix_key, prefix_value=prefix_value, **kwargs)
        hidden_states = hidden_states + self.dropout(output)

        hidden_states, normed = self.pre_norm(self.post_attention_layernorm, hidden_states)
        return hidden_states + self.dropout(self.mlp(normed))

    def pre_norm(self, norm: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the residual and the input of the sublayer."""
        normed = norm(hidden_states)
        residual = normed if self.residual_post_layernorm else hidden_states
        # A float32 residual stream ends before the linear layers, which keep the model's dtype.
        return residual, normed.to(norm.weight.dtype) if self.fp32_residual_connection else normed

    def dropout(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return hidden_states  # twice in each layer, where even a call that does nothing counts
        return nn.functional.dropout(hidden_states, p=self.hidden_dropout)


class GLMTransformer(nn.Module):
    """The stack of layers, and the norm after it."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.fp32_residual_connection = config.fp32_residual_connection
        self.layers = nn.ModuleList([GLMBlock(config, i) for i in range(config.num_layers)])
        self.final_layernorm = build_norm(config) if config.post_layer_norm else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        dtype = hidden_states.dtype
        if self.fp32_residual_connection:
            hidden_states = hidden_states.float()
        for i, layer in enumerate(self.layers):
            # Positional, as reentrant gradient checkpointing needs tensors that gradients flow into.
            hidden_states = layer(hidden_states, *(prefix[i] if prefix is not None else ()), **kwargs)
        if self.final_layernorm is not None:
            hidden_states = self.final_layernorm(hidden_states)
        return hidden_states.to(dtype)


class FuseQKV(Concatenate):
    """Fuses separate query, key and value projections of a checkpoint into `query_key_value`, while loading."""

    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        if config.multi_query_attention:
            return super().convert(input_dict, source_patterns, target_patterns)
        # Without multi-query attention, query, key and value of each head are side by side.
        tensors = (input_dict.pop(pattern) for pattern in source_patterns)
        tensors = [tensor[0] if isinstance(tensor, list) else tensor for tensor in tensors]
        heads = [tensor.unflatten(0, (config.num_attention_heads, config.kv_channels)) for tensor in tensors]
        return {target_patterns[0]: torch.cat(heads, dim=1).flatten(0, 1)}


# Other programs write the head under the ecosystem's name, and query, key and value apart. Both load.
LOAD_CONVERSIONS = [
    WeightRenaming(r"^lm_head\.", "transformer.output_layer."),
    WeightConverter(
        [f"self_attention.{name}" for name in ("q_proj", "k_proj", "v_proj")],
        "self_attention.query_key_value",
        operations=[FuseQKV(dim=0)],
    ),
]
_loading = threading.RLock()


@contextmanager
def load_conversions():
    """
    Has the library apply `LOAD_CONVERSIONS`. Its registry is global, and makes every save write the other names, so it
    holds them only while a checkpoint is loaded.
    """
    with _loading:
        register_checkpoint_conversion_mapping(ChatGLMConfig.model_type, LOAD_CONVERSIONS, overwrite=True)
        try:
            yield
        finally:
            register_checkpoint_conversion_mapping(ChatGLMConfig.model_type, [], overwrite=True)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What all ChatGLM2 models have in common: what they can do, and how they are loaded."""

    config_class = ChatGLMConfig
    config: ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GLMBlock, "attentions": SelfAttention}
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq$"]

    @classmethod
    def from_pretrained(cls, *args, device=None, empty_init=True, **kwargs):
        """
        The library's method, with two arguments of the published code: `device`, where to put the model, and
        `empty_init`, which has no effect as weights are never initialized before they are loaded.
        """
        if device is not None:
            kwargs.setdefault("device_map", {"": device})
        with load_conversions():
            loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        model.base_model.freeze_all_but_prefix()  # the library makes what it loads trainable
        return loaded

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantized in the published format."""
        return getattr(self, "quantization_method", None) == QUANT_METHOD

    def quantize(self, bits: int, empty_init: bool = False, device=None, calibration=None, **options):
        """
        Quantizes the layers in place, in the published format, and returns the model.

        Args:
            bits (`int`): 4 or 8; 0 changes nothing.
            empty_init (`bool`): Accepted as in the published code, without effect.
            device: Where to put the model then.
            calibration (`Iterable[torch.LongTensor]`, *optional*): Ids of some text, each `[batch, seq]`, by which to
                round such that the model's outputs change less. 16,000 tokens do.
            options: The others of `ChatGLMQuantizationConfig`: `group_size`, `quantize_embeddings`, `scale_search`,
                `exact_activations`, `modules_to_not_convert`.

        Raises:
            ValueError: if an option is wrong, or a weight is not finite. The model is then as it was.
        """
        if self.quantized:
            logger.warning("Already quantized.")
        elif bits != 0:
            quantize(self, bits, calibration, **options)
        return self if device is None else self.to(device)

    def resize_token_embeddings(self, *args, **kwargs):
        """The library's method. INT8 embeddings cannot be resized."""
        if hasattr(self.get_input_embeddings(), "weight_scale"):
            raise ValueError(
                "The embeddings are in INT8 and cannot be resized: dequantize() first, or resize and then quantize."
            )
        return super().resize_token_embeddings(*args, **kwargs)

    # The library refuses to cast quantized models. Here scales and activations follow, and packed weights stay.

    def half(self):
        return nn.Module.half(self) if self.quantized else super().half()

    def float(self):
        return nn.Module.float(self) if self.quantized else super().float()

    def _init_weights(self, module: nn.Module):
        prefix_encoder = getattr(self.base_model, "prefix_encoder", None)
        if hasattr(module, "weight_scale"):  # a quantized layer, perhaps of another copy of the module
            init_quantized(module)
        elif prefix_encoder is not None and any(module is part for part in prefix_encoder.modules()):
            # torch's own initialization, as published: the recipes' learning rates are made for it.
            if isinstance(module, nn.Embedding):
                init.normal_(module.weight)
            elif isinstance(module, nn.Linear):
                init.kaiming_uniform_(module.weight, a=5**0.5)
                init.uniform_(module.bias, -(module.in_features**-0.5), module.in_features**-0.5)
        else:
            super()._init_weights(module)

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """The library's method. Writes the published names and shapes, also if the checkpoint loaded had others."""
        cls = type(self)
        if cls.__module__.startswith("torch."):  # made by FSDP2, whose code would be saved as the model's
            original = next(base for base in cls.__mro__ if base.__module__ == __name__)
            cls.__module__, cls.__name__ = original.__module__, original.__name__
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """
    The network without a head, except that `output_layer` is its member, as in the checkpoint.

    Args:
        config (`ChatGLMConfig`): What to build.
        with_output_layer (`bool`): Whether there is an `output_layer`. Classifiers have none.
    """

    _tied_weights_keys = {"output_layer.weight": "embedding.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig, with_output_layer: bool = True):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryEmbedding(config)
        self.encoder = GLMTransformer(config)
        self.output_layer = None
        if with_output_layer:
            self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        else:
            self._tied_weights_keys = None
        self.gradient_checkpointing = False

        self.pre_seq_len = config.pre_seq_len
        if self.pre_seq_len is not None:
            self.prefix_encoder = PrefixEncoder(config)
            self.prefix_dropout = nn.Dropout(0.1)
            self.freeze_all_but_prefix()
        self.post_init()

    def freeze_all_but_prefix(self):
        """With a P-Tuning prefix, makes that alone trainable; without one, does nothing."""
        if self.pre_seq_len is not None:
            self.requires_grad_(False)
            self.prefix_encoder.requires_grad_(True)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.embedding.word_embeddings = value

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.output_layer

    def set_output_embeddings(self, value: nn.Linear):
        self.output_layer = value

    def get_prompt(self, batch_size: int, device, dtype=torch.half) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns per layer the (key, value) of the P-Tuning prefix, each `[batch, groups, pre_seq_len, head_dim]`."""
        prefix = torch.arange(self.pre_seq_len, device=device).expand(batch_size, -1)
        states = self.prefix_encoder(prefix).type(dtype)
        states = states.view(
            batch_size,
            self.pre_seq_len,
            2 * self.config.num_layers,
            self.config.num_key_value_heads,
            self.config.kv_channels,
        )
        states = self.prefix_dropout(states).permute(2, 0, 3, 1, 4)
        return list(zip(states[0::2], states[1::2]))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)  # as published: the last hidden state is before the final norm
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        full_attention_mask: torch.BoolTensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_legacy_cache: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: `[batch, seq]`; or else `inputs_embeds`, `[batch, seq, hidden]`.
            position_ids: `[batch, seq]`. By default they go on from the cache.
            attention_mask: 1 where attended, `[batch, cached + seq]`, without the P-Tuning prefix; or
                `[batch, 1, seq, cached + seq]`, boolean or to be added to the scores.
            full_attention_mask: The published form of the latter: boolean, true where masked.
            past_key_values: Any cache of the library, or the published tuples of [seq, batch, groups, head_dim].
            return_legacy_cache: Whether to return the published tuples.

        Returns:
            `last_hidden_state`, `[batch, seq, hidden]`; `hidden_states`: the embedding and the output of each layer.

        Raises:
            ValueError: if there is not exactly one of `input_ids` and `inputs_embeds`, or an id is outside the
                vocabulary (checked on the CPU only, where it is free).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            check_range("input_ids", input_ids, self.config.padded_vocab_size, "the vocabulary (padded_vocab_size)")
            inputs_embeds = self.embedding(input_ids)
        batch_size, seq_length = inputs_embeds.shape[:2]
        if full_attention_mask is not None:
            attention_mask = ~full_attention_mask.bool()
        if past_key_values is not None and not isinstance(past_key_values, Cache):
            past_key_values = cache_from_legacy(past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = let_grow(DynamicCache(config=self.config))

        if past_key_values is not None:
            check_cache(past_key_values, self.config, inputs_embeds)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        prefix, mask_cache = None, past_key_values
        if self.pre_seq_len is not None:
            if seen == 0:
                device, dtype = inputs_embeds.device, inputs_embeds.dtype
                if torch.is_autocast_enabled(device.type):  # what the layers' keys are in
                    dtype = torch.get_autocast_dtype(device.type)
                prefix = self.get_prompt(batch_size, device, dtype)
                if past_key_values is None:
                    # Nothing to keep it in (gradient checkpointing, say): handed to each layer.
                    mask_cache = DynamicCache()
                    mask_cache.update(*prefix[0], 0)
                else:
                    for layer_idx, (key, value) in enumerate(prefix):
                        past_key_values.update(key, value, layer_idx)
                    prefix = None
            else:
                seen = seen - self.pre_seq_len
            if attention_mask is not None:
                # The prefix is visible to all: 1, true, or 0 added to the scores.
                visible = 0 if attention_mask.dim() == 4 and attention_mask.is_floating_point() else 1
                attention_mask = nn.functional.pad(attention_mask, (self.pre_seq_len, 0), value=visible)

        if position_ids is None:
            position_ids = (torch.arange(seq_length, device=inputs_embeds.device) + seen)[None]
        warn_beyond_context(position_ids, context_length(self.config))
        attention_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=mask_cache,
            position_ids=position_ids,
        )
        hidden_states = self.encoder(
            inputs_embeds,
            prefix=prefix,
            attention_mask=attention_mask,
            position_embeddings=self.rotary_pos_emb(inputs_embeds, position_ids),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        if return_legacy_cache and past_key_values is not None:
            past_key_values = cache_to_legacy(past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class GrowingLayer(DynamicLayer):
    """
    The cache of a layer that grows as needed, with room to spare: a step of decoding copies the new token into it, where
    the library's layer copies all of the cache.

    What `keys` and `values` were before `crop` is overwritten by what comes next: clone them to keep them.
    """

    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        is_first = not self.is_initialized or self.keys.numel() == 0
        if is_first or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if self._buffers is None or not (
            fits(self.keys, self._buffers[0], key_states) and fits(self.values, self._buffers[1], value_states)
        ):
            self._buffers = with_room(self.keys, key_states), with_room(self.values, value_states)
        self.keys = append(self.keys, self._buffers[0], key_states)
        self.values = append(self.values, self._buffers[1], value_states)
        return self.keys, self.values


def fits(cached: torch.Tensor, buffer: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether `cached` still is the beginning of `buffer`, rather than replaced by a copy, and there is room for `new`."""
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return False  # torch forbids to write to it
    is_beginning = cached.data_ptr() == buffer.data_ptr() and cached.stride() == buffer.stride()
    return is_beginning and buffer.shape[0] == new.shape[0] and cached.shape[2] + new.shape[2] <= buffer.shape[2]


def with_room(cached: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Returns a buffer, `[batch, groups, n, head_dim]`, that begins with `cached` and has room for `new` and some more."""
    batch, groups, length, head_dim = cached.shape
    length = (length + new.shape[2]) * 5 // 4 + 64
    buffer = cached.new_empty(batch, groups, length, head_dim)
    buffer[:, :, : cached.shape[2]] = cached
    return buffer


def append(cached: torch.Tensor, buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    start, end = cached.shape[2], cached.shape[2] + new.shape[2]
    buffer[:, :, start:end] = new
    return buffer[:, :, :end]


def let_grow(cache: Cache | None) -> Cache | None:
    """Has a new, empty `DynamicCache` made of `GrowingLayer`s; leaves others as they are."""
    if type(cache) is DynamicCache and not cache.offloading:
        if all(type(layer) is DynamicLayer and not layer.is_initialized for layer in cache.layers):
            cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache


def select_positions(hidden_states: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """
    Selects positions of `[batch, seq, hidden]`. The library has this as `slice_logits_to_keep` since 5.20.

    Args:
        keep: How many from the last (0: all); or indices, `[n]` or for each row `[batch, n]`; or booleans `[batch, seq]`.
    """
    if isinstance(keep, int):
        return hidden_states[:, -keep:]
    if keep.ndim == 1:
        return hidden_states[:, keep]
    if keep.dtype == torch.bool:
        return hidden_states[keep]
    return torch.take_along_dim(hidden_states, keep[..., None], dim=1)


def check_range(name: str, ids: torch.Tensor, limit: int, of_what: str):
    """Raises `ValueError` for ids outside [0, limit). On the CPU only: elsewhere to look would stall the device."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(
            f"{name} must be in [0, {limit}), {of_what}, got {low if low < 0 else high}. Was the text encoded with the "
            "tokenizer of another model?"
        )


def check_cache(cache: Cache, config: ChatGLMConfig, inputs_embeds: torch.Tensor):
    """
    Raises `ValueError` for a cache that cannot go with the input: of another model, batch, dtype or device, or too small.

    Args:
        inputs_embeds: `[batch, seq, hidden]`.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not cache.layers:
        return
    if inputs_embeds.device.type == "cpu":  # to look elsewhere would stall the device
        check_room(cache, (int(cache.get_seq_length()) or config.pre_seq_len or 0) + inputs_embeds.shape[1])
    keys = getattr(cache.layers[0], "keys", None)
    if keys is None or keys.dim() != 4:  # nothing in it yet
        return
    remedy = "Start with an empty one: past_key_values=None."
    if len(cache.layers) != config.num_layers:
        raise ValueError(f"The cache is of a model of {len(cache.layers)} layers, not {config.num_layers}. {remedy}")
    groups, head_dim = config.num_key_value_heads, config.kv_channels
    if keys.shape[1::2] != (groups, head_dim):
        raise ValueError(
            f"The cache is of another model: its keys have {keys.shape[1]} heads of {keys.shape[-1]} channels, this "
            f"model's {groups} of {head_dim}. {remedy}"
        )
    if keys.shape[0] != inputs_embeds.shape[0]:
        raise ValueError(
            f"The cache is of a batch of {keys.shape[0]}, the input of {inputs_embeds.shape[0]}. {remedy} To go on with "
            "some of its rows, use its batch_select_indices or batch_repeat_interleave."
        )
    if keys.dtype != inputs_embeds.dtype and not torch.is_autocast_enabled(keys.device.type):
        raise ValueError(
            f"The cache is in {keys.dtype}, the model computes in {inputs_embeds.dtype}: it was cast in between. {remedy}"
        )
    if keys.device.type != inputs_embeds.device.type and not getattr(cache, "offloading", False):
        raise ValueError(
            f"The cache is on {keys.device}, the input on {inputs_embeds.device}: the model was moved in between. {remedy}"
        )


def check_room(cache: Cache, length: int):
    """Raises `ValueError` if a static cache is too small for so many tokens."""
    room = min((getattr(layer, "max_cache_len", length) for layer in cache.layers), default=length)
    if length > room:
        raise ValueError(
            f"The cache has room for {room} tokens, and {length} would be in it. Make it with a larger max_cache_len, or "
            "lower max_new_tokens."
        )


def context_length(config: ChatGLMConfig) -> int:
    """Positions that the model was made for, or that its dynamic NTK scaling stretches that to."""
    if config.rope_parameters["rope_type"] == "dynamic":
        return int(config.seq_length * config.rope_parameters["factor"])
    return config.seq_length


def check_prompt(length: int, config: ChatGLMConfig):
    """Raises `ValueError` for a prompt of more tokens than the context has."""
    context = context_length(config)
    if length > context:
        raise ValueError(
            f"The prompt has {length} tokens, the model's context {context} (seq_length). {CONTEXT_REMEDY}"
        )


def warn_beyond_context(position_ids: torch.Tensor, context: int):
    if position_ids.device.type != "cpu" or torch.compiler.is_compiling() or position_ids.numel() == 0:
        return
    if int(position_ids.max()) >= context:
        logger.warning_once(
            f"There are positions beyond the {context} that this model was made for (seq_length): expect poor text. "
            f"{CONTEXT_REMEDY}"
        )


def cache_from_legacy(past_key_values: LegacyCache) -> DynamicCache:
    """Converts the published cache: per layer (key, value), each `[seq, batch, groups, head_dim]`."""
    cache = DynamicCache()
    for layer_idx, (key, value) in enumerate(past_key_values):
        cache.update(key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), layer_idx)
    return cache


def cache_to_legacy(cache: Cache) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """The inverse of `cache_from_legacy`."""
    return tuple((layer.keys.permute(2, 0, 1, 3), layer.values.permute(2, 0, 1, 3)) for layer in cache.layers)


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """
    Ends the rows whose logits are NaN or infinite, with a warning; the other rows go on.

    Args:
        eos_token_id (`int`): The token that ends a row.
    """

    def __init__(self, eos_token_id: int):
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        invalid = ~torch.isfinite(scores).all(dim=-1)
        if not invalid.any():
            return scores
        logger.warning(
            f"The model's logits are NaN or infinite in row(s) {invalid.nonzero().flatten().tolist()}, which end here. "
            "Check the weights; on a device where float16 overflows use bfloat16 or float32."
        )
        end = torch.full_like(scores, -torch.inf)
        end[:, self.eos_token_id] = 0
        return torch.where(invalid[:, None], end, scores)


def capture_torch_context() -> Callable[[], ExitStack]:
    """Returns what enters, in another thread, the settings of torch that hold in this one and would be lost there."""
    is_inference = torch.is_inference_mode_enabled()
    device_types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    autocast = [(t, torch.get_autocast_dtype(t), torch.is_autocast_enabled(t)) for t in device_types]
    cuda_device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(is_inference))
        for device_type, dtype, enabled in autocast:
            stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled))
        if cuda_device is not None:
            stack.enter_context(torch.cuda.device(cuda_device))
        return stack

    return enter


class TokenStreamer(BaseStreamer):
    """
    Hands the tokens of each step of `generate`, which runs in a thread of its own, to an iterating consumer.

    Generation waits until the consumer asks for more. So whatever the consumer holds between two steps (a cache, the
    random state) stands still, and when it stops iterating, generation has stopped too.
    """

    class Stopped(Exception):
        pass

    def __init__(self):
        self._items = queue.SimpleQueue()
        self._resume = threading.Semaphore(0)
        self._stopped = False
        self._prompt_is_next = True

    def put(self, value: torch.Tensor):
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self._items.put(value)
        self._resume.acquire()
        if self._stopped:
            raise self.Stopped

    def end(self):
        pass  # `run` sees `generate` return, also where the library does not call this

    def run(self, generate: Callable) -> Iterator[torch.Tensor]:
        """Calls `generate(streamer=self)`, and yields what it puts; exceptions in it are raised here."""
        enter_context = capture_torch_context()

        def target():
            try:
                with enter_context():
                    generate(streamer=self)
            except self.Stopped:
                pass
            except BaseException as error:
                self._items.put(error)
            else:
                self._items.put(None)

        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        try:
            while (item := self._items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
                self._resume.release()
        finally:
            self._stopped = True
            self._resume.release()
            thread.join()


@dataclass
class ChatRecord:
    """
    What a cache that `chat` returned holds, so that the next round can tell which part of it still stands.

    Args:
        ids (`list[int]`): Every id of the context in order, those of answers as they were generated. The cache holds
            the keys and values of the first ones.
        rounds (`list[tuple[str, str]]`): The rounds, as returned in the history.
        ends (`list[int]`): `ids[:ends[i]]` are the rounds up to i.
    """

    ids: list[int] = field(default_factory=list)
    rounds: list[tuple[str, str]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """
    The language model, with `chat`.

    Args:
        config (`ChatGLMConfig`): What to build.
        empty_init (`bool`): Accepted as in the published code, without effect.
        device: Where to put the model.
    """

    _tied_weights_keys = {"transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"}
    _tp_plan = {"transformer.output_layer": "colwise_gather_output"}
    _pp_plan = {"transformer.output_layer": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"transformer.output_layer": "keep_full_weight"}

    def __init__(self, config: ChatGLMConfig, empty_init: bool = True, device=None):
        super().__init__(config)
        self.max_sequence_length = config.seq_length
        self.transformer = ChatGLMModel(config)
        # A P-Tuning prefix enters the cache in the first forward only, which depends on data.
        self._can_compile_fullgraph = config.pre_seq_len is None
        self.post_init()
        if device is not None:
            self.to(device)

    def get_output_embeddings(self) -> nn.Linear:
        return self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Linear):
        self.transformer.output_layer = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        return_last_logit: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: `[batch, seq]`, -100 where there is no loss. They are shifted here: logits predict the next label.
            return_last_logit: Compute the logits of the last position only.
            logits_to_keep: How many positions, from the last, to compute logits of (0: all), or which.

            The others are those of `ChatGLMModel.forward`.

        Returns:
            `logits`, `[batch, seq, padded_vocab_size]`, and the loss (in float32) if there are `labels`.
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = select_positions(outputs.last_hidden_state, 1 if return_last_logit else logits_to_keep)
        logits = linear(self.transformer.output_layer, hidden_states)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    # Generation: what the library's `generate` has to know of this model

    def _get_logits_processor(self, generation_config, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        eos_token_id = generation_config.eos_token_id
        eos_token_id = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
        if eos_token_id is None or eos_token_id < 0:  # nothing ends a row
            return processors
        return LogitsProcessorList([InvalidScoreLogitsProcessor(eos_token_id), *processors])

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length):
        cache = model_kwargs.get("past_key_values")
        if self.config.pre_seq_len is not None and isinstance(cache, Cache) and int(cache.get_seq_length()):
            raise ValueError(
                "With a P-Tuning prefix (pre_seq_len) generate cannot go on from a cache: it would take the prefix in it "
                "for tokens of the prompt. Pass the whole prompt without past_key_values."
            )
        if "offloaded" in (generation_config.cache_implementation or "") and not torch.accelerator.is_available():
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} moves a GPU's cache to the CPU, where this "
                "model is already. Leave it out."
            )
        mask = model_kwargs.get("attention_mask")
        length = getattr(generation_config, "_mask_length", 0)  # since 5.20 a mask that hides nothing is dropped
        if mask is not None and mask.dim() == 2:
            length = int(mask.sum(-1).max())  # padding does not count
        if not getattr(generation_config, "is_assistant", False):  # whose context need not hold all of the dialogue
            check_prompt(length, self.config)
        max_cache_length += self.config.pre_seq_len or 0
        result = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, mode, batch_size, max_cache_length
        )
        cache = let_grow(model_kwargs.get("past_key_values"))
        if cache is not None:
            check_room(cache, max_cache_length)
        return result

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,  # the library looks whether this is here
        **kwargs,
    ):
        # Assisted decoding would put the whole prompt behind a cache that holds its beginning.
        has_cache = past_key_values is not None and self.config.pre_seq_len is None
        if next_sequence_length is None and has_cache and attention_mask is not None:
            seen = int(past_key_values.get_seq_length())
            if seen and attention_mask.shape == input_ids.shape:
                next_sequence_length = input_ids.shape[1] - seen
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        if self._prefill_beginning(input_ids, generation_config, model_kwargs):
            mask, length = model_kwargs.get("attention_mask"), model_kwargs["past_key_values"].get_seq_length()
            total = (
                mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", input_ids.shape[1])
            )
            if total > input_ids.shape[1]:  # only what was not cached before: what still is not
                input_ids = input_ids[:, int(length) - total :]
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None  # done
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _assisted_decoding(self, input_ids, *args, generation_config, **kwargs):
        if len(input_ids) == 1:  # the library refuses more
            self._prefill_beginning(input_ids, generation_config, kwargs)
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones_like(input_ids)  # by which the first step is known
        return super()._assisted_decoding(input_ids, *args, generation_config=generation_config, **kwargs)

    def _prefill_beginning(self, input_ids, generation_config, model_kwargs) -> bool:
        """
        Encodes a long prompt into the cache chunk by chunk, all but the last chunk. Returns whether this is for it to do.

        The library's own chunks have to be asked for, forget (before 5.20) that the cache may hold the beginning, and
        assisted decoding has none.
        """
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        chunk_size = generation_config.prefill_chunk_size
        if chunk_size is None:
            if self._needs_the_whole_prompt(generation_config):
                return False
            chunk_size = PREFILL_CHUNK_SIZE
        if chunk_size < 1:
            raise ValueError(f"prefill_chunk_size must be at least 1, got {chunk_size}.")
        # A P-Tuning prefix, ours or PEFT's (which replaces this method), is put before the prompt by its first forward.
        has_prefix = self.config.pre_seq_len is not None or "prepare_inputs_for_generation" in vars(self)
        if cache is None or has_prefix or model_kwargs.get("inputs_embeds") is not None:
            return False
        if mask is None:  # since 5.20 one that hides nothing is dropped, and its length kept
            length = getattr(generation_config, "_mask_length", input_ids.shape[1])
            mask = input_ids.new_ones(input_ids.shape[0], length)
        begin, total = int(cache.get_seq_length()), mask.shape[-1]
        offset = total - input_ids.shape[1]  # how many tokens are in the cache only
        if mask.dim() != 2 or not 0 <= offset <= begin:
            return False
        position_ids = model_kwargs.get("position_ids")
        if position_ids is None or position_ids.shape[-1] != total:
            position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        others = ("past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep")
        others = {name: value for name, value in model_kwargs.items() if name not in others}
        for end in range(begin + chunk_size, total, chunk_size):
            inputs = self.prepare_inputs_for_generation(
                input_ids[:, end - chunk_size - offset : end - offset],
                past_key_values=cache,
                attention_mask=mask[:, :end],
                position_ids=position_ids[..., end - chunk_size : end],
                use_cache=True,
                logits_to_keep=1,
                **others,
            )
            self(**inputs)
        return True

    def _needs_the_whole_prompt(self, generation_config) -> bool:
        """Whether chunks, unless asked for, would change what comes out, or keep processes waiting for each other."""
        # Frequencies that depend on the length, which has to be known from the first token on
        depends_on_length = self.config.rope_parameters["rope_type"] in ("dynamic", "longrope")
        returns_states = generation_config.output_hidden_states or generation_config.output_attentions
        # Ranks gather weights together, in each forward, and their prompts may differ in length.
        is_sharded = is_fsdp_managed_module(self) or is_deepspeed_zero3_enabled()
        return bool(depends_on_length or returns_states or is_sharded)

    def generate_batch(self, inputs, generation_config=None, continuous_batching_config=None, **kwargs):
        """
        The library's continuous batching. Its paged cache has no place for a P-Tuning prefix.

        On the CPU the cache is as large as these requests need, up to 65,536 tokens, beyond which they wait for each
        other; by itself the library would take nearly all of the memory.
        """
        if self.config.pre_seq_len is not None:
            raise ValueError("generate_batch does not work with a P-Tuning prefix (pre_seq_len): use generate.")
        for ids in inputs:
            check_prompt(len(ids), self.config)
        if continuous_batching_config is None and self.device.type == "cpu":
            config = generation_config or self.generation_config
            limit = kwargs.get("max_new_tokens") or config.max_new_tokens or context_length(self.config)
            sequences = kwargs.get("num_return_sequences") or config.num_return_sequences or 1
            blocks = [sequences * ((len(ids) + limit) // 256 + 1) for ids in inputs]  # of 256 tokens
            num_blocks = max(min(sum(blocks), 256), *blocks, 1)
            continuous_batching_config = ContinuousBatchingConfig(num_blocks=num_blocks, max_batch_tokens=512)
        return super().generate_batch(inputs, generation_config, continuous_batching_config, **kwargs)

    @staticmethod
    def create_masks_for_generate(config, attention_mask=None, **kwargs):
        # The P-Tuning prefix enters the cache in the forward, which only then can make the mask.
        if config.pre_seq_len is not None:
            return attention_mask
        return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)

    # Chat

    def process_response(self, response: str) -> str:
        """Cleans an answer as published: strips it, and fills in the one placeholder that the training data has."""
        return response.strip().replace("[[训练时间]]", "2023年")

    def build_inputs(self, tokenizer, query: str, history: list[tuple[str, str]] | None = None):
        """Returns the encoded prompt of a dialogue, on the model's device."""
        return tokenizer([tokenizer.build_prompt(query, history)], return_tensors="pt").to(self.device)

    def build_stream_inputs(self, tokenizer, query: str, history: list[tuple[str, str]] | None = None):
        """Returns the encoded prompt of the newest round alone, to go on from a cache that holds the `history`."""
        prompt = tokenizer.build_prompt(query, history)
        if not history:
            return tokenizer([prompt], return_tensors="pt").to(self.device)
        ids = encode_continuation(tokenizer, prompt[len(rounds_text(tokenizer, history)) :])
        return tokenizer.pad({"input_ids": [ids]}, return_tensors="pt").to(self.device)

    @torch.no_grad()
    def chat(
        self,
        tokenizer,
        query: str | list[str],
        history: list[tuple[str, str]] | list[list[tuple[str, str]]] | None = None,
        max_length: int = 8192,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        logits_processor: LogitsProcessorList | None = None,
        past_key_values: Cache | None = None,
        return_past_key_values: bool = False,
        **kwargs,
    ):
        """
        Answers a query.

        Args:
            tokenizer (`ChatGLMTokenizer`): The model's tokenizer.
            query (`str`): What the user says; or a list of queries, to be answered together.
            history (`list[tuple[str, str]]`): Earlier rounds, (query, response); with a list of queries, one for each.
                The oldest rounds that do not fit into the context are left out, with a warning.
            max_length (`int`): Limit of prompt and answer together, in tokens. `max_new_tokens` limits the answer.
            do_sample, top_p, temperature, num_beams: How to choose tokens. Temperatures below 0.001 are greedy.
            logits_processor (`LogitsProcessorList`): Applied before sampling; left as it is.
            past_key_values (`Cache`): What the last round returned. The part of it that still holds is reused,
                whatever has become of the history meanwhile.
            return_past_key_values (`bool`): Whether to return a cache for the next round.
            kwargs: Any other argument of `generate`, `GenerationConfig`'s included.

        Returns:
            The response, and the history with this round appended (for a list of queries, lists of them), and the
            cache if it was asked for.

        Raises:
            ValueError: if the query is no string or does not fit into the context, the history is of another shape, or
                the cache is not one that `chat` returned.
        """
        options = dict(
            max_length=max_length, num_beams=num_beams, do_sample=do_sample, top_p=top_p, temperature=temperature
        )
        options = self._chat_options(options, logits_processor, kwargs)
        if not isinstance(query, str) and isinstance(query, (list, tuple)):
            if past_key_values is not None or return_past_key_values:
                raise ValueError("A batch of queries has no cache to reuse: leave past_key_values out, or chat singly.")
            return self._chat_batch(tokenizer, query, history, options)

        history = copy_history(history)
        cache = self._chat_cache(past_key_values, return_past_key_values, options)
        record, inputs, options = self._start_round(tokenizer, query, history, cache, options)
        output = self.generate(**inputs, **options)
        output = output if isinstance(output, torch.Tensor) else output.sequences
        ids = output[0].tolist()
        self._warn_if_cut(tokenizer, ids)
        response = self._finish_round(tokenizer, query, record, ids, inputs["input_ids"].shape[1])
        history.append((query, response))
        return (response, history, cache) if return_past_key_values else (response, history)

    @torch.no_grad()
    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        past_key_values: Cache | None = None,
        max_length: int = 8192,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        logits_processor: LogitsProcessorList | None = None,
        return_past_key_values: bool = False,
        **kwargs,
    ) -> Iterator:
        """
        Answers a query, and yields after each token what `chat` would return: the response so far, the history with it
        and, if asked for, the cache. Stopping early leaves a cache that the next round can reuse.

        The arguments and errors are those of `chat`.
        """
        options = dict(max_length=max_length, do_sample=do_sample, top_p=top_p, temperature=temperature)
        options = self._chat_options(options, logits_processor, kwargs)
        history = copy_history(history)
        cache = self._chat_cache(past_key_values, return_past_key_values, options)
        record, inputs, options = self._start_round(tokenizer, query, history, cache, options)
        response, prompt_length = None, inputs["input_ids"].shape[1]
        for output in self.stream_generate(**inputs, **options):
            ids = output[0].tolist()
            text = tokenizer.decode(answer_ids(tokenizer, ids[prompt_length:]), skip_special_tokens=True)
            # The bytes of one character can come as several tokens.
            if text and not text.endswith("\ufffd"):
                response = self._finish_round(tokenizer, query, record, ids, prompt_length)
                yield self._stream_item(query, response, history, cache, return_past_key_values)
            else:
                record.ids = ids
        self._warn_if_cut(tokenizer, ids)
        last = self._finish_round(tokenizer, query, record, ids, prompt_length)
        if last != response:
            yield self._stream_item(query, last, history, cache, return_past_key_values)

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
        The library's `generate`, step by step: yields `[batch, seq]`, the prompt and all tokens so far, after each
        (and the cache, if asked for). A row that has ended is filled with `pad_token_id`.

        Args:
            input_ids (`torch.LongTensor`): The prompt, `[batch, seq]`.
            return_past_key_values (`bool`): Whether to yield the cache too, which holds all tokens but the last.
            kwargs: Any other argument of `generate`.
        """
        if "streamer" in kwargs:
            raise ValueError("Streaming has a streamer of its own. To use another, pass it to chat or generate.")
        if (kwargs.get("num_beams") or getattr(generation_config, "num_beams", None) or 1) > 1:
            raise ValueError(
                "Beam search cannot be streamed, as it may change earlier tokens: use num_beams=1, or chat."
            )
        if return_past_key_values and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = let_grow(DynamicCache(config=self.config))

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
            yield (output, kwargs["past_key_values"]) if return_past_key_values else output

    def _chat_options(self, options: dict, logits_processor, kwargs: dict) -> dict:
        """Merges the arguments of `chat` into those of `generate`."""
        if kwargs.get("generation_config") is not None:
            # What the caller left at its default is the generation_config's to say.
            defaults = dict(max_length=8192, num_beams=1, do_sample=True, top_p=0.8, temperature=0.8)
            options = {name: value for name, value in options.items() if value != defaults[name]}
        elif not options["do_sample"] or (
            options["temperature"] is not None and options["temperature"] < LEAST_TEMPERATURE
        ):
            options.update(do_sample=False, top_p=1.0, temperature=1.0)
        if logits_processor is not None:
            options["logits_processor"] = LogitsProcessorList(logits_processor)
        options = {**options, **kwargs}
        if (options.get("num_return_sequences") or 1) > 1:
            raise ValueError(
                "chat gives one answer: num_return_sequences must be 1. For several, call it several times."
            )
        for name in ("max_new_tokens", "max_length"):
            if options.get(name) is None:
                options.pop(name, None)
            elif options[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {options[name]}.")
        return options

    def _chat_cache(self, past_key_values: Cache | None, return_past_key_values: bool, options: dict) -> Cache | None:
        """Returns the cache of a chat, with a `ChatRecord` of what is in it."""
        cache = past_key_values
        if cache is None:
            if not return_past_key_values:
                return None
            if options.get("cache_implementation") is not None:
                raise ValueError(
                    "return_past_key_values=True with cache_implementation: make the cache yourself, and pass it as "
                    "past_key_values."
                )
            cache = let_grow(DynamicCache(config=self.config))
        if (options.get("num_beams") or 1) > 1 or options.get("use_cache") is False:
            raise ValueError(
                "With num_beams > 1 or use_cache=False there is no cache to keep for the next round: leave out "
                "past_key_values and return_past_key_values."
            )
        if not isinstance(cache, Cache):
            raise ValueError(
                f"past_key_values must be what chat or stream_chat returned, got {type(cache).__name__}: the rounds that "
                "published tuples hold are not known. Start with past_key_values=None."
            )
        if not hasattr(cache, "chat_record"):
            if int(cache.get_seq_length()):
                raise ValueError(
                    "past_key_values is not empty, and was not returned by chat or stream_chat: what it holds is not "
                    "known. Start with past_key_values=None or an empty cache."
                )
            cache.chat_record = ChatRecord()
        return cache

    def _start_round(
        self, tokenizer, query: str, history: list[tuple[str, str]], cache: Cache | None, options: dict
    ) -> tuple[ChatRecord, dict, dict]:
        """
        Prepares a round: what is asked, within the limits, and as much of the cache as still holds.

        Returns:
            The record of the context, the model's inputs and the arguments for `generate`.
        """
        self._check_chat(tokenizer, query)
        old_record = cache.chat_record if cache is not None else ChatRecord()
        history_limit, prompt_limit, options = self._limit_length(options, cache)

        def continue_from(start: int) -> ChatRecord:
            return continue_record(tokenizer, old_record, query, history[start:])

        start, record = 0, continue_from(0)
        if len(record.ids) > history_limit:  # leave out as few of the oldest rounds as will do
            start = bisect.bisect_left(
                range(len(history)), True, key=lambda start: len(continue_from(start).ids) <= history_limit
            )
            record = continue_from(start)
        if len(record.ids) > prompt_limit:
            raise ValueError(
                f"The query is {len(record.ids)} tokens long; at most {prompt_limit} fit (context "
                f"{context_length(self.config)}, max_length {options['max_length']}). Shorten it, or raise max_length."
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
            self._crop_cache(cache, record.ids)
            cache.chat_record = record
            options["past_key_values"] = cache
        input_ids = torch.tensor([record.ids], device=self.device)
        return record, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}, options

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
            logger.warning("The query is empty: the model answers to nothing in particular.")

    def _limit_length(self, options: dict, cache: Cache | None = None) -> tuple[int, int, dict]:
        """
        Caps the lengths in `options` by the context.

        Returns:
            How long a prompt with history may be, so that there is room for an answer; how long one may be at all; and
            the options.
        """
        options, context = dict(options), context_length(self.config)
        for layer in cache.layers if cache is not None else ():
            context = min(context, getattr(layer, "max_cache_len", context))  # of a static cache
        generation_config = options.get("generation_config")
        for name in ("max_new_tokens", "max_length"):
            if name not in options and getattr(generation_config, name, None) is not None:
                options[name] = getattr(generation_config, name)
        if "max_new_tokens" in options:
            options["max_length"] = context
            return max(context - options["max_new_tokens"], context // 2), context - 1, options
        max_length = options.get("max_length", 8192)
        if max_length > context and max_length != 8192:
            logger.warning(
                f"max_length={max_length} is beyond the context of {context} tokens (seq_length): the dialogue is kept "
                f"within {context}."
            )
        max_length = options["max_length"] = min(max_length, context)
        return max_length - min(max_length // 4, 512), max_length - 1, options

    def _warn_if_cut(self, tokenizer, ids: list[int]):
        context = context_length(self.config)
        if len(ids) >= context and ids[-1] != tokenizer.eos_token_id:
            logger.warning(f"The answer was cut at the end of the context of {context} tokens (seq_length).")

    def _crop_cache(self, cache: Cache, ids: list[int]):
        """Leaves in the cache what it holds of the beginning of `ids`, short of the last: that has to be computed."""
        lengths = [int(layer.get_seq_length()) for layer in cache.layers]
        # An interrupted forward leaves layers of different length, and an interrupted prompt lookup candidates that were
        # rejected, at the end and in the place of the last token.
        valid = min([*lengths, max(len(cache.chat_record.ids) - 1, 0)])
        kept = common_prefix(cache.chat_record.ids[:valid], ids[:-1])
        if self.config.pre_seq_len is not None:
            kept = 0  # `generate` would take the P-Tuning prefix in the cache for tokens of the prompt
        if all(type(layer) in (DynamicLayer, GrowingLayer) for layer in cache.layers):
            for layer, length in zip(cache.layers, lengths):
                if length > kept:
                    layer.crop(kept - length)
        elif any(length != kept for length in lengths):  # a static cache cannot be cropped
            cache.reset()

    def _finish_round(self, tokenizer, query: str, record: ChatRecord, ids: list[int], prompt_length: int) -> str:
        """Enters an answer, complete or not, into the record, and returns its text."""
        answer = answer_ids(tokenizer, ids[prompt_length:])
        response = self.process_response(tokenizer.decode(answer, skip_special_tokens=True))
        if record.ends and record.ends[-1] >= prompt_length:  # the answer as far as it was a step ago
            record.rounds.pop()
            record.ends.pop()
        record.ids = ids
        record.rounds.append((query, response))
        record.ends.append(prompt_length + len(answer))
        return response

    @staticmethod
    def _stream_item(query, response, history, cache, return_past_key_values):
        new_history = [*history, (query, response)]
        return (response, new_history, cache) if return_past_key_values else (response, new_history)

    def _chat_batch(self, tokenizer, queries: Sequence[str], histories, options: dict):
        """Answers several queries at once, left-padded; see `chat`."""
        histories = [None] * len(queries) if histories is None else histories
        if len(histories) != len(queries):
            raise ValueError(f"There are {len(queries)} queries but {len(histories)} histories; give one for each.")
        histories = [copy_history(history) for history in histories]
        if not queries:
            return [], []
        rounds = [
            self._start_round(tokenizer, query, history, None, options) for query, history in zip(queries, histories)
        ]
        prompts = [record.ids for record, _, _ in rounds]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(self.device)
        prompt_length = inputs["input_ids"].shape[1]
        # Limits of single rounds count from the beginning of each prompt: padding does not shorten the answers.
        *_, options = self._limit_length(options)
        if "max_new_tokens" not in options:
            options["max_new_tokens"] = options["max_length"] - min(len(prompt) for prompt in prompts)
        options.pop("max_length")
        outputs = self.generate(**inputs, **options)
        outputs = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        responses = []
        for (record, _, single), query, history, output in zip(
            rounds, queries, histories, outputs.tolist(), strict=True
        ):
            ids = record.ids + output[prompt_length:]
            ids = ids[: single["max_length"]]
            responses.append(self._finish_round(tokenizer, query, record, ids, len(record.ids)))
            history.append((query, responses[-1]))
        return responses, histories


def copy_history(history) -> list[tuple[str, str]]:
    """Copies a history; its contents are checked by `tokenizer.build_prompt`."""
    if history is not None and (isinstance(history, str) or not isinstance(history, Sequence)):
        raise ValueError(f"history must be a list of (query, response) pairs, got {type(history).__name__}.")
    return list(history or ())


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
    return ChatRecord(ids=ids, rounds=rounds, ends=ends)


def answer_ids(tokenizer, ids: list[int]) -> list[int]:
    """Cuts generated ids before the first `</s>`."""
    return ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids


def common_prefix(a: Sequence, b: Sequence) -> int:
    """Number of items at the beginning of `a` and `b` that are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class ChatGLMForSequenceClassification(ChatGLMPreTrainedModel):
    """Classifies a text by the hidden state of its last token."""

    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq$", r"output_layer\."]

    def __init__(self, config: ChatGLMConfig, empty_init: bool = True, device=None):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config, with_output_layer=False)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.post_init()
        if device is not None:
            self.to(device)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        full_attention_mask: torch.BoolTensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """
        Args:
            labels: Classes `[batch]`, several of them `[batch, num_labels]` in floating point, or values to regress.

            The others are those of `ChatGLMModel.forward`.

        Returns:
            `logits`, `[batch, num_labels]`.
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            full_attention_mask=full_attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        # The published code takes the last position, which is padding if that is on the right.
        last = torch.full(hidden_states.shape[:1], -1, device=hidden_states.device)
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).int()
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask[:, -hidden_states.shape[1] :].to(hidden_states.device)
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=-1)
        pooled = hidden_states[torch.arange(len(hidden_states), device=hidden_states.device), last]
        logits = self.classifier_head(self.dropout(pooled))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=None, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ChatGLMForTokenClassification(ChatGLMPreTrainedModel):
    """Classifies each token."""

    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq$", r"output_layer\."]

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config, with_output_layer=False)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """
        Args:
            labels: Classes, `[batch, seq]`, -100 where there is no loss.

            The others are those of `ChatGLMModel.forward`.

        Returns:
            `logits`, `[batch, seq, num_labels]`.
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.classifier_head(self.dropout(outputs.last_hidden_state))
        loss = self.loss_function(logits, labels, self.config) if labels is not None else None
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "ChatGLMForConditionalGeneration",
    "ChatGLMForSequenceClassification",
    "ChatGLMForTokenClassification",
    "ChatGLMModel",
    "ChatGLMPreTrainedModel",
]
