"""
Rewrites a checkpoint's `.bin` files as safetensors, tensor by tensor: the model is never in memory.

    python -m conversion.to_safetensors --model path/to/chatglm2-6b --output chatglm2-6b-safetensors

The values are the same bit for bit, except `inv_freq`, which is computed and which nothing reads. The output is a complete
checkpoint with this package's code. Quantized checkpoints work, too.
"""

from common.options import Parser, add_model_option, add_output_option


def options() -> Parser:
    parser = Parser(__doc__)
    add_model_option(parser)
    add_output_option(parser)
    return parser


if __name__ == "__main__":
    options().parse_args()  # answers --help and wrong options before the slow imports below


from pathlib import Path

from common.errors import plain_errors
from common.files import new_folder

from .checkpoint import SHARD_BYTES, Checkpoint, as_published, write_package, write_weights


def convert(model: str | Path, output: Path, shard_bytes: int = SHARD_BYTES):
    checkpoint = Checkpoint(model)
    model = checkpoint.folder
    with new_folder(output) as folder:
        write_package(folder, model, checkpoint.config_dict)
        tensors = as_published(checkpoint.tensors("Writing safetensors"), checkpoint.config)
        write_weights(folder, tensors, shard_bytes)


def main(argv=None):
    args = options().parse_args(argv)
    with plain_errors("conversion"):
        convert(args.model, args.output)


if __name__ == "__main__":
    main()
