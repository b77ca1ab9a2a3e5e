"""Values that a ChatGLM2 configuration refuses."""

import math


# Fields of related architectures that change the maths, and the values for which they change nothing here. A checkpoint
# with any other value is not a ChatGLM2: it would load and produce nonsense.
FOREIGN_FIELDS = {
    "hidden_act": ("silu", "swiglu"),
    "inner_hidden_size": (),  # ChatGLM-6B
    "max_sequence_length": (),  # ChatGLM-6B
    "position_encoding_2d": (None, False),  # ChatGLM-6B
    "sliding_window": (None,),
}

# The library's types, except those made for other models' layouts
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

MAX_LAYERS = 1000  # more is a damaged file, which would take all memory


def refuse_foreign_fields(fields: dict):
    """Raises `ValueError` for a field of another architecture."""
    for name, accepted in FOREIGN_FIELDS.items():
        if name in fields and fields[name] not in accepted:
            raise ValueError(
                f"{name}={fields[name]!r} belongs to another architecture than ChatGLM2. Load this checkpoint with the "
                "code that was published with it."
            )


class ConfigurationChecks:
    """Mixed into the configuration. The library calls each `validate_` method once the fields are set."""

    def validate_numbers(self):
        sizes = "padded_vocab_size ffn_hidden_size num_attention_heads seq_length multi_query_group_num pre_seq_len"
        for names, accepts, requirement in (
            ("num_layers", lambda value: 1 <= value <= MAX_LAYERS, f"between 1 and {MAX_LAYERS}"),
            (sizes, lambda value: value >= 1, "at least 1"),
            ("hidden_size initializer_range", lambda value: value >= 0, "at least 0"),
            ("hidden_dropout attention_dropout classifier_dropout", lambda value: 0 <= value < 1, "in [0, 1)"),
            ("layernorm_epsilon rope_ratio", lambda value: 0 < value < math.inf, "positive and finite"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not accepts(value):
                    raise ValueError(f"{name} must be {requirement}, got {value}.")

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

    def validate_quantization(self):
        quantization_config = getattr(self, "quantization_config", None)
        if isinstance(quantization_config, (str, int, float, list)):
            raise ValueError(
                "quantization_config must be a dictionary such as {'quant_method': 'chatglm', 'bits': 4}, got "
                f"{quantization_config!r}."
            )
        fields = quantization_config if isinstance(quantization_config, dict) else {}
        if fields.get("quant_method") == "chatglm" and "bits" not in fields:
            raise ValueError(f"quantization_config lacks 'bits', which must be 4 or 8: {quantization_config}.")
