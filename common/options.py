"""The options that all commands share. Needs only the standard library, so that `--help` answers at once."""

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
    """argparse's, which shows the description as it is and takes `--max_length` for `--max-length`."""

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
    """Returns `--max-length=VALUE` for `--max_length=VALUE`, and whatever else is no option as it is."""
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--\w[\w-]*", name) else arg


def add_model_option(parser: argparse.ArgumentParser, default: str | Path | None = TINY):
    """`--model`, of which commands that have no default need one."""
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
    """Which model to load, and how."""
    add_model_option(parser, default)
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, mps, or auto: all GPUs (default: the first GPU, or the CPU)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, elsewhere the checkpoint's")
    parser.add_argument("--quantization", choices=list(QUANTIZATIONS), help="quantize the weights while they load")
    parser.add_argument(
        "--checkpoint-code",
        action="store_true",
        help="run the code in the model's folder or repository (trust_remote_code) instead of this package's",
    )


def add_server_options(parser: argparse.ArgumentParser, port: int):
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: other machines too (default: this one only)")
    parser.add_argument(
        "--port",
        type=at_least(0, maximum=65535, number=int),
        default=port,
        help="0: any free one; default: %(default)s",
    )
    parser.add_argument(
        "--max-body", type=at_least(1, number=int), default=1 << 20, help="bytes of a request; default: 1 MiB"
    )
    parser.add_argument(
        "--api-key", default=os.environ.get("API_KEY"), help="that clients have to send (default: $API_KEY, or none)"
    )
    parser.add_argument(
        "--allowed-hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names by which clients may call this server, besides localhost and IP addresses; '*': any",
    )
    parser.add_argument(
        "--cors", nargs="+", default=[], metavar="ORIGIN", help="web pages that may use this server; '*': any"
    )


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
