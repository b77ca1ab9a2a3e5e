"""
Long prompts in the ChatGLM2-6B shape on the CPU: seconds and peak memory, in chunks (what `generate` does by itself) and as a
whole.

    python -m benchmarks.prompts --output build/prompts.json

INT4 with 2 of the 28 layers. Memory above weights and cache is that of one layer at work, and what each layer's cache has to
spare: up to a quarter of the cache more.
"""

from functools import partial

import torch

from .measure import PeakMemory, in_turn, options, report, seconds
from .systems import Ours, random_prompt


LONGEST_WHOLE = 8192  # longer ones would take 10 GB


def main():
    parser = options(__doc__, rounds=1)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192, 32768])
    args = parser.parse_args()
    layers = 2
    if args.quick:
        layers, args.lengths = 1, [256]
    model = Ours(args.work, layers, 4).model

    def encode(length: int, **kwargs) -> dict:
        ids, outputs = torch.tensor([random_prompt(length)]), []

        def generate():
            mask = torch.ones_like(ids)
            outputs.append(
                model.generate(ids, attention_mask=mask, max_new_tokens=1, return_dict_in_generate=True, **kwargs)
            )

        with PeakMemory() as memory:
            duration = seconds(generate)
        cache = outputs[0].past_key_values
        cache_gb = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 1e9
        return {"seconds": duration, "peak_gb_above_weights_and_cache": memory.gb - cache_gb}

    rows = []
    for length in args.lengths:
        ways = {"in chunks": partial(encode, length)}
        if length <= LONGEST_WHOLE:
            ways["whole"] = partial(encode, length, prefill_chunk_size=length)
        results = in_turn(ways, args.rounds)
        rows.append({"tokens": length, **{name: values[len(values) // 2] for name, values in results.items()}})
    report({"layers": layers, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
