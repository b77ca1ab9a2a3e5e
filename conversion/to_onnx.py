"""
Exports a checkpoint to ONNX, for ONNX Runtime, OpenVINO and other programs:

    python -m conversion.to_onnx --model path/to/chatglm2-6b --output chatglm2-6b-onnx

One graph computes a step with any number of tokens, after any number of cached tokens, for any batch size. Inputs: `input_ids` and
`position_ids`, `[batch, seq]`; `attention_mask`, `[batch, past + seq]`; `past_key_values.N.key` and `.value` for each layer,
`[batch, groups, past, head_dim]`, where past is 0 at first. Outputs: `logits`, `[batch, seq, vocab]`; `present.N.key` and
`.value`, the next step's past. Everything is in float32. Needs `onnx` and `onnxscript`, and memory for the model.
"""

from common.options import Parser, add_model_option, add_output_option


def options() -> Parser:
    parser = Parser(__doc__)
    add_model_option(parser)
    add_output_option(parser)
    return parser


if __name__ == "__main__":
    options().parse_args()  # answers --help and wrong options before the slow imports below


import shutil
from pathlib import Path

import torch
from transformers.cache_utils import DynamicCache

from common.checkpoint import CACHE
from common.errors import plain_errors
from common.files import new_folder

from .checkpoint import SETTINGS, Checkpoint, is_language_model, meta_model


class Step(torch.nn.Module):
    """A forward pass whose KV cache is a list of tensors, as input and as output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        cache = DynamicCache([tuple(layer) for layer in past])
        options = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: cache, "use_cache": True}
        output = self.model.transformer(input_ids, **options)
        logits = self.model.transformer.output_layer(output.last_hidden_state)
        return logits, [[layer.keys, layer.values] for layer in getattr(output, CACHE).layers]


def export(model, path: Path):
    """Writes the graph, and its weights beside it."""
    config = model.config
    # Example inputs; the dimensions that vary are named below.
    batch, past, length = 2, 5, 3
    shape = (batch, config.num_key_value_heads, past, config.kv_channels)
    ids = torch.ones(batch, length, dtype=torch.long)
    mask = torch.ones(batch, past + length, dtype=torch.long)
    positions = torch.arange(past, past + length).expand(batch, -1).contiguous()
    caches = [[torch.zeros(shape), torch.zeros(shape)] for _ in range(config.num_layers)]
    dims = {0: "batch", 1: "seq"}
    dynamic = (dims, {0: "batch", 1: "total"}, dims, [[{0: "batch", 2: "past"}] * 2] * config.num_layers)
    parts = [f"{i}.{kind}" for i in range(config.num_layers) for kind in ("key", "value")]
    with torch.no_grad():
        program = torch.onnx.export(
            Step(model).eval(),
            (ids, mask, positions, caches),
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in parts)],
            output_names=["logits", *(f"present.{part}" for part in parts)],
        )
    program.save(path, external_data=True)


def convert(model: str | Path, output: Path):
    checkpoint = Checkpoint(model)
    model = checkpoint.folder
    if checkpoint.config.pre_seq_len is not None or not is_language_model(checkpoint.config):
        raise ValueError(f"{model}: only language models without a P-Tuning prefix (pre_seq_len) can be exported.")
    with new_folder(output) as folder:
        loaded = type(meta_model(checkpoint.config)).from_pretrained(model)
        if checkpoint.quantized:
            loaded = loaded.dequantize()
        export(loaded.float().eval(), folder / "model.onnx")
        for name in ("config.json", "tokenizer.model", *SETTINGS):
            if (model / name).exists():
                shutil.copy(model / name, folder)


def main(argv=None):
    args = options().parse_args(argv)
    with plain_errors("conversion"):
        convert(args.model, args.output)


if __name__ == "__main__":
    main()
