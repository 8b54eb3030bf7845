"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """A copy of a model whose floating tensors trail the original's.

    The decay ramps up, min(decay, (1 + n) / (10 + n)) after n updates, so that the random
    initial weights are forgotten early in a short run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards `model`'s current weights and buffers."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        ours, theirs = _tensors(self.model), _tensors(model)
        floating = [i for i, tensor in enumerate(ours) if tensor.is_floating_point()]
        torch._foreach_lerp_([ours[i] for i in floating], [theirs[i] for i in floating], 1 - decay)
        for i in set(range(len(ours))) - set(floating):  # counters, e.g. of batch norm
            ours[i].copy_(theirs[i])
        self.num_updates += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
