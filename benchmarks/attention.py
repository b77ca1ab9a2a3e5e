"""
What attention adds to a step of decoding as the context grows, in the ChatGLM2-6B shape on the CPU: this model, the same
without multi-query attention (32 groups, as the first generation had), and `GlmForCausalLM` of Transformers.

    python -m benchmarks.attention

Only attention's share is measured, so few layers do: the rest of a step does not depend on the context. Caches are filled
with random numbers; the systems take turns.
"""

import argparse
import inspect
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, DynamicCache, GlmConfig, GlmForCausalLM

from .decode import describe_machine, report
from .random_checkpoint import ROOT


def build(name: str, layers: int):
    """Sizes that attention does not depend on are small, for the step to be mostly attention."""
    if name == "GlmForCausalLM":
        config = GlmConfig(
            vocab_size=1024, hidden_size=4096, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=32,
            num_key_value_heads=2, head_dim=128, max_position_embeddings=32768, pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        return GlmForCausalLM(config).eval()
    options = dict(num_layers=layers, padded_vocab_size=1024, ffn_hidden_size=64, seq_length=32768)
    if name == "without multi-query attention":
        options["multi_query_attention"] = False
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True, **options)
    return AutoModel.from_config(config, trust_remote_code=True, dtype=torch.float32).eval()


def filled_cache(model, positions: int):
    """Returns a cache as the model itself makes it, with `positions` random keys and values."""
    groups = model.config.num_key_value_heads
    cache = DynamicCache(config=model.config)
    let_grow = getattr(inspect.getmodule(type(model)), "let_grow", None)
    if let_grow is not None:
        let_grow(cache)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*torch.randn(2, 1, groups, positions, 128), layer)
    return cache


@torch.no_grad()
def step_seconds(model, cache, steps: int) -> float:
    seconds = []
    token = torch.tensor([[5]])
    for _ in range(steps):
        start = time.perf_counter()
        model(token, past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--positions", type=int, nargs="*", default=[512, 2048, 8192, 32000])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()

    names = ["this", "without multi-query attention", "GlmForCausalLM"]
    models = {name: build(name, args.layers) for name in names}
    empty, rows = {}, []
    for name, model in models.items():
        empty[name] = step_seconds(model, filled_cache(model, 1), args.steps)
    for positions in args.positions:
        seconds = {name: [] for name in names}
        cache_bytes = {}
        for _ in range(args.rounds):
            for name, model in models.items():
                cache = filled_cache(model, positions)
                cache_bytes[name] = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
                seconds[name].append(step_seconds(model, cache, args.steps))
                del cache
        row = {"positions": positions}
        for name in names:
            attention = (statistics.median(seconds[name]) - empty[name]) / args.layers * 1000
            row[name] = {
                "milliseconds_added_per_layer": attention,
                "cache_bytes_per_layer_and_position": cache_bytes[name] // args.layers // positions,
            }
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    report({"machine": describe_machine(), "layers": args.layers, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
