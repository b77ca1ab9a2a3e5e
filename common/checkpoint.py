"""Checkpoint folders: checked before anything is loaded, and loaded; the message of an error names the file and field."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from .files import read_json
from .package import product


logger = logging.get_logger(__name__)

# What the library calls the KV cache, in arguments and outputs: `cache` since 5.24, `past_key_values` before
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

# Where the library looks for weights, in its order
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# What reading a file of wrong content raises, deep inside the library
UNREADABLE = (
    ArithmeticError, AttributeError, EOFError, ImportError, LookupError, RuntimeError, SafetensorError, StrictDataclassError,
    SyntaxError, TypeError, UnpicklingError,
)  # fmt: skip


def load(auto_class, name: str | Path, may_lack: tuple[str, ...] = (), **options):
    """
    Loads a model of a folder or of the Hub by `auto_class.from_pretrained`.

    Args:
        may_lack: Parts of the names of weights that the files need not have.

    Raises:
        ValueError: if a file is missing or damaged, a field of config.json is wrong, or a weight has another shape or is
            missing, which would be random.
        OSError: if there is no such model.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "adapter_config.json").exists():  # of PEFT, which the library reads by itself
        if read_json(folder / "config.json").get("model_type", "chatglm") == "chatglm":
            read_config(folder)
        weight_files(folder)
    options.update(trust_remote_code=True, output_loading_info=True, ignore_mismatched_sizes=True)
    with without_loading_report():
        try:
            model, found = auto_class.from_pretrained(name, **options)
        except UNREADABLE as error:
            raise ValueError(
                f"{name} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    for weight, shape, expected in found["mismatched_keys"]:
        raise ValueError(
            f"{weight} in {name} is {list(shape)}; by config.json it would be {list(expected)}. They belong to different "
            "models."
        )
    missing = sorted(key for key in found["missing_keys"] if not any(part in key for part in may_lack))
    if missing:
        hint = "Download the weights again."
        if getattr(model.config, "pre_seq_len", None) and not any("prefix_encoder" in key for key in missing):
            hint = "It holds a P-Tuning prefix alone, which needs its model: docs/training.md loads the two."
        raise ValueError(f"{name} lacks {name_some(missing)}, which would be random. {hint}")
    if found["unexpected_keys"]:
        logger.warning(f"{name} has {name_some(sorted(found['unexpected_keys']))}, which the model does not use.")
    return model


@contextmanager
def without_loading_report() -> Iterator[None]:
    """Keeps the library from listing, over many lines, what `load` says in one."""
    reporter = logging.get_logger("transformers.modeling_utils")

    def is_no_report(record) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    reporter.addFilter(is_no_report)
    try:
        yield
    finally:
        reporter.removeFilter(is_no_report)


def load_tokenizer(name: str | Path, **options):
    """
    Raises:
        ValueError: if a file of the tokenizer is missing or damaged.
        OSError: if there is no such tokenizer.
    """
    for file in ("tokenizer_config.json", "tokenizer.model"):
        if Path(name).is_dir() and not (Path(name) / file).is_file():
            raise ValueError(f"{Path(name) / file} is missing. Copy it there: it is published beside the weights.")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=True, **options)
    except (ValueError, *UNREADABLE) as error:
        message = " ".join(str(error).split())
        raise ValueError(
            f"The tokenizer of {name} cannot be loaded from tokenizer_config.json, tokenizer.model and what is beside them: "
            f"{message}"
        ) from error


def name_some(names: list[str]) -> str:
    """Returns the first three names, and how many there are besides."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def check_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {folder}. A model of the Hub is downloaded by `hf download NAME --local-dir {folder}`."
        )
    return folder


def read_config(folder: Path) -> tuple[dict, object]:
    """
    Returns what config.json of a folder holds, and the `ChatGLMConfig` made of it.

    Raises:
        ValueError: if a configuration file is not JSON, or a field of config.json has the wrong type or value.
    """
    path = check_folder(folder) / "config.json"
    written = read_json(path, "Give a complete checkpoint folder: download it again.")
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            read_json(folder / name)
    model_type = written.get("model_type", "chatglm")  # the published one does not say
    if model_type != "chatglm":
        hint = " Convert it with `python -m conversion.from_glm`." if model_type == "glm" else ""
        raise ValueError(f"{path}: model_type is {model_type!r}, and ChatGLM2's is 'chatglm'.{hint}")
    for name, kind in (("architectures", list), ("auto_map", dict), ("quantization_config", dict)):
        if written.get(name) is not None and not isinstance(written[name], kind):
            article = "a list" if kind is list else "an object"
            raise ValueError(f"{path}: {name} must be {article}, got {written[name]!r}.")
    for name in ("dtype", "torch_dtype"):
        value = written.get(name)
        if value is not None and not (isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)):
            raise ValueError(f"{path}: {name} must name a type of torch, such as 'float16', got {value!r}.")
    try:
        return written, product("configuration_chatglm.ChatGLMConfig").from_pretrained(folder)
    except (ValueError, *UNREADABLE) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def weight_files(folder: Path) -> list[Path]:
    """
    Returns the files of a folder that hold its weights.

    Raises:
        ValueError: if there are none, one that the index names is missing, or the index is damaged.
    """
    for name in WEIGHTS:
        path = folder / name
        if not path.exists():
            continue
        if not name.endswith(".index.json"):
            return [check_file(path)]
        names = read_json(path).get("weight_map")
        if not (isinstance(names, dict) and names and all(is_file_name(file) for file in names.values())):
            raise ValueError(
                f"{path}: weight_map must be an object that gives each weight's file, got {names!r:.60}. Download it again."
            )
        files = sorted({folder / file for file in names.values()})
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ValueError(f"{folder} lacks {name_some(missing)} of the files in {name}. Download them.")
        return [check_file(file) for file in files]
    raise ValueError(
        f"There are no weights in {folder}: none of {', '.join(WEIGHTS)}. Download them, or give their folder."
    )


def is_file_name(value) -> bool:
    return isinstance(value, str) and Path(value).name == value


def check_file(path: Path) -> Path:
    with path.open("rb") as file:
        if file.read(19) == b"version https://git":
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`.")
    return path
