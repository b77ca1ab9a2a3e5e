"""
Converts a checkpoint to `GlmForCausalLM`, the architecture of Transformers itself, for all software that knows that one:

    python -m conversion.to_glm --model path/to/chatglm2-6b --output chatglm2-6b-glm

The output loads without trust_remote_code, as model (`AutoModelForCausalLM`), tokenizer and chat template. The weights are the
same numbers under other names; `conversion.from_glm` gives the same bytes back. Quantized weights are dequantized.

The tokens `sop` and `eop` are called `<sop>` and `<eop>` there, as in GLM-4: this tokenizer reads special tokens from text,
and would find the former in "sophisticated".
"""

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, GlmConfig, PreTrainedTokenizerFast

from .checkpoint import TINY, Checkpoint, new_folder, plain_errors, product, write_weights


NAMES = {
    "transformer.embedding.word_embeddings.": "model.embed_tokens.",
    "transformer.encoder.layers.": "model.layers.",
    "transformer.encoder.final_layernorm.": "model.norm.",
    "transformer.output_layer.": "lm_head.",
    ".self_attention.dense.": ".self_attn.o_proj.",
    ".mlp.dense_h_to_4h.": ".mlp.gate_up_proj.",
    ".mlp.dense_4h_to_h.": ".mlp.down_proj.",
}
# Text of special tokens that is a part of words
RENAMED_TOKENS = {"sop": "<sop>", "eop": "<eop>"}


def glm_names(name: str) -> list[str]:
    """Returns what a tensor is called in GLM; those of query, key and value for a fused one."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    if ".query_key_value." not in name:
        return [name]
    return [name.replace(".self_attention.query_key_value.", f".self_attn.{letter}_proj.") for letter in "qkv"]


def glm_config(config) -> GlmConfig:
    return GlmConfig(
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
        rope_parameters=dict(config.rope_parameters),  # rope_ratio is linear scaling among them
        tie_word_embeddings=config.tie_word_embeddings,
        vocab_size=config.padded_vocab_size,
    )


def split_query_key_value(tensor: torch.Tensor, config) -> Iterable[torch.Tensor]:
    """Returns query, key and value rows of a fused weight `[rows, hidden]` or bias `[rows]`."""
    if config.multi_query_attention:
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        return (part.clone() for part in tensor.split([n * config.kv_channels for n in heads]))
    # Without multi-query attention, query, key and value of each head are side by side.
    heads = tensor.unflatten(0, (config.num_attention_heads, 3, config.kv_channels))
    return (part.flatten(0, 1).clone() for part in heads.unbind(1))


def glm_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in checkpoint.plain_tensors("Converting to GLM"):
        names = glm_names(name)
        yield from zip(names, [tensor] if len(names) == 1 else split_query_key_value(tensor, checkpoint.config))


def rename_prompt_tokens(template: str) -> str:
    """Returns the chat template with the renamed tokens in the prefix that it writes."""
    return template.replace("[gMASK]sop", "[gMASK]" + RENAMED_TOKENS["sop"])


def native_tokenizer(tokenizer) -> PreTrainedTokenizerFast:
    """Returns the tokenizer without this package's class: the same ids for texts that name no special token."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in backend["added_tokens"]:
        token["content"] = RENAMED_TOKENS.get(token["content"], token["content"])
    template = json.dumps(backend["post_processor"])
    for old, new in RENAMED_TOKENS.items():
        template = template.replace(json.dumps(old), json.dumps(new))
    backend["post_processor"] = json.loads(template)
    names = [token["content"] for token in backend["added_tokens"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        unk_token=tokenizer.unk_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens=[
            name for name in names if name in tokenizer.all_special_tokens or name in RENAMED_TOKENS.values()
        ],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=rename_prompt_tokens(tokenizer.chat_template),
    )


def convert(model: Path, output: Path):
    checkpoint = Checkpoint(model)
    checkpoint.check_standard("GlmForCausalLM")
    tokenizer = product("tokenization_chatglm.ChatGLMTokenizer").from_pretrained(model)
    config = glm_config(checkpoint.config)
    with new_folder(output) as folder:
        config.save_pretrained(folder)
        GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).save_pretrained(folder)
        native_tokenizer(tokenizer).save_pretrained(folder)
        shutil.copy(model / "tokenizer.model", folder)  # for conversion.from_glm
        write_weights(folder, glm_tensors(checkpoint))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="a checkpoint folder (default: checkpoints/tiny)")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    args = parser.parse_args(argv)
    with plain_errors():
        convert(args.model, args.output)


if __name__ == "__main__":
    main()
