"""The sizes of the network in llama.cpp's file format."""

import gguf

from .glm import rope_parameters


def write_architecture(writer: gguf.GGUFWriter, config):
    """Writes the sizes of the network. Raises `ValueError` if llama.cpp would compute different results."""
    if config.hidden_size != config.num_attention_heads * config.kv_channels:
        raise ValueError(
            f"llama.cpp computes heads of hidden_size / num_attention_heads ({config.hidden_size} / "
            f"{config.num_attention_heads}), not of kv_channels={config.kv_channels}."
        )
    rope = rope_parameters(config)
    if rope["rope_type"] not in ("default", "linear"):
        raise ValueError(
            f"rope_type {rope['rope_type']!r} cannot be converted, only 'default' and 'linear' (rope_ratio). llama.cpp scales "
            "positions by options of its own (--rope-scaling yarn): convert without rope_parameters."
        )
    writer.add_context_length(config.seq_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.layernorm_epsilon)
    writer.add_rope_dimension_count(config.kv_channels // 2)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
