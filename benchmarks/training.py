"""
Training beside `GlmForCausalLM` with the same weights under the same Trainer: tokens per second and peak memory.

    python -m benchmarks.training

All weights, LoRA, QLoRA (this package's INT4 beside bitsandbytes' NF4) and P-Tuning v2 (beside PEFT's prefix tuning), in
float32, in turn, each in a process of its own.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from common.package import ROOT

from .measure import PeakMemory, in_turn, options, report
from .random_checkpoint import write_checkpoint
from .systems import Glm, is_installed, prepared


WAYS = ["full", "LoRA", "QLoRA", "P-Tuning"]
SYSTEMS = ["this", "GlmForCausalLM"]
PREFIX, RANK = 128, 8
# A quarter of the 6B shape's width: all weights with gradients and the optimizer's states fit into 16 GB
SHAPE = {"num_layers": 8, "hidden_size": 1024, "ffn_hidden_size": 3424, "num_attention_heads": 8}
QUICK = {"num_layers": 1, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 2}


def write_models(folder: Path, **shape):
    write_checkpoint(folder / "this", dtype=torch.float32, **shape)
    model = AutoModelForCausalLM.from_pretrained(folder / "this", trust_remote_code=True).eval()
    Glm(model).model.save_pretrained(folder / "GlmForCausalLM")


def build(folder: Path, way: str) -> torch.nn.Module:
    """Returns what is trained, in one of `WAYS`."""
    is_ours = folder.name == "this"
    kwargs = {"dtype": torch.float32}
    if way == "QLoRA" and is_ours:
        kwargs["quantization_config"] = {"quant_method": "chatglm", "bits": 4}
    elif way == "QLoRA":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    elif way == "P-Tuning" and is_ours:
        kwargs["pre_seq_len"] = PREFIX
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=is_ours, **kwargs)
    if "LoRA" in way:
        layers = ["query_key_value"] if is_ours else ["q_proj", "k_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules=layers, task_type="CAUSAL_LM"))
    elif way == "P-Tuning" and not is_ours:
        model = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=PREFIX, task_type="CAUSAL_LM"))
    return model


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def run(folder: Path, way: str, rows: int, length: int, steps: int) -> dict[str, float]:
    """Trains, and returns tokens per second (of the median step, after two in which memory is mapped), peak memory in GB and the loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 1000, (rows * steps, length), generator=generator)
    times = StepTimes()
    with PeakMemory() as memory:
        trainer = Trainer(
            build(folder, way),
            TrainingArguments(
                folder / "output",
                per_device_train_batch_size=rows,
                max_steps=steps,
                learning_rate=1e-4,
                logging_steps=1,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                max_grad_norm=1.0,
            ),  # fmt: skip
            data_collator=default_data_collator,
            train_dataset=[{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids],
            callbacks=[times],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens_s": rows * length / statistics.median(times.seconds[2:]),
        "peak_gb": memory.gb,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def in_process(folder: Path, way: str, sizes: list[int]) -> dict[str, float]:
    """`run`, in a process of its own, so that what others leave in memory does not count."""
    command = [sys.executable, "-m", "benchmarks.training", "--run", str(folder), way, *map(str, sizes)]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main():
    parser = options(__doc__, rounds=3)
    parser.add_argument("--run", nargs="+", help="one of them, in this process: folder, way, rows, length, steps")
    args = parser.parse_args()
    if args.run:
        folder, way, *sizes = args.run
        print(json.dumps(run(Path(folder), way, *map(int, sizes))))
        return
    shape, sizes = (QUICK, [1, 16, 3]) if args.quick else (SHAPE, [2, 256, 7])
    folder = prepared(args.work / f"training-{shape['hidden_size']}", write_models, **shape)
    functions = {}
    for way in WAYS:
        for system in SYSTEMS:
            if (way, system) == ("QLoRA", "GlmForCausalLM") and not is_installed("bitsandbytes"):
                continue
            functions[way, system] = lambda way=way, system=system: in_process(folder / system, way, sizes)
    results = in_turn(functions, 1 if args.quick else args.rounds)
    rows = {way: {} for way in WAYS}
    for (way, system), runs in results.items():
        rows[way][system] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    for row in rows.values():
        if len(row) == len(SYSTEMS):
            this, peer = (row[system] for system in SYSTEMS)
            row["ratio"] = {key: this[key] / peer[key] for key in ("tokens_s", "peak_gb")}
    report({"shape": shape, "rows": sizes[0], "length": sizes[1], "steps": sizes[2], "ways": rows}, args.output)


if __name__ == "__main__":
    main()
