"""What the recipes share: a Trainer that stops in time and loses nothing, and the run of one, from data to report."""

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .objective import IGNORED


logger = logging.get_logger(__name__)

# What of the Trainer's settings changes what is learned, and what of the data's does not
SETTINGS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "num_train_epochs", "max_steps",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "neftune_noise_alpha", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "seed", "data_seed",
)  # fmt: skip
NOT_LEARNED = ("validation_file", "test_file", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers")


class RecipeTrainer(Trainer):
    """The Trainer, which stops at the first loss that is not finite and leaves no checkpoint half-written."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            self.stop_training(f"The loss is {loss.item()}")
        return loss

    def stop_training(self, why: str):
        last = last_checkpoint(self.args.output_dir)
        kept = f"The last good checkpoint is {last}." if last else "There is no checkpoint yet."
        raise FloatingPointError(
            f"{why} in step {self.state.global_step + 1}. {kept} Check the data, lower the learning rate (it is "
            f"{self.args.learning_rate:g}), or train in bfloat16 or float32 instead of float16."
        )

    def _save_checkpoint(self, model, trial):
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                self.stop_training(f"{name} is not finite any more")
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # OSError, or torch's and safetensors' own
            shutil.rmtree(folder, ignore_errors=True)
            last = last_checkpoint(self.args.output_dir)
            raise OSError(
                f"{folder} could not be written ({error}). Make room, and start again with the same options: "
                f"{f'{last} is whole and will be gone on from' if last else 'no checkpoint was written before it'}."
            ) from error

    def prediction_step(self, model, inputs, *args, **kwargs):
        tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
        loss, *others = super().prediction_step(model, inputs, *args, **kwargs)
        if tokens:
            self.held_out += torch.tensor([tokens * float(loss), tokens], dtype=torch.float64)
        return loss, *others

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """The Trainer's, with loss and perplexity of all tokens: its own loss is a mean of the means of batches."""
        self.held_out = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, tokens = self.accelerator.reduce(self.held_out.to(self.args.device, torch.float32)).tolist()
        loss = total / tokens
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 700))
        return output


class SetEpoch(TrainerCallback):
    """Tells the data the epoch, for its draws to differ from one to the next."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.epoch = int(state.epoch)


def last_checkpoint(output_dir: str) -> str | None:
    """Returns the newest checkpoint that is whole: `trainer_state.json` is what the Trainer writes last."""
    states = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json")
    folders = [path.parent for path in states if read_json(path) is not None]
    return str(max(folders, key=lambda folder: int(folder.name.split("-")[-1]))) if folders else None


def read_json(path: Path) -> dict | None:
    """Returns what the file holds; None if it is missing or was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def fingerprint(rows) -> str:
    """Of up to 1000 rows of the data, evenly spread, and their number."""
    chosen = [rows[i] for i in range(0, len(rows), max(1, len(rows) // 1000))]
    return hashlib.sha256(json.dumps([len(rows), chosen]).encode()).hexdigest()[:16]


def check_settings(path: Path, settings: dict):
    """Raises ValueError if the run that is to be gone on with was started with others."""
    old = read_json(path)
    if old is None:
        raise ValueError(
            f"{path.parent} holds checkpoints, and no settings.json that says how they were made: choose another --output_dir."
        )
    differ = [
        f"{name} {old.get(group, {}).get(name)!r}, now {value!r}"
        for group in settings
        for name, value in settings[group].items()
        if old.get(group, {}).get(name) != value
    ]
    if differ:
        raise ValueError(
            f"{path.parent} holds a run with other settings: {'; '.join(differ)}. Go on with those, or choose another "
            "--output_dir to start anew."
        )


def train(trainer: Trainer, model_args, data_args):
    """
    Trains, from the last checkpoint in the output folder on if there is one, and writes the model, the metrics and the
    curve there.

    Raises:
        ValueError: before any work, if nothing can be trained, or if the settings are not those of the checkpoint.
    """
    args = trainer.args
    # Under ZeRO-3 a process holds a part of each, and its size in ds_numel.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
    trainable = sum(size for size, is_trainable in sizes if is_trainable)
    if not trainable:
        raise ValueError(
            "No parameter of this model can be trained. Quantized weights are frozen: train LoRA or P-Tuning on them "
            "(training.lora, training.ptuning), or dequantize() the model first."
        )
    logger.warning(f"{trainable:,} of {sum(size for size, _ in sizes):,} parameters are trained.")
    settings = {
        "model": asdict(model_args),
        "data": {name: value for name, value in asdict(data_args).items() if name not in NOT_LEARNED}
        | {"rows": fingerprint(trainer.train_dataset)},
        "training": {name: getattr(args, name) for name in SETTINGS},
    }
    settings = json.loads(json.dumps(settings, default=str))
    checkpoint = args.resume_from_checkpoint or last_checkpoint(args.output_dir)
    if checkpoint:
        check_settings(Path(checkpoint).parent / "settings.json", settings)
        logger.warning(f"Going on from {checkpoint}.")
    if args.should_save:
        path = Path(args.output_dir, "settings.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    if args.should_save:
        plot_curve(trainer.state.log_history, Path(args.output_dir, "curve.png"))


def evaluate(trainer: Trainer):
    """Writes the loss and perplexity on the held-out data."""
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def plot_curve(log_history: list[dict], path: Path):
    """Plots the loss over the steps, and that on held-out data where there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
