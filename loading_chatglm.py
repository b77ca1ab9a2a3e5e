"""How models are loaded, saved, cast and quantized, where that differs from the library."""

import re

from torch import nn
from transformers.utils import logging

from .linear_chatglm import choose_linear
from .quantization import QUANT_METHOD
from .quantization_calibration import quantize


logger = logging.get_logger(__name__)


class ChatGLMLoadingMixin:
    """Mixed into all ChatGLM2 models, before the library's `PreTrainedModel`."""

    @classmethod
    def from_pretrained(cls, *args, device=None, empty_init=True, **kwargs):
        """
        The library's method, with two arguments of the published code: `device`, where to put the model, and
        `empty_init`, which has no effect, as weights are never initialized before they are loaded.
        """
        if device is not None:
            kwargs.setdefault("device_map", {"": device})
        kwargs["key_mapping"] = {r"^classifier_head\.": "score.", **(kwargs.get("key_mapping") or {})}
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        model.base_model.freeze_all_but_prefix()  # the library makes what it loads trainable
        choose_linear(model)
        return loaded

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantized in the published format."""
        return getattr(self, "quantization_method", None) == QUANT_METHOD

    def quantize(self, bits: int, empty_init: bool = False, device=None, calibration=None, **options):
        """
        Quantizes the linear layers in place, in the published format, and returns the model.

        Args:
            bits (`int`): 4 or 8; 0 changes nothing.
            empty_init (`bool`): No effect. The published code has this argument.
            device: Device to move the model to afterwards.
            calibration (`Iterable[torch.LongTensor]`, *optional*): Token ids of sample text, each `[batch, seq]`; 16,000
                tokens are enough. The weights are rounded so that the model's outputs on this text change least.
            options: Other options of `ChatGLMQuantizationConfig`: `group_size`, `quantize_embeddings`, `scale_search`,
                `modules_to_not_convert`.

        Raises:
            ValueError: If an option is invalid or a weight is not finite. The model is then unchanged.
        """
        if self.quantized:
            logger.warning("Already quantized.")
        elif bits != 0:
            quantize(self, bits, calibration, **options)
        return self if device is None else self.to(device)

    def resize_token_embeddings(self, *args, **kwargs):
        """The library's method. INT8 embeddings cannot be resized."""
        if hasattr(self.get_input_embeddings(), "weight_scale"):
            raise ValueError(
                "The embeddings are in INT8 and cannot be resized: dequantize() first, or resize and then quantize."
            )
        return super().resize_token_embeddings(*args, **kwargs)

    # The library refuses to cast quantized models. Here scales and activations follow, and packed weights stay.

    def half(self):
        return nn.Module.half(self) if self.quantized else super().half()

    def float(self):
        return nn.Module.float(self) if self.quantized else super().float()

    def save_pretrained(self, save_directory, *args, state_dict: dict | None = None, **kwargs):
        """
        The library's method. Writes the names of the published checkpoints: `classifier_head`, and `inv_freq`, which
        only programs that compare checkpoints need (mergekit).
        """
        cls = type(self)
        if cls.__module__.startswith("torch."):  # made by FSDP2, whose code would be saved as the model's
            original = next(base for base in cls.__mro__ if base.__module__.endswith("modeling_chatglm"))
            cls.__module__, cls.__name__ = original.__module__, original.__name__
        if state_dict is None:
            rotary = self.base_model.rotary_pos_emb
            name = next(name for name, module in self.named_modules() if module is rotary)
            inv_freq, _ = rotary.compute_default_rope_parameters(self.config, device="cpu")
            state_dict = {**self.state_dict(), f"{name}.inv_freq": inv_freq.to(self.dtype)}
        state_dict = {re.sub(r"^score\.", "classifier_head.", name): value for name, value in state_dict.items()}
        if self.quantized:
            self.hf_quantizer.state_dict_to_save = state_dict  # the library asks it, and forgets its own argument
        return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
