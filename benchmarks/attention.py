"""
Measures the time that attention adds to a decoding step as the context grows, in the ChatGLM2-6B shape on the CPU: for this
model, for the same without multi-query attention (32 key-value heads), for `GlmForCausalLM` of Transformers, for llama.cpp
and, with `--ik`, for ik_llama.cpp (see benchmarks/decode.py).

    python -m benchmarks.attention --output build/attention.json

Only attention depends on the context, so two layers show what each adds; `decode_ms` is a measured step of INT4 with all 28
layers and a short context (Q4_0 likewise), plus 28 times that. Caches are filled with random numbers, those of llama.cpp and
ik_llama.cpp by a prompt; the systems take turns.
"""

import statistics

import torch
from transformers import AutoConfig, AutoModel, DynamicCache, GlmConfig, GlmForCausalLM

from common.package import ROOT, module_of

from .measure import in_turn, options, report, seconds
from .systems import IkLlamaCpp, LlamaCpp, Ours, add_ik, gguf_file, is_installed, random_prompt


# Sizes that attention does not depend on are small, for the step to be mostly attention.
SMALL = dict(padded_vocab_size=1024, ffn_hidden_size=64)
HIDDEN = 512  # of the models in torch, whose weights would take longer than attention to 2,048 positions


def build(name: str, layers: int):
    if name == "GlmForCausalLM":
        config = GlmConfig(
            vocab_size=1024, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=32,
            num_key_value_heads=2, head_dim=128, max_position_embeddings=32768, pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        return GlmForCausalLM(config).eval()
    sizes = dict(num_layers=layers, seq_length=32768, hidden_size=HIDDEN, **SMALL)
    if name == "without multi-query attention":
        sizes["multi_query_attention"] = False
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True, **sizes)
    return AutoModel.from_config(config, trust_remote_code=True, dtype=torch.float32).quantize(4).eval()


class Torch:
    """A model with a filled KV cache."""

    def __init__(self, name: str, layers: int):
        self.model = build(name, layers)

    def fill(self, positions: int):
        self.cache = DynamicCache(config=self.model.config)
        if "chatglm" in type(self.model).__module__:
            module_of(self.model, "cache_chatglm").grow_in_place(self.cache)
        for layer in range(self.model.config.num_hidden_layers):
            self.cache.update(*torch.randn(2, 1, self.model.config.num_key_value_heads, positions, 128), layer)

    @property
    def cache_bytes(self) -> int:
        """Returns the bytes of the KV cache for one position and layer."""
        layer = self.cache.layers[0]
        return (layer.keys.nbytes + layer.values.nbytes) // layer.get_seq_length()

    @torch.no_grad()
    def step_seconds(self, steps: int) -> float:
        token = torch.tensor([[5]])
        step = lambda: self.model(token, past_key_values=self.cache, use_cache=True)  # noqa: E731
        return statistics.median(seconds(step) for _ in range(steps))


class LlamaCppAtLength(LlamaCpp):
    """llama.cpp with a prompt in its KV cache."""

    def fill(self, positions: int):
        missing = positions - self.model.n_tokens
        if missing > 0:
            self.model.eval(random_prompt(missing, vocabulary=1000))
        else:
            self.model.n_tokens = positions  # the next evaluation drops what is behind

    @property
    def cache_bytes(self) -> int:
        return 2 * 2 * 128 * 2  # float16, keys and values of two groups


class IkLlamaCppAtLength(IkLlamaCpp):
    """ik_llama.cpp, which runs a prompt before each measurement."""

    cache_bytes = LlamaCppAtLength.cache_bytes

    def fill(self, positions: int):
        self.positions = positions

    def step_seconds(self, steps: int) -> float:
        """Mean seconds, as llama-bench gives no median."""
        return 1 / self.bench("-p", "0", "-gp", f"{self.positions},{steps}")[0]["avg_ts"]


def main():
    parser = options(__doc__, rounds=3)
    add_ik(parser)
    parser.add_argument("--positions", type=int, nargs="*", default=[512, 2048, 8192, 32000])
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args()
    layers, base_layers = 2, 28
    if args.quick:
        layers = base_layers = args.rounds = 1
        args.positions, args.steps = [128, 256], 4

    names = ["this", "without multi-query attention", "GlmForCausalLM"]
    systems = {name: Torch(name, layers) for name in names}
    bases = {"this": Ours(args.work, base_layers, 4)}
    if is_installed("llama_cpp"):
        longest = max(args.positions) + 2 * args.steps
        for name, flash in (("llama.cpp", False), ("llama.cpp, flash attention", True)):
            systems[name] = LlamaCppAtLength(gguf_file(args.work, layers, "Q4_0", **SMALL), longest, flash)
            bases[name] = LlamaCpp(gguf_file(args.work, base_layers, "Q4_0"), 256, flash)
    if args.ik:
        systems["ik_llama.cpp"] = IkLlamaCppAtLength(args.ik, gguf_file(args.work, layers, "Q4_0", **SMALL))
        bases["ik_llama.cpp"] = IkLlamaCpp(args.ik, gguf_file(args.work, base_layers, "Q4_0"))

    short = random_prompt(16)
    base_runs = {name: lambda system=system: system.run(short, args.steps)[1] for name, system in bases.items()}
    base = {name: statistics.median(values) for name, values in in_turn(base_runs, args.rounds).items()}

    def at(positions: int) -> dict[str, float]:
        def measure(system) -> float:
            system.fill(positions)
            return system.step_seconds(args.steps)

        runs = {name: lambda system=system: measure(system) for name, system in systems.items()}
        return {name: statistics.median(values) for name, values in in_turn(runs, args.rounds).items()}

    empty, rows = at(16), []
    for positions in args.positions:
        row = {"positions": positions}
        for name, step in at(positions).items():
            added = (step - empty[name]) / layers * 1000
            row[name] = {
                "milliseconds_added_per_layer": added,
                "cache_bytes_per_layer_and_position": systems[name].cache_bytes,
            }
            if name in base:
                decode = 1000 * base[name] + base_layers * added
                row[name] |= {"decode_ms": decode, "attention_added": decode / (1000 * base[name]) - 1}
        peers = [row[name]["decode_ms"] for name in base if name != "this"]
        if peers:
            row["decode_ratio"] = min(peers) / row["this"]["decode_ms"]
        rows.append(row)
    report({"layers": layers, "base_ms": {n: 1000 * s for n, s in base.items()}, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
