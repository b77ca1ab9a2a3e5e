"""
ChatGLM2-6B on a GPU, with random weights: decoding as a share of what the memory's bandwidth allows, prompts beside torch's
matrix multiplications alone, and peak memory; in bfloat16, INT8 and INT4, with each cache and attention that is installed,
beside other libraries' quantization. And how far each attention's logits are from eager float32.

    python -m benchmarks.gpu --output benchmarks/results/gpu.json
    python -m benchmarks.gpu --device cpu --quick        # a small model, to see that every call can be made

That the kernels are right on the GPU is what tests/test_quantization_gpu.py checks there.
"""

import functools
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, GlmForCausalLM, TorchAoConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from common.package import ROOT

from .decode import weight_bytes
from .gpu_limits import layer_shapes
from .measure import Clock, options, report, seconds
from .random_checkpoint import load, write_checkpoint
from .systems import Glm, is_installed, prepared, random_prompt


PRECISIONS = {"bfloat16": None, "int8": 8, "int4": 4}
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
    """Other libraries' quantization to 4 bits, for `GlmForCausalLM` of Transformers: functions that make its configuration."""
    found = {}
    if is_installed("bitsandbytes"):
        bfloat16 = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        found["bitsandbytes nf4"] = functools.partial(BitsAndBytesConfig, load_in_4bit=True, **bfloat16)
    if is_installed("torchao"):
        from torchao.quantization import Int4WeightOnlyConfig

        found["torchao int4"] = lambda: TorchAoConfig(Int4WeightOnlyConfig(group_size=128))
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
    outputs = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    taken = time.perf_counter() - start
    generated = sum(len(output.generated_tokens) for output in outputs.values())
    return {"requests": requests, "prompt": prompt, "tokens_s": generated / taken}


@torch.no_grad()
def logit_errors(device: torch.device, length: int) -> dict[str, float]:
    """Largest difference from the logits of eager float32, of their largest, with 2 layers in bfloat16."""
    sizes = {**SMALL, "num_layers": 2, "padded_vocab_size": 1024}
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True, **sizes)
    torch.manual_seed(0)
    model = AutoModel.from_config(config, trust_remote_code=True, dtype=torch.float32).eval().to(device)
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
        extensive: Whether to measure each kind of step and of attention, rather than eager steps.
    """
    limit = bandwidth / weight_bytes(model)
    result = {"weights_gb": sum(p.nbytes for p in model.parameters()) / 1e9, "limit_tokens_s": limit}
    result["prompts"] = [measure_prompt(model, tokens) for tokens in args.prompts]
    ways = [(steps, "sdpa") for steps in (STEPS if extensive else ["eager"])]
    if extensive:
        ways += [("eager", name) for name in attention_implementations(args.device)[1:]]
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


def peer_folder(work: Path, ours: Path, layers: int) -> Path:
    """The same bfloat16 weights, for `GlmForCausalLM`."""

    def write(folder: Path):
        Glm(load(ours, dtype=torch.bfloat16)).model.save_pretrained(folder)

    return prepared(work / f"glm-{layers}", write)


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
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device: install its CUDA build, or choose another with --device.")
    sizes, error_length, bandwidth_bytes = {"num_layers": args.layers}, 4096, 1 << 31
    if args.quick:
        sizes, error_length, bandwidth_bytes = SMALL, 64, 1 << 20
        args.layers, args.prompts, args.positions, args.tokens, args.requests = 1, [32], [48], 4, 2
        args.work = args.work / "small"

    device = args.device
    bandwidth = read_bandwidth(device, bandwidth_bytes)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    result = {"device": name, "layers": args.layers, "bandwidth_gb_s": bandwidth / 1e9}
    config, folders = {}, {}
    for precision, bits in PRECISIONS.items():
        folder = args.work / f"{f'int{bits}' if bits else 'bf16'}-{args.layers}"
        quantization = {"quantize_embeddings": True} if bits else {}
        folders[precision] = prepared(folder, write_checkpoint, bits=bits, quantization=quantization, **sizes)
        print(precision, file=sys.stderr)
        model = load(folder, dtype=torch.bfloat16).to(device)
        config = model.config.to_dict()
        result[precision] = measure_model(model, bandwidth, args, extensive=True)
        del model
    result["matmuls_alone_tokens_s"] = {tokens: matmul_rate(config, tokens, device) for tokens in args.prompts}
    for peer, quantization_config in peers().items():
        print(peer, file=sys.stderr)
        folder = peer_folder(args.work, folders["bfloat16"], args.layers)
        options_of_peer = dict(dtype=torch.bfloat16, device_map={"": device})
        model = GlmForCausalLM.from_pretrained(folder, quantization_config=quantization_config(), **options_of_peer)
        model.generation_config.eos_token_id = None
        result[peer] = measure_model(model.eval(), bandwidth, args, extensive=False)
        del model
    report({**result, "logit_errors": logit_errors(device, error_length)}, args.output)


if __name__ == "__main__":
    main()
