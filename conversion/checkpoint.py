"""Checkpoint folders: read tensor by tensor, checked before any work, and written complete or not at all."""

import json
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.dynamic_module_utils import get_class_from_dynamic_module


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "checkpoints/tiny"
CODE = ("*_chatglm.py", "quantization*.py")
# Of this repository, for checkpoints without, as the published one
DEFAULTS = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
SETTINGS = (*DEFAULTS, "tokenizer.json", "added_tokens.json", "MODEL_LICENSE")
# Where the library looks for weights, in its order
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SHARD_BYTES = 2_000_000_000


def product(name: str):
    """Returns a class of this package, `module.Class`, whatever code lies in a checkpoint's folder."""
    return get_class_from_dynamic_module(name, str(ROOT))


@contextmanager
def plain_errors():
    """For a command: ends it with the message of an expected error, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).stem}: {error}") from error
    except ImportError as error:
        raise SystemExit(f"{Path(sys.argv[0]).stem}: {error}. pip install -e '.[conversion]'") from error


# Reading


class Checkpoint:
    """
    A folder with weights of ChatGLM2, as `.bin` or safetensors, in one file or several.

    Attributes:
        config: The `ChatGLMConfig` of the folder.
        names: `{name: meta tensor}` of all weights, without the published `inv_freq`.
        quantized: `{layer: its quantized layer without data}`; empty if the checkpoint is not quantized.

    Raises:
        ValueError: if a file is missing or damaged, or the weights are not those that config.json describes.
    """

    def __init__(self, folder: Path):
        self.folder = check_folder(folder)
        self.config_dict = read_json(folder / "config.json")
        model_type = self.config_dict.get("model_type", "chatglm")  # the published one does not say
        if model_type != "chatglm":
            hint = " Convert it with `python -m conversion.from_glm`." if model_type == "glm" else ""
            raise ValueError(f"{folder} holds a model of type {model_type!r}, not a ChatGLM2.{hint}")
        try:
            self.config = product("configuration_chatglm.ChatGLMConfig").from_pretrained(folder)
        except (StrictDataclassError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
        model = meta_model(self.config)
        self.quantized = quantized_layers(model)
        self.files = weight_files(folder)
        self.names = check_names(self.files, model)
        self.nbytes = sum(tensor.nbytes for tensor in self.names.values())

    def tensors(self, doing: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields each (name, tensor), mapped from its file rather than read into memory, with a progress bar."""
        return with_progress(self.files, self.names, doing)

    def plain_tensors(self, doing: str) -> Iterator[tuple[str, torch.Tensor]]:
        """As `tensors`, but quantized weights are dequantized one by one, into the dtype of their scales."""
        return self._dequantized(self.tensors(doing))

    def plain_names(self) -> dict[str, torch.Tensor]:
        """What `plain_tensors` yields, in its order, as meta tensors."""
        return dict(self._dequantized(self.names.items()))

    def _dequantized(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        waiting: dict[str, dict] = {}  # weights or scales, until the other was read
        for name, tensor in tensors:
            layer, _, kind = name.rpartition(".")
            if layer not in self.quantized or kind == "bias":
                yield name, tensor
                continue
            waiting.setdefault(layer, {})[kind] = torch.nn.Parameter(tensor, requires_grad=False)
            if len(waiting[layer]) == 2:
                quantized, parts = self.quantized[layer], waiting.pop(layer)
                quantized.weight, quantized.weight_scale = parts["weight"], parts["weight_scale"]
                yield f"{layer}.weight", quantized.dequantize().weight.detach()
                quantized.weight = quantized.weight_scale = None

    def check_standard(self, target: str):
        """Raises `ValueError` if the model is a variant of ChatGLM2 that `target` has no words for."""
        standard = dict(
            rmsnorm=True, post_layer_norm=True, add_bias_linear=False, pre_seq_len=None, fp32_residual_connection=False,
            apply_residual_connection_post_layernorm=False,
        )  # fmt: skip
        for name, value in standard.items():
            if (actual := getattr(self.config, name)) != value:
                raise ValueError(f"{target} has nothing for {name}={actual!r}: only {value!r} can be converted.")
        if not is_language_model(self.config):
            raise ValueError(f"Only language models become {target}, not {self.config.architectures[0]}.")


def check_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {folder}. A model of the Hub is downloaded by `hf download NAME --local-dir {folder}`."
        )
    return folder


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: that is no checkpoint folder, or an incomplete one.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}. Download it again.")
    return content


def is_language_model(config) -> bool:
    return not any("Classification" in name for name in config.architectures or ())


def meta_model(config):
    """Returns the model that `config` describes, without data."""
    name = "ChatGLMForConditionalGeneration" if is_language_model(config) else config.architectures[0]
    try:
        model_class = product(f"modeling_chatglm.{name}")
    except AttributeError:
        raise ValueError(f"config.json names the architecture {name!r}, which this package does not have.") from None
    with torch.device("meta"):
        return model_class(config)


def quantized_layers(model) -> dict[str, torch.nn.Module]:
    """Puts quantized layers, without data, where config.json says that the checkpoint has them; returns them by name."""
    options = getattr(model.config, "quantization_config", None)
    if not options:
        return {}
    if not isinstance(options, dict):
        raise ValueError(f"quantization_config in config.json must be an object, got {options!r}.")
    if options.get("quant_method") != "chatglm":
        raise ValueError(
            f"The weights are quantized by {options.get('quant_method')!r}: convert the checkpoint that they were made from."
        )
    formats = quantization_module(model)
    layers = formats.empty_layers(model, formats.ChatGLMQuantizationConfig(**options))
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def quantization_module(model):
    """Returns the copy of quantization.py that `model` uses."""
    modeling = sys.modules[type(model).__module__]
    return sys.modules[modeling.quantize.__module__]


def weight_files(folder: Path) -> list[Path]:
    for name in WEIGHTS:
        if not (folder / name).exists():
            continue
        if not name.endswith(".index.json"):
            return [folder / name]
        index = read_json(folder / name)
        files = sorted({folder / file for file in index.get("weight_map", {}).values()})
        missing = [path.name for path in files if not path.exists()]
        if missing or not files:
            raise ValueError(f"{folder} lacks {', '.join(missing) or 'all'} of the files in {name}. Download them.")
        return files
    raise ValueError(
        f"There are no weights in {folder}: none of {', '.join(WEIGHTS)}. Download them, or give their folder."
    )


def read_file(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields each (name, tensor) of a file, mapped into memory."""
    with path.open("rb") as file:
        if file.read(19) == b"version https://git":
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        else:
            yield from torch.load(path, map_location="cpu", mmap=True, weights_only=True).items()
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        message = str(error).split("\n")[0]
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {message}. Download it again."
        ) from error


def check_names(files: list[Path], model) -> dict[str, torch.Tensor]:
    """
    Returns `{name: meta tensor}` of what the files hold, but for the published `inv_freq`, which is computed.

    Raises:
        ValueError: if it is not what `model` consists of.
    """
    found = {name: tensor.to("meta") for path in files for name, tensor in read_file(path)}
    found = {name: tensor for name, tensor in found.items() if not name.endswith("rotary_pos_emb.inv_freq")}
    expected = model.state_dict()
    optional = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    for what, names in (
        ("lack", expected.keys() - found.keys() - optional),
        ("have what config.json does not know:", found.keys() - expected.keys()),
    ):
        if names:
            some = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"The weights in {files[0].parent} {what} {some}{more}. Are config.json and weights of one model? Weights under "
                "other names are renamed by loading the model and save_pretrained."
            )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} in {files[0].parent} is {list(tensor.shape)}; by config.json it would be "
                f"{list(expected[name].shape)}. They belong to different models."
            )
    return found


def with_progress(
    files: list[Path], names: Mapping[str, torch.Tensor], doing: str
) -> Iterator[tuple[str, torch.Tensor]]:
    total = sum(tensor.nbytes for tensor in names.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=doing) as bar:
        for path in files:
            for name, tensor in read_file(path):
                if name in names:
                    yield name, tensor
                    bar.update(tensor.nbytes)


# Writing


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """
    Gives a folder to write to, which becomes `output` in the end; on any error nothing is left of it.

    Raises:
        ValueError: if `output` is there already, and not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already. Give another --output, or remove it.")
    with unfinished_folder(output) as unfinished:
        yield unfinished
        if output.exists():
            output.rmdir()
        unfinished.rename(output)


@contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """As `new_folder`, for a file."""
    if output.exists():
        raise ValueError(f"{output} exists already. Give another --output, or remove it.")
    with unfinished_folder(output) as unfinished:
        yield unfinished / output.name
        (unfinished / output.name).rename(output)


@contextmanager
def unfinished_folder(output: Path) -> Iterator[Path]:
    """Gives a folder beside `output`, on the same disk."""
    output.parent.mkdir(parents=True, exist_ok=True)
    umask = os.umask(0)
    os.umask(umask)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    unfinished.chmod(0o777 & ~umask)  # mkdtemp keeps it to the user alone
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_package(folder: Path, source: Path, config: dict, settings: tuple[str, ...] = SETTINGS):
    """
    Writes all of a checkpoint but its weights: this package's code, `config` with the classes that it has, and the
    tokenizer of `source` with those of its `settings` that there are.

    Raises:
        ValueError: if `source` has no tokenizer.model.
    """
    published = read_json(ROOT / "config.json")
    shared = {name: published[name] for name in ("model_type", "auto_map")}
    (folder / "config.json").write_text(json.dumps({**config, **shared}, indent=2, ensure_ascii=False) + "\n")
    for pattern in CODE:
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)
    for name in DEFAULTS:
        shutil.copy(ROOT / name, folder)
    if not (source / "tokenizer.model").exists():
        raise ValueError(f"{source} has no tokenizer.model. Copy it there: it is published beside the weights.")
    for name in ("tokenizer.model", *settings):
        if (source / name).exists():
            shutil.copy(source / name, folder)


def write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES):
    """Writes tensors as they come, in files of at most `shard_bytes` (or one tensor), with an index if they are several."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = 0

    def write():
        path = folder / f"{len(shards)}.safetensors"
        save_file(shard, path, {"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors keeps it to the user alone
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            write()
        if any(tensor.data_ptr() == other.data_ptr() for other in shard.values()):
            tensor = tensor.clone()  # tied weights, which a file must hold twice
        shard[name] = tensor.contiguous()
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
