"""Loads a P-Tuning v2 prefix from its own file, as the published scripts save it. Does not need the packages of the training."""

from pathlib import Path

import torch
from transformers.utils import WEIGHTS_NAME


PREFIX = "transformer.prefix_encoder."


def load_prefix(model, folder: str):
    """
    Raises:
        ValueError: if the folder has no prefix, or one for another length or model.
    """
    path = Path(folder, WEIGHTS_NAME)
    if not path.is_file():
        raise ValueError(f"There is no {WEIGHTS_NAME} in {folder} (--ptuning-checkpoint).")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    saved = {name.removeprefix(PREFIX): value for name, value in saved.items() if name.startswith(PREFIX)}
    wanted = {name: tuple(value.shape) for name, value in model.transformer.prefix_encoder.state_dict().items()}
    if {name: tuple(value.shape) for name, value in saved.items()} != wanted:
        shapes = {name: tuple(value.shape) for name, value in saved.items()}
        raise ValueError(
            f"{path} holds {shapes or 'no prefix'}, and the model takes {wanted}: give the --pre-seq-len and "
            "--prefix-projection that it was trained with, and the same model."
        )
    model.transformer.prefix_encoder.load_state_dict(saved)
