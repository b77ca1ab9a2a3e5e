"""
What quantization costs: perplexity, and divergence from the model that is not quantized, of the trained tiny checkpoint, whose
INT8 weights are dequantized to float32 first.

    python -m benchmarks.quantization_quality --corpora ../shared/data/corpora

Measured on the texts that were held out when it was trained; calibrated on others, that it was trained on. All linear
layers are quantized, embedding and output layer are not. Activations are left as they are. Columns that are no multiple of a
group's are filled up with zeros, rounded, and cut off again. A KV cache in half precision, of the model that is not quantized,
stands beside them.
"""

import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import pad
from transformers import AutoModel, DynamicCache

from common.files import read_json
from common.package import ROOT, TINY, module_of

from .measure import SHARED, options, report


ROWS_AT_ONCE = 8


def batches_of(path: Path, limit: int) -> list[dict[str, torch.Tensor]]:
    """Returns the first `limit` rows of a file of `training.tiny rows`, in batches."""
    rows = {name: torch.tensor(values[:limit]) for name, values in read_json(path).items()}
    return [
        {name: values[start : start + ROWS_AT_ONCE] for name, values in rows.items()}
        for start in range(0, len(rows["input_ids"]), ROWS_AT_ONCE)
    ]


class RoundedCache(DynamicCache):
    """A KV cache whose numbers are those of another dtype."""

    def __init__(self, dtype: torch.dtype, **kwargs):
        super().__init__(**kwargs)
        self.dtype = dtype

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        rounded = (states.to(self.dtype).to(states.dtype) for states in (key_states, value_states))
        return super().update(*rounded, *args, **kwargs)


def packed_mask(position_ids: torch.Tensor) -> torch.BoolTensor:
    """The mask `[batch, 1, seq, seq]` of texts packed in rows, which the model makes itself only if there is no cache."""
    text = (position_ids == 0).cumsum(1)
    return (text[:, None, :, None] == text[:, None, None, :]).tril()


@torch.no_grad()
def log_probabilities(model, batches: list[dict], cache_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Returns of each batch the log-probabilities, `[positions, vocabulary]`, wherever there is a token to predict."""
    result = []
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        if cache_dtype:
            cache, mask = RoundedCache(cache_dtype, config=model.config), packed_mask(batch["position_ids"])
            logits = model(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        else:
            logits = model(**inputs, use_cache=False).logits
        result.append(logits[:, :-1][batch["labels"][:, 1:] != -100].float().log_softmax(-1))
    return result


def measure(
    model, batches: list[dict], reference: list[torch.Tensor], cache_dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Returns the perplexity, and the mean KL divergence from `reference` in nats a token."""
    loss = divergence = tokens = 0
    for batch, ours, theirs in zip(batches, log_probabilities(model, batches, cache_dtype), reference):
        labels = batch["labels"][:, 1:]
        labels = labels[labels != -100]
        loss -= ours.gather(1, labels[:, None]).sum().item()
        divergence += (theirs.exp() * (theirs - ours)).sum().item()
        tokens += len(labels)
    return {"perplexity": math.exp(loss / tokens), "loss": loss / tokens, "divergence": divergence / tokens}


def main():
    parser = options(__doc__)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--corpora", type=Path, default=SHARED / "corpora")
    parser.add_argument("--calibration", type=int, default=128, help="rows of 256 tokens to calibrate with")
    parser.add_argument("--rows", type=int, default=160, help="rows of 256 tokens to measure on")
    args = parser.parse_args()
    if args.quick:
        args.calibration = args.rows = 1
    if not args.corpora.is_dir():
        raise SystemExit(f"{args.corpora} is missing: give it with --corpora.")

    command = [
        sys.executable,
        "-m",
        "training.tiny",
        "rows",
        "--corpora",
        str(args.corpora),
        "--output",
        str(args.model),
    ]
    subprocess.run([*command, "--limit", str(max(args.rows, args.calibration))], cwd=ROOT, check=True)
    batches = batches_of(ROOT / "build/tiny/rows/held_out.json", args.rows)
    calibration = [b["input_ids"] for b in batches_of(ROOT / "build/tiny/rows/train.json", args.calibration)]

    def load():
        model = AutoModel.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32).eval()
        return model.dequantize() if model.config.quantization_bit else model

    def ours(bits: int, **kwargs):
        return lambda: load().quantize(bits, **kwargs)

    def rounded(round_weight):
        """Replaces each weight by what is left of it; for formats that have no layer of our own."""
        model = load()
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "transformer.output_layer":
                layer.weight.data = round_weight(layer.weight.data)
        return model

    def groups(group_size: int):
        formats = module_of(load(), "quantization")

        def round_weight(weight: torch.Tensor) -> torch.Tensor:
            filled = pad(weight, (0, -weight.shape[1] % group_size))
            packed, scale = formats.quantize_weight(filled, 4, group_size, scale_search=True)
            return formats.dequantize_weight(packed, scale, 4)[:, : weight.shape[1]]

        return lambda: rounded(round_weight)

    ways = {
        "INT8, published rule": ours(8),
        "INT4, published rule": ours(4),
        "INT4, searched scales": ours(4, scale_search=True),
        "INT4, calibrated": ours(4, calibration=calibration),
        "INT4, groups of 128, searched": groups(128),
        "INT4, groups of 32, searched": groups(32),
    }
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        # Its functions rather than its layer, and rows of one block: on the CPU (0.50) it is wrong where a block goes on in
        # the next row, as with 688 columns.
        def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
            blocks = quantize_4bit(weight.reshape(-1, 64), blocksize=64, quant_type="nf4")
            return dequantize_4bit(*blocks).view_as(weight)

        ways["bitsandbytes nf4 (blocks of 64)"] = lambda: rounded(round_to_nf4)
    except ImportError:
        print("bitsandbytes is not installed: nf4 is left out.", file=sys.stderr)

    model = load()
    reference = log_probabilities(model, batches)
    exact = measure(model, batches, reference)
    results = {"not quantized": exact}
    for name, way in ways.items():
        start = time.perf_counter()
        model = way()
        seconds = time.perf_counter() - start
        results[name] = {**measure(model, batches, reference), "seconds_to_quantize": seconds}
        row = results[name]
        published = results.get("INT4, published rule", row)
        loss_share = (row["loss"] - exact["loss"]) / (published["loss"] - exact["loss"])
        row["loss_share"], row["divergence_share"] = loss_share, row["divergence"] / published["divergence"]
        print(f"  {name}: {row}", file=sys.stderr, flush=True)
    model = load()
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        results[f"KV cache in {name}"] = measure(model, batches, reference, dtype)
    report({"results": results}, args.output)


if __name__ == "__main__":
    main()
