"""Stores the settings of a run beside its results, so that it can only be resumed with the same settings."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .files import read_json


def check_settings(path: Path, settings: Mapping, option: str):
    """
    Args:
        path: `settings.json` of the run that is to be resumed, as `write_json` wrote it.
        settings: The settings of this run: a mapping of values or of groups of values, in JSON's types.
        option: The option that names the folder, for the message.

    Raises:
        ValueError: if the file is damaged, or the run was started with other settings. The message has both values.
    """
    remedy = f"It says how the results beside it were made. Choose another {option}."
    old, new = flat(read_json(path, remedy)), flat(settings)
    differ = [f"{name} {old.get(name)!r}, now {value!r}" for name, value in new.items() if old.get(name) != value]
    if differ:
        raise ValueError(
            f"{path.parent} holds a run with other settings: {'; '.join(differ)}. Go on with those, or choose another "
            f"{option} to start anew."
        )


def flat(settings: Mapping) -> dict:
    """Returns groups of settings as one mapping."""
    parts = [value if isinstance(value, Mapping) else {name: value} for name, value in settings.items()]
    return {name: value for part in parts for name, value in part.items()}


def rows_fingerprint(rows: Sequence) -> str:
    """Returns a hash of the number of rows and of up to 1,000 rows that are evenly spread."""
    chosen = [rows[i] for i in range(0, len(rows), max(1, len(rows) // 1000))]
    return hashlib.sha256(json.dumps([len(rows), chosen]).encode()).hexdigest()[:16]


def weights_fingerprint(folder: str | Path) -> list:
    """Returns name, size and time of each weight file, to notice if the weights change. Empty for a Hub name."""
    files = sorted(path for pattern in ("*.safetensors", "*.bin") for path in Path(folder).glob(pattern))
    return [[path.name, path.stat().st_size, int(path.stat().st_mtime)] for path in files]
