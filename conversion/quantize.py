"""
Writes a checkpoint in INT4 or INT8 (docs/quantize.md), in the published format unless an option says otherwise:

    python -m conversion.quantize --model path/to/chatglm2-6b --output chatglm2-6b-int4
    python -m conversion.quantize ... --calibration dialogues.txt     # rounds for the kind of text in there

One tensor is in memory at a time; with a calibration text, which the layers have to compute, the whole model is.
"""

from pathlib import Path

from common.options import QUANTIZATIONS, Parser, add_model_option, add_output_option


def options() -> Parser:
    parser = Parser(__doc__)
    add_model_option(parser)
    add_output_option(parser)
    parser.add_argument("--quantization", choices=list(QUANTIZATIONS), default="int4", help="default: %(default)s")
    parser.add_argument("--calibration", type=Path, help="a text in UTF-8 of the kind that the model is for")
    parser.add_argument("--scale-search", action="store_true", help="scales with the least squared error")
    parser.add_argument(
        "--group-size", type=int, choices=[32, 64, 128], help="columns a scale; this package's own format"
    )
    parser.add_argument("--quantize-embeddings", action="store_true", help="embedding and output layer in INT8")
    parser.add_argument("--modules-to-not-convert", nargs="+", metavar="NAME", help="layers to leave as they are")
    return parser


if __name__ == "__main__":
    options().parse_args()  # --help and wrong options are answered before the imports below, which take seconds


from collections.abc import Iterator

import torch

from common.errors import plain_errors
from common.files import new_folder
from common.package import module_of, product

from .checkpoint import Checkpoint, as_published, meta_model, write_package, write_weights


# Of the calibration text so much is used: what docs/quantize.md asks for
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
    Returns the beginning of a text as rows of ids, each `[1, seq]`, with the prefix that prompts have.

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
        raise ValueError(f"{path} (--calibration) is empty. Give a text of some 16,000 tokens.")
    prefix = tokenizer.get_prefix_tokens()
    step = ROW_TOKENS - len(prefix)
    rows = [prefix + ids[start : start + step] for start in range(0, len(ids), step)][:ROWS]
    print(f"Calibrating with {sum(map(len, rows)):,} tokens of {path}.")
    return [torch.tensor([row]) for row in rows]


def convert(model: str | Path, output: Path, bits: int, calibration: Path | None = None, **options):
    """
    Args:
        options: Those of `ChatGLMQuantizationConfig`.
    """
    checkpoint = Checkpoint(model)
    model = checkpoint.folder
    if checkpoint.quantized:
        raise ValueError(f"{model} is quantized already. Give the checkpoint that it was made from.")
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
