"""Count the targets of a global batch: losses and denoising queries depend on the counts of all workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raydetr.data.batch import Batch
from raydetr.training.world import Pending, World


@dataclass(frozen=True)
class BatchCounts:
    """Counts of a global batch, on the device. Numbers that losses are divided by are means over the workers.

    Gradients are averaged over the workers, so that these means make the gradient that of one process with all images.
    """

    by_worker: Tensor  # [workers, 6]

    @property
    def num_boxes(self) -> Tensor:
        """Target boxes, at least 1 over all workers, over the number of workers."""
        return self.by_worker[:, 0].sum().clamp(min=1) / len(self.by_worker)

    @property
    def num_matched(self) -> Tensor:
        """Queries that are matched, over the number of workers."""
        return self.by_worker[:, 1].mean()

    @property
    def num_queries(self) -> Tensor:
        """Queries of all images, at least 1 over all workers, over the number of workers."""
        return self.by_worker[:, 2].sum().clamp(min=1) / len(self.by_worker)

    @property
    def num_corrupt(self) -> Tensor:
        """Corrupt samples of all workers."""
        return self.by_worker[:, 3].sum()

    @property
    def num_stopping(self) -> Tensor:
        """Workers that were asked to stop after this step."""
        return self.by_worker[:, 5].sum()

    def max_targets(self) -> int:
        """Return the number of targets of the image with the most; this waits for the device."""
        return int(self.by_worker[:, 4].max())


@dataclass(frozen=True)
class PendingCounts:
    """Counts that the other workers may not have sent yet."""

    gathered: Pending

    @staticmethod
    def start(
        micro_batches: Sequence[Batch], num_queries: int, world: World, *, is_stopping: bool = False
    ) -> PendingCounts:
        """Count this worker's targets, and start to gather the counts of all.

        Args:
            micro_batches: this worker's share of the global batch.
            num_queries: of the model, per image.
            world: the workers.
            is_stopping: this worker was asked to stop.
        """
        counts = [count for batch in micro_batches if not batch.is_blank for count in batch.counts]
        row = (
            sum(counts),
            sum(min(count, num_queries) for count in counts),
            num_queries * len(counts),
            sum(len(batch.corrupt) for batch in micro_batches),
            max(counts, default=0),
            is_stopping,
        )
        # float64, because the numbers of a large world exceed what float32 counts exactly
        return PendingCounts(
            world.all_gather_async(torch.tensor(row, dtype=torch.float64, device=world.device))
        )

    def wait(self) -> BatchCounts:
        """Wait for the other workers; return the counts."""
        return BatchCounts(self.gathered.wait())
