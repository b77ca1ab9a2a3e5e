"""P-Tuning v2: trainable keys and values that every token sees. They live in attention alone, not in the KV cache."""

import torch
from torch import nn
from transformers.cache_utils import Cache

from .compat_chatglm import CONTINUOUS_BATCHING_TAKES_A_PREFIX
from .configuration_chatglm import ChatGLMConfig


class PrefixEncoder(nn.Module):
    """
    Trainable keys and values that precede the text in every layer (P-Tuning v2: Liu et al. 2021, arXiv 2110.07602).

    Input: prefix indices, `[batch, pre_seq_len]`. Output: `[batch, pre_seq_len, num_layers * 2 * kv_heads * head_dim]`.
    """

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.config = config
        self.prefix_projection = config.prefix_projection
        self.kept: tuple[list, torch.Tensor] | None = None
        kv_size = config.num_layers * 2 * config.num_key_value_heads * config.kv_channels
        # As published, the embedding is as wide as the output even if an MLP follows.
        self.embedding = nn.Embedding(config.pre_seq_len, kv_size)
        if self.prefix_projection:
            self.trans = nn.Sequential(
                nn.Linear(kv_size, config.hidden_size), nn.Tanh(), nn.Linear(config.hidden_size, kv_size)
            )

    def forward(self, prefix: torch.LongTensor) -> torch.Tensor:
        states = self.embedding(prefix)
        return self.trans(states) if self.prefix_projection else states

    def states(self, device) -> torch.Tensor:
        """
        Returns the output for the whole prefix. The output of the MLP, which takes as long as a decoding step, is kept
        until its weights change, unless gradients are needed.
        """
        prefix = torch.arange(self.config.pre_seq_len, device=device)[None]
        is_kept = self.prefix_projection and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not is_kept or any(parameter.is_inference() for parameter in self.parameters()):
            return self(prefix)
        versions = [(parameter.data_ptr(), parameter._version) for parameter in self.parameters()]
        if self.kept is None or self.kept[0] != versions:
            self.kept = versions, self(prefix)
        return self.kept[1]

    def keys_and_values(
        self, batch_size: int, device, dtype, dropout: nn.Module
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns (key, value) for each layer, `[batch, kv_heads, pre_seq_len, head_dim]`."""
        config = self.config
        states = self.states(device).type(dtype)
        states = states.view(
            1, config.pre_seq_len, 2 * config.num_layers, config.num_key_value_heads, config.kv_channels
        )
        states = dropout(states.expand(batch_size, -1, -1, -1, -1)).permute(2, 0, 3, 1, 4)
        return list(zip(states[0::2], states[1::2]))


def uncover_prefix(
    attention_mask, cache: Cache | None, inputs_embeds: torch.Tensor, is_causal: bool | None, config: ChatGLMConfig
):
    """
    Returns the mask of the attention function with `pre_seq_len` more columns on the left, visible to every token.

    Args:
        attention_mask: As the library makes it for the attention implementation: none, or two- or four-dimensional.
        inputs_embeds: `[batch, seq, hidden]`.
        is_causal: False if every token sees every other.

    Raises:
        ValueError: If the attention implementation has a mask of another kind.
    """
    implementation = config._attn_implementation
    is_flash = "flash" in implementation
    is_paged = cache is not None and not isinstance(cache, Cache)
    if is_paged and (is_flash or not CONTINUOUS_BATCHING_TAKES_A_PREFIX):
        raise ValueError(
            "Continuous batching with a P-Tuning prefix (pre_seq_len) needs Transformers 5.24 or newer, and "
            "attn_implementation='sdpa' or 'eager'. Use generate instead."
        )
    q_len, device = inputs_embeds.shape[1], inputs_embeds.device
    if attention_mask is None:
        if q_len == 1 or is_flash or is_causal is False:  # flash attention aligns queries with the last keys
            return None
        seen, kv_len = 0, q_len
        if cache is not None:
            seen, kv_len = cache.get_seq_length(), cache.get_mask_sizes(q_len, 0)[0]
        last_visible = torch.arange(q_len, device=device)[:, None] + seen
        attention_mask = (torch.arange(kv_len, device=device) <= last_visible)[None, None]
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(
            f"attn_implementation={implementation!r} does not work with a P-Tuning prefix (pre_seq_len): use 'sdpa', "
            "'eager' or flash attention."
        )
    # 1 or true, or 0 added to the scores
    visible = 0 if attention_mask.dim() == 4 and attention_mask.is_floating_point() else 1
    return nn.functional.pad(attention_mask, (config.pre_seq_len, 0), value=visible)
