"""Reads and writes checkpoint folders, one tensor at a time."""

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common.checkpoint import check_tokenizer, name_some, read_config, weight_files
from common.files import read_json
from common.hub import local_folder
from common.package import DEFAULTS, ROOT, copy_code, module_of, product


SETTINGS = (*DEFAULTS, "tokenizer.json", "added_tokens.json", "MODEL_LICENSE")
SHARD_BYTES = 2_000_000_000


# Reading


class Checkpoint:
    """
    A ChatGLM2 checkpoint in a folder or on the Hub, as `.bin` or safetensors, in one file or several.

    Attributes:
        folder: Where the files are.
        config: The `ChatGLMConfig` of the folder.
        names: `{name: meta tensor}` of all weights, without the published `inv_freq`.
        quantized: `{layer: its quantized layer without data}`; empty if the checkpoint is not quantized.

    Raises:
        ValueError: if a file is missing or damaged, or the weights do not match config.json.
    """

    def __init__(self, name: str | Path):
        self.folder = folder = local_folder(name)
        self.config_dict, self.config = read_config(folder)
        model = meta_model(self.config)
        self.quantized = quantized_layers(model)
        self.files = weight_files(folder)
        self.names = check_names(self.files, model)
        self.nbytes = sum(tensor.nbytes for tensor in self.names.values())

    def tensors(self, doing: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields each (name, tensor), mapped from its file, with a progress bar."""
        return with_progress(self.files, self.names, doing)

    def plain_tensors(self, doing: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Like `tensors`, but quantized weights are dequantized one by one, to the dtype of their scales."""
        return self._dequantized(self.tensors(doing))

    def plain_names(self) -> dict[str, torch.Tensor]:
        """Returns the names and meta tensors of `plain_tensors`, in the same order."""
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
        """Raises `ValueError` if the model is a variant of ChatGLM2 that `target` has no equivalent for."""
        standard = dict(
            rmsnorm=True, post_layer_norm=True, add_bias_linear=False, pre_seq_len=None, fp32_residual_connection=False,
            apply_residual_connection_post_layernorm=False,
        )  # fmt: skip
        for name, value in standard.items():
            if (actual := getattr(self.config, name)) != value:
                raise ValueError(f"{target} has no equivalent for {name}={actual!r}. Only {value!r} can be converted.")
        if not is_language_model(self.config):
            raise ValueError(f"Only language models can be converted to {target}, not {self.config.architectures[0]}.")


def is_language_model(config) -> bool:
    return not any("Classification" in name for name in config.architectures or ())


def meta_model(config):
    """Returns the model for `config`, without data."""
    name = "ChatGLMForConditionalGeneration" if is_language_model(config) else config.architectures[0]
    try:
        model_class = product(f"modeling_chatglm.{name}")
    except AttributeError:
        raise ValueError(f"config.json names the architecture {name!r}, which this package does not support.") from None
    with torch.device("meta"):
        return model_class(config)


def quantized_layers(model) -> dict[str, torch.nn.Module]:
    """Inserts quantized layers without data where the checkpoint has them by config.json. Returns them by name."""
    options = getattr(model.config, "quantization_config", None)
    if not options:
        return {}
    if options.get("quant_method") != "chatglm":
        raise ValueError(
            f"The weights are quantized by {options.get('quant_method')!r}: convert the checkpoint that they were made from."
        )
    formats = module_of(model, "quantization")
    layers = formats.empty_layers(model, formats.ChatGLMQuantizationConfig(**options))
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def read_file(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields each (name, tensor) of a file. The file is mapped into memory, unless it is a `.bin` in torch's old format."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
            return
        tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        message = str(error).split("\n")[0]
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {message}. Download it again."
        ) from error
    if not (isinstance(tensors, Mapping) and all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())):
        raise ValueError(f"{path} has no named tensors, so it is not a file of model weights.")
    yield from tensors.items()


def check_names(files: list[Path], model) -> dict[str, torch.Tensor]:
    """
    Returns `{name: meta tensor}` for the files, without the published `inv_freq`, which is computed.

    Raises:
        ValueError: if names or shapes are not those of `model`.
    """
    found = {name: tensor.to("meta") for path in files for name, tensor in read_file(path)}
    found = {name: tensor for name, tensor in found.items() if not name.endswith("rotary_pos_emb.inv_freq")}
    # In the model the head of a classifier is called score, in files classifier_head, as published.
    expected = {re.sub(r"^score\.", "classifier_head.", name): tensor for name, tensor in model.state_dict().items()}
    optional = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    for what, names in (
        ("lack", expected.keys() - found.keys() - optional),
        ("have what config.json does not know:", found.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"The weights in {files[0].parent} {what} {name_some(sorted(names))}. Are config.json and weights of one model? Weights under "
                "other names are renamed by loading the model and save_pretrained."
            )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} in {files[0].parent} is {list(tensor.shape)}; config.json says "
                f"{list(expected[name].shape)}. They belong to different models."
            )
    return found


def published_name(name: str) -> str:
    """Returns the name that a tensor of the model has in files."""
    return re.sub(r"^score\.", "classifier_head.", name)


def as_published(tensors: Iterable[tuple[str, torch.Tensor]], config) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Yields tensors with their published names, and `inv_freq`, as `save_pretrained` does. Nothing reads `inv_freq`, but
    programs that compare checkpoints (mergekit) expect it.
    """
    dtype = None
    for name, tensor in tensors:
        dtype = dtype or (tensor.dtype if tensor.is_floating_point() else None)
        yield published_name(name), tensor
    rotary = product("modeling_chatglm.RotaryEmbedding")
    inv_freq, _ = rotary.compute_default_rope_parameters(config, device="cpu")
    yield "transformer.rotary_pos_emb.inv_freq", inv_freq.to(dtype)


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


def write_package(folder: Path, source: Path, config: dict, settings: tuple[str, ...] = SETTINGS):
    """
    Writes everything of a checkpoint except the weights: this package's code, `config` with this package's classes, and the
    tokenizer of `source` with its `settings`.

    Raises:
        ValueError: if `source` has no tokenizer.model.
    """
    published = read_json(ROOT / "config.json")
    shared = {name: published[name] for name in ("model_type", "auto_map")}
    (folder / "config.json").write_text(json.dumps({**config, **shared}, indent=2, ensure_ascii=False) + "\n")
    copy_code(folder)
    check_tokenizer(source)
    for name in ("tokenizer.model", *settings):
        if (source / name).exists():
            shutil.copy(source / name, folder)


def write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES):
    """Writes tensors in the given order, in files of at most `shard_bytes` (or one tensor), with an index if there are several."""
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
