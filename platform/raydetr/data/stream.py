"""From shards to batches: in the plan's order for training, once through for evaluation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np

from raydetr.data.batch import Batch, Sample, blank_batch, collate
from raydetr.data.corrupt import Damage, OnDamage, apply_policy, earlier_samples
from raydetr.data.loader.loader import Out, load
from raydetr.data.order import Plan
from raydetr.data.samples import make_sample
from raydetr.data.transforms.transform import Transform
from raydetr.shards.files import Follower
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
    on_damage: OnDamage = "raise",
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
        on_damage: what becomes of a damaged sample; the batch says what did. Where "mask" leaves nothing of a
            batch, it is blank.

    Raises:
        ShardError: a sample is damaged, and `on_damage` is "raise".
        LoaderError: a loader process died, or there is no memory for its batches.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    assert batch_size >= 1, batch_size
    assert position >= 0, position
    maker = _Maker(shards, transform, seed, on_damage)
    yield from load(_TrainBatches(maker, position, rank, world_size, batch_size), num_workers)


def evaluation_batches(
    shards: Shards,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    transform: Transform,
    num_workers: int = 0,
    on_damage: OnDamage = "raise",
) -> Iterator[Batch | None]:
    """The batches of one rank in an evaluation: every image once, as many batches on every rank.

    Batch j holds images j * batch_size and following, for any number of ranks, and goes to rank
    j mod world_size; `None` stands for a batch that a rank does not have. A damaged image is missing in its
    batch, unless `on_damage` is "raise"; no other image takes its place.

    Raises:
        ShardError: an image is damaged, and `on_damage` is "raise".
        LoaderError: a loader process died, or there is no memory for its batches.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    assert batch_size >= 1, batch_size
    maker = _Maker(shards, transform, 0, "raise" if on_damage == "raise" else "mask")
    yield from load(_EvaluationBatches(maker, rank, world_size, batch_size), num_workers)


def make_plan(shards: Shards, seed: int) -> Plan:
    """The order in which `train_batches` goes through the shards."""
    samples = shards.samples
    aspects = samples["width"] / samples["height"]
    return Plan(samples["shard"].astype(np.int64), aspects, shards.fingerprint, seed)


@dataclass(frozen=True, eq=False)
class _Turn:
    """A batch that is to be made: samples `indices`, at `position` and following, of the step at `start`."""

    step: int  # of this rank, from 0
    start: int
    position: int
    indices: list[int]
    instead: Callable[[int], Iterable[int]]  # samples that may take the place of the one at a position


@dataclass(frozen=True, eq=False)
class _Maker:
    """Makes batches of samples that were read."""

    shards: Shards
    transform: Transform
    seed: int
    on_damage: OnDamage

    def batches(self, turns: Iterable[_Turn], all_turns: Iterable[_Turn], out: Out | None) -> Iterator[Batch]:
        """The batches of this process's turns, out of those of all processes of the rank."""
        with closing(self.shards.files.follow(turn.indices for turn in all_turns)) as follower:
            for turn, raws in _read_ahead(self.shards, turns, follower):
                yield self._batch(turn, raws, out)

    def _batch(self, turn: _Turn, raws: list[RawSample | ShardError], out: Out | None) -> Batch:
        samples: list[Sample] = []
        damage: list[Damage] = []
        for position, (index, raw) in enumerate(zip(turn.indices, raws, strict=True), turn.position):
            sample, row = self._sample(turn, position, index, raw)
            samples += [sample] if sample is not None else []
            damage += [row] if row is not None else []
        batch = collate(samples, turn.start, out=out) if samples else blank_batch(turn.start, out=out)
        return replace(batch, damage=tuple(damage)) if damage else batch

    def _sample(
        self, turn: _Turn, position: int, index: int, raw: RawSample | ShardError
    ) -> tuple[Sample | None, Damage | None]:
        short_side = self.transform.step_short_side(self.seed, turn.start)

        def make(index: int, raw: RawSample) -> Sample:
            return make_sample(
                self.shards, index, raw, self.transform,
                seed=self.seed, position=position, short_side=short_side,
            )  # fmt: skip

        if not isinstance(raw, ShardError):
            with suppress(ShardError):  # the policy makes it again
                return make(index, raw), None
        others = turn.instead(position)
        return apply_policy(self.on_damage, self.shards, index, position, make, others)


@dataclass(frozen=True, eq=False)
class _TrainBatches:
    maker: _Maker
    position: int
    rank: int
    world_size: int
    batch_size: int

    def batches(self, worker: int, num_workers: int, out: Out | None) -> Iterator[Batch]:
        return self.maker.batches(self._turns(worker, num_workers), self._turns(0, 1), out)

    def _turns(self, worker: int, num_workers: int) -> Iterator[_Turn]:
        plan = make_plan(self.maker.shards, self.maker.seed)
        for step in count(worker, num_workers):
            start = self.position + step * self.world_size * self.batch_size
            own = start + self.rank * self.batch_size
            indices = plan.samples(own, self.batch_size).tolist()
            yield _Turn(step, start, own, indices, partial(earlier_samples, plan))


@dataclass(frozen=True, eq=False)
class _EvaluationBatches:
    maker: _Maker
    rank: int
    world_size: int
    batch_size: int

    def batches(self, worker: int, num_workers: int, out: Out | None) -> Iterator[Batch | None]:
        turns = self._turns(worker, num_workers)
        all_turns = (turn for turn in self._turns(0, 1) if turn.indices)
        yield from self.maker.batches([turn for turn in turns if turn.indices], all_turns, out)
        yield from [None for turn in turns if not turn.indices]  # only the last can be

    def _turns(self, worker: int, num_workers: int) -> list[_Turn]:
        num_images = self.maker.shards.num_samples
        num_rounds = -(-num_images // (self.batch_size * self.world_size))
        rounds = range(worker, num_rounds, num_workers)
        starts = [(number * self.world_size + self.rank) * self.batch_size for number in rounds]
        ends = [min(start + self.batch_size, num_images) for start in starts]
        return [
            _Turn(number, start, start, list(range(start, end)), _nothing)
            for number, start, end in zip(rounds, starts, ends, strict=True)
        ]


def _nothing(position: int) -> Iterable[int]:
    return ()


def _read_ahead(
    shards: Shards, turns: Iterable[_Turn], follower: Follower
) -> Iterator[tuple[_Turn, list[RawSample | ShardError]]]:
    """Read the samples of each turn, and begin with those of the following ones."""
    begun = deque[tuple[_Turn, Callable[[], list[RawSample | ShardError]]]]()
    for turn in turns:
        follower.at(turn.step)
        begun.append((turn, shards.start(turn.indices)))
        if len(begun) > READ_AHEAD:
            first, wait = begun.popleft()
            yield first, wait()
    for turn, wait in begun:
        yield turn, wait()
