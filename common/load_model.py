"""The options of all examples that say which model to load and how, and the loading, with errors that fit on a line."""

import argparse
import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import torch
from transformers import AutoModel
from transformers.utils import logging

from common import checkpoint
from common.package import TINY


DTYPES = ["float32", "bfloat16", "float16"]


def add_model_options(parser: argparse.ArgumentParser):
    parser.add_argument("--model", default=str(TINY), help="folder or Hub id (default: checkpoints/tiny)")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, mps, or auto: all GPUs (default: the first GPU, or the CPU)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, elsewhere the checkpoint's")
    parser.add_argument("--quantization", choices=["int8", "int4"], help="quantize the weights while they load")


def at_least(minimum: float, above: bool = False, maximum: float = float("inf"), number: type = float):
    """Returns a type for argparse: a number that is at least, or above, `minimum`, and at most `maximum`."""

    def parse(text: str):
        value = number(text)
        if not minimum <= value <= maximum or (above and value == minimum):
            limit = f"{'above' if above else 'at least'} {minimum:g}"
            raise argparse.ArgumentTypeError(
                f"{text}: must be {limit}" + (f" and at most {maximum:g}" if maximum < float("inf") else "")
            )
        return value

    parse.__name__ = "number"  # argparse says "invalid number value" of what is none
    return parse


def load_model(args: argparse.Namespace):
    """
    Loads the model and the tokenizer that the options ask for.

    Raises:
        SystemExit: With one line that says what is wrong with which option, before anything is loaded where possible.
    """
    logging.disable_progress_bar()
    path = Path(args.model)
    is_hub_id = args.model.count("/") == 1 and not path.is_absolute() and not args.model.startswith(".")
    if not (path / "config.json").is_file() and (path.exists() or not is_hub_id):
        raise SystemExit(
            f"--model {args.model}: no model there. Give a folder with config.json, or a Hub id (owner/name)."
        )
    device = default_device() if args.device is None else args.device
    if device == "meta":
        raise SystemExit("--device meta: there is no memory on it to compute with.")
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise SystemExit(
                f"--device {device}: {str(error).splitlines()[0]} Use --device cpu, or a build of PyTorch for the device."
            ) from None
    dtype = args.dtype or ("float32" if device == "cpu" else "auto")  # CPUs compute slowly in float16
    options = {}
    if args.quantization:
        options["quantization_config"] = {"quant_method": "chatglm", "bits": int(args.quantization.removeprefix("int"))}
    try:
        if path.is_dir():
            checkpoint.read_config(path)
        tokenizer = checkpoint.load_tokenizer(args.model)
        model = checkpoint.load(AutoModel, args.model, device_map=device, dtype=dtype, **options).eval()
    except (OSError, ValueError, MemoryError, *checkpoint.UNREADABLE) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise SystemExit(f"--model {args.model}: {message}") from None
    if not hasattr(model, "stream_chat"):
        raise SystemExit(f"--model {args.model}: a model of type {model.config.model_type}, not ChatGLM2 (chatglm).")
    return model, tokenizer


def default_device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


async def iterate_in_threads(stream: Iterator) -> AsyncIterator:
    """
    Yields what a generator (`stream_chat`) yields, each step in a thread, so that others are served meanwhile. Cancelled or
    closed, it lets the step at hand end, and closes the generator: then generation has stopped.
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
