"""Update the weights: AdamW with its parameter groups, the learning rate schedule, the EMA."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from raydetr.config import OptimConfig

# Parameters of sampling offsets and reference points, which have a rate of their own (Deformable DETR, A.4: a tenth)
SAMPLING_NAMES = ("sampling_offsets", "queries.point.")
# With the backbone's rate; in the official code, a learned position encoding is a part of the backbone
BACKBONE_NAMES = ("backbone.", "neck.position.")


def build_optimizer(detector: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters of `detector`; each group has its `base_lr`."""
    return torch.optim.AdamW(parameter_groups(detector.named_parameters(), optim), lr=optim.lr, fused=True)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig
) -> list[dict[str, Any]]:
    """Group parameters by kind (`name`: "backbone", "sampling" or "rest") and weight decay, in order of appearance."""
    rates = {"backbone": optim.lr_backbone, "sampling": optim.lr_sampling, "rest": optim.lr}
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        kind, weight_decay = _kind(name), _weight_decay(parameter, optim)
        empty = {"name": kind, "params": [], "base_lr": rates[kind], "lr": rates[kind]}
        group = groups.setdefault((kind, weight_decay), {**empty, "weight_decay": weight_decay})
        group["params"].append(parameter)
    return list(groups.values())


def lr_factor(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Return the factor of every base learning rate at `step` (counted from 0) of `total_steps`."""
    warmup_steps = round(optim.warmup_fraction * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if optim.schedule == "cosine":
        progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine
    epoch = step * optim.epochs // total_steps
    return float(0.1 ** sum(epoch >= drop for drop in optim.lr_drop_epochs))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the rate of every group to `factor` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _kind(name: str) -> str:
    if name.startswith(BACKBONE_NAMES):
        return "backbone"
    return "sampling" if any(word in name for word in SAMPLING_NAMES) else "rest"


def _weight_decay(parameter: nn.Parameter, optim: OptimConfig) -> float:
    decays = optim.decay_norms_and_biases or parameter.ndim > 1
    return optim.weight_decay if decays else 0.0


class Ema:
    """Exponential moving average of a model's floating-point parameters and buffers.

    The decay ramps up, min(decay, (1 + n) / (10 + n)) after n updates, so that the random initial weights have little
    influence in a short run. The model's tensors must not be replaced afterwards, for example by moving the model to
    another device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0
        # Collected once: listing the tensors at each step takes longer than the arithmetic
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        self._averaged, self._current = ([pair[side] for pair in floating] for side in (0, 1))
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Include the model's current parameters and buffers in the average."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self._averaged, self._current, 1 - decay)
        for averaged, current in self._counters:  # integers, of batch norm: an average has no meaning
            averaged.copy_(current)
        self.num_updates += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
