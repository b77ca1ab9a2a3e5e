"""
Loading, prefill and decoding in the ChatGLM2-6B shape, on the CPU: float32 and bfloat16 beside `GlmForCausalLM` of
Transformers, INT8 and INT4 beside llama.cpp.

    python -m benchmarks.decode --output benchmarks/results/decode.json

Weights are random. The systems generate greedily from the same number of tokens, on as many threads, in turn; reported are
medians over the rounds, and their ratios. float32 has 8 of the 28 layers, as all would take 25 GB.
"""

import statistics
import sys

import torch

from .measure import in_turn, options, read_bandwidth, report, seconds
from .systems import Glm, LlamaCpp, Ours, is_installed, random_prompt


PRECISIONS = {
    "float32": dict(bits=None, dtype=torch.float32),
    "bfloat16": dict(bits=None, dtype=torch.bfloat16),
    "int8": dict(bits=8, dtype=torch.float32),
    "int4": dict(bits=4, dtype=torch.float32),
}


def weight_bytes(model) -> int:
    """Bytes that each token reads: all but the embedding, of which it reads a row."""
    embedding = set(model.get_input_embeddings().parameters())
    return sum(p.nbytes for p in model.parameters() if p not in embedding)


def product_seconds(model, tokens: int) -> float:
    """Median seconds that all linear layers of the model take for one token, without the rest of the step."""
    layers = [module for module in model.modules() if hasattr(module, "in_features")]
    inputs = [torch.randn(1, 1, layer.in_features, dtype=model.dtype) for layer in layers]

    @torch.no_grad()
    def multiply():
        for layer, x in zip(layers, inputs):
            layer(x)

    return statistics.median(seconds(multiply) for _ in range(tokens))


def compare(precision: str, args) -> dict:
    layers = min(args.layers, 8) if precision == "float32" else args.layers
    bits = PRECISIONS[precision]["bits"]
    print(precision, file=sys.stderr)
    ours = Ours(args.work, layers, **PRECISIONS[precision])
    systems = {"this": ours}
    if bits is None:
        systems["GlmForCausalLM"] = Glm(ours.model)
    elif is_installed("llama_cpp"):
        systems["llama.cpp"] = LlamaCpp(args.work, layers, bits, args.prompt + args.tokens)
    prompt = random_prompt(args.prompt)
    runs = {name: lambda system=system: system.run(prompt, args.tokens) for name, system in systems.items()}
    bandwidth = read_bandwidth()
    rounds = in_turn(runs, args.rounds)
    result = {
        "layers": layers,
        "load_seconds": ours.load_seconds,
        "anonymous_gb": ours.memory,
        "weights_gb": sum(p.nbytes for p in ours.model.parameters()) / 1e9,
        "bandwidth_gb_s": statistics.median([bandwidth, read_bandwidth(), read_bandwidth()]),
    }
    for name, pairs in rounds.items():
        prefill, decode = (statistics.median(values) for values in zip(*pairs))
        result[name] = {"prefill_tokens_s": args.prompt / prefill, "decode_tokens_s": 1 / decode}
    step = 1 / result["this"]["decode_tokens_s"]
    result["read_gb_s"] = weight_bytes(ours.model) / 1e9 / step
    result["share_outside_products"] = 1 - product_seconds(ours.model, args.tokens) / step
    for peer in systems.keys() - {"this"}:
        result["ratio"] = {figure: result["this"][figure] / result[peer][figure] for figure in result[peer]}
    return result


def main():
    parser = options(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate")
    args = parser.parse_args()
    if args.quick:
        args.layers = args.rounds = 1
        args.prompt, args.tokens = 32, 4
    result = {"prompt": args.prompt, "tokens": args.tokens, "rounds": args.rounds}
    for precision in args.precisions:
        result[precision] = compare(precision, args)
    report(result, args.output)


if __name__ == "__main__":
    main()
