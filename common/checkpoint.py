"""Checks and loads checkpoint folders. Errors name the file and the field."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from .files import read_json
from .hub import is_hub_name, local_folder
from .package import DEFAULTS, ROOT, product


logger = logging.get_logger(__name__)

# What the library calls the KV cache, in arguments and outputs: `cache` since 5.24, `past_key_values` before
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

# Where the library looks for weights, in its order
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Errors of the library for files with wrong content
UNREADABLE = (
    ArithmeticError, AttributeError, EOFError, ImportError, LookupError, RuntimeError, SafetensorError, StrictDataclassError,
    SyntaxError, TypeError, UnpicklingError,
)  # fmt: skip


def load(auto_class, name: str | Path, may_lack: tuple[str, ...] = (), checkpoint_code: bool = False, **options):
    """
    Loads a model of a folder or of the Hub, as `auto_class.from_pretrained` does, but with this package's code.

    Args:
        may_lack: Weights that may be missing, by parts of their names.
        checkpoint_code: Run the code in the folder instead of this package's, as `trust_remote_code` does.

    Raises:
        ValueError: if there is no such model, a file is missing or damaged, a field of config.json is wrong, or a weight has
            another shape or is missing. (A missing weight would be random.)
    """
    folder = base = local_folder(name, options.pop("revision", None))
    if (folder / "adapter_config.json").exists():  # an adapter of PEFT, which the library loads itself
        base = local_folder(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or folder)
    else:
        weight_files(folder)
    loader = auto_class
    if is_chatglm(base):
        config = options.pop("config", None) or load_config(base, checkpoint_code)
        options["config"] = config
        if stored := getattr(config, "quantization_config", None):
            check_quantization(name, stored, options.pop("quantization_config", stored))
        if not checkpoint_code:
            loader = package_class(auto_class.__name__)
    options.update(output_loading_info=True, ignore_mismatched_sizes=True)
    if loader is auto_class:
        options["trust_remote_code"] = checkpoint_code
    with without_loading_report():
        try:
            model, found = loader.from_pretrained(folder, **options)
        except UNREADABLE as error:
            raise ValueError(
                f"{name} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    for weight, shape, expected in found["mismatched_keys"]:
        raise ValueError(
            f"{weight} in {name} is {list(shape)}; config.json says {list(expected)}. They belong to different models."
        )
    missing = sorted(key for key in found["missing_keys"] if not any(part in key for part in may_lack))
    if missing:
        hint = "Download the weights again."
        if getattr(model.config, "pre_seq_len", None) and not any("prefix_encoder" in key for key in missing):
            hint = "It holds a P-Tuning prefix alone, which needs its model: docs/training.md loads the two."
        raise ValueError(f"{name} lacks {name_some(missing)}, which would be random. {hint}")
    if found["unexpected_keys"]:
        logger.warning(f"{name} has {name_some(sorted(found['unexpected_keys']))}, which the model does not use.")
    if is_hub_name(name):
        model.config.name_or_path = model.name_or_path = str(
            name
        )  # not the folder of the cache: adapters store this name
    return model


def check_quantization(name: str | Path, stored: dict, wanted):
    """Raises ValueError if weights that are stored quantized are to be quantized in another way, a dict or a config."""
    has, asked = (quantization_name(config) for config in (stored, wanted))
    if has != asked:
        raise ValueError(
            f"The weights of {name} are in {has} already. To have them in {asked}, pass the checkpoint that they were made from."
        )


def quantization_name(config) -> str:
    fields = config if isinstance(config, dict) else config.to_dict()
    method = getattr(fields["quant_method"], "value", fields["quant_method"])
    return f"INT{fields['bits']}" if method == "chatglm" else f"the format of {method}"


def package_class(auto_class: str):
    """Returns this package's class for one of the library's `Auto...` names. Saving it also saves the code."""
    name = read_json(ROOT / ("tokenizer_config.json" if auto_class == "AutoTokenizer" else "config.json"))["auto_map"]
    name = name[auto_class]
    loaded = product(name if isinstance(name, str) else name[0])
    loaded.register_for_auto_class(auto_class)
    return loaded


def load_config(name: str | Path, checkpoint_code: bool = False, revision: str | None = None, **fields):
    """
    Returns the configuration of a folder or of a name on the Hub, with `fields` changed.

    Raises:
        ValueError: if there is no such folder, or a field of config.json is wrong.
    """
    folder = local_folder(name, revision)
    if checkpoint_code or not is_chatglm(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=checkpoint_code, **fields)
    read_config(folder)
    config = package_class("AutoConfig").from_pretrained(folder, **fields)
    config.auto_map = read_json(ROOT / "config.json")["auto_map"]  # the folder's may name code on the Hub
    return config


def is_chatglm(folder: Path) -> bool:
    """Whether a folder has a ChatGLM2 model or tokenizer. The published config.json does not name the type."""
    check_links(folder)
    if (folder / "config.json").exists():
        return read_json(folder / "config.json").get("model_type", "chatglm") == "chatglm"
    path = folder / "tokenizer_config.json"
    return path.exists() and read_json(path).get("tokenizer_class") == "ChatGLMTokenizer"


def check_links(folder: Path):
    """Raises ValueError if Git wrote the folder's symbolic links as text files, as it does on Windows by default."""
    for name in DEFAULTS:
        path = folder / name
        if path.is_file() and path.stat().st_size < 100 and path.read_bytes().startswith(b"../"):
            raise ValueError(
                f"{path} is a symbolic link that Git wrote as a plain file. Write the files with "
                f'`python -m conversion.upgrade "{folder}"`, or clone with `git clone -c core.symlinks=true`.'
            )


@contextmanager
def without_loading_report() -> Iterator[None]:
    """Hides the library's long loading report. `load` reports problems in one line."""
    reporter = logging.get_logger("transformers.modeling_utils")

    def is_no_report(record) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    reporter.addFilter(is_no_report)
    try:
        yield
    finally:
        reporter.removeFilter(is_no_report)


def load_tokenizer(name: str | Path, checkpoint_code: bool = False, revision: str | None = None, **options):
    """
    Loads the tokenizer of a folder or of the Hub, with this package's code unless `checkpoint_code`.

    Raises:
        ValueError: if there is no such folder, or a file of the tokenizer is missing or damaged.
    """
    folder = local_folder(name, revision)
    loader = AutoTokenizer
    if is_chatglm(folder):
        check_tokenizer(folder)
        if not checkpoint_code:
            loader = package_class("AutoTokenizer")
    if loader is AutoTokenizer:
        options["trust_remote_code"] = checkpoint_code
    try:
        tokenizer = loader.from_pretrained(folder, **options)
    except (ValueError, *UNREADABLE) as error:
        message = " ".join(str(error).split())
        raise ValueError(
            f"The tokenizer of {name} cannot be loaded from tokenizer_config.json, tokenizer.model and what is beside them: "
            f"{message}"
        ) from error
    if tokenizer.chat_template is None and loader is not AutoTokenizer:
        tokenizer.chat_template = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def check_tokenizer(folder: Path):
    """Raises ValueError if a checkpoint folder has no tokenizer."""
    if not (folder / "tokenizer.model").is_file():
        raise ValueError(
            f"{folder / 'tokenizer.model'} is missing, and without it the folder has no tokenizer. Copy it there from the "
            "model that this one was made from: it is published beside the weights."
        )


def name_some(names: list[str]) -> str:
    """Returns the first three names, and the number of further ones."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def check_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}. Give a folder, or a name on the Hub (OWNER/NAME).")
    return folder


def read_config(folder: Path) -> tuple[dict, object]:
    """
    Returns the content of a folder's config.json, and the `ChatGLMConfig` made from it.

    Raises:
        ValueError: if a configuration file is not JSON, or a field of config.json has the wrong type or value.
    """
    path = check_folder(folder) / "config.json"
    written = read_json(path, "Give a complete checkpoint folder: download it again.")
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            read_json(folder / name)
    model_type = written.get("model_type", "chatglm")  # the published one does not name it
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
    Returns the weight files of a folder.

    Raises:
        ValueError: if there are none, a file of the index is missing, or the index is damaged.
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
