"""
ChatGLM2-6B on a GPU, with random weights: decoding as a share of what the memory's bandwidth allows, prompts beside torch's
matrix multiplications alone, and peak memory; in INT4, bfloat16 and INT8, INT4 with each cache and attention that is
installed, beside `GlmForCausalLM` of Transformers and other libraries' quantization of it. And how far each attention's
logits are from eager float32. The figures are written after each model.

    python -m benchmarks.gpu --output benchmarks/results/gpu.json
    python -m benchmarks.gpu --device cpu --quick        # a small model, to see that every call can be made

That the kernels are right on the GPU is what tests/test_quantization_gpu.py checks there.
"""

import functools
import gc
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig, GlmForCausalLM, TorchAoConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from .decode import weight_bytes
from .gpu_limits import layer_shapes
from .measure import Clock, device_name, options, report, seconds
from .random_checkpoint import random_model
from .systems import Glm, is_installed, paged_cache, prepared, random_prompt


PRECISIONS = {"int4": 4, "bfloat16": None, "int8": 8}
# How the steps of `generate` run: each operation launched by Python; the same with a cache of fixed size; compiled, with
# CUDA graphs, which on a GPU is what a static cache does by default
STEPS = {
    "eager": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "compiled": {"cache_implementation": "static"},
}
SMALL = dict(num_layers=1, hidden_size=256, ffn_hidden_size=512, num_attention_heads=8, kv_channels=32)


def attention_implementations(device: torch.device) -> list[str]:
    names = ["sdpa", "flex_attention"]
    if device.type == "cuda":
        names += ["flash_attention_2"] * is_flash_attn_2_available()
        names += ["flash_attention_3"] * is_flash_attn_3_available()
    return names


def peers() -> dict:
    """`GlmForCausalLM` of Transformers, and other libraries' quantization of it: functions that make its configuration."""
    found = {"GlmForCausalLM bfloat16": lambda: None}
    if is_installed("bitsandbytes"):
        bfloat16 = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        found["GlmForCausalLM bitsandbytes nf4"] = functools.partial(BitsAndBytesConfig, load_in_4bit=True, **bfloat16)
    if is_installed("torchao"):
        from torchao.quantization import Int4WeightOnlyConfig

        # The kernels of torch itself; the default format needs another library's.
        int4 = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
        found["GlmForCausalLM torchao int4"] = lambda: TorchAoConfig(int4)
    return found


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device: torch.device, rounds: int = 5) -> float:
    """Seconds of the fastest of some calls, after one that may compile."""

    def call():
        function()
        synchronize(device)

    call()
    return min(seconds(call) for _ in range(rounds))


def read_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second of reading memory: as decoding does, so its limit."""
    numbers = torch.ones(size // 4, device=device)
    return numbers.nbytes / timed(numbers.sum, device, rounds=20)


def peak_gb(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def forget_models():
    """Compiled code keeps the memory of its CUDA graphs, which would count for the next model."""
    torch.compiler.reset()
    gc.collect()


def reset_peak(device: torch.device):
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@torch.no_grad()
def measure_prompt(model, tokens: int) -> dict:
    """Encodes a prompt as `generate` does: logits of the last position alone."""
    device = model.device
    ids = torch.tensor([random_prompt(tokens)], device=device)
    reset_peak(device)
    taken = timed(lambda: model(ids, logits_to_keep=1), device)
    return {"prompt": tokens, "tokens_s": tokens / taken, "peak_gb": peak_gb(device)}


@torch.no_grad()
def matmul_rate(config: dict, tokens: int, device: torch.device) -> float:
    """Tokens a second of the layers' matrix multiplications alone, by torch (cuBLAS) in bfloat16."""
    taken = 0
    for out, columns in layer_shapes(config):
        x = torch.randn(tokens, columns, dtype=torch.bfloat16, device=device)
        weight = torch.randn(out, columns, dtype=torch.bfloat16, device=device)
        taken += timed(lambda x=x, weight=weight: nn.functional.linear(x, weight), device)
    return tokens / (taken * config["num_layers"])


def measure_steps(model, positions: int, tokens: int, **kwargs) -> dict:
    """Times `generate` of the last `tokens` of so many positions; the first run compiles."""
    device = model.device
    ids = torch.tensor([random_prompt(positions - tokens)], device=device)
    for _ in range(2):
        reset_peak(device)
        clock = Clock()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), streamer=clock, max_new_tokens=tokens, do_sample=False, **kwargs
        )
    return {"positions": positions, "tokens_s": 1 / clock.step_seconds(), "peak_gb": peak_gb(device)}


def measure_paged(model, requests: int, prompt: int, tokens: int) -> dict:
    """Tokens a second of several requests together: continuous batching with a paged cache."""
    prompts = [random_prompt(prompt, seed) for seed in range(requests)]
    config = model.generation_config
    config.max_new_tokens, config.do_sample = tokens, False
    start = time.perf_counter()
    outputs = model.generate_batch(prompts, config, paged_cache(prompts, tokens), progress_bar=False)
    taken = time.perf_counter() - start
    generated = sum(len(output.generated_tokens) for output in outputs.values())
    return {"requests": requests, "prompt": prompt, "tokens_s": generated / taken}


@torch.no_grad()
def logit_errors(device: torch.device, length: int) -> dict[str, float]:
    """Largest difference from the logits of eager float32, of their largest, with 2 layers in bfloat16."""
    sizes = {**SMALL, "num_layers": 2, "padded_vocab_size": 1024}
    model = random_model(device, dtype=torch.float32, **sizes)
    ids = torch.randint(0, 1024, (1, length), device=device)
    model.set_attn_implementation("eager")
    expected = model(ids, logits_to_keep=256).logits
    model = model.bfloat16()
    errors = {}
    for name in ["eager", *attention_implementations(device)]:
        model.set_attn_implementation(name)
        difference = (model(ids, logits_to_keep=256).logits - expected).abs().max()
        errors[name] = float(difference / expected.abs().max())
    return errors


def measure_model(model, bandwidth: float, args, extensive: bool) -> dict:
    """
    Args:
        extensive: Whether to measure static caches that are not compiled, each attention, and continuous batching, too.
    """
    limit = bandwidth / weight_bytes(model)
    result = {"weights_gb": sum(p.nbytes for p in model.parameters()) / 1e9, "limit_tokens_s": limit}
    result["prompts"] = [measure_prompt(model, tokens) for tokens in args.prompts]
    ways = [("eager", "sdpa"), ("compiled", "sdpa")]
    if extensive:
        ways += [("static", "sdpa"), *(("eager", name) for name in attention_implementations(args.device)[1:])]
    result["steps"] = []
    for steps, attention in ways:
        model.set_attn_implementation(attention)
        for positions in args.positions:
            row = measure_steps(model, positions, args.tokens, **STEPS[steps])
            row = {"steps": steps, "attention": attention, **row, "share_of_limit": row["tokens_s"] / limit}
            result["steps"].append(row)
            print(row, file=sys.stderr, flush=True)
    model.set_attn_implementation("sdpa")
    if extensive:
        result["paged"] = measure_paged(model, args.requests, args.prompts[0], args.tokens)
    return result


def peer_folder(work: Path, model) -> Path:
    """The weights of our model, for `GlmForCausalLM`."""
    return prepared(work / f"glm-{model.config.num_layers}", Glm(model).model.save_pretrained)


def main():
    parser = options(__doc__)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048], help="tokens")
    parser.add_argument(
        "--positions", type=int, nargs="*", default=[2048, 8192, 32768], help="of a dialogue, at its end"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate at each length")
    parser.add_argument("--requests", type=int, default=8, help="that are batched")
    args = parser.parse_args()
    name = device_name(args.device)
    sizes, error_length, bandwidth_bytes = {"num_layers": args.layers}, 4096, 1 << 32
    if args.quick:
        sizes, error_length, bandwidth_bytes = SMALL, 64, 1 << 20
        args.layers, args.prompts, args.positions, args.tokens, args.requests = 1, [32], [48], 4, 2
        args.work = args.work / "small"

    device = args.device
    bandwidth = read_bandwidth(device, bandwidth_bytes)
    result = {"device": name, "layers": args.layers, "bandwidth_gb_s": bandwidth / 1e9}
    for precision, bits in PRECISIONS.items():
        print(precision, file=sys.stderr)
        model = random_model(device, bits, **sizes)
        config = model.config.to_dict()
        result[precision] = measure_model(model, bandwidth, args, extensive=precision == "int4")
        report(result, args.output)
        del model
        forget_models()
    result["matmuls_alone_tokens_s"] = {tokens: matmul_rate(config, tokens, device) for tokens in args.prompts}
    folder = peer_folder(args.work, random_model(device, **sizes))
    for peer, quantization_config in peers().items():
        print(peer, file=sys.stderr)
        options_of_peer = dict(dtype=torch.bfloat16, device_map={"": device})
        model = GlmForCausalLM.from_pretrained(folder, quantization_config=quantization_config(), **options_of_peer)
        model.generation_config.eos_token_id = None
        result[peer] = measure_model(model.eval(), bandwidth, args, extensive=False)
        report(result, args.output)
        del model
        forget_models()
    report({**result, "logit_errors": logit_errors(device, error_length)}, args.output)


if __name__ == "__main__":
    main()
