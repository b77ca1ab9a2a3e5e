"""Maps configuration and tensors of ChatGLM2 to `GlmForCausalLM`, which is built into Transformers."""

from collections.abc import Iterable, Iterator

import torch
from transformers import GlmConfig


NAMES = {
    "transformer.embedding.word_embeddings.": "model.embed_tokens.",
    "transformer.encoder.layers.": "model.layers.",
    "transformer.encoder.final_layernorm.": "model.norm.",
    "transformer.output_layer.": "lm_head.",
    ".self_attention.dense.": ".self_attn.o_proj.",
    ".mlp.dense_h_to_4h.": ".mlp.gate_up_proj.",
    ".mlp.dense_4h_to_h.": ".mlp.down_proj.",
}


def glm_config(config, **changes) -> GlmConfig:
    """Returns the configuration of the same network as a `ChatGLMConfig`, with `changes`."""
    fields = dict(
        architectures=["GlmForCausalLM"],
        attention_bias=config.add_qkv_bias,
        attention_dropout=config.attention_dropout,
        bos_token_id=config.bos_token_id,
        dtype=config.dtype,
        eos_token_id=config.eos_token_id,
        head_dim=config.kv_channels,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        max_position_embeddings=config.seq_length,
        multi_query_attention=config.multi_query_attention,  # unknown to GLM: how to fuse q, k and v again
        num_attention_heads=config.num_attention_heads,
        num_hidden_layers=config.num_layers,
        num_key_value_heads=config.num_key_value_heads,
        pad_token_id=config.pad_token_id,
        rms_norm_eps=config.layernorm_epsilon,
        rope_parameters=rope_parameters(config),
        tie_word_embeddings=config.tie_word_embeddings,
        vocab_size=config.padded_vocab_size,
    )
    return GlmConfig(**{**fields, **changes})


def rope_parameters(config) -> dict:
    """Returns the library's RoPE settings for a `ChatGLMConfig`. `rope_ratio` becomes linear scaling."""
    rope = dict(config.rope_parameters)
    if rope["rope_type"] == "default" and config.rope_ratio != 1:
        rope.update(rope_type="linear", factor=float(config.rope_ratio))
    return rope


def glm_names(name: str) -> list[str]:
    """Returns the name of a tensor in GLM, or the names of query, key and value for a fused tensor."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    if ".query_key_value." not in name:
        return [name]
    return [name.replace(".self_attention.query_key_value.", f".self_attn.{letter}_proj.") for letter in "qkv"]


def glm_tensors(tensors: Iterable[tuple[str, torch.Tensor]], config) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) for GLM. With multi-query attention, the parts of fused tensors are views."""
    for name, tensor in tensors:
        names = glm_names(name)
        yield from zip(names, [tensor] if len(names) == 1 else split_query_key_value(tensor, config))


def split_query_key_value(tensor: torch.Tensor, config) -> list[torch.Tensor]:
    """Returns query, key and value rows of a fused weight `[rows, hidden]` or bias `[rows]`."""
    if config.multi_query_attention:
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        return list(tensor.split([n * config.kv_channels for n in heads]))
    # Without multi-query attention, query, key and value of each head are side by side.
    heads = tensor.unflatten(0, (config.num_attention_heads, 3, config.kv_channels))
    return [part.flatten(0, 1) for part in heads.unbind(1)]


def fuse_query_key_value(parts: list[torch.Tensor], config) -> torch.Tensor:
    """The inverse of `split_query_key_value`."""
    if config.multi_query_attention:
        return torch.cat(parts)
    heads = [part.unflatten(0, (config.num_attention_heads, config.kv_channels)) for part in parts]
    return torch.stack(heads, dim=1).flatten(0, 2)
