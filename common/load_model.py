"""Loads the model that the options name, with errors of one line."""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import torch
from transformers import AutoModel
from transformers.utils import logging

from . import checkpoint
from .hub import local_folder
from .options import QUANTIZATIONS


LARGE = 1_000_000_000  # bytes


def load_model(args: argparse.Namespace):
    """
    Loads the model and the tokenizer that the options name.

    Raises:
        SystemExit: With one line that names the option and the problem, before anything is loaded if possible.
    """
    try:
        folder = local_folder(args.model)
    except ValueError as error:
        raise SystemExit(f"--model {args.model}: {error}") from None
    if not shows_progress(folder):
        logging.disable_progress_bar()
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise SystemExit(f"--model {args.model}: it has no config.json. Pass a complete checkpoint folder.")
    device = default_device() if args.device is None else args.device
    if device == "meta":
        raise SystemExit("--device meta: it has no memory, so nothing can be computed on it.")
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise SystemExit(
                f"--device {device}: {str(error).splitlines()[0]} Use --device cpu, or a build of PyTorch for the device."
            ) from None
    dtype = args.dtype or ("float32" if device == "cpu" else "auto")  # float16 is slow on CPUs
    options = {}
    if args.quantization:
        options["quantization_config"] = {"quant_method": "chatglm", "bits": QUANTIZATIONS[args.quantization]}
    try:
        if (folder / "config.json").is_file():
            checkpoint.read_config(folder)
        tokenizer = checkpoint.load_tokenizer(folder, args.checkpoint_code)
        options.update(checkpoint_code=args.checkpoint_code, device_map=device, dtype=dtype)
        model = checkpoint.load(AutoModel, args.model, **options).eval()
    except (OSError, ValueError, MemoryError, *checkpoint.UNREADABLE) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise SystemExit(f"--model {args.model}: {message}") from None
    if not hasattr(model, "stream_chat"):
        raise SystemExit(f"--model {args.model}: a model of type {model.config.model_type}, not ChatGLM2 (chatglm).")
    return model, tokenizer


def shows_progress(folder: Path) -> bool:
    """Whether to show a progress bar while loading: in a terminal, for large weights."""
    weights = (path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    return sys.stderr is not None and sys.stderr.isatty() and sum(path.stat().st_size for path in weights) > LARGE


def default_device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


async def iterate_in_threads(stream: Iterator) -> AsyncIterator:
    """
    Yields what a generator (`stream_chat`) yields. Each step runs in a thread, so that other requests are served meanwhile. If
    it is cancelled or closed, it waits for the current step and closes the generator, which stops generation.
    """
    step, end = None, object()
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, stream, end))
            item = await asyncio.shield(step)
            if item is end:
                return
            yield item
    finally:
        await asyncio.wait([step])
        stream.close()
