"""The prefix of P-Tuning v2 in a file of its own, as the published scripts save it. Needs none of what the training does."""

from pathlib import Path

import torch
from transformers.utils import WEIGHTS_NAME


PREFIX = "transformer.prefix_encoder."


def load_prefix(model, folder: str):
    """
    Raises:
        ValueError: if there is no prefix in the folder, or one of another length or model.
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
