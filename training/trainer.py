"""Shared by the recipes: a Trainer that stops at a NaN and keeps its checkpoints, and a run from data to report."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from common.files import only_run, read_json, write_json
from common.settings import check_settings, rows_fingerprint, weights_fingerprint

from .muon import MuonWithAdamW
from .objective import IGNORED
from .precision import choose_bf16


logger = logging.get_logger(__name__)

# What of the Trainer's settings changes what is learned, and what of the data's does not
SETTINGS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "num_train_epochs", "max_steps",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "neftune_noise_alpha", "optim", "muon", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "seed", "data_seed",
)  # fmt: skip
NOT_LEARNED = (
    "validation_file", "test_file", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers", "overwrite_cache",
)  # fmt: skip


class RecipeTrainer(Trainer):
    """A Trainer that stops at the first loss that is not finite, and never leaves an incomplete checkpoint."""

    def __init__(self, model, args, **kwargs):
        choose_bf16(model, args, checkpoint_to_resume(args) if args.bf16 is None else None)
        if getattr(args, "muon", False):
            adamw = dict(betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
            kwargs["optimizers"] = MuonWithAdamW(model, args.learning_rate, args.weight_decay, **adamw), None
        super().__init__(model=model, args=args, **kwargs)
        if self.label_smoother is not None:
            # The Trainer's shifts labels only for classes that Transformers has.
            self.label_smoother, self.compute_loss_func = None, self.smoothed_loss

    def smoothed_loss(self, outputs, labels: torch.LongTensor, num_items_in_batch=None) -> torch.Tensor:
        """Returns the cross entropy of the next tokens, smoothed by `label_smoothing_factor` in training only."""
        labels = labels[:, 1:].flatten()
        total = torch.nn.functional.cross_entropy(
            outputs["logits"][:, :-1].flatten(0, 1).float(),
            labels,
            ignore_index=IGNORED,
            label_smoothing=self.args.label_smoothing_factor if self.model.training else 0.0,
            reduction="sum",
        )
        return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)

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
        """The Trainer's method, with loss and perplexity over all tokens. (Its own loss is a mean of the means of batches.)"""
        self.held_out = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, tokens = self.accelerator.reduce(self.held_out.to(self.args.device, torch.float32)).tolist()
        loss = total / tokens
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 700))
        return output


class SetEpoch(TrainerCallback):
    """Passes the epoch to the data, so that the random choices differ between epochs."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.epoch = int(state.epoch)


def last_checkpoint(output_dir: str) -> str | None:
    """Returns the newest complete checkpoint. The Trainer writes `trainer_state.json` last."""
    states = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    folders = [path.parent for path in states if is_whole(path)]
    return str(max(folders, key=lambda folder: int(folder.name.split("-")[-1]))) if folders else None


def is_whole(path: Path) -> bool:
    """Whether a JSON file is complete."""
    try:
        return bool(read_json(path))
    except ValueError:
        return False


@contextmanager
def output_folder(args) -> Iterator[None]:
    """
    Locks the output folder for this run, and ends the process group after it.

    Raises:
        ValueError: if another run writes there, or --resume-from-checkpoint names no checkpoint.
    """
    checkpoint_to_resume(args)
    with only_run(Path(args.output_dir), "--output") if args.should_save else nullcontext():
        yield
    if torch.distributed.is_initialized():
        # Else Gloo's threads may still run when the interpreter ends, which aborts a finished process.
        torch.distributed.destroy_process_group()


def checkpoint_to_resume(args) -> str | None:
    """
    Returns the checkpoint to resume from: by default the last one in the output folder, if there is one.

    Raises:
        ValueError: if --resume-from-checkpoint names none.
    """
    last, given = last_checkpoint(args.output_dir), args.resume_from_checkpoint
    wanted = {"true": True, "false": False}.get(str(given).lower(), given)
    if args.overwrite_output_dir:
        if wanted:
            raise ValueError("--resume-from-checkpoint and --overwrite-output-dir exclude each other.")
        return None
    if wanted is None:
        return last
    if wanted is False:
        if last:
            raise ValueError(f"{last} is there: to start anew, add --overwrite-output-dir or choose another --output.")
        return None
    if wanted is True:
        if not last:
            raise ValueError(f"There is no checkpoint in {args.output_dir} to resume from (--resume-from-checkpoint).")
        return last
    # The output folder has that file, too, but not the optimizer's state.
    if not (Path(wanted).name.startswith(PREFIX_CHECKPOINT_DIR) and is_whole(Path(wanted, TRAINER_STATE_NAME))):
        raise ValueError(
            f"--resume-from-checkpoint: {wanted} is not a folder {PREFIX_CHECKPOINT_DIR}-N with a {TRAINER_STATE_NAME}. Name "
            "one, or leave the option out to go on from the last one in the output folder."
        )
    return wanted


def remove_checkpoints(args, model_args):
    """For --overwrite-output-dir. Raises ValueError if one of them is what the run starts from."""
    folders = list(Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    for name, option in (("model_name_or_path", "--model"), ("ptuning_checkpoint", "--ptuning-checkpoint")):
        value = getattr(model_args, name, None)
        if value and any(Path(value).resolve().is_relative_to(folder.resolve()) for folder in folders):
            raise ValueError(
                f"--overwrite-output-dir would remove {value} ({option}), which this run starts from. Choose another "
                "--output."
            )
    for folder in folders:
        shutil.rmtree(folder)
    if folders:
        logger.warning(f"{len(folders)} checkpoints in {args.output_dir} are removed (--overwrite-output-dir).")


class Finished(Exception):
    """The loaded checkpoint is already that of the last step."""


class StopIfFinished(TrainerCallback):
    """Stops a finished run, for which the Trainer would make one more step."""

    def on_train_begin(self, args, state, control, **kwargs):  # after model and state are loaded
        if state.global_step >= state.max_steps:
            raise Finished


def train(trainer: Trainer, model_args, data_args):
    """
    Trains, starting from the last checkpoint in the output folder if there is one, and writes the model, the metrics and the
    curve to that folder.

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
    name = model_args.model_name_or_path
    settings = {
        "model": asdict(model_args) | {"weights": weights_fingerprint(name) if name else []},
        "data": {name: value for name, value in asdict(data_args).items() if name not in NOT_LEARNED}
        | {"rows": rows_fingerprint(trainer.train_dataset)},
        "training": {name: getattr(args, name) for name in SETTINGS},
    }
    settings = json.loads(json.dumps(settings, default=str))
    checkpoint = checkpoint_to_resume(args)
    if checkpoint:
        check_settings(Path(checkpoint).parent / "settings.json", settings, "--output")
        logger.warning(f"Going on from {checkpoint}.")
    if args.should_save:
        if args.overwrite_output_dir:
            remove_checkpoints(args, model_args)
        write_json(Path(args.output_dir, "settings.json"), settings)
    trainer.add_callback(StopIfFinished)
    try:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
    except Finished:
        logger.warning(f"The run is finished: {checkpoint} is of its last step. Its model is saved again.")
    trainer.save_model()
    trainer.save_state()
    if args.should_save:
        plot_curve(trainer)


def evaluate(trainer: Trainer):
    """Writes loss and perplexity on the held-out data, and adds the loss to the curve."""
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if trainer.args.should_save:
        plot_curve(trainer)


def plot_curve(trainer: Trainer):
    """Draws the loss over the steps, in training and on held-out data, to curve.png in the output folder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style, color in (
        ("loss", "training", "-", "#0072b2"),
        ("eval_loss", "held out", "o-", "#d55e00"),  # colours that the colour-blind tell apart
    ):
        points = [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]
        if points:
            axes.plot(*zip(*points), style, color=color, label=label, markersize=5)
    name = Path(trainer.model.config.name_or_path).name or "a new model"
    axes.set(
        title=f"Training of {name} on {trainer.args.device}", xlabel="optimizer step", ylabel="loss, nats per token"
    )
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(Path(trainer.args.output_dir, "curve.png"), dpi=200)
