"""
An optimizer for pretraining from random weights: Muon for the matrices of the layers (Jordan et al. 2024,
kellerjordan.github.io/posts/muon), and AdamW for all other weights.
"""

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """
    Combines both optimizers of torch, so that schedulers and checkpoints see only one. Muon's updates are scaled to the
    size of AdamW's (`match_rms_adamw`), so that both can use the same learning rate and weight decay.

    Args:
        model: Muon trains its trainable matrices, except those of the embedding and the output layer.
        adamw: Options of `torch.optim.AdamW`: betas and eps.

    Raises:
        ValueError: if this torch has no Muon.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, **adamw):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"--muon needs torch 2.9 or newer, this is {torch.__version__}. Leave it out for AdamW.")
        both_ends = (model.get_input_embeddings(), model.get_output_embeddings())
        both_ends = {id(layer.weight) for layer in both_ends if layer is not None}
        matrices, decayed, others = [], [], []
        for parameter in model.parameters():
            if parameter.requires_grad:
                is_end = id(parameter) in both_ends
                group = decayed if is_end else matrices if parameter.ndim == 2 else others
                group.append(parameter)
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.parts = [muon, torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, **adamw)]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.share()

    def share(self):
        """Shares the parameter groups, whose learning rate a scheduler sets, between the parts and the whole."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict):
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.share()
