"""
Writes a checkpoint in INT4 or INT8, in the published format unless --group-size is given (see docs/quantize.md):

    python -m conversion.quantize --model path/to/chatglm2-6b --output chatglm2-6b-int4
    python -m conversion.quantize ... --calibration dialogues.txt     # better quality for this kind of text

Only one tensor is in memory at a time. With a calibration text, the whole model is.
"""

from pathlib import Path

from common.options import QUANTIZATIONS, Parser, add_model_option, add_output_option


def options() -> Parser:
    parser = Parser(__doc__)
    add_model_option(parser)
    add_output_option(parser)
    parser.add_argument("--quantization", choices=list(QUANTIZATIONS), default="int4", help="default: %(default)s")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text of the kind that the model will be used for")
    parser.add_argument(
        "--scale-search", action="store_true", help="search for the scales with the least squared error"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=[32, 64, 128],
        help="columns that share a scale; only this package can read the result",
    )
    parser.add_argument(
        "--quantize-embeddings", action="store_true", help="store embedding and output layer in INT8, too"
    )
    parser.add_argument("--modules-to-not-convert", nargs="+", metavar="NAME", help="layers that are not quantized")
    return parser


if __name__ == "__main__":
    options().parse_args()  # answers --help and wrong options before the slow imports below


from collections.abc import Iterator

import torch

from common.errors import plain_errors
from common.files import new_folder
from common.package import module_of, product

from .checkpoint import Checkpoint, as_published, meta_model, write_package, write_weights


# How much of the calibration text is used: the amount that docs/quantize.md asks for
ROWS, ROW_TOKENS = 32, 512


def quantized_tensors(checkpoint: Checkpoint, layers: dict, scale_search: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in checkpoint.tensors("Quantizing"):
        layer, _, kind = name.rpartition(".")
        if layer not in layers or kind == "bias":
            yield name, tensor
            continue
        try:
            weight, scale = layers[layer].quantize(tensor, scale_search)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        yield name, weight
        yield f"{name}_scale", scale


def calibration_ids(path: Path, tokenizer) -> list[torch.LongTensor]:
    """
    Returns the beginning of a text as rows of ids, each `[1, seq]`, with the prefix of prompts.

    Raises:
        ValueError: if the text is missing, empty or not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path} (--calibration).")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}). Convert it, or give another --calibration.") from None
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not text.strip():
        raise ValueError(f"{path} (--calibration) is empty. Pass a text of about 16,000 tokens.")
    prefix = tokenizer.get_prefix_tokens()
    step = ROW_TOKENS - len(prefix)
    rows = [prefix + ids[start : start + step] for start in range(0, len(ids), step)][:ROWS]
    print(f"Calibrating with {sum(map(len, rows)):,} tokens of {path}.")
    return [torch.tensor([row]) for row in rows]


def convert(model: str | Path, output: Path, bits: int, calibration: Path | None = None, **options):
    """
    Args:
        options: Options of `ChatGLMQuantizationConfig`.
    """
    checkpoint = Checkpoint(model)
    model = checkpoint.folder
    if checkpoint.quantized:
        raise ValueError(f"{model} is quantized already. Pass the checkpoint that it was made from.")
    empty = meta_model(checkpoint.config)
    formats = module_of(empty, "quantization")
    config = formats.ChatGLMQuantizationConfig(bits=bits, **options)
    layers = formats.empty_layers(empty, config)
    changed = {"quantization_bit": bits, "quantization_config": config.to_dict()}
    if calibration is not None:
        ids = calibration_ids(calibration, product("tokenization_chatglm.ChatGLMTokenizer").from_pretrained(model))
    with new_folder(output) as folder:
        write_package(folder, model, {**checkpoint.config_dict, **changed})
        if calibration is None:
            tensors = quantized_tensors(checkpoint, layers, config.scale_search)
        else:
            loaded = type(empty).from_pretrained(model).eval().quantize(bits, calibration=ids, **options)
            tensors = loaded.state_dict().items()
        write_weights(folder, as_published(tensors, checkpoint.config))


def main(argv=None):
    args = vars(options().parse_args(argv))
    with plain_errors("conversion"):
        convert(bits=QUANTIZATIONS[args.pop("quantization")], **args)


if __name__ == "__main__":
    main()
