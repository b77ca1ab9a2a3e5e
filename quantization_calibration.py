"""How a loaded model is quantized: rounded layer by layer, or calibrated with sample text (GPTQ)."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers.utils import logging

from .quantization import (
    QUANT_METHOD,
    ChatGLMQuantizationConfig,
    ChatGLMQuantizer,
    check_finite,
    empty_layers,
    is_quantized,
    largest_quantized,
    new_parameter,
    searched_scale,
)
from .quantization_kernels import pack_int4


def quantize(
    model: nn.Module, bits: int, calibration: Iterable[torch.LongTensor] | None = None, **options
) -> nn.Module:
    """
    Quantizes a loaded model in place.

    Args:
        calibration: Ids of sample text, each `[batch, seq]`, to reduce the error of the layers' outputs; see
            `quantize_calibrated`.
        options: Those of `ChatGLMQuantizationConfig`.

    Raises:
        ValueError: if an option is wrong or a weight is not finite. The model is then as it was.
    """
    config = ChatGLMQuantizationConfig(bits=bits, **options)
    layers = empty_layers(model, config)
    for name in layers:
        check_finite(f"{name}.weight", model.get_submodule(name).weight)
    if calibration is not None:
        originals = {name: model.get_submodule(name) for name in layers}
        was_training = model.training
        try:
            quantize_calibrated(model.eval(), layers, calibration)
        except BaseException:
            for name, original in originals.items():
                model.set_submodule(name, original)
            raise
        finally:
            model.train(was_training)
    for name, layer in layers.items():
        if not is_quantized(old := model.get_submodule(name)):
            replace_layer(model, name, layer, *layer.quantize(old.weight.detach(), config.scale_search))
    model.hf_quantizer = ChatGLMQuantizer(config)
    model.hf_quantizer.is_qat_trainable = model.config.pre_seq_len is not None
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = config
    model.config.quantization_bit = bits
    return model


def replace_layer(model: nn.Module, name: str, layer: nn.Module, weight: torch.Tensor, scale: torch.Tensor):
    layer.weight, layer.weight_scale = new_parameter(weight), new_parameter(scale)
    if getattr(model.get_submodule(name), "bias", None) is not None:
        layer.bias = new_parameter(model.get_submodule(name).bias.detach())
    model.set_submodule(name, layer)


class Captured(Exception):
    """Ends a forward pass once the wanted inputs are known."""


@torch.no_grad()
def layer_inputs(module: nn.Module, layer: nn.Module, calls: list[tuple]) -> Iterator[tuple[tuple, dict]]:
    """Calls `module` with each (args, kwargs) of `calls`, and yields the (args, kwargs) that its `layer` is called with."""
    seen = []

    def capture(layer, args, kwargs):
        seen.append((args, kwargs))
        raise Captured

    handle = layer.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        for args, kwargs in calls:
            try:
                module(*args, **kwargs)
            except Captured:
                yield seen.pop()
    finally:
        handle.remove()


@torch.no_grad()
def quantize_calibrated(model: nn.Module, layers: dict[str, nn.Module], calibration: Iterable[torch.LongTensor]):
    """
    Quantizes the linear layers in order. The inputs of a layer are computed by the layers before it, which are quantized
    already; its outputs are kept close to those of the original model (GPTQ, as below, with the objective of GPTAQ: Li
    et al. 2025, arXiv 2504.02692).

    Args:
        layers: Layers without data, which replace those of the same name.
        calibration: Ids, each `[batch, seq]`. About 16,000 tokens of typical text are enough.

    Raises:
        ValueError: if there are no ids, or the model has a P-Tuning prefix.
    """
    calls = [((ids.to(model.device),), {"use_cache": False}) for ids in calibration]
    if not calls or any(args[0].ndim != 2 or args[0].numel() == 0 for args, _ in calls):
        raise ValueError("calibration must be one or more tensors of ids, [batch, seq].")
    if model.config.pre_seq_len is not None:
        raise ValueError(
            "Calibrate the model without its P-Tuning prefix (pre_seq_len): the prefix loads on top of it."
        )
    base = model.base_model
    calls = list(layer_inputs(base, base.encoder.layers[0], calls))
    original_calls = calls
    for block in logging.tqdm(base.encoder.layers, desc="Quantizing layers"):
        prefix = next(name for name, module in model.named_modules() if module is block)
        names = [name for name in layers if name.startswith(f"{prefix}.")]
        original_inputs = {}
        for name in names:
            inputs = layer_inputs(block, model.get_submodule(name), original_calls)
            original_inputs[name] = [args[0].flatten(0, -2) for args, _ in inputs]
        original_calls = [((block(*args, **kwargs),), kwargs) for args, kwargs in original_calls]
        for name in names:
            linear = model.get_submodule(name)
            hessian = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
            shift = torch.zeros_like(hessian)  # sum of (original x - x) x^T
            for original, (args, _) in zip(original_inputs.pop(name), layer_inputs(block, linear, calls)):
                x = args[0].flatten(0, -2).float()
                hessian.addmm_(x.T, x)
                shift.addmm_((original.float() - x).T, x)
            if not torch.isfinite(hessian).all():
                raise ValueError(f"The inputs of {name} are NaN, infinite or too large: it cannot be calibrated.")
            # The paper's damping; and columns that no input uses
            hessian.diagonal().add_(0.01 * hessian.diagonal().mean() + 1e-6)
            weight = linear.weight.float()
            weight = weight + torch.linalg.solve(hessian, shift.T @ weight.T).T
            layer = layers[name]
            quantized = quantize_compensated(weight.to(linear.weight.dtype), hessian, layer.bits, layer.group_size)
            replace_layer(model, name, layer, *quantized)
        calls = [((block(*args, **kwargs),), kwargs) for args, kwargs in calls]


def quantize_compensated(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Quantizes a matrix column by column. Each rounding error is compensated by the columns of the row that are still to be
    rounded, so that the output changes as little as possible for the calibration inputs (GPTQ: Frantar et al. 2022, arXiv
    2210.17323; the columns with the largest inputs come first).

    Args:
        weight: `[out, in]`.
        hessian: Sum of x x^T over the inputs of the layer, damped, float32 `[in, in]`.

    Returns:
        As `quantize_weight`.
    """
    columns, limit = weight.shape[1], largest_quantized(bits)
    size = group_size or columns
    importance = hessian.diagonal()
    scale = searched_scale(weight.unflatten(1, (-1, size)), bits, importance.view(-1, size))
    order = importance.argsort(descending=True)
    # Row i of this Cholesky factor says by how much the columns after i make up for an error in column i.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)

    left = weight.float()[:, order]
    quantized = torch.empty_like(left, dtype=torch.int8)
    divisor = torch.where(scale == 0, 1, scale).float().repeat_interleave(size, dim=1)[:, order]
    for start in range(0, columns, 128):  # the columns after these wait for all their errors
        block = slice(start, min(start + 128, columns))
        errors = torch.empty_like(left[:, block])
        for i in range(block.start, block.stop):
            q = (left[:, i] / divisor[:, i]).round().clamp(-limit, limit)
            quantized[:, i] = q.to(torch.int8)
            error = (left[:, i] - q * divisor[:, i]) / factor[i, i]
            left[:, i : block.stop] -= error[:, None] * factor[i, i : block.stop]
            errors[:, i - start] = error
        left[:, block.stop :] -= errors @ factor[block, block.stop :]
    quantized = quantized[:, order.argsort()]
    return (pack_int4(quantized) if bits == 4 else quantized), scale if group_size else scale.squeeze(1)
