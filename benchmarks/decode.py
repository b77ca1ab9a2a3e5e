"""
Measures loading, prefill and decoding in the ChatGLM2-6B shape on the CPU, and compares with llama.cpp, ik_llama.cpp (with
`--ik`) and, in float32 and half precision, `GlmForCausalLM` of Transformers.

    python -m benchmarks.decode --output build/decode.json --ik ik_llama.cpp/build/bin/llama-bench

Weights are random. The systems take turns and generate greedily from the same number of tokens, with the same number of threads.
The figures are medians over the rounds, and their ratios. Each round measures a plain read of memory too, which decoding can
hardly be faster than, and the matrix multiplications alone, of one and of four sequences. Unquantized weights have 6 of the 28
layers, as all would take up to 25 GB.

ik_llama.cpp is not on PyPI; build it with its default flags: `cmake -B build -DGGML_NATIVE=ON`, `cmake --build build`.
"""

import statistics
import sys

import torch

from .measure import in_turn, options, read_bandwidth, report, seconds
from .systems import Glm, IkLlamaCpp, LlamaCpp, Ours, add_ik, gguf_file, is_installed, random_prompt


PRECISIONS = {
    "int4": dict(bits=4, dtype=torch.float32, gguf="Q4_0"),
    "int8": dict(bits=8, dtype=torch.float32, gguf="Q8_0"),
    "bfloat16": dict(bits=None, dtype=torch.bfloat16, gguf="BF16"),
    "float16": dict(bits=None, dtype=torch.float16, gguf="F16"),
    "float32": dict(bits=None, dtype=torch.float32, gguf=None),
}


def weight_bytes(model) -> int:
    """Returns the bytes that are read for each token: everything except the embedding, of which one row is read."""
    embedding = set(model.get_input_embeddings().parameters())
    return sum(p.nbytes for p in model.parameters() if p not in embedding)


def product_seconds(model, tokens: int, batch: int = 1) -> float:
    """Returns the median seconds of all linear layers of the model for one token, without the rest of the step."""
    layers = [module for module in model.modules() if hasattr(module, "in_features")]
    inputs = [torch.randn(batch, 1, layer.in_features, dtype=model.dtype) for layer in layers]

    @torch.no_grad()
    def multiply():
        for layer, x in zip(layers, inputs):
            layer(x)

    return statistics.median(seconds(multiply) for _ in range(tokens))


def compare(precision: str, args) -> dict:
    bits, dtype, kind = PRECISIONS[precision].values()
    layers = args.layers if bits else min(args.layers, 6)
    print(precision, file=sys.stderr)
    ours = Ours(args.work, layers, bits, dtype)
    systems = {"this": ours}
    if bits is None:
        systems["GlmForCausalLM"] = Glm(ours.model)
    if kind and is_installed("llama_cpp"):
        systems["llama.cpp"] = LlamaCpp(gguf_file(args.work, layers, kind), args.prompt + args.tokens)
    if kind and args.ik:
        systems["ik_llama.cpp"] = IkLlamaCpp(args.ik, gguf_file(args.work, layers, kind))
    prompt = random_prompt(args.prompt)
    memory = torch.ones(1 << 28)  # 1 GB, which no cache holds
    runs = {name: lambda system=system: system.run(prompt, args.tokens) for name, system in systems.items()}
    runs = {  # next to each other what is compared with each other
        "stream": lambda: read_bandwidth(memory),
        "this": runs.pop("this"),
        "products": lambda: product_seconds(ours.model, args.tokens),
        "products of four": lambda: product_seconds(ours.model, args.tokens, batch=4),
        **runs,
    }
    rounds = in_turn(runs, args.rounds)
    stream, products, of_four = (rounds.pop(name) for name in ("stream", "products", "products of four"))
    read = weight_bytes(ours.model) / 1e9
    result = {
        "layers": layers,
        "rounds": args.rounds,
        "load_seconds": ours.load_seconds,
        "anonymous_gb": ours.memory,
        "weights_gb": sum(p.nbytes for p in ours.model.parameters()) / 1e9,
        "stream_gb_s": statistics.median(stream),
        "share_of_stream": statistics.median(read / step / gb_s for (_, step), gb_s in zip(rounds["this"], stream)),
    }
    steps = [step for _, step in rounds["this"]]
    result["share_outside_products"] = statistics.median(1 - p / step for p, step in zip(products, steps))
    result["four_rows"] = statistics.median(four / one for four, one in zip(of_four, products))
    for name, pairs in rounds.items():
        prefill, decode = (statistics.median(values) for values in zip(*pairs))
        result[name] = {"prefill_tokens_s": args.prompt / prefill, "decode_tokens_s": 1 / decode}
    result["ratio"] = {
        peer: {figure: result["this"][figure] / result[peer][figure] for figure in result[peer]}
        for peer in systems
        if peer != "this"
    }
    return result


def main():
    parser = options(__doc__, rounds=4)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate")
    add_ik(parser)
    args = parser.parse_args()
    if args.quick:
        args.layers = args.rounds = 1
        args.prompt, args.tokens = 32, 4
    result = {"prompt": args.prompt, "tokens": args.tokens}
    for precision in args.precisions:
        result[precision] = compare(precision, args)
    report(result, args.output)


if __name__ == "__main__":
    main()
