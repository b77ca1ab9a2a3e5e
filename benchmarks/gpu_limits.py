"""
Writes the tables of docs/gpu.md: what was measured (benchmarks/results/*/gpu.json and gpu_products.json), and what a GPU can
reach at most, computed: tokens per second from its memory bandwidth, and memory from the sizes of ChatGLM2-6B.

    python -m benchmarks.gpu_limits
"""

import json
from dataclasses import dataclass

from common.package import ROOT

from .present import table


PAGE = ROOT / "docs/gpu.md"
RESULTS = ROOT / "benchmarks/results"
MARKS = ("<!-- tables: python -m benchmarks.gpu_limits -->\n", "<!-- end of the tables -->\n")

# GB/s and GB, from the vendor's data sheets
CARDS = {
    "T4": (320, 16),
    "RTX 2060": (336, 6),
    "RTX 3060": (360, 12),
    "RTX 3090": (936, 24),
    "RTX 4060": (272, 8),
    "RTX 4090": (1008, 24),
    "A100 40 GB": (1555, 40),
    "H100 SXM": (3350, 80),
}
POSITIONS = (2048, 8192, 32768)
CONTEXT_GB = 0.5  # CUDA's context and libraries: an assumption
DEQUANTIZED_BYTES = 1 << 26  # as in quantization_gpu.py
CHUNK = 1024  # tokens of a prompt that are encoded at a time


@dataclass(frozen=True)
class Precision:
    name: str
    bits: int  # of the layers' matrices
    embedding_bits: int  # of the embedding and the output layer


PRECISIONS = [
    Precision("float16", 16, 16),
    Precision("INT8", 8, 16),
    Precision("INT8, embeddings too", 8, 8),
    Precision("INT4", 4, 16),
    Precision("INT4, embeddings in INT8", 4, 8),
]


def matrix_bytes(out: int, columns: int, bits: int) -> int:
    """With a float16 scale for each row if it is quantized."""
    return out * columns * bits // 8 + (2 * out if bits < 16 else 0)


def layer_shapes(config: dict) -> list[tuple[int, int]]:
    """`[out, in]` of query_key_value, dense, dense_h_to_4h and dense_4h_to_h."""
    hidden, ffn, width = config["hidden_size"], config["ffn_hidden_size"], config["kv_channels"]
    heads, groups = config["num_attention_heads"], config["multi_query_group_num"]
    return [((heads + 2 * groups) * width, hidden), (hidden, heads * width), (2 * ffn, hidden), (hidden, ffn)]


def token_bytes(config: dict, precision: Precision) -> int:
    """Weights that each token reads: all but the embedding, of which it reads a row."""
    shapes = layer_shapes(config)
    hidden = config["hidden_size"]
    layer = sum(matrix_bytes(*shape, precision.bits) for shape in shapes) + 2 * (shapes[0][0] + 2 * hidden)
    head = matrix_bytes(config["padded_vocab_size"], hidden, precision.embedding_bits)
    return config["num_layers"] * layer + 2 * hidden + head


def weight_bytes(config: dict, precision: Precision) -> int:
    embedding = matrix_bytes(config["padded_vocab_size"], config["hidden_size"], precision.embedding_bits)
    return token_bytes(config, precision) + embedding


def cache_bytes(config: dict, positions: int) -> int:
    """Keys and values, in half precision."""
    return 2 * 2 * config["multi_query_group_num"] * config["kv_channels"] * config["num_layers"] * positions


def workspace_bytes(config: dict, precision: Precision, positions: int) -> int:
    """While a chunk of the prompt is encoded: activations, the attention mask, logits, and a dequantized part of a weight."""
    activations = CHUNK * 2 * (4 * config["ffn_hidden_size"] + 4 * config["hidden_size"])
    logits = 3 * 4 * config["padded_vocab_size"]  # of one position, in float32, with the copies of the sampling
    return activations + CHUNK * positions + logits + (DEQUANTIZED_BYTES if precision.bits < 16 else 0)


def memory_gb(config: dict, precision: Precision, positions: int) -> float:
    parts = weight_bytes(config, precision), cache_bytes(config, positions)
    return sum(parts, workspace_bytes(config, precision, positions)) / 1e9 + CONTEXT_GB


def tables() -> str:
    config = json.loads((ROOT / "config.json").read_text())
    speed = table(
        ["", "GB read per token", *(f"{card}, {bandwidth:,} GB/s" for card, (bandwidth, _) in CARDS.items())],
        [
            [p.name, f"{size:.2f}", *(f"{bandwidth / size:.0f}" for bandwidth, _ in CARDS.values())]
            for p in PRECISIONS
            for size in [token_bytes(config, p) / 1e9]
        ],
    )
    cards_by_memory = sorted({size for _, size in CARDS.values()})
    rows = []
    for p in PRECISIONS:
        needed = [memory_gb(config, p, positions) for positions in POSITIONS]
        # 6 GB on the box are 6 GiB
        fits = next((size for size in cards_by_memory if needed[-1] <= size * 1.024**3), None)
        rows.append([p.name, f"{weight_bytes(config, p) / 1e9:.2f}", *(f"{n:.1f}" for n in needed), f"{fits} GB"])
    memory = table(["", "weights", *(f"{n:,} tokens" for n in POSITIONS), "smallest card"], rows)
    cache = ", ".join(f"{cache_bytes(config, n) / 1e9:.2f} GB at {n:,}" for n in POSITIONS)
    return (
        "## Highest possible speed, in tokens per second\n\n"
        "The memory bandwidth divided by the size of the weights that are read for each token. Long dialogues are slower, as the "
        f"KV cache is read too: {cache} tokens.\n\n{speed}\n\n"
        "## Memory, in GB\n\n"
        "Weights, KV cache, the memory to encode a chunk of 1,024 tokens (activations, mask, logits, a dequantized part of a "
        f"weight), and {CONTEXT_GB} GB for CUDA itself. The last column is the smallest card above that has enough for 32,768 "
        f"tokens.\n\n{memory}\n\n"
    )


MODELS = {"int4": "INT4", "bfloat16": "bfloat16", "int8": "INT8"}
STEPS = {"eager": "default cache", "static": "static cache, not compiled", "compiled": "static cache, compiled"}


def measured() -> str:
    """The measured speeds of each GPU, and the times of the multiplications alone."""
    text = ""
    for path in sorted(RESULTS.glob("*/gpu.json")):
        figures = json.loads(path.read_text())
        models = {name: value for name, value in figures.items() if isinstance(value, dict) and "steps" in value}
        rows = [
            [
                MODELS.get(name, name),
                STEPS[step["steps"]] + ("" if step["attention"] == "sdpa" else f", {step['attention']}"),
                f"{step['positions']:,}",
                f"{step['tokens_s']:.0f}",
                f"{100 * step['share_of_limit']:.0f} %",
            ]
            for name, model in models.items()
            for step in model["steps"]
        ]
        decoding = table(["", "steps", "tokens in the cache", "tokens/s", "of the bandwidth's limit"], rows)
        prompts = [prompt["prompt"] for prompt in models["int4"]["prompts"]]
        rows = [
            [MODELS.get(name, name), *(f"{prompt['tokens_s']:,.0f}" for prompt in model["prompts"])]
            for name, model in models.items()
        ]
        rows.append(
            [
                "matrix multiplications alone, bfloat16",
                *(f"{figures['matmuls_alone_tokens_s'][str(n)]:,.0f}" for n in prompts),
            ]
        )
        text += f"## Measured: {figures['device']}\n\n"
        text += f"Random weights, {figures['layers']} layers; memory read at {figures['bandwidth_gb_s']:,.0f} GB/s; "
        text += (
            f"torch {figures['machine']['torch']}, Transformers {figures['machine']['transformers']}. Decoding, of one "
        )
        text += f"dialogue:\n\n{decoding}\n\nPrompts, in tokens per second:\n\n"
        text += table(["", *(f"{n:,} tokens" for n in prompts)], rows) + "\n\n"
        products = json.loads(path.with_name("gpu_products.json").read_text())["products"]
        counts = list(products[0]["microseconds"])
        rows = [
            [
                f"{row['out']:,} × {row['columns']:,}",
                f"INT{row['bits']}" + (f", groups of {row['group_size']}" if row["group_size"] else ""),
                *(f"{row['microseconds'][n]:.0f}" for n in counts),
                f"{row['float16_microseconds']['1']:.0f}",
            ]
            for row in products
        ]
        heads = ["weight", "", *(f"{n} {'row' if n == '1' else 'rows'}" for n in counts), "float16, 1 row"]
        text += f"One multiplication, in microseconds:\n\n{table(heads, rows)}\n\n"
    return text


def with_tables(page: str) -> str:
    """The page, with the tables between the marks replaced."""
    before, rest = page.split(MARKS[0])
    return before + MARKS[0] + "\n" + measured() + tables() + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
