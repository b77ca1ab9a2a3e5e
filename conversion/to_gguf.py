"""
Converts a checkpoint to a GGUF file for llama.cpp, with its tokenizer and chat template:

    python -m conversion.to_gguf --model path/to/chatglm2-6b --output chatglm2-6b-q4_0.gguf --type q4_0

Types: f16, q8_0 and q4_0. In q4_0, embedding and output layer are q8_0. Vectors are float32. A weight stays f16 if its number of
columns is not a multiple of 32. Quantized checkpoints are dequantized first. Only one tensor is in memory at a time. Needs the
package `gguf`.

The format is that of llama.cpp's architecture `chatglm` (its conversion/chatglm.py), with SentencePiece's vocabulary. As in
`conversion.to_glm`, the tokens `sop` and `eop` are called `<sop>` and `<eop>`: llama.cpp finds special tokens inside words.
"""

from common.options import Parser, add_model_option, add_output_option


TYPES = ("f16", "q8_0", "q4_0")


def options() -> Parser:
    parser = Parser(__doc__)
    add_model_option(parser)
    add_output_option(parser, "the file to write")
    parser.add_argument("--type", choices=TYPES, default="f16", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    options().parse_args()  # answers --help and wrong options before the slow imports below


import re
from pathlib import Path

import gguf
import numpy as np
import torch

from common.errors import plain_errors
from common.files import new_file
from common.gguf_architecture import write_architecture
from common.glm import split_query_key_value
from common.package import product

from .checkpoint import Checkpoint
from .to_glm import RENAMED_TOKENS, rename_prompt_tokens


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer, config):
    """Writes a token for each row of the embedding, with SentencePiece's scores, and the chat template."""
    sp, kinds = tokenizer.tokenizer.sp_model, gguf.TokenType
    tokens, scores, types = [], [], []
    for i in range(config.padded_vocab_size):
        token = tokenizer.convert_ids_to_tokens(i)
        if i < sp.vocab_size():
            flags = (sp.is_unknown, kinds.UNKNOWN), (sp.is_control, kinds.CONTROL), (sp.is_byte, kinds.BYTE)
            types.append(next((kind for is_so, kind in flags if is_so(i)), kinds.NORMAL))
        elif not token:
            token = f"[PAD{i}]"
            types.append(kinds.UNUSED)
        else:
            types.append(kinds.CONTROL if i < tokenizer.vocab_size else kinds.USER_DEFINED)
        tokens.append(RENAMED_TOKENS.get(token, token))
        scores.append(sp.get_score(i) if i < sp.vocab_size() else 0.0)
    writer.add_tokenizer_model("llama")  # SentencePiece
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(sp.unk_id())
    writer.add_bos_token_id(sp.bos_id())
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(True)
    # Other programs do not know Transformers' marks around generated text.
    template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "{#- -#}", tokenizer.chat_template)
    writer.add_chat_template(rename_prompt_tokens(template))


def tensor_type(name: str, tensor: torch.Tensor, wanted: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    kinds = gguf.GGMLQuantizationType
    if tensor.ndim == 1:
        return kinds.F32
    if wanted != kinds.F16 and tensor.shape[1] % 32:
        return kinds.F16
    return kinds.Q8_0 if wanted == kinds.Q4_0 and not name.startswith("blk.") else wanted


def convert(model: str | Path, output: Path, kind: str = "f16"):
    checkpoint = Checkpoint(model)
    model = checkpoint.folder
    checkpoint.check_standard("llama.cpp")
    config = checkpoint.config
    tokenizer = product("tokenization_chatglm.ChatGLMTokenizer").from_pretrained(model)
    if len(tokenizer) > config.padded_vocab_size:
        raise ValueError(
            f"The tokenizer in {model} has {len(tokenizer):,} tokens, the embedding {config.padded_vocab_size} rows: they "
            "belong to different models, or the model lacks resize_token_embeddings."
        )
    wanted, file_type = gguf.GGMLQuantizationType[kind.upper()], gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.CHATGLM, config.num_layers)

    def gguf_name(name: str) -> str:
        return names.get_name(name.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))

    with new_file(output) as path:
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.CHATGLM])
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(model.resolve().name)
        write_architecture(writer, config)
        write_vocabulary(writer, tokenizer, config)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        kinds = {}
        for name, tensor in checkpoint.plain_names().items():
            kinds[name] = tensor_type(gguf_name(name), tensor, wanted)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kinds[name]]
            size = tensor.numel() // block * block_bytes
            writer.add_tensor_info(gguf_name(name), tensor.shape, np.dtype(np.float32), size, raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in checkpoint.plain_tensors(f"Converting to {kind}"):
            if not torch.isfinite(tensor.half()).all():
                raise ValueError(f"{name} has values that are not finite in float16, and cannot be converted.")
            if ".query_key_value." in name:
                tensor = torch.cat(split_query_key_value(tensor, config))
            tensor = tensor.half() if kinds[name] == gguf.GGMLQuantizationType.F16 else tensor.float()
            writer.write_tensor_data(gguf.quants.quantize(tensor.numpy(), kinds[name]))
        writer.close()
    if unaligned := [name for name, dtype in kinds.items() if dtype.name == "F16" and kind != "f16"]:
        print(f"{len(unaligned)} of {len(kinds)} tensors stay f16: their number of columns is not a multiple of 32.")


def main(argv=None):
    args = options().parse_args(argv)
    with plain_errors("conversion"):
        convert(args.model, args.output, args.type)


if __name__ == "__main__":
    main()
