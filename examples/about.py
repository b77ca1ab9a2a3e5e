"""Describes the loaded model, for the terminal and the web page."""

from pathlib import Path


def model_name(path: str) -> str:
    """Returns the name of a checkpoint: the name of its folder, or its id on the Hub."""
    return Path(path).resolve().name if Path(path).is_dir() else path


def model_format(model) -> str:
    """Returns the type of the weights, for example INT4 or float32."""
    quantization = getattr(model.config, "quantization_config", None)
    bits = quantization.get("bits") if isinstance(quantization, dict) else getattr(quantization, "bits", None)
    return f"INT{bits}" if bits else str(model.dtype).removeprefix("torch.")


def model_size(model) -> str:
    """Returns the memory that the weights take, for example 37.9 MB."""
    size = model.get_memory_footprint()
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
