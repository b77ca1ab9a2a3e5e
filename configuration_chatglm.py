"""ChatGLM2 configuration: what a checkpoint is.

Field names, defaults and the file format are those of the published ChatGLM2-6B `config.json`. The names that the
rest of the ecosystem uses for the same things (`num_hidden_layers`, `max_position_embeddings`, ...) work too.
"""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


# What the published config.json carries. Converters (TensorRT-LLM, llama.cpp) tell the ChatGLM versions apart by it.
PUBLISHED_NAME = "THUDM/chatglm2-6b"

# Fields of related architectures that change the maths, and the values for which they change nothing here. A checkpoint
# with any other value is not a ChatGLM2: it would load and produce nonsense.
FOREIGN_FIELDS = {
    "activation_func": ("swiglu",),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "hidden_act": ("silu", "swiglu"),
    "inner_hidden_size": (),  # ChatGLM-6B
    "logit_scale": (None, 1.0),
    "max_sequence_length": (),  # ChatGLM-6B
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "parallel_residual": (None, False),
    "position_encoding_2d": (None, False),  # ChatGLM-6B
    "qk_layernorm": (None, False),
    "sliding_window": (None,),
    "use_qk_norm": (None, False),
}


# The library's types, except those made for other models' layouts
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

MAX_LAYERS = 1000  # more is a damaged file, which would take all memory


@strict
class ChatGLMConfig(PreTrainedConfig):
    r"""
    Configuration of a ChatGLM2 model. The defaults are those of the published class. ChatGLM2-6B itself has other
    values (32,768 positions, QKV bias, 2 key-value heads): see `config.json`.

    Args:
        num_layers (`int`): Number of layers.
        padded_vocab_size (`int`): Number of rows of the embedding. The tokenizer uses fewer.
        hidden_size (`int`): Width of the residual stream.
        ffn_hidden_size (`int`): Width of the MLP after the gate (`dense_h_to_4h` has twice as many rows).
        kv_channels (`int`): Width of one attention head. It must be even; RoPE rotates half of it.
        num_attention_heads (`int`): Number of query heads.
        seq_length (`int`): Context length: the number of positions that the model was trained for.
        hidden_dropout, attention_dropout (`float`): Dropout in training.
        classifier_dropout (`float`, *optional*): Dropout before `classifier_head`.
        layernorm_epsilon (`float`): Added to the variance in the norms.
        rmsnorm (`bool`): Whether to use RMSNorm; otherwise LayerNorm.
        apply_residual_connection_post_layernorm (`bool`): Whether the residual is taken after the norm, not before it.
        post_layer_norm (`bool`): Whether there is a norm after the last block.
        add_bias_linear (`bool`): Whether all linear layers have a bias.
        add_qkv_bias (`bool`): Whether `query_key_value` has a bias.
        multi_query_attention (`bool`): Whether there are fewer key-value heads than query heads.
        multi_query_group_num (`int`): Number of key-value heads with `multi_query_attention`.
        fp32_residual_connection (`bool`): Whether to keep the residual stream in float32.
        quantization_bit (`int`): 4 or 8 in quantized checkpoints. Sets `quantization_config`.
        pre_seq_len (`int`, *optional*): Length of a P-Tuning v2 prefix. All weights but the prefix are then frozen.
        prefix_projection (`bool`): Whether an MLP computes the prefix.
        original_rope (`bool`): Always true for ChatGLM2. Other engines require the field.
        rope_ratio (`float`): Divides the positions, as in ChatGLM2-6B-32K. ChatGLM3 multiplies the base of RoPE instead:
            `rope_parameters={"rope_type": "default", "rope_theta": 10000 * ratio}`.
        rope_parameters (`dict`, *optional*): RoPE settings of the library (`linear`, `dynamic`, `yarn`, ...).

    `bias_dropout_fusion`, `apply_query_key_layer_scaling` and `attention_softmax_in_fp32` are read and saved, but have
    no effect: in the published code they chose between kernels with the same results.

    Raises:
        ValueError: If the checkpoint is of another architecture, or two names of one field have different values.
        huggingface_hub.errors.StrictDataclassError: If a value has the wrong type or is impossible. The message names it.

    Example:

    ```python
    >>> config = ChatGLMConfig(num_layers=2, hidden_size=64, num_attention_heads=4, kv_channels=16)
    >>> config.num_hidden_layers
    2
    ```
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "last_hidden_state"]
    attribute_map = {
        "head_dim": "kv_channels",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "num_hidden_layers": "num_layers",
        "rms_norm_eps": "layernorm_epsilon",
        "vocab_size": "padded_vocab_size",
    }
    # `query_key_value` fuses blocks of unequal size, which a column split would tear apart. So attention runs whole on
    # every rank (its KV cache is small: 2 heads), and the MLP, three quarters of the weights, is split.
    base_model_tp_plan = {
        "embedding.word_embeddings": "embedding_rowwise",
        "encoder.layers.*.self_attention.query_key_value": "colwise_gather_output",
        "encoder.layers.*.self_attention.dense": "rowwise_split_input",
        "encoder.layers.*.mlp.dense_h_to_4h": "packed_colwise",
        "encoder.layers.*.mlp.dense_4h_to_h": "rowwise",
    }
    base_model_pp_plan = {
        "embedding": (["input_ids"], ["inputs_embeds"]),
        "encoder.layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "encoder.final_layernorm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_fsdp_plan = {
        "embedding.word_embeddings": "free_full_weight",
        "encoder.layers.*": "free_full_weight",
        "encoder.final_layernorm": "keep_full_weight",
    }

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    seq_length: int = 2048
    hidden_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    attention_dropout: float | int = 0.0
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    bias_dropout_fusion: bool = True
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    apply_query_key_layer_scaling: bool = True
    attention_softmax_in_fp32: bool = True
    fp32_residual_connection: bool = False
    quantization_bit: int = 0
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    original_rope: bool = True
    rope_ratio: float | int = 1.0
    rope_parameters: dict | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self, num_key_value_heads: int | None = None, head_dim: int | None = None, **kwargs):
        for name, accepted in FOREIGN_FIELDS.items():
            if name in kwargs and kwargs[name] not in accepted:
                raise ValueError(
                    f"{name}={kwargs[name]!r} belongs to another architecture than ChatGLM2. Load this checkpoint with "
                    "the code that was published with it."
                )
        self._published_name = kwargs.pop("_name_or_path", None) or PUBLISHED_NAME
        if self.quantization_bit and not kwargs.get("quantization_config"):
            kwargs["quantization_config"] = {"quant_method": "chatglm", "bits": self.quantization_bit}
        if self.rope_parameters is None and not kwargs.get("rope_scaling"):
            self.rope_parameters = {"rope_type": "default"}
        kwargs.setdefault("partial_rotary_factor", 0.5)
        super().__post_init__(**kwargs)

        if num_key_value_heads not in (None, self.num_key_value_heads):
            if self.multi_query_attention:
                raise ValueError(
                    f"num_key_value_heads={num_key_value_heads} contradicts multi_query_group_num="
                    f"{self.multi_query_group_num}: give one of them."
                )
            self.num_key_value_heads = num_key_value_heads
        if head_dim not in (None, self.kv_channels):
            if self.kv_channels != type(self).kv_channels:
                raise ValueError(f"head_dim={head_dim} contradicts kv_channels={self.kv_channels}: give one of them.")
            self.kv_channels = head_dim

    # The library calls every method whose name begins with `validate_` once the fields are set.

    def validate_sizes(self):
        names = "num_layers padded_vocab_size ffn_hidden_size num_attention_heads seq_length multi_query_group_num"
        for name in names.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("hidden_size", "initializer_range"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers must be at most {MAX_LAYERS}, got {self.num_layers}.")
        if self.pre_seq_len is not None and self.pre_seq_len < 1:
            raise ValueError(f"pre_seq_len must be at least 1, or None for no prefix, got {self.pre_seq_len}.")

    def validate_numbers(self):
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        for name in ("layernorm_epsilon", "rope_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}.")

    def validate_attention(self):
        if self.kv_channels < 2 or self.kv_channels % 2:
            raise ValueError(
                f"kv_channels must be a positive even number, as RoPE rotates pairs of channels, got {self.kv_channels}."
            )
        if self.multi_query_attention and self.num_attention_heads % self.multi_query_group_num:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by multi_query_group_num "
                f"({self.multi_query_group_num})."
            )

    def validate_rotary_embedding(self):
        rope_type = self.rope_parameters["rope_type"]
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_parameters['rope_type'] must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}.")
        for name in ("rope_theta", "factor"):
            value = self.rope_parameters.get(name, 1.0)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"rope_parameters[{name!r}] must be a positive number, got {value!r}.")
        if rope_type != "default" and self.rope_ratio != 1:
            raise ValueError(
                f"rope_ratio={self.rope_ratio} and rope_parameters['rope_type']={rope_type!r} both scale the positions: "
                "set rope_ratio to 1, or rope_type to 'default'."
            )
        if not self.original_rope:
            raise ValueError("original_rope=False is not ChatGLM2's rotary embedding, and is not supported.")

    def validate_quantization(self):
        if self.quantization_bit not in (0, 4, 8):
            raise ValueError(f"quantization_bit must be 0, 4 or 8, got {self.quantization_bit}.")
        quantization_config = getattr(self, "quantization_config", None)
        if isinstance(quantization_config, (str, int, float, list)):
            raise ValueError(
                "quantization_config must be a dictionary such as {'quant_method': 'chatglm', 'bits': 4}, got "
                f"{quantization_config!r}."
            )
        fields = quantization_config if isinstance(quantization_config, dict) else {}
        if fields.get("quant_method") == "chatglm" and "bits" not in fields:
            raise ValueError(f"quantization_config lacks 'bits', which must be 4 or 8: {quantization_config}.")

    @property
    def context_length(self) -> int:
        """Number of positions the model was made for, or that its dynamic NTK scaling stretches them to."""
        if self.rope_parameters["rope_type"] == "dynamic":
            return int(self.seq_length * self.rope_parameters["factor"])
        return self.seq_length

    @property
    def rope_scaling(self) -> dict | None:
        """The old name of `rope_parameters`. None without scaling, as programs that use this name expect (FastChat)."""
        return None if self.rope_parameters["rope_type"] == "default" else self.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, value: dict | None):
        kept = {name: self.rope_parameters[name] for name in ("rope_theta", "partial_rotary_factor")}
        self.rope_parameters = {**kept, **(value or {})}
        self.standardize_rope_params()

    @property
    def num_key_value_heads(self) -> int:
        """Number of key-value heads: `multi_query_group_num`, or all heads without multi-query attention."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    @num_key_value_heads.setter
    def num_key_value_heads(self, value: int):
        self.multi_query_attention = value != self.num_attention_heads
        if self.multi_query_attention:
            self.multi_query_group_num = value

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if not isinstance(config_dict, dict):
            raise ValueError(f"config.json must hold an object of fields, not {type(config_dict).__name__}.")
        config_dict = dict(config_dict)
        # These two are in the file for other programs to read. Here they follow from the published fields.
        for derived, source in (("num_key_value_heads", "multi_query_group_num"), ("head_dim", "kv_channels")):
            if source in config_dict:
                config_dict.pop(derived, None)
        # The library assigns overrides to the finished configuration: too late for those that others follow from.
        for name in ("quantization_bit", "rope_parameters"):
            if name in kwargs:
                config_dict[name] = kwargs.pop(name)
        rope_parameters = config_dict.get("rope_parameters")
        if isinstance(rope_parameters, dict) and rope_parameters.get("rope_type") in ("yarn", "longrope", "llama3"):
            # What the checkpoint was trained with. An overridden seq_length says what it is extended to.
            trained = {"original_max_position_embeddings": config_dict.get("seq_length", cls.seq_length)}
            config_dict["rope_parameters"] = {**trained, **rope_parameters}
        result = super().from_dict(config_dict, **kwargs)
        (result[0] if isinstance(result, tuple) else result).validate()
        return result

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.pop("_published_name", None)
        if self.multi_query_attention:
            # PEFT's prefix tuning reads these from the dictionary. Without them it assumes as many as query heads.
            output["num_key_value_heads"] = self.num_key_value_heads
            output["head_dim"] = self.kv_channels
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        output = super().to_diff_dict()
        output["_name_or_path"] = self._published_name
        # SGLang knows the language model by this published name only. The library would write the class's name.
        if output.get("architectures") == ["ChatGLMForConditionalGeneration"]:
            output["architectures"] = ["ChatGLMModel"]
        return output


__all__ = ["ChatGLMConfig"]
