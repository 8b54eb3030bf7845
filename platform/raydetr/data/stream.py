"""From shards to batches: in the plan's order for training, once through for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from raydetr.data.batch import Batch, collate
from raydetr.data.index import Shards
from raydetr.data.plan import Plan
from raydetr.data.samples import load_sample
from raydetr.data.transforms import Transform

T = TypeVar("T")


def train_batches(
    shards: Shards,
    *,
    seed: int,
    position: int,
    rank: int,
    world_size: int,
    batch_size: int,
    transform: Transform,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """The batches of one rank, without end, from `position` on.

    Step s takes the samples position + s * world_size * batch_size and following of the plan; this rank's are
    the `rank`-th `batch_size` of them. All ranks see equally many batches, and each sample once an epoch.

    Args:
        shards: what to read.
        seed: of the order and of the augmentation.
        position: G, the number of samples that the run has consumed, over all ranks.
        rank: of this process.
        world_size: number of ranks.
        batch_size: images per rank and step.
        transform: applied with randomness keyed by (seed, position of the sample).
        num_workers: loader processes; 0 loads in this process.

    Raises:
        ShardError: a sample is damaged.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    assert batch_size >= 1, batch_size
    assert position >= 0, position
    batches = _TrainBatches(shards, transform, seed, position, rank, world_size, batch_size)
    yield from _load(batches, num_workers)


def evaluation_batches(
    shards: Shards,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    transform: Transform,
    num_workers: int = 0,
) -> Iterator[Batch | None]:
    """The batches of one rank in an evaluation: every image once, as many batches on every rank.

    Batch j holds images j * batch_size and following, for any number of ranks, and goes to rank
    j mod world_size; `None` stands for a batch that a rank does not have.

    Raises:
        ShardError: a sample is damaged.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    assert batch_size >= 1, batch_size
    yield from _load(_EvaluationBatches(shards, transform, rank, world_size, batch_size), num_workers)


def make_plan(shards: Shards, seed: int) -> Plan:
    """The order in which `train_batches` goes through the shards."""
    aspects = shards.samples["width"] / shards.samples["height"]
    return Plan(shards.samples["shard"].astype(np.int64), aspects, shards.fingerprint, seed)


@dataclass(frozen=True, eq=False)
class _TrainBatches(IterableDataset[Batch]):
    shards: Shards
    transform: Transform
    seed: int
    position: int
    rank: int
    world_size: int
    batch_size: int

    def __iter__(self) -> Iterator[Batch]:
        plan = make_plan(self.shards, self.seed)
        worker, num_workers = _this_worker()
        step = worker
        while True:
            yield self._batch(plan, self.position + step * self.world_size * self.batch_size)
            step += num_workers

    def _batch(self, plan: Plan, start: int) -> Batch:
        own = start + self.rank * self.batch_size
        indices = plan.samples(own, self.batch_size).tolist()
        return collate(
            [
                load_sample(self.shards, index, self.transform, seed=self.seed, position=own + slot)
                for slot, index in enumerate(indices)
            ],
            start,
        )


@dataclass(frozen=True, eq=False)
class _EvaluationBatches(IterableDataset[Batch | None]):
    shards: Shards
    transform: Transform
    rank: int
    world_size: int
    batch_size: int

    def __iter__(self) -> Iterator[Batch | None]:
        num_batches = -(-self.shards.num_samples // self.batch_size)
        num_rounds = -(-num_batches // self.world_size)
        worker, num_workers = _this_worker()
        for turn in range(worker, num_rounds, num_workers):
            yield self._batch((turn * self.world_size + self.rank) * self.batch_size)

    def _batch(self, start: int) -> Batch | None:
        indices = range(start, min(start + self.batch_size, self.shards.num_samples))
        if not indices:
            return None
        return collate(
            [load_sample(self.shards, index, self.transform, seed=0, position=index) for index in indices],
            start,
        )


def _this_worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _load(dataset: IterableDataset[T], num_workers: int) -> Iterable[T]:
    """Iterate a data set of whole batches, in order, in this process or in loader processes."""
    if num_workers == 0:
        return dataset
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # else starting the loader would draw from the global one
        in_order=True,
    )


def _unchanged(batch: T) -> T:
    return batch
