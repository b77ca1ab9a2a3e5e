"""The ChatGLM2 network, in the order data flows through it: forward passes only.

Module and parameter names are those of the published checkpoint. Hidden states are `[batch, seq, hidden]` throughout.
`chat` is in generation_chatglm.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_chatglm import can_use_grouped_sdpa, grouped_sdpa_forward
from .cache_chatglm import grow_in_place
from .checks_chatglm import (
    check_cache,
    check_ids,
    checked_arguments,
    checked_on_newer_releases,
    warn_beyond_context,
)
from .compat_chatglm import CACHE_NAME, update_cache
from .configuration_chatglm import ChatGLMConfig

# Unused here, as the others marked F401: until 5.16, the library copies only those files of a folder that this one imports.
from .configuration_checks_chatglm import ConfigurationChecks  # noqa: F401
from .cpp_chatglm import CPP_SOURCE  # noqa: F401
from .fused_chatglm import fused_on_cpu
from .generation_chatglm import ChatGLMGenerationMixin
from .layers_chatglm import in_one_call
from .linear_chatglm import choose_linear  # noqa: F401
from .loading_chatglm import ChatGLMLoadingMixin
from .prefix_chatglm import PrefixEncoder, uncover_prefix
from .quantization import init_quantized
from .quantization_calibration import quantize  # noqa: F401
from .quantization_cpu import cpu_rms_norm, cpu_rotate, cpu_swiglu
from .quantization_gpu import gpu_linear  # noqa: F401
from .quantization_kernels import quantized_linear  # noqa: F401
from .streaming_chatglm import TokenStreamer  # noqa: F401


class Embedding(nn.Module):
    """Token embedding."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        return self.word_embeddings(input_ids)


class RotaryEmbedding(nn.Module):
    """
    Angles of rotary position embedding (Su et al. 2021, arXiv 2104.09864) for the first half of each head.

    Computed in float32 whatever the model's dtype: the published code computes them in float16, which cannot tell
    positions above 2,048 apart.
    """

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.rope_init_fn = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = self.rope_init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)
        # Checkpoints hold inv_freq in float16. It is computed rather than loaded.
        self.register_load_state_dict_pre_hook(drop_inv_freq)

    @staticmethod
    def compute_default_rope_parameters(config: ChatGLMConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Returns the inverse frequencies, float32 `[rotary_dim / 2]`, and the factor for cos and sin (1)."""
        dim = int(config.kv_channels * config.rope_parameters["partial_rotary_factor"])
        exponents = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents / config.rope_ratio, 1.0

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns cos and sin in the dtype of `x`, each `[batch, seq, head_dim]`. Each angle is repeated for the two
        channels of a pair, and the first sine is negated. Channels that are not rotated have cos 1 and sin 0: that takes
        fewer operations in each layer than splitting them off.
        """
        # Not from the buffer: model.half() rounds it, and then every angle is off.
        depends_on_length = self.rope_type in ("dynamic", "longrope")
        seq_len = int(position_ids.max()) + 1 if depends_on_length else None
        inv_freq, self.attention_scaling = self.rope_init_fn(self.config, x.device, seq_len=seq_len)
        if depends_on_length:
            self.inv_freq = inv_freq
        angles = position_ids[..., None].float() * inv_freq
        # Not dim=-1: torch's legacy ONNX export (2.13) adds 3 to this -1 in place, and so to every other -1 of the graph.
        angles = angles.repeat_interleave(2, dim=2)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        sin[..., 0::2].neg_()
        rest = self.config.kv_channels - angles.shape[-1]
        cos, sin = nn.functional.pad(cos, (0, rest), value=1.0), nn.functional.pad(sin, (0, rest))
        return cos.to(x.dtype), sin.to(x.dtype)


def drop_inv_freq(module: RotaryEmbedding, state_dict: dict, prefix: str, *args):
    state_dict.pop(f"{prefix}inv_freq", None)


@fused_on_cpu(cpu_rotate)
def apply_rotary_pos_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (0, 1), (2, 3), ... of channels of `x`, `[batch, heads, seq, head_dim]`."""
    x_swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * cos[:, None] + x_swapped * sin[:, None]


class RMSNorm(nn.Module):
    """RMS normalization (Zhang and Sennrich 2019, arXiv 1910.07467) over the last dimension."""

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.eps)


@fused_on_cpu(cpu_rms_norm)
def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    # Unlike LLaMA's, the weight multiplies before the downcast.
    x, weight = hidden_states.to(dtype), weight.to(dtype)
    if torch.jit.is_tracing():  # for torch's legacy ONNX export, which does not know rms_norm
        normed = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    else:
        normed = nn.functional.rms_norm(x, weight.shape, weight, eps)
    return normed.to(hidden_states.dtype)


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
    Attention in plain torch. Keys and values are not copied for each head: the query heads that share a key-value head
    become rows of one matrix.

    Args:
        query: `[batch, heads, q_len, head_dim]`.
        key, value: `[batch, kv_heads, kv_len, head_dim]`.
        attention_mask: Added to the scores, or boolean with true where attended, `[batch, 1, q_len, kv_len]`.

    Returns:
        The output, `[batch, q_len, heads, head_dim]`, and the weights, `[batch, heads, q_len, kv_len]`.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    folded = query.reshape(batch, kv_heads, heads // kv_heads * q_len, head_dim)
    scores = torch.matmul(folded, key.transpose(2, 3)).view(batch, heads, q_len, kv_len) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=softmax_dtype).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights.view(batch, kv_heads, heads // kv_heads * q_len, kv_len), value)
    return output.view(batch, heads, q_len, head_dim).transpose(1, 2).contiguous(), weights


class SelfAttention(nn.Module):
    """Multi-query attention; `query_key_value` is fused as in the checkpoint."""

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
        Splits `[batch, seq, qkv_size]` into query, `[batch, heads, seq, head_dim]`, key and value, each `[batch, kv_heads,
        seq, head_dim]`. Query and key are rotated.
        """
        batch, seq = qkv.shape[:2]
        if self.multi_query_attention:
            kv_heads = self.num_key_value_heads
            heads = qkv.view(batch, seq, -1, self.head_dim).transpose(1, 2)
            rotated = apply_rotary_pos_emb(heads[:, :-kv_heads], cos, sin)  # query and key together
            return rotated[:, :-kv_heads], rotated[:, -kv_heads:], heads[:, -kv_heads:]
        # Without multi-query attention the checkpoint has query, key and value of each head side by side.
        heads = qkv.view(batch, seq, self.num_heads, 3 * self.head_dim).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)
        return apply_rotary_pos_emb(query, cos, sin), apply_rotary_pos_emb(key, cos, sin), value

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.split_qkv(self.query_key_value(hidden_states), *position_embeddings)
        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx, kwargs)
        if prefix is not None:
            key = torch.cat((prefix[0].to(key.dtype), key), dim=2)
            value = torch.cat((prefix[1].to(value.dtype), value), dim=2)

        implementation = self.config._attn_implementation
        if implementation == "sdpa" and can_use_grouped_sdpa(query, attention_mask, kwargs):
            attention_interface = grouped_sdpa_forward
        else:
            attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
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
        return self.dense(output.reshape(*hidden_states.shape[:-1], -1)), weights


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202); gate and up projection are fused."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        bias = config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(swiglu(self.dense_h_to_4h(hidden_states)))


@fused_on_cpu(cpu_swiglu)
def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def build_norm(config: ChatGLMConfig) -> nn.Module:
    return (RMSNorm if config.rmsnorm else nn.LayerNorm)(config.hidden_size, eps=config.layernorm_epsilon)


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
        kwargs["cache"] = kwargs.pop(CACHE_NAME, None)
        prefix = None if prefix_key is None else (prefix_key, prefix_value)
        hidden_states, normed = self.pre_norm(self.input_layernorm, hidden_states)
        output, _ = self.self_attention(normed, prefix=prefix, **kwargs)
        hidden_states = hidden_states + nn.functional.dropout(output, self.hidden_dropout, self.training)

        hidden_states, normed = self.pre_norm(self.post_attention_layernorm, hidden_states)
        return hidden_states + nn.functional.dropout(self.mlp(normed), self.hidden_dropout, self.training)

    def pre_norm(self, norm: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the residual and the input of the sublayer."""
        normed = norm(hidden_states)
        residual = normed if self.residual_post_layernorm else hidden_states
        # The linear layers keep the model's dtype if the residual stream is in float32.
        return residual, normed.to(norm.weight.dtype) if self.fp32_residual_connection else normed


class GLMTransformer(nn.Module):
    """The stack of layers, and the norm after it."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([GLMBlock(config, i) for i in range(config.num_layers)])
        self.final_layernorm = build_norm(config) if config.post_layer_norm else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        dtype = hidden_states.dtype
        if self.config.fp32_residual_connection:
            hidden_states = hidden_states.float()
        hidden_states = self.run_layers(hidden_states, prefix, cache, **kwargs)
        if self.final_layernorm is not None:
            hidden_states = self.final_layernorm(hidden_states)
        return hidden_states.to(dtype)

    @in_one_call(GLMBlock, SelfAttention, MLP, RMSNorm)
    def run_layers(
        self,
        hidden_states: torch.Tensor,
        prefix: Sequence[tuple[torch.Tensor, torch.Tensor]] | None,
        cache: Cache | None,
        **kwargs,
    ) -> torch.Tensor:
        kwargs[CACHE_NAME] = cache  # by which name gradient checkpointing takes it away
        for i, layer in enumerate(self.layers[: self.config.num_layers]):  # fewer in early-exit decoding
            # Positional, as reentrant gradient checkpointing needs it of tensors that gradients flow into.
            hidden_states = layer(hidden_states, *(prefix[i] if prefix is not None else ()), **kwargs)
        return hidden_states


class ChatGLMPreTrainedModel(ChatGLMLoadingMixin, PreTrainedModel):
    """What all ChatGLM2 models have in common."""

    config: ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GLMBlock, "attentions": SelfAttention}
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq$", r"output_layer\.weight$"]

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
        if with_output_layer:
            self._tp_plan["output_layer"] = "colwise_gather_output"

    def freeze_all_but_prefix(self):
        """With a P-Tuning prefix, makes only the prefix trainable. Without one, does nothing."""
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
        """Returns for each layer the (key, value) of the P-Tuning prefix, `[batch, kv_heads, pre_seq_len, head_dim]`."""
        return self.prefix_encoder.keys_and_values(batch_size, device, dtype, self.prefix_dropout)

    @checked_arguments
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)  # as published: the last hidden state is before the final norm
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        full_attention_mask: torch.BoolTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: `[batch, seq]`; or `inputs_embeds`, `[batch, seq, hidden]`.
            position_ids: `[batch, seq]`. By default they continue the cache.
            attention_mask: 1 where attended, `[batch, cached + seq]`, without the P-Tuning prefix; or boolean or added to
                the scores, `[batch, 1, seq, cached + seq]`.
            full_attention_mask: The published form of the latter: boolean, true where masked.
            cache: Any cache of the library. Its published name, `past_key_values`, works too.

        Returns:
            `last_hidden_state`, `[batch, seq, hidden]`; `hidden_states`: the embedding and the output of each layer.

        Raises:
            ValueError: If there is not exactly one of `input_ids` and `inputs_embeds`, an id is outside the vocabulary
                (checked on the CPU only, where it is free), or the cache does not fit the input.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            check_ids(input_ids, self.config.padded_vocab_size)
            inputs_embeds = self.embedding(input_ids)
        if full_attention_mask is not None:
            attention_mask = ~full_attention_mask.bool()
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        cache = grow_in_place(cache)
        check_cache(cache, inputs_embeds)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
        warn_beyond_context(position_ids, self.config)

        attention_mask = create_causal_mask(
            self.config,
            inputs_embeds,
            attention_mask,
            cache if isinstance(cache, Cache) else None,  # continuous batching brings its own mask
            position_ids,
        )
        if torch.jit.is_tracing() and attention_mask is not None and attention_mask.dtype == torch.bool:
            # Padding on the left sees nothing. OpenVINO's attention makes NaN of that, for the whole row.
            attention_mask = attention_mask | ~attention_mask.any(dim=-1, keepdim=True)
        prefix = None
        if self.pre_seq_len is not None:
            prefix = self.get_prompt(inputs_embeds.shape[0], inputs_embeds.device, inputs_embeds.dtype)
            attention_mask = uncover_prefix(attention_mask, cache, inputs_embeds, kwargs.get("is_causal"), self.config)
        hidden_states = self.encoder(
            inputs_embeds,
            prefix,
            cache,
            attention_mask=attention_mask,
            position_embeddings=self.rotary_pos_emb(inputs_embeds, position_ids),
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})


def select_positions(hidden_states: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """
    Selects positions of `[batch, seq, hidden]`.

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


@dataclass
class ChatGLMLMOutput(CausalLMOutputWithPast):
    """
    The library's output, with what sentence encoders read.

    Args:
        last_hidden_state: `[batch, seq, hidden]`, after the final norm. None in training, and if `logits_to_keep`
            selects positions, as in generation: nothing reads it there, and it would take memory.
    """

    last_hidden_state: torch.FloatTensor | None = None


@checked_on_newer_releases
class ChatGLMForConditionalGeneration(ChatGLMGenerationMixin, ChatGLMPreTrainedModel):
    """
    The language model, with `chat`.

    Args:
        config (`ChatGLMConfig`): What to build.
        empty_init (`bool`): Accepted as in the published code, without effect.
        device: Where to put the model.
    """

    _tied_weights_keys = {"transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"}
    _pp_plan = {"transformer.output_layer": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"transformer.output_layer": "keep_full_weight"}

    def __init__(self, config: ChatGLMConfig, empty_init: bool = True, device=None):
        super().__init__(config)
        self.max_sequence_length = config.seq_length
        self.transformer = ChatGLMModel(config)
        self.post_init()
        if device is not None:
            self.to(device)

    def get_output_embeddings(self) -> nn.Linear:
        return self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Linear):
        self.transformer.output_layer = value

    @checked_arguments
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        return_last_logit: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> ChatGLMLMOutput:
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
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        is_whole = not return_last_logit and isinstance(logits_to_keep, int) and logits_to_keep == 0
        hidden_states = select_positions(outputs.last_hidden_state, 1 if return_last_logit else logits_to_keep)
        logits = self.transformer.output_layer(hidden_states)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return ChatGLMLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            last_hidden_state=hidden_states if labels is None and is_whole else None,
            **{CACHE_NAME: outputs[CACHE_NAME] if CACHE_NAME in outputs else None},
        )


class ChatGLMClassifier(ChatGLMPreTrainedModel):
    """
    What the classifiers have in common. The head is called `score`, as PEFT and TRL expect, and `classifier_head` in
    checkpoints, as published.

    The arguments are those of the language model; `config.num_labels` is the number of classes.
    """

    def __init__(self, config: ChatGLMConfig, empty_init: bool = True, device=None):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config, with_output_layer=False)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        # bitsandbytes leaves as it is the layer whose weight is the model's last parameter: here the bias comes before.
        weight = self.score.weight
        del self.score.weight
        self.score.weight = weight
        self.register_load_state_dict_pre_hook(rename_head)
        self.post_init()
        if device is not None:
            self.to(device)

    @property
    def classifier_head(self) -> nn.Linear:
        return self.score


def rename_head(module: ChatGLMClassifier, state_dict: dict, prefix: str, *args):
    for name in ("weight", "bias"):
        if f"{prefix}classifier_head.{name}" in state_dict:
            state_dict[f"{prefix}score.{name}"] = state_dict.pop(f"{prefix}classifier_head.{name}")


class ChatGLMForSequenceClassification(ChatGLMClassifier):
    """Classifies a text by the hidden state of its last token."""

    @checked_arguments
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        full_attention_mask: torch.BoolTensor | None = None,
        cache: Cache | None = None,
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
            cache=cache,
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
        logits = self.score(self.dropout(pooled))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=None, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs[CACHE_NAME] if CACHE_NAME in outputs else None},
        )


class ChatGLMForTokenClassification(ChatGLMClassifier):
    """Classifies each token."""

    @checked_arguments
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
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
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
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
