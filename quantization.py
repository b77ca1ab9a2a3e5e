"""INT8 and INT4 weights: how they are rounded, the layers that hold them, and how the library loads them.

A weight is scale * q with q in -127..127 (INT8) or -7..7 (INT4), and one scale for each row, as published, or for each
group of columns. How a packed weight is multiplied is in quantization_kernels.py.
"""

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import initialization as init
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import load_state_dict
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .quantization_kernels import (
    CHUNK_ROWS,
    GROUP_SIZES,
    dequantize_weight,
    pack_int4,
    quantized_linear,
    quantized_linear_backward,
)


logger = logging.get_logger(__name__)

QUANT_METHOD = "chatglm"
# What is quantized in each layer. Norms, biases and the P-Tuning prefix never are.
QUANTIZED_LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
# What `quantize_embeddings` adds, in INT8.
QUANTIZED_EMBEDDINGS = ("word_embeddings", "output_layer")

# Fractions of the largest magnitude that are tried for the end of the range. The best for a bell curve of 4,096 values
# in INT4 is about 0.7.
SEARCHED_SCALES = [i / 40 for i in range(16, 41)]


# Rounding


def largest_quantized(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def check_finite(name: str, weight: torch.Tensor):
    if weight.numel() and not torch.isfinite(torch.stack(weight.aminmax())).all():  # NaN goes through; no copy
        raise ValueError(f"{name} holds NaN or infinity, and cannot be quantized. Is the checkpoint damaged?")


def published_scale(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """
    Returns the scales of rows or groups, `[...]` for a weight `[..., columns]` and in its dtype, that put the largest
    magnitude at the end of the range.
    """
    return (weight.float().abs().amax(dim=-1) / largest_quantized(bits)).to(weight.dtype)


def searched_scale(weight: torch.Tensor, bits: int, importance: torch.Tensor | None = None) -> torch.Tensor:
    """
    As `published_scale`, but tries some smaller scales, too, and takes the one with the least squared error. A smaller
    scale clips the largest values and rounds the others less.

    Args:
        importance: `[..., columns]`, weights of the squared errors.
    """
    largest = published_scale(weight, bits)
    best_scale, best_error = largest, torch.full(largest.shape, torch.inf, device=weight.device)
    for fraction in SEARCHED_SCALES:
        scale = (largest.float() * fraction).to(weight.dtype)
        error = (round_to_scale(weight, scale, bits).float() * scale.float()[..., None] - weight.float()).square()
        error = (error if importance is None else error * importance).sum(dim=-1)
        better = error < best_error
        best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    return best_scale


def round_to_scale(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns int8 `[..., columns]`, the nearest to `weight / scale[..., None]`."""
    limit = largest_quantized(bits)
    divisor = torch.where(scale == 0, 1, scale)  # a row of zeros
    if weight.dtype == torch.bfloat16:
        weight, divisor = weight.float(), divisor.float()
    return (weight / divisor[..., None]).round().clamp(-limit, limit).to(torch.int8)


def quantize_weight(
    weight: torch.Tensor, bits: int, group_size: int | None = None, scale_search: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Quantizes a matrix, rounding to nearest.

    By default equal to the published code bit for bit, except that this divides bfloat16 in float32 and clamps: there,
    bfloat16 rounds the largest value of a row to 128, which wraps to -128.

    Args:
        weight: `[out, in]`, floating point; `in` is even if `bits` is 4.
        bits: 8 or 4.
        group_size: How many neighbouring columns share a scale; by default a whole row does.
        scale_search: Whether to look for the scales with the least squared error.

    Returns:
        int8 `[out, in]`, or packed `[out, in / 2]`; and the scales, `[out]` or `[out, in / group_size]`, in the dtype of
        `weight`.

    Raises:
        ValueError: if the weight is not finite, or its columns cannot be grouped or packed.
    """
    check_finite("The weight", weight)
    out, columns = weight.shape
    if columns % (group_size or {4: 2, 8: 1}[bits]):
        raise ValueError(f"{columns} columns are no multiple of {group_size or 2}.")
    packed = torch.empty(out, columns // 2 if bits == 4 else columns, dtype=torch.int8, device=weight.device)
    groups = () if group_size is None else (columns // group_size,)
    scales = torch.empty(out, *groups, dtype=weight.dtype, device=weight.device)
    for start in range(0, out, CHUNK_ROWS):  # to need little memory
        rows = slice(start, start + CHUNK_ROWS)
        grouped = weight[rows] if group_size is None else weight[rows].unflatten(1, (-1, group_size))
        scale = searched_scale(grouped, bits) if scale_search else published_scale(grouped, bits)
        quantized = round_to_scale(grouped, scale, bits).view(-1, columns)
        packed[rows], scales[rows] = pack_int4(quantized) if bits == 4 else quantized, scale
    return packed, scales


# Layers


class QuantizedMatmul(torch.autograd.Function):
    """`x @ weight.T` for a quantized weight, which is dequantized again for the gradient rather than kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.bits = bits
        return quantized_linear(x, weight, scale, bits, exact=True)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        weight, scale = ctx.saved_tensors
        return quantized_linear_backward(grad_output, weight, scale, ctx.bits), None, None, None


def new_parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def check_group_size(group_size: int | None):
    if group_size is not None and (type(group_size) is not int or group_size not in GROUP_SIZES):
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, or None for a scale a row, got {group_size!r}.")


class QuantizedLinear(nn.Linear):
    """
    A linear layer with a quantized, frozen weight. It is an `nn.Linear`, so that PEFT finds it.

    Its state: `weight`, int8 `[out, in]` or packed `[out, in / 2]`; `weight_scale`, `[out]` or `[out, in / group_size]`;
    `bias`, `[out]`.

    The CPU quantizes activations to INT8 in blocks of 32, except while gradients are computed.

    Raises:
        ValueError: if `in_features` is odd in INT4, or no multiple of `group_size`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool,
        dtype=None,
        device=None,
        group_size: int | None = None,
    ):
        if bits == 4 and in_features % 2:
            raise ValueError(f"INT4 packs pairs of columns: in_features must be even, got {in_features}.")
        check_group_size(group_size)
        if group_size is not None and in_features % group_size:
            raise ValueError(f"group_size must divide in_features, got {group_size} and {in_features}.")
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        columns = in_features // 2 if bits == 4 else in_features
        scales = (out_features,) if group_size is None else (out_features, in_features // group_size)
        self.weight = new_parameter(torch.zeros(out_features, columns, dtype=torch.int8, device=device))
        self.weight_scale = new_parameter(torch.zeros(scales, dtype=dtype, device=device))
        self.bias = new_parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def empty(cls, linear: nn.Linear, config: "ChatGLMQuantizationConfig", bits: int) -> "QuantizedLinear":
        """Returns the layer to take the place of another, without data."""
        group_size = config.group_size if bits == config.bits else None
        has_bias, dtype = linear.bias is not None, linear.weight.dtype
        features = (linear.in_features, linear.out_features)
        return cls(*features, bits, has_bias, dtype, "meta", group_size)

    def quantize(self, weight: torch.Tensor, scale_search: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_weight(weight, self.bits, self.group_size, scale_search)

    def dequantize(self) -> nn.Linear:
        new = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        new.weight = nn.Parameter(dequantize_weight(self.weight, self.weight_scale, self.bits))
        new.bias = None if self.bias is None else nn.Parameter(self.bias.detach())
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            output = QuantizedMatmul.apply(x, self.weight, self.weight_scale, self.bits)
        else:
            output = quantized_linear(x, self.weight, self.weight_scale, self.bits)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        group_size = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"{super().extra_repr()}, bits={self.bits}{group_size}"


class QuantizedEmbedding(nn.Embedding):
    """
    An embedding in INT8. Its state: `weight`, int8 `[num_embeddings, embedding_dim]`; `weight_scale`,
    `[num_embeddings]`, in the dtype of the output.
    """

    bits, group_size = 8, None

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype=None, device=None):
        weight = torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        super().__init__(num_embeddings, embedding_dim, _weight=weight, _freeze=True)
        self.weight_scale = new_parameter(torch.zeros(num_embeddings, dtype=dtype, device=device))

    @classmethod
    def empty(cls, embedding: nn.Embedding, config, bits: int) -> "QuantizedEmbedding":
        return cls(embedding.num_embeddings, embedding.embedding_dim, embedding.weight.dtype, "meta")

    def quantize(self, weight: torch.Tensor, scale_search: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_weight(weight, self.bits, scale_search=scale_search)

    def dequantize(self) -> nn.Embedding:
        weight = dequantize_weight(self.weight, self.weight_scale, self.bits)
        return nn.Embedding(self.num_embeddings, self.embedding_dim, _weight=weight, _freeze=False)

    def forward(self, ids: torch.LongTensor) -> torch.Tensor:
        return self.weight[ids].to(self.weight_scale.dtype) * self.weight_scale[ids][..., None]


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, (QuantizedLinear, QuantizedEmbedding))


def refuse_to_merge(*args, **kwargs):
    raise ValueError(
        "An adapter cannot be merged into quantized weights. Call dequantize() on the model first (a PeftModel has the method "
        "too), then merge; after that the model can be quantized again."
    )


def guard_merging(module: nn.Module, name: str, submodule: nn.Module):
    """
    Makes PEFT's layers refuse to merge into a quantized layer, until it is dequantized.

    PEFT adds to `base_layer.weight`, whatever its format is. With INT8 this rounded the adapter away, without an error. PEFT
    does not ask the layer first, so this hook notices when the layer is wrapped.
    """
    if name == "base_layer":
        if is_quantized(submodule):
            module.merge = refuse_to_merge
        elif vars(module).get("merge") is refuse_to_merge:
            del module.merge  # its class has the real one


register_module_module_registration_hook(guard_merging)


def empty_layers(model: nn.Module, config: "ChatGLMQuantizationConfig") -> dict[str, nn.Module]:
    """
    Returns quantized layers without data, which replace the layers of the same name.

    Raises:
        ValueError: if a layer cannot be quantized so.
    """
    if config.quantize_embeddings and model.config.tie_word_embeddings:
        raise ValueError(
            "quantize_embeddings needs an output layer of its own: this model shares it (tie_word_embeddings)."
        )
    layers = {}
    for name, module in model.named_modules():
        last_name = name.rsplit(".", 1)[-1]
        if last_name in QUANTIZED_LINEARS and ".layers." in f".{name}":
            bits = config.bits
        elif last_name in QUANTIZED_EMBEDDINGS and config.quantize_embeddings:
            bits = 8
        else:
            continue
        if any(f".{skipped}." in f".{name}." for skipped in config.modules_to_not_convert or ()):
            continue
        # By name too: layers of adapters and of other quantizations are subclasses, and there are several copies of ours.
        if not isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ not in ("Linear", "Embedding"):
            raise ValueError(
                f"{name} is a {type(module).__name__}: the model has adapters or is quantized already. Merge them, or start "
                "from the model as it was."
            )
        kind = QuantizedEmbedding if isinstance(module, nn.Embedding) else QuantizedLinear
        try:
            layers[name] = kind.empty(module, config, bits)
        except ValueError as error:
            raise ValueError(f"{name} cannot be quantized: {error}") from None
    return layers


# How the library loads them


class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """
    Options of quantization, for `from_pretrained(..., quantization_config=...)` and `model.quantize(bits, ...)`.

    Args:
        bits (`int`): 4 or 8.
        modules_to_not_convert (`list[str]`, *optional*): Layers that are not quantized, by name or by whole parts of a
            name: `layers.1` does not match `layers.10`.
        group_size (`int`, *optional*): Number of columns that share a scale: 32, 64 or 128. By default one scale is
            used for a whole row, as published. Groups give better quality, but only this package can read them.
        quantize_embeddings (`bool`): Whether to store embedding and output layer in INT8. They are a fifth of an INT4
            model.
        scale_search (`bool`): Whether to search for the scales with the least squared error. Takes longer than the
            published rule and gives better answers, in the same format.

    Raises:
        ValueError: if `bits` or `group_size` is another number.
    """

    def __init__(
        self,
        bits: int = 4,
        modules_to_not_convert: list[str] | None = None,
        group_size: int | None = None,
        quantize_embeddings: bool = False,
        scale_search: bool = False,
        quant_method: str = QUANT_METHOD,
        **kwargs,
    ):
        if kwargs.pop("exact_activations", False):  # checkpoints of earlier versions have the key
            logger.warning("exact_activations has no effect any more: CPUs quantize activations, except in training.")
        if kwargs:
            raise TypeError(f"Unknown options for quantization: {', '.join(kwargs)}.")
        if type(bits) is not int or bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits!r}.")
        check_group_size(group_size)
        if isinstance(modules_to_not_convert, str):
            raise ValueError(f"modules_to_not_convert must be a list of names, got {modules_to_not_convert!r}.")
        self.quant_method = QUANT_METHOD
        self.bits = bits
        self.modules_to_not_convert = modules_to_not_convert
        self.group_size = group_size
        self.quantize_embeddings = quantize_embeddings
        self.scale_search = scale_search


class QuantizeWhileLoading(ConversionOps):
    """Turns the weight of one layer into the quantized weight and its scales, as soon as it has been read."""

    def __init__(self, quantizer: "ChatGLMQuantizer"):
        self.quantizer = quantizer

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        layer = model.get_submodule(full_layer_name.rpartition(".")[0])
        weight, scale = layer.quantize(value, self.quantizer.quantization_config.scale_search)
        return {full_layer_name: weight, f"{full_layer_name}_scale": scale}


class ChatGLMQuantizer(HfQuantizer):
    """What the library calls while it loads a quantized model, or quantizes one."""

    requires_calibration = False
    is_trainable = True  # with adapters
    is_qat_trainable = False  # without, which the Trainer refuses but where there is a P-Tuning prefix
    is_compileable = True
    serialized_names = {"weight": ["weight", "weight_scale"]}
    state_dict_to_save = None  # what the model's save_pretrained was given

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    def validate_environment(self, device_map=None, **kwargs):
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            # The library would offload the file's weights, as they were before they were quantized.
            raise ValueError(
                "Weights cannot be quantized while they are offloaded to disk. Quantize and save the model first "
                "(save_pretrained), then load that with this device_map."
            )

    def get_state_dict_and_metadata(self, model):
        """Returns what `save_pretrained` saves: the library takes it from here, not from its argument `state_dict`."""
        state_dict, self.state_dict_to_save = self.state_dict_to_save, None
        return state_dict, {}

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        layers = empty_layers(model, self.quantization_config)
        if layers and self.pre_quantized and checkpoint_files:
            check_has_scales(checkpoint_files)
        for name, layer in layers.items():
            if not self.pre_quantized:
                layer.weight = model.get_submodule(name).weight  # by whose dtype releases before 5.23 read the file's
            model.set_submodule(name, layer)
        return model

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        module_name, _, tensor_name = param_name.rpartition(".")
        return tensor_name == "weight" and not self.pre_quantized and is_quantized(model.get_submodule(module_name))

    def get_quantize_ops(self) -> QuantizeWhileLoading:
        return QuantizeWhileLoading(self)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in model.named_modules():
            if is_quantized(module):
                check_state(name, module)
                module.requires_grad_(False)
        model.config.quantization_bit = self.quantization_config.bits
        self.is_qat_trainable = model.config.pre_seq_len is not None
        return model

    def dequantize(self, model, dtype=None):
        """The library's method. Without a dtype the model keeps the one that it has, rather than its checkpoint's."""
        model = super().dequantize(model)
        return model if dtype is None else model.to(dtype)

    def _dequantize(self, model, dtype=None):
        for name, module in list(model.named_modules()):
            if is_quantized(module):
                model.set_submodule(name, module.dequantize())
        model.config.quantization_bit = 0
        return model


def init_quantized(layer: nn.Module):
    """Marks what the checkpoint lacks, for `check_state` to find; called by the library, after loading."""
    init.constant_(layer.weight_scale, float("nan"))
    if not getattr(layer.weight, "_is_hf_initialized", False):
        layer.weight_scale.data.fill_(float("nan"))
    if getattr(layer, "bias", None) is not None:
        init.zeros_(layer.bias)


def check_has_scales(files: list[str]):
    """Raises `ValueError` if files of weights hold no scales: they are not quantized, though the configuration says so."""
    if not any(name.endswith(".weight_scale") for file in files for name in load_state_dict(file, map_location="meta")):
        raise ValueError(
            f"The weights in {files[0]} are not quantized, though quantization_bit or quantization_config in the configuration "
            "says so. To quantize them while they are loaded, leave quantization_bit out and pass "
            "quantization_config={'quant_method': 'chatglm', 'bits': 4} to from_pretrained."
        )


def check_state(name: str, layer: nn.Module):
    """Raises `ValueError` if what was loaded into a layer cannot be right."""
    weight, scale = layer.weight, layer.weight_scale
    if weight.device.type == "meta":  # offloaded
        return
    columns = layer.in_features if isinstance(layer, QuantizedLinear) else layer.embedding_dim
    if 8 * weight.shape[1] != columns * layer.bits:  # 5.9 lets it pass
        raise ValueError(
            f"{name}.weight has a size mismatch: {weight.shape[1]} columns for {columns} of {layer.bits} bits. Was it packed by "
            "other software? Download the weights again."
        )
    # A scale is zero where all of its weights are.
    if not torch.isfinite(scale).all() or weight.view(*scale.shape, -1)[scale == 0].any():
        raise ValueError(
            f"{name}.weight or {name}.weight_scale is missing from the checkpoint, or the scale is zero, NaN or infinite. "
            "Download the weights again."
        )


# Assigned rather than registered: each folder that code is loaded from has its own copy of this module.
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = ChatGLMQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = ChatGLMQuantizationConfig
