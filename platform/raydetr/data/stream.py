"""Stream batches from shards: in the sample order, indefinitely, for training; every image once for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, tee
from typing import cast

import numpy as np

from raydetr.config import OnCorrupt
from raydetr.data.batch import Batch, Sample, blank_batch, collate
from raydetr.data.corrupt import CorruptSample, apply_policy, earlier_samples
from raydetr.data.layout import Layout
from raydetr.data.loader.loader import Out, load
from raydetr.data.order import SampleOrder
from raydetr.data.samples import load_sample
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
    specs = partial(_train_specs, shards, seed, position, layout, rank)
    builder = BatchBuilder(shards, transform, seed, on_corrupt, specs)
    yield from cast(Iterator[Batch], load(builder.batches, num_workers))


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
    specs = partial(_evaluation_specs, shards.num_samples, rank, world_size, batch_size)
    policy: OnCorrupt = "raise" if on_corrupt == "raise" else "mask"
    yield from load(BatchBuilder(shards, transform, 0, policy, specs).batches, num_workers)


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
    order: SampleOrder | None = None  # its earlier samples replace corrupt ones; None: in an evaluation


@dataclass(frozen=True, eq=False)
class BatchBuilder:
    """Reads and makes batches, for training and evaluation."""

    shards: Shards
    transform: Transform
    seed: int
    on_corrupt: OnCorrupt
    specs: Callable[[int, int], Iterator[BatchSpec]]  # of loader process `worker` of `num_workers`

    def batches(self, worker: int, num_workers: int, out: Out | None) -> Iterator[Batch | None]:
        """Yield the batches of a loader process."""
        specs, ahead = tee(self.specs(worker, num_workers))
        read = self.shards.read_batches((spec.indices for spec in ahead), READ_AHEAD)
        for spec, raws in zip(specs, read, strict=True):
            # A share without samples is a blank batch in training, and none in an evaluation
            yield self._batch(spec, raws, out) if spec.indices or spec.order else None

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
            return load_sample(
                self.shards, index, self.transform,
                seed=self.seed, position=position, short_side=short_side, raw=raw,
            )  # fmt: skip

        if not isinstance(raw, ShardError):
            with suppress(ShardError):  # not decodable, or a corrupt mosaic partner: the policy reads again
                return make(index, raw), None
        fallbacks = earlier_samples(spec.order, position) if spec.order else ()
        return apply_policy(self.on_corrupt, self.shards, index, position, make, fallbacks)


def _train_specs(
    shards: Shards, seed: int, position: int, layout: Layout, rank: int, worker: int, num_workers: int
) -> Iterator[BatchSpec]:
    order, parts = make_order(shards, seed), layout.micro_batches(rank)
    for number in count(worker, num_workers):
        step, part = divmod(number, len(parts))
        start = position + step * layout.global_batch
        first = start + parts[part].start
        yield BatchSpec(start, first, order.samples(first, len(parts[part])).tolist(), order)


def _evaluation_specs(
    num_images: int, rank: int, world_size: int, batch_size: int, worker: int, num_workers: int
) -> Iterator[BatchSpec]:
    num_rounds = -(-num_images // (batch_size * world_size))
    for number in range(worker, num_rounds, num_workers):
        start = (number * world_size + rank) * batch_size
        yield BatchSpec(start, start, list(range(start, min(start + batch_size, num_images))))
