"""Describe the processes that train together: a rank, a world size, a device, and the collectives between them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def make_deterministic() -> None:
    """Let all GPU kernels of this process compute the same bits again (`cluster.deterministic`).

    torch then raises an error at an operation that has no such kernel. To be called before the GPU is used.
    """
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # otherwise sums depend on what else is running
    torch.use_deterministic_algorithms(True)
    # It costs time, and nothing reads such memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


@dataclass(frozen=True)
class World:
    """One process of `size`. With size 1, no process group is needed and nothing is communicated.

    All collectives raise RuntimeError if another process died.
    """

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0  # among the processes on this machine

    @classmethod
    def single_process(cls, device: torch.device | None = None) -> World:
        """Return a world of one process."""
        return cls(0, 1, device or torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True in the process that writes and logs for all (rank 0)."""
        return self.rank == 0

    def all_reduce_async(self, value: Tensor) -> Pending:
        """Start to sum `value` over all processes, in place; `wait()` returns the sum."""
        handle = dist.all_reduce(value, async_op=True) if self.size > 1 else None
        return Pending(value, handle)

    def all_gather_async(self, value: Tensor) -> Pending:
        """Start to gather `value`, [k], of all processes; `wait()` returns [size, k]."""
        if self.size == 1:
            return Pending(value[None], None)
        gathered = value.new_empty(self.size, *value.shape)
        # Not the variant that takes one tensor, whose name changes with torch 2.13
        return Pending(gathered, dist.all_gather(list(gathered.unbind(0)), value, async_op=True))

    def all_gather(self, value: Any) -> list[Any]:
        """Return the (picklable) values of all processes, in rank order, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather(self, value: Any) -> list[Any] | None:
        """Return the (picklable) values of all processes, in rank order, on rank 0; None on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values


@dataclass(frozen=True)
class Pending:
    """The result of a collective that may not be complete yet."""

    value: Tensor
    handle: dist.Work | None  # None: complete

    def wait(self) -> Tensor:
        """Wait for the other processes; return the result."""
        if self.handle is not None:
            self.handle.wait()
        return self.value
