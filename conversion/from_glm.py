"""
Converts a `GlmForCausalLM` checkpoint back to ChatGLM2: the output of `conversion.to_glm`, also after training it.

    python -m conversion.from_glm --model chatglm2-6b-glm --output chatglm2-6b

The folder must have ChatGLM2's tokenizer.model, which `conversion.to_glm` writes.
"""

from common.options import Parser, add_output_option


def options() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="a folder with a GlmForCausalLM, or OWNER/NAME on the Hub")
    add_output_option(parser)
    return parser


if __name__ == "__main__":
    options().parse_args()  # answers --help and wrong options before the slow imports below


from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import GlmConfig, GlmForCausalLM

from common.checkpoint import check_folder, weight_files
from common.errors import plain_errors
from common.files import new_folder, read_json
from common.glm import fuse_query_key_value, glm_names
from common.hub import local_folder
from common.package import ROOT, product

from .checkpoint import as_published, check_names, meta_model, with_progress, write_package, write_weights


def chatglm_config(folder: Path) -> tuple[GlmConfig, dict]:
    """
    Returns GLM's configuration, and the fields for ChatGLM2's config.json.

    Raises:
        ValueError: if the folder has another architecture, or a GLM that ChatGLM2 has no equivalent for.
    """
    written = read_json(check_folder(folder) / "config.json")
    if written.get("model_type") != "glm":
        raise ValueError(f"{folder} holds a model of type {written.get('model_type')!r}, not 'glm' (GlmForCausalLM).")
    config = GlmConfig.from_pretrained(folder)
    rope = dict(config.rope_parameters)
    for name, value, only in (
        ("hidden_act", config.hidden_act, "silu"),
        ("partial_rotary_factor", rope.pop("partial_rotary_factor", 0.5), 0.5),
    ):
        if value != only:
            raise ValueError(f"ChatGLM2 has no equivalent for {name}={value!r}. Only {only!r} can be converted.")
    fields = dict(
        read_json(ROOT / "config.json"),
        add_qkv_bias=config.attention_bias,
        attention_dropout=config.attention_dropout,
        eos_token_id=config.eos_token_id,
        ffn_hidden_size=config.intermediate_size,
        hidden_size=config.hidden_size,
        kv_channels=config.head_dim,
        layernorm_epsilon=config.rms_norm_eps,
        multi_query_attention=getattr(config, "multi_query_attention", True),
        multi_query_group_num=config.num_key_value_heads,
        num_attention_heads=config.num_attention_heads,
        num_layers=config.num_hidden_layers,
        pad_token_id=config.pad_token_id,
        padded_vocab_size=config.vocab_size,
        seq_length=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        torch_dtype=str(config.dtype).removeprefix("torch."),
    )
    if rope["rope_type"] == "linear" and rope["rope_theta"] == 10000:
        fields["rope_ratio"] = rope["factor"]  # as published
    elif rope != {"rope_type": "default", "rope_theta": 10000}:
        fields["rope_parameters"] = rope
    return config, fields


def chatglm_tensors(files: list[Path], names: dict[str, torch.Tensor], model) -> Iterator[tuple[str, torch.Tensor]]:
    sources = {name: glm_names(name) for name in model.state_dict()}
    target = {source: name for name, parts in sources.items() for source in parts}
    waiting: dict[str, dict] = {}  # of query, key and value, until all three were read
    for source, tensor in with_progress(files, names, "Converting from GLM"):
        name = target[source]
        if len(sources[name]) == 1:
            yield name, tensor
            continue
        waiting.setdefault(name, {})[source] = tensor
        if len(waiting[name]) == 3:
            parts = waiting.pop(name)
            yield name, fuse_query_key_value([parts[part] for part in sources[name]], model.config)


def convert(model: str | Path, output: Path):
    model = local_folder(model)
    glm_config, fields = chatglm_config(model)
    with torch.device("meta"):
        names = check_names(files := weight_files(model), GlmForCausalLM(glm_config))
    chatglm = meta_model(product("configuration_chatglm.ChatGLMConfig").from_dict(fields))
    with new_folder(output) as folder:
        write_package(folder, model, fields, settings=())  # GLM's tokenizer has other names
        write_weights(folder, as_published(chatglm_tensors(files, names, chatglm), chatglm.config))


def main(argv=None):
    args = options().parse_args(argv)
    with plain_errors("conversion"):
        convert(args.model, args.output)


if __name__ == "__main__":
    main()
