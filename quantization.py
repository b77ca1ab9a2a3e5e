"""INT8 and INT4 weights: the published number formats, the linear layer, and how the library loads them.

Each row of a weight has one scale, so that weight = scale * q with q in -127..127 (INT8) or -7..7 (INT4). INT4 packs
two neighbouring columns into a byte, the even one in the high half.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin


logger = logging.get_logger(__name__)

QUANT_METHOD = "chatglm"
# What is quantized in each layer. Embedding, output layer, norms, biases and the P-Tuning prefix are not.
QUANTIZED_LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def quantize_weight(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Quantizes a matrix row by row, rounding to nearest, with the largest magnitude of a row at the end of the range.

    Equal to the published code bit for bit, except that this divides bfloat16 in float32 and clamps: there, bfloat16
    rounds the largest value of a row to 128, which wraps to -128.

    Args:
        weight: `[out, in]`, floating point; `in` is even if `bits` is 4.
        bits: 8 or 4.

    Returns:
        int8 `[out, in]`, or packed `[out, in / 2]`; and the scales, `[out]`, in the dtype of `weight`.

    Raises:
        ValueError: if the weight is not finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("The weight holds NaN or infinity, and cannot be quantized. Is the checkpoint damaged?")
    limit = 2 ** (bits - 1) - 1
    scale = (weight.float().abs().amax(dim=1) / limit).to(weight.dtype)
    divisor = torch.where(scale == 0, 1, scale)  # a row of zeros
    if weight.dtype == torch.bfloat16:
        weight, divisor = weight.float(), divisor.float()
    quantized = (weight / divisor[:, None]).round().clamp(-limit, limit).to(torch.int8)
    return (pack_int4(quantized) if bits == 4 else quantized), scale


def pack_int4(quantized: torch.Tensor) -> torch.Tensor:
    """Packs int8 `[out, in]` with values in -8..7 into `[out, in / 2]`."""
    return (quantized[:, 0::2] << 4) | (quantized[:, 1::2] & 15)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int4`. Shifts of int8 are arithmetic: they keep the sign."""
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(-2)


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the matrix `[out, in]` in the dtype of `scale`."""
    return (unpack_int4(weight) if bits == 4 else weight).to(scale.dtype) * scale[:, None]


class QuantizedMatmul(torch.autograd.Function):
    """`x @ weight.T` for a quantized weight, which is dequantized again for the gradient rather than kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.bits = bits
        return nn.functional.linear(x, dequantize_weight(weight, scale, bits).to(x.dtype))

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        weight, scale = ctx.saved_tensors
        return grad_output @ dequantize_weight(weight, scale, ctx.bits).to(grad_output.dtype), None, None, None


class QuantizedLinear(nn.Linear):
    """
    A linear layer with a quantized, frozen weight. It is an `nn.Linear`, so that PEFT finds it.

    Its state: `weight`, int8 `[out, in]` or packed `[out, in / 2]`; `weight_scale`, `[out]`; `bias`, `[out]`.
    """

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool, dtype=None, device=None):
        if bits == 4 and in_features % 2:
            raise ValueError(f"INT4 packs pairs of columns: in_features must be even, got {in_features}.")
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        columns = in_features // 2 if bits == 4 else in_features
        weight = torch.zeros(out_features, columns, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        scale = torch.zeros(out_features, dtype=dtype, device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        self.bias = bias

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int) -> "QuantizedLinear":
        """Quantizes a layer, on the device and in the dtype that it has."""
        new = cls(linear.in_features, linear.out_features, bits, False, device="meta")
        weight, scale = quantize_weight(linear.weight.detach(), bits)
        new.weight = nn.Parameter(weight, requires_grad=False)
        new.weight_scale = nn.Parameter(scale, requires_grad=False)
        new.bias = linear.bias
        return new

    def to_linear(self) -> nn.Linear:
        """Returns the dequantized layer."""
        new = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        new.weight = nn.Parameter(dequantize_weight(self.weight, self.weight_scale, self.bits))
        new.bias = self.bias
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = QuantizedMatmul.apply(x, self.weight, self.weight_scale, self.bits)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


def replace_linears(model: nn.Module, make, skip: list[str] | None = None):
    """Replaces each layer that is quantized in the published format by `make(layer)`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in QUANTIZED_LINEARS and ".layers." in f".{name}":
            if not any(skipped in name for skipped in skip or ()):
                model.set_submodule(name, make(module))


class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """
    How to quantize, for `from_pretrained(..., quantization_config=...)`.

    Args:
        bits (`int`): 4 or 8.
        modules_to_not_convert (`list[str]`, *optional*): Parts of names of layers to leave as they are.

    Raises:
        ValueError: if `bits` is neither 4 nor 8.
    """

    def __init__(self, bits: int = 4, modules_to_not_convert: list[str] | None = None, **kwargs):
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits!r}.")
        self.quant_method = QUANT_METHOD
        self.bits = bits
        self.modules_to_not_convert = modules_to_not_convert


class QuantizeWhileLoading(ConversionOps):
    """Turns the weight of one layer into the quantized weight and its scales, as soon as it has been read."""

    def __init__(self, quantizer: "ChatGLMQuantizer"):
        self.quantizer = quantizer

    def convert(self, input_dict, full_layer_name=None, missing_keys=None, **kwargs):
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        weight, scale = quantize_weight(value, self.quantizer.quantization_config.bits)
        scale_name = f"{full_layer_name}_scale"
        if missing_keys is not None:
            missing_keys.discard(scale_name)
        return {full_layer_name: weight, scale_name: scale}


class ChatGLMQuantizer(HfQuantizer):
    """What the library calls while it loads a quantized model, or quantizes one."""

    requires_calibration = False
    is_trainable = True  # with adapters
    is_compileable = True
    serialized_names = {"weight": ["weight", "weight_scale"]}

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        bits, skip = self.quantization_config.bits, self.quantization_config.modules_to_not_convert

        def make(linear):
            layer = QuantizedLinear(
                linear.in_features, linear.out_features, bits, linear.bias is not None, linear.weight.dtype, "meta"
            )
            if not self.pre_quantized:
                layer.weight = linear.weight  # by whose dtype the library (5.9) reads the checkpoint's
            return layer

        replace_linears(model, make, skip)
        return model

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        module_name, _, tensor_name = param_name.rpartition(".")
        is_quantized = isinstance(model.get_submodule(module_name), QuantizedLinear)
        return is_quantized and tensor_name == "weight" and not self.pre_quantized

    def get_quantize_ops(self) -> QuantizeWhileLoading:
        return QuantizeWhileLoading(self)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                check_scales(name, module)
                module.requires_grad_(False)
        model.config.quantization_bit = self.quantization_config.bits
        return model

    def _dequantize(self, model, dtype=None):
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                model.set_submodule(name, module.to_linear())
        model.config.quantization_bit = 0
        return model


def init_scales(layer: QuantizedLinear):
    """Marks scales that the checkpoint lacks, for `check_scales` to find; called by the library, after loading."""
    init.constant_(layer.weight_scale, float("nan"))


def check_scales(name: str, layer: QuantizedLinear):
    """Raises `ValueError` if the scales of a layer were not loaded, or cannot be right."""
    scale = layer.weight_scale
    if scale.device.type != "meta" and not (torch.isfinite(scale).all() and (scale != 0).any()):
        raise ValueError(
            f"{name}.weight_scale is missing from the checkpoint, zero, NaN or infinite. Download the weights again."
        )


def quantize(model: nn.Module, bits: int) -> nn.Module:
    """
    Quantizes a loaded model in place.

    Raises:
        ValueError: if `bits` is neither 4 nor 8.
    """
    config = ChatGLMQuantizationConfig(bits=bits)
    replace_linears(model, lambda linear: QuantizedLinear.from_linear(linear, bits))
    quantizer = ChatGLMQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = config
    model.config.quantization_bit = bits
    return model


# Assigned rather than registered: each folder that code is loaded from has its own copy of this module.
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = ChatGLMQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = ChatGLMQuantizationConfig
