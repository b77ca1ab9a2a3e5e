"""
Computes the memory that the 6B model takes by dtype and context: the weights, and the KV cache of one dialogue.

    python -m benchmarks.memory

Computed from config.json, not measured. A prompt takes some more while it is encoded (docs/benchmarks.md).
"""

import torch
from transformers import AutoConfig, AutoModel

from common.options import Parser
from common.package import ROOT, module_of


CONTEXTS = (2048, 8192, 32768)
FORMATS = {"float32": (torch.float32, None), "bfloat16, float16": (torch.bfloat16, None)}
FORMATS |= {"INT8": (torch.bfloat16, 8), "INT4": (torch.bfloat16, 4)}


def weight_bytes(config, dtype: torch.dtype, bits: int | None) -> int:
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True, dtype=dtype)
        if bits:
            formats = module_of(model, "quantization")
            for name, layer in formats.empty_layers(model, formats.ChatGLMQuantizationConfig(bits=bits)).items():
                model.set_submodule(name, layer)
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def cache_bytes(config, dtype: torch.dtype, tokens: int) -> int:
    """Keys and values of all layers."""
    return 2 * config.num_layers * config.num_key_value_heads * config.kv_channels * tokens * dtype.itemsize


def table() -> list[str]:
    """Returns the lines of a table in Markdown, in GB (10^9 bytes)."""
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    lines = ["| | weights | " + " | ".join(f"{tokens // 1024}K tokens" for tokens in CONTEXTS) + " |"]
    lines.append("|---" * (2 + len(CONTEXTS)) + "|")
    for name, (dtype, bits) in FORMATS.items():
        weights = weight_bytes(config, dtype, bits)
        sizes = [weights, *(weights + cache_bytes(config, dtype, tokens) for tokens in CONTEXTS)]
        lines.append(f"| {name} | " + " | ".join(f"{size / 1e9:.1f}" for size in sizes) + " |")
    return lines


def main():
    Parser(__doc__).parse_args()
    print("\n".join(table()))


if __name__ == "__main__":
    main()
