"""
Decoding on a GPU in the ChatGLM2-6B shape: tokens per second at several lengths of context, as a share of what the memory's
bandwidth allows, and peak memory; in bfloat16 with each attention implementation that is installed and with a static cache
(compiled, with CUDA graphs), in INT8 and INT4. And how far each implementation's logits are from eager float32.

    python -m benchmarks.gpu --output benchmarks/results/gpu.json
    python -m benchmarks.gpu --device cpu --quick        # to see that it runs

Weights are random. That the INT4 and INT8 kernels are right on the GPU is what tests/test_quantization_kernels.py checks.
"""

import sys

import torch
from transformers import AutoConfig, AutoModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from .decode import weight_bytes
from .measure import Clock, options, report, seconds
from .random_checkpoint import ROOT, load, write_checkpoint
from .systems import prepared, random_prompt


def attention_implementations(device: torch.device) -> list[str]:
    names = ["sdpa", "flex_attention"]
    if device.type == "cuda":
        names += ["flash_attention_2"] * is_flash_attn_2_available() + [
            "flash_attention_3"
        ] * is_flash_attn_3_available()
    return names


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of reading and writing, as a copy on the device does."""
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)

    def copy():
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    copy()
    return 2 * source.nbytes / min(seconds(copy) for _ in range(10)) / 1e9


@torch.no_grad()
def logit_errors(device: torch.device, length: int) -> dict[str, float]:
    """Largest difference from the logits of eager float32, of their largest, with 2 layers in bfloat16."""
    sizes = dict(num_layers=2, padded_vocab_size=1024)
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


def measure(model, positions: int, tokens: int, **kwargs) -> dict:
    """Times `generate` of the last `tokens` of so many positions."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ids = torch.tensor([random_prompt(positions - tokens)], device=device)
    clock = Clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), streamer=clock, max_new_tokens=tokens, do_sample=False, **kwargs
    )
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return {"positions": positions, "tokens_s": 1 / clock.step_seconds(), "peak_gb": peak}


def main():
    parser = options(__doc__, rounds=1)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--positions", type=int, nargs="*", default=[2048, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate at each length")
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device: install its CUDA build, or choose another with --device.")
    error_length = 4096
    if args.quick:
        args.layers, args.positions, args.tokens, error_length = 1, [64], 4, 64

    bandwidth = copy_bandwidth(args.device)
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device)
    rows = []
    for precision, bits in (("bfloat16", None), ("int8", 8), ("int4", 4)):
        folder = args.work / f"{f'int{bits}' if bits else 'bf16'}-{args.layers}"
        quantization = {"quantize_embeddings": True} if bits else {}
        prepared(folder, write_checkpoint, bits=bits, quantization=quantization, num_layers=args.layers)
        model = load(folder, dtype=torch.bfloat16, device=args.device)
        limit = bandwidth * 1e9 / weight_bytes(model)
        ways = [(name, {}) for name in (attention_implementations(args.device) if bits is None else ["sdpa"])]
        ways.append(("sdpa", {"cache_implementation": "static"}))
        for implementation, kwargs in ways:
            model.set_attn_implementation(implementation)
            for positions in args.positions:
                measure(model, positions, args.tokens, **kwargs)  # compiles
                row = measure(model, positions, args.tokens, **kwargs)
                row = {"precision": precision, "attention": implementation, **kwargs, **row}
                rows.append({**row, "share_of_limit": row["tokens_s"] / limit})
                print(rows[-1], file=sys.stderr, flush=True)
        del model
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
    result = {"device": name, "layers": args.layers, "bandwidth_gb_s": bandwidth, "rows": rows}
    report({**result, "logit_errors": logit_errors(args.device, error_length)}, args.output)


if __name__ == "__main__":
    main()
