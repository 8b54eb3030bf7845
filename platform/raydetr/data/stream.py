"""From shards to batches: in the plan's order for training, once through for evaluation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np

from raydetr.config import OnCorrupt
from raydetr.data.batch import Batch, Sample, blank_batch, collate
from raydetr.data.corrupt import CorruptSample, apply_policy, earlier_samples
from raydetr.data.loader.loader import Out, load
from raydetr.data.order import SampleOrder
from raydetr.data.samples import make_sample
from raydetr.data.transforms.transform import Transform
from raydetr.shards.files import Prefetcher
from raydetr.shards.reader import ShardError, Shards
from raydetr.shards.validation import RawSample

READ_AHEAD = 4  # batches of a process that are being read while one is made; remote shards only


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
    on_corrupt: OnCorrupt = "raise",
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
        on_corrupt: what becomes of a damaged sample; the batch says what did. Where "mask" leaves nothing of a
            batch, it is blank.

    Raises:
        ShardError: a sample is damaged, and `on_corrupt` is "raise".
        LoaderError: a loader process died, or there is no memory for its batches.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    assert batch_size >= 1, batch_size
    assert position >= 0, position
    builder = BatchBuilder(shards, transform, seed, on_corrupt)
    yield from load(_TrainBatches(builder, position, rank, world_size, batch_size), num_workers)


def evaluation_batches(
    shards: Shards,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    transform: Transform,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "raise",
) -> Iterator[Batch | None]:
    """The batches of one rank in an evaluation: every image once, as many batches on every rank.

    Batch j holds images j * batch_size and following, for any number of ranks, and goes to rank
    j mod world_size; `None` stands for a batch that a rank does not have. A damaged image is missing in its
    batch, unless `on_corrupt` is "raise"; no other image takes its place.

    Raises:
        ShardError: an image is damaged, and `on_corrupt` is "raise".
        LoaderError: a loader process died, or there is no memory for its batches.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    assert batch_size >= 1, batch_size
    builder = BatchBuilder(shards, transform, 0, "raise" if on_corrupt == "raise" else "mask")
    yield from load(_EvaluationBatches(builder, rank, world_size, batch_size), num_workers)


def make_order(shards: Shards, seed: int) -> SampleOrder:
    """The order in which `train_batches` goes through the shards."""
    samples = shards.samples
    aspects = samples["width"] / samples["height"]
    return SampleOrder(samples["shard"].astype(np.int64), aspects, shards.fingerprint, seed)


@dataclass(frozen=True, eq=False)
class BatchSpec:
    """A batch that is to be made: samples `indices`, at `position` and following, of the step at `start`."""

    step: int  # of this rank, from 0
    start: int
    position: int
    indices: list[int]
    fallbacks: Callable[[int], Iterable[int]]  # samples that may take the place of the one at a position


@dataclass(frozen=True, eq=False)
class BatchBuilder:
    """Makes batches of samples that were read."""

    shards: Shards
    transform: Transform
    seed: int
    on_corrupt: OnCorrupt

    def batches(
        self, specs: Iterable[BatchSpec], all_specs: Iterable[BatchSpec], out: Out | None
    ) -> Iterator[Batch]:
        """The batches of this process's turns, out of those of all processes of the rank."""
        with closing(self.shards.files.prefetch(spec.indices for spec in all_specs)) as prefetcher:
            for spec, raws in _read_ahead(self.shards, specs, prefetcher):
                yield self._batch(spec, raws, out)

    def _batch(self, spec: BatchSpec, raws: list[RawSample | ShardError], out: Out | None) -> Batch:
        samples: list[Sample] = []
        corrupt: list[CorruptSample] = []
        for position, (index, raw) in enumerate(zip(spec.indices, raws, strict=True), spec.position):
            sample, row = self._sample(spec, position, index, raw)
            samples += [sample] if sample is not None else []
            corrupt += [row] if row is not None else []
        batch = collate(samples, spec.start, out=out) if samples else blank_batch(spec.start, out=out)
        return replace(batch, corrupt=tuple(corrupt)) if corrupt else batch

    def _sample(
        self, spec: BatchSpec, position: int, index: int, raw: RawSample | ShardError
    ) -> tuple[Sample | None, CorruptSample | None]:
        short_side = self.transform.step_short_side(self.seed, spec.start)

        def make(index: int, raw: RawSample) -> Sample:
            return make_sample(
                self.shards, index, raw, self.transform,
                seed=self.seed, position=position, short_side=short_side,
            )  # fmt: skip

        if not isinstance(raw, ShardError):
            with suppress(ShardError):  # the policy makes it again
                return make(index, raw), None
        others = spec.fallbacks(position)
        return apply_policy(self.on_corrupt, self.shards, index, position, make, others)


@dataclass(frozen=True, eq=False)
class _TrainBatches:
    builder: BatchBuilder
    position: int
    rank: int
    world_size: int
    batch_size: int

    def batches(self, worker: int, num_workers: int, out: Out | None) -> Iterator[Batch]:
        return self.builder.batches(self._specs(worker, num_workers), self._specs(0, 1), out)

    def _specs(self, worker: int, num_workers: int) -> Iterator[BatchSpec]:
        plan = make_order(self.builder.shards, self.builder.seed)
        for step in count(worker, num_workers):
            start = self.position + step * self.world_size * self.batch_size
            own = start + self.rank * self.batch_size
            indices = plan.samples(own, self.batch_size).tolist()
            yield BatchSpec(step, start, own, indices, partial(earlier_samples, plan))


@dataclass(frozen=True, eq=False)
class _EvaluationBatches:
    builder: BatchBuilder
    rank: int
    world_size: int
    batch_size: int

    def batches(self, worker: int, num_workers: int, out: Out | None) -> Iterator[Batch | None]:
        specs = self._specs(worker, num_workers)
        all_specs = (spec for spec in self._specs(0, 1) if spec.indices)
        yield from self.builder.batches([spec for spec in specs if spec.indices], all_specs, out)
        yield from [None for spec in specs if not spec.indices]  # only the last can be

    def _specs(self, worker: int, num_workers: int) -> list[BatchSpec]:
        num_images = self.builder.shards.num_samples
        num_rounds = -(-num_images // (self.batch_size * self.world_size))
        rounds = range(worker, num_rounds, num_workers)
        starts = [(number * self.world_size + self.rank) * self.batch_size for number in rounds]
        ends = [min(start + self.batch_size, num_images) for start in starts]
        return [
            BatchSpec(number, start, start, list(range(start, end)), _nothing)
            for number, start, end in zip(rounds, starts, ends, strict=True)
        ]


def _nothing(position: int) -> Iterable[int]:
    return ()


def _read_ahead(
    shards: Shards, specs: Iterable[BatchSpec], prefetcher: Prefetcher
) -> Iterator[tuple[BatchSpec, list[RawSample | ShardError]]]:
    """Read the samples of each turn, and begin with those of the following ones."""
    begun = deque[tuple[BatchSpec, Callable[[], list[RawSample | ShardError]]]]()
    for spec in specs:
        prefetcher.advance(spec.step)
        begun.append((spec, shards.start(spec.indices)))
        if len(begun) > READ_AHEAD:
            first, wait = begun.popleft()
            yield first, wait()
    for spec, wait in begun:
        yield spec, wait()
