"""
Merges LoRA adapters into the weights, for a checkpoint that does not need PEFT:

    python -m conversion.merge_lora --adapter output --output chatglm2-6b-tuned
    python -m conversion.merge_lora --adapter output --model path/to/chatglm2-6b --output chatglm2-6b-tuned

The adapters are those of `training.lora` or of PEFT's `save_pretrained`. Without `--model`, the base model is the one in
adapter_config.json. If it is quantized, it is dequantized first, because the adapters were trained on its values. Needs the
package `peft`, and memory for the model.
"""

from pathlib import Path

from common.options import Parser, add_output_option


def options() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapters")
    parser.add_argument(
        "--model",
        help="base model: checkpoint folder, or OWNER/NAME on the Hub (default: the one in adapter_config.json)",
    )
    add_output_option(parser)
    return parser


if __name__ == "__main__":
    options().parse_args()  # answers --help and wrong options before the slow imports below


from peft import PeftConfig, PeftModel
from safetensors import SafetensorError

from common.checkpoint import check_folder
from common.errors import plain_errors
from common.files import new_folder

from .checkpoint import Checkpoint, as_published, meta_model, write_package, write_weights


ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def convert(adapter: Path, output: Path, model: str | Path | None = None):
    if not (check_folder(adapter) / "adapter_config.json").exists():
        raise ValueError(f"{adapter} has no adapter_config.json. Pass a folder with adapters that PEFT saved.")
    if not any((adapter / name).exists() for name in ADAPTERS):
        raise ValueError(f"{adapter} has no {' or '.join(ADAPTERS)}: the adapters themselves are missing.")
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{adapter / 'adapter_config.json'} cannot be read by this PEFT: {error!r}") from error
    if config.is_prompt_learning:
        raise ValueError(
            f"{adapter} holds a {config.peft_type.value}, which does not change weights and cannot be merged."
        )
    if model is None and not config.base_model_name_or_path:
        raise ValueError(f"{adapter} does not name its base model. Pass it with --model.")
    model = model or config.base_model_name_or_path
    checkpoint = Checkpoint(model)
    model = checkpoint.folder
    with new_folder(output) as folder:
        changed = {
            name: value for name, value in checkpoint.config_dict.items() if not name.startswith("quantization_")
        }
        write_package(folder, model, changed)
        base = type(meta_model(checkpoint.config)).from_pretrained(model)
        if checkpoint.quantized:
            base = base.dequantize()
        try:
            merged = PeftModel.from_pretrained(base, adapter).merge_and_unload(progressbar=True, safe_merge=True)
        except (RuntimeError, SafetensorError) as error:  # torch's, of shapes, or of a damaged file
            raise ValueError(f"{adapter} does not fit {model}: {error}") from error
        write_weights(folder, as_published(merged.state_dict().items(), checkpoint.config))


def main(argv=None):
    args = options().parse_args(argv)
    with plain_errors("conversion"):
        convert(args.adapter, args.output, args.model)


if __name__ == "__main__":
    main()
