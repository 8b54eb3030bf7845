"""Synchronize batch norm: its statistics are those of the images of all workers.

torch's own SyncBatchNorm is for GPUs only; `SyncBatchNorm2d` does the same on CPUs.
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
        out: Tensor
        out, mean, var, count = _Normalize.apply(input, self.weight, self.bias, self.eps, self.group)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * count / (count - 1), momentum)
        return out


class _Normalize(torch.autograd.Function):
    """Normalize by the statistics of all workers: one collective forward, and one backward.

    Gloo takes a millisecond or two for the smallest message, which for a small model is more than the layer.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = input if input.dtype == torch.float64 else input.float()
        size = x.numel() // x.shape[1]
        if size == 0:
            own_var = own_mean = x.new_zeros(x.shape[1])
        else:
            own_var, own_mean = torch.var_mean(x, (0, 2, 3), correction=0)
        own = torch.cat((own_mean, own_var, x.new_full((1,), size)))
        gathered = own.new_empty(dist.get_world_size(group), len(own))
        # Not the variant that takes one tensor, whose name changes with torch 2.13
        dist.all_gather(list(gathered.unbind(0)), own, group=group)
        means, variances, counts = torch.split(gathered, [x.shape[1], x.shape[1], 1], 1)
        count = counts.sum()
        # Chan, Golub and LeVeque 1979: the variance of a union, without the difference of large sums of squares
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        ctx.save_for_backward(input, weight, mean, (var + eps).rsqrt(), count)
        ctx.group = group
        out = nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps).to(input.dtype)
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, inverse, count = ctx.saved_tensors
        gradient = grad_out.to(mean.dtype)
        normalized = (input - mean[:, None, None]) * inverse[:, None, None]
        # Of this worker: those of weight and bias are averaged with all others
        own = torch.stack(((gradient * normalized).sum((0, 2, 3)), gradient.sum((0, 2, 3))))
        total = own.clone()
        dist.all_reduce(total, group=ctx.group)
        of_weight, of_bias = (total / count)[:, :, None, None]
        grad_input = (weight * inverse)[:, None, None] * (gradient - of_bias - normalized * of_weight)
        return grad_input.to(input.dtype), own[0], own[1], None, None
