"""Stream batches from shards: in the sample order, indefinitely, for training; every image once for evaluation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np

from raydetr.config import OnCorrupt
from raydetr.data.batch import Batch, Sample, blank_batch, collate
from raydetr.data.corrupt import CorruptSample, apply_policy, earlier_samples
from raydetr.data.layout import Layout
from raydetr.data.loader.loader import Out, load
from raydetr.data.order import SampleOrder
from raydetr.data.samples import make_sample
from raydetr.data.transforms.transform import Transform
from raydetr.shards.reader import ShardError, Shards
from raydetr.shards.validation import RawSample

READ_AHEAD = 4  # batches per process whose reads are in flight while one is made; remote shards only


def train_batches(
    shards: Shards,
    *,
    seed: int,
    position: int,
    layout: Layout,
    rank: int = 0,
    transform: Transform,
    num_workers: int = 0,
    on_corrupt: OnCorrupt = "raise",
) -> Iterator[Batch]:
    """Yield the micro-batches of one rank indefinitely, starting at `position`.

    Step s takes `layout.global_batch` samples of the order from position + s * `layout.global_batch` on, and yields
    `layout.num_micro_batches` batches with this rank's share of them; a batch without samples is blank. Over all ranks,
    each sample comes once per epoch.

    Args:
        shards: the data set.
        seed: of the order and of the augmentation.
        position: G, the number of samples that the run has consumed, over all ranks.
        layout: of the global batch among the ranks.
        rank: of this process.
        transform: applied with randomness keyed by (seed, position of the sample).
        num_workers: loader processes; 0 loads in this process.
        on_corrupt: what replaces a corrupt sample; `Batch.corrupt` reports it. If "mask" removes all samples of a
            batch, the batch is blank.

    Raises:
        ShardError: a sample is corrupt, and `on_corrupt` is "raise".
        LoaderError: a loader process died, or there is no memory for its batches.
    """
    assert position >= 0, position
    builder = BatchBuilder(shards, transform, seed, on_corrupt)
    yield from load(_TrainBatches(builder, position, layout, rank), num_workers)


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
    """Yield the batches of one rank in an evaluation: every image once, the same number of batches on every rank.

    Batch j holds `batch_size` images from j * batch_size on, for any number of ranks, and goes to rank
    j mod world_size; ranks without a last batch get `None`. A corrupt image is omitted from its batch without a
    substitute, unless `on_corrupt` is "raise".

    Raises:
        ShardError: an image is corrupt, and `on_corrupt` is "raise".
        LoaderError: a loader process died, or there is no memory for its batches.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    assert batch_size >= 1, batch_size
    builder = BatchBuilder(shards, transform, 0, "raise" if on_corrupt == "raise" else "mask")
    yield from load(_EvaluationBatches(builder, rank, world_size, batch_size), num_workers)


def make_order(shards: Shards, seed: int) -> SampleOrder:
    """Return the order in which `train_batches` takes the samples."""
    samples = shards.samples
    aspects = samples["width"] / samples["height"]
    return SampleOrder(samples["shard"].astype(np.int64), aspects, shards.fingerprint, seed)


@dataclass(frozen=True, eq=False)
class BatchSpec:
    """A batch to make."""

    start: int  # position of the first sample of the global batch
    position: int  # of the first sample of this batch
    indices: list[int]  # of the samples
    fallbacks: Callable[[int], Iterable[int]]  # samples that may replace the one at a position


@dataclass(frozen=True, eq=False)
class BatchBuilder:
    """Reads and makes batches."""

    shards: Shards
    transform: Transform
    seed: int
    on_corrupt: OnCorrupt

    def batches(self, specs: Iterable[BatchSpec], out: Out | None) -> Iterator[Batch]:
        """Yield the batches `specs`."""
        for spec, raws in _read_ahead(self.shards, specs):
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
            with suppress(ShardError):  # not decodable, or a corrupt mosaic partner: the policy reads again
                return make(index, raw), None
        fallbacks = spec.fallbacks(position)
        return apply_policy(self.on_corrupt, self.shards, index, position, make, fallbacks)


@dataclass(frozen=True, eq=False)
class _TrainBatches:
    builder: BatchBuilder
    position: int
    layout: Layout
    rank: int

    def batches(self, worker: int, num_workers: int, out: Out | None) -> Iterator[Batch]:
        return self.builder.batches(self._specs(worker, num_workers), out)

    def _specs(self, worker: int, num_workers: int) -> Iterator[BatchSpec]:
        order = make_order(self.builder.shards, self.builder.seed)
        parts = self.layout.micro_batches(self.rank)
        for number in count(worker, num_workers):
            step, part = divmod(number, len(parts))
            start = self.position + step * self.layout.global_batch
            position = start + parts[part].start
            indices = order.samples(position, len(parts[part])).tolist()
            yield BatchSpec(start, position, indices, partial(earlier_samples, order))


@dataclass(frozen=True, eq=False)
class _EvaluationBatches:
    builder: BatchBuilder
    rank: int
    world_size: int
    batch_size: int

    def batches(self, worker: int, num_workers: int, out: Out | None) -> Iterator[Batch | None]:
        specs = self._specs(worker, num_workers)
        yield from self.builder.batches([spec for spec in specs if spec.indices], out)
        yield from [None for spec in specs if not spec.indices]  # only the last can be empty

    def _specs(self, worker: int, num_workers: int) -> list[BatchSpec]:
        num_images = self.builder.shards.num_samples
        num_rounds = -(-num_images // (self.batch_size * self.world_size))
        rounds = range(worker, num_rounds, num_workers)
        starts = [(number * self.world_size + self.rank) * self.batch_size for number in rounds]
        ends = [min(start + self.batch_size, num_images) for start in starts]
        return [
            BatchSpec(start, start, list(range(start, end)), _no_fallbacks)
            for start, end in zip(starts, ends, strict=True)
        ]


def _no_fallbacks(position: int) -> Iterable[int]:
    return ()


def _read_ahead(
    shards: Shards, specs: Iterable[BatchSpec]
) -> Iterator[tuple[BatchSpec, list[RawSample | ShardError]]]:
    """Yield each batch with its raw samples, while the reads of the next READ_AHEAD batches are in flight."""
    pending = deque[tuple[BatchSpec, Callable[[], list[RawSample | ShardError]]]]()
    for spec in specs:
        pending.append((spec, shards.start(spec.indices)))
        if len(pending) > READ_AHEAD:
            first, wait = pending.popleft()
            yield first, wait()
    for spec, wait in pending:
        yield spec, wait()
