"""
Converts a checkpoint to `GlmForCausalLM`, which is built into Transformers and supported by many programs:

    python -m conversion.to_glm --model path/to/chatglm2-6b --output chatglm2-6b-glm

The output loads without trust_remote_code: model (`AutoModelForCausalLM`), tokenizer and chat template. The weights have other
names and the same values; `conversion.from_glm` restores them bit for bit. Quantized weights are dequantized.

The tokens `sop` and `eop` are called `<sop>` and `<eop>` there, as in GLM-4: the library's tokenizer finds special tokens in text,
and would find `sop` in "sophisticated".
"""

from common.options import Parser, add_model_option, add_output_option


def options() -> Parser:
    parser = Parser(__doc__)
    add_model_option(parser)
    add_output_option(parser)
    return parser


if __name__ == "__main__":
    options().parse_args()  # answers --help and wrong options before the slow imports below


import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from common.errors import plain_errors
from common.files import new_folder
from common.glm import glm_config, glm_tensors
from common.package import product

from .checkpoint import Checkpoint, write_weights


# Text of special tokens that is a part of words
RENAMED_TOKENS = {"sop": "<sop>", "eop": "<eop>"}


def rename_prompt_tokens(template: str) -> str:
    """Returns the chat template with the renamed tokens in its prefix."""
    return template.replace("[gMASK]sop", "[gMASK]" + RENAMED_TOKENS["sop"])


def native_tokenizer(tokenizer) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of the library's class, with the same ids for texts without special tokens."""
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


def convert(model: str | Path, output: Path):
    checkpoint = Checkpoint(model)
    model = checkpoint.folder
    checkpoint.check_standard("GlmForCausalLM")
    tokenizer = product("tokenization_chatglm.ChatGLMTokenizer").from_pretrained(model)
    config = glm_config(checkpoint.config)
    with new_folder(output) as folder:
        config.save_pretrained(folder)
        GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).save_pretrained(folder)
        native_tokenizer(tokenizer).save_pretrained(folder)
        shutil.copy(model / "tokenizer.model", folder)  # for conversion.from_glm
        write_weights(folder, glm_tensors(checkpoint.plain_tensors("Converting to GLM"), checkpoint.config))


def main(argv=None):
    args = options().parse_args(argv)
    with plain_errors("conversion"):
        convert(args.model, args.output)


if __name__ == "__main__":
    main()
