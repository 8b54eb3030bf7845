"""Synchronize batch norm: its statistics are those of the images of all workers.

torch's own SyncBatchNorm is for GPUs only; `SyncBatchNorm2d` is its definition in terms of two sums, for CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raydetr.training.world import World


def synchronize_norms(model: nn.Module, world: World) -> None:
    """Replace every batch norm of a model by a synchronized one with the same tensors, if there are several workers."""
    norms = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.BatchNorm2d)
    ]
    if world.size == 1 or not norms:
        return
    # A group of its own: the sums of DistributedDataParallel's gradients are under way at the same time, in an order
    # that need not be the same on all workers
    group = dist.new_group()
    on_gpu = world.device.type == "cuda"
    for module, name, norm in norms:
        setattr(module, name, _to_gpu_norm(norm, group) if on_gpu else SyncBatchNorm2d.of(norm, group))


def _to_gpu_norm(norm: nn.BatchNorm2d, group: Any) -> nn.Module:
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm, group)  # type: ignore[no-untyped-call]
    return converted


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all workers of a group; equals BatchNorm2d on one worker with all images."""

    group: Any

    @staticmethod
    def of(norm: nn.BatchNorm2d, group: Any) -> SyncBatchNorm2d:
        """Return a synchronized norm with the parameters and buffers of `norm`."""
        assert norm.affine, norm
        assert norm.track_running_stats, norm
        synchronized = SyncBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
        synchronized.weight, synchronized.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(synchronized, name, buffer)
        synchronized.group = group
        return synchronized.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize [b, c, h, w]."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        own = input.new_full((1,), input.numel() / input.shape[1])
        sums = _Sum.apply(torch.cat((input.sum((0, 2, 3)), own)), self.group)  # type: ignore[no-untyped-call]
        count = sums[-1].detach()
        mean = sums[:-1] / count
        # In two passes: the difference of large sums of squares would lose the digits of a small variance
        centered = input - mean[:, None, None]
        var = _Sum.apply(centered.square().sum((0, 2, 3)), self.group) / count  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * count / (count - 1), momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        out: Tensor = centered * scale[:, None, None] + self.bias[:, None, None]
        return out


class _Sum(torch.autograd.Function):
    """Sum over the workers of a group; the gradient is the sum of the workers' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
