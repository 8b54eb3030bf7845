"""Divide a global batch among workers, and a worker's share into micro-batches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How the images of an optimizer step are distributed.

    What a step computes does not depend on it: every sample of the global batch is used once, losses are normalized
    over the global batch, and random draws are keyed by the samples' positions. Statistics of batch norm are the
    exception: micro-batches have their own.

    Args:
        global_batch: images of one optimizer step.
        world_size: number of workers. Shares differ by at most one image; with more workers than images, some have
            none.
        micro_batch: most images that a worker processes at once; None: its complete share.
    """

    global_batch: int
    world_size: int = 1
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        assert self.global_batch >= 1, self
        assert self.world_size >= 1, self
        assert self.micro_batch is None or self.micro_batch >= 1, self

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of every worker in a step; gradients are accumulated over them."""
        largest_share = -(-self.global_batch // self.world_size)
        return 1 if self.micro_batch is None else -(-largest_share // self.micro_batch)

    def micro_batches(self, rank: int) -> list[range]:
        """Return, for each micro-batch of a worker, its samples' places in the global batch; some may be empty."""
        assert 0 <= rank < self.world_size, (rank, self)
        first, last = (r * self.global_batch // self.world_size for r in (rank, rank + 1))
        share, count = last - first, self.num_micro_batches
        bounds = [first + number * share // count for number in range(count + 1)]
        return [range(start, end) for start, end in itertools.pairwise(bounds)]
