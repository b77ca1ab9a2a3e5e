"""Decides whether to train with autocast to bfloat16, if the user does not say."""

import time
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from common.files import read_json


logger = logging.get_logger(__name__)

NARROW = 128  # of models that are narrower, matrix multiplications are a small part of a step
TOKENS = 512
ENOUGH = 0.75  # of the time in float32: less must be gained to be worth the rounding


def choose_bf16(model: PreTrainedModel, args, checkpoint: str | None):
    """
    Sets `args.bf16` if it is None: on a CPU by a measurement, or as in the run that is resumed; otherwise to False.

    Args:
        checkpoint: The checkpoint to resume from.
    """
    if args.bf16 is not None:
        return
    if checkpoint:
        try:
            args.bf16 = bool(read_json(Path(checkpoint).parent / "settings.json")["training"].get("bf16"))
        except ValueError:  # the file is missing or damaged, by which the run is refused before it begins
            args.bf16 = False
    else:
        is_alone_on_cpu = args.device.type == "cpu" and args.world_size == 1 and args.mixed_precision == "no"
        args.bf16 = is_alone_on_cpu and is_faster_in_bf16(model)
    if args.bf16:
        args.mixed_precision = "bf16"
        logger.warning("Training with autocast to bfloat16, which is faster on this CPU (--bf16 False for float32).")


def is_faster_in_bf16(model: PreTrainedModel) -> bool:
    """Measures the largest layer of a float32 model for some milliseconds. Returns False for other and quantized models."""
    if model.config.hidden_size < NARROW or any(p.dtype != torch.float32 for p in model.parameters()):
        return False
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    largest = max(layers, key=lambda layer: layer.weight.numel())
    return step_time(largest, True) < ENOUGH * step_time(largest, False)


def step_time(layer: nn.Linear, bf16: bool) -> float:
    """Returns the seconds of a forward and backward pass, the best of four."""
    inputs = torch.ones(TOKENS, layer.in_features, requires_grad=True)
    learned = [inputs, *(weight for weight in layer.parameters() if weight.requires_grad)]
    times = []
    for _ in range(4):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = layer(inputs)
        torch.autograd.grad(outputs.float().sum(), learned)
        times.append(time.perf_counter() - start)
    return min(times)
