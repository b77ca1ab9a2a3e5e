"""The options that all commands share. Imports only the standard library, so that `--help` is fast."""

import argparse
import os
import re
import sys
from pathlib import Path

from .errors import program_name
from .package import TINY


DTYPES = ["float32", "bfloat16", "float16"]
QUANTIZATIONS = {"int4": 4, "int8": 8}


class Parser(argparse.ArgumentParser):
    """argparse's parser. Keeps the line breaks of the description, and accepts `--max_length` for `--max-length`."""

    def __init__(self, description: str | None):
        name = program_name()
        super().__init__(
            prog=None if name == "error" else name if " " in name else f"python -m {name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_known_args(self, args=None, namespace=None):  # which parse_args calls
        args = [hyphens(arg) for arg in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)


def hyphens(arg: str) -> str:
    """Returns `--max-length=VALUE` for `--max_length=VALUE`, and anything else unchanged."""
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--\w[\w-]*", name) else arg


def add_model_option(parser: argparse.ArgumentParser, default: str | Path | None = TINY):
    """Adds `--model`, which is required if there is no default."""
    shown = "" if default is None else f" (default: {'checkpoints/tiny' if default == TINY else default})"
    parser.add_argument(
        "--model",
        default=None if default is None else str(default),
        required=default is None,
        help=f"a checkpoint folder, or OWNER/NAME on the Hub{shown}",
    )


def add_output_option(parser: argparse.ArgumentParser, what: str = "the folder to write"):
    parser.add_argument("--output", type=Path, required=True, help=what)


def add_model_options(parser: argparse.ArgumentParser, default: str | Path | None = TINY):
    """Adds the options for loading a model."""
    add_model_option(parser, default)
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 or mps; auto uses all GPUs (default: the first GPU, or the CPU)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, otherwise the checkpoint's dtype")
    parser.add_argument("--quantization", choices=list(QUANTIZATIONS), help="quantize the weights while loading")
    parser.add_argument(
        "--checkpoint-code",
        action="store_true",
        help="run the code in the model's folder or repository (trust_remote_code) instead of this package's",
    )


def add_server_options(parser: argparse.ArgumentParser, port: int):
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 allows other machines (default: this machine only)",
    )
    parser.add_argument(
        "--port",
        type=at_least(0, maximum=65535, number=int),
        default=port,
        help="port; 0 means any free one (default: %(default)s)",
    )
    parser.add_argument(
        "--max-body", type=at_least(1, number=int), default=1 << 20, help="largest request, in bytes (default: 1 MiB)"
    )
    parser.add_argument(
        "--api-key", default=os.environ.get("API_KEY"), help="key that clients must send (default: $API_KEY, or no key)"
    )
    parser.add_argument(
        "--allowed-hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="host names that clients may use, besides localhost and IP addresses; '*' allows all",
    )
    parser.add_argument(
        "--cors",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="origins of web pages that may use this server; '*' allows all",
    )


def at_least(minimum: float, above: bool = False, maximum: float = float("inf"), number: type = float):
    """Returns a type for argparse: a number of at least (or above) `minimum` and at most `maximum`."""

    def parse(text: str):
        value = number(text)
        if not minimum <= value <= maximum or (above and value == minimum):
            limit = f"{'above' if above else 'at least'} {minimum:g}"
            raise argparse.ArgumentTypeError(
                f"{text}: must be {limit}" + (f" and at most {maximum:g}" if maximum < float("inf") else "")
            )
        return value

    parse.__name__ = "number"  # for argparse's message, "invalid number value"
    return parse
