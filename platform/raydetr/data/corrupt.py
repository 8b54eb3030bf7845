"""What happens with a sample that is damaged: one policy for a run.

A sample is damaged when `Shards.read` or its decoding refuses it. It is read once more first. What comes instead
of it is a function of the plan and of which samples are damaged, never of ranks, workers or batches.

The damaged samples that a run has met: a file of rows, a part of its checkpoints, and a budget.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from raydetr.config import OnCorrupt
from raydetr.data.order import SampleOrder
from raydetr.shards.reader import ShardError, Shards
from raydetr.shards.validation import RawSample

T = TypeVar("T")

MAX_TRIES = 64  # samples that are tried as a substitute; where as many are damaged, so is the whole set

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorruptSample:
    """One sample that could not be used when its turn came."""

    position: int  # G; of an evaluation: where the training was
    shard: str  # path
    key: str
    offset: int  # bytes, in the shard
    reason: str
    action: Literal["substituted", "masked", "not evaluated"]

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key} at byte {self.offset}: {self.reason}; {self.action}"


def apply_policy(
    policy: OnCorrupt,
    shards: Shards,
    index: int,
    position: int,
    make: Callable[[int, RawSample], T],
    others: Iterable[int],
) -> tuple[T | None, CorruptSample | None]:
    """What to use in place of a sample that could not be made, after one more try.

    Args:
        policy: "raise"; "substitute" takes the first of `others` that is sound; "mask" takes nothing.
        shards: where the sample is.
        index: of the sample.
        position: G of the sample.
        make: makes the final sample of this position from an index and what was read for it; raises ShardError.
        others: indices of samples that may take its place, best first.

    Returns:
        the sample, or None where it is masked; and the row for the ledger, or None where the second try did it.

    Raises:
        ShardError: the policy is "raise", or none of the first MAX_TRIES others is sound.
    """
    try:
        sample = make(index, shards.reread(index))
    except ShardError as error:
        if policy == "raise":
            raise
        if policy == "mask":
            return None, note(error, position, "masked")
        return _substitute(shards, error, make, others), note(error, position, "substituted")
    log.warning("sample %s was damaged when it was read first, and sound the second time", shards.key(index))
    return sample, None


def _substitute(
    shards: Shards, error: ShardError, make: Callable[[int, RawSample], T], others: Iterable[int]
) -> T:
    tried = 0
    for other, _ in zip(others, range(MAX_TRIES), strict=False):
        tried += 1
        for read in (shards.read, shards.reread):
            try:
                return make(other, read(other))
            except ShardError as fault:
                log.info("no substitute: %s", fault)
    raise ShardError(
        f"{error}; none of the {tried} samples before it can take its place, they are damaged too"
    )


def earlier_samples(plan: SampleOrder, position: int) -> Iterator[int]:
    """The other samples of the position's epoch, the one just before it in the order first, then around."""
    epoch, place = divmod(position, plan.num_samples)
    for back in range(1, plan.num_samples):
        place_before = (place - back) % plan.num_samples
        yield int(plan.samples(epoch * plan.num_samples + place_before, 1)[0])


def note(
    error: ShardError, position: int, action: Literal["substituted", "masked", "not evaluated"]
) -> CorruptSample:
    """The row for the ledger."""
    return CorruptSample(position, error.shard, error.key, error.offset, error.reason, action)


CORRUPT_LOG = "damage.jsonl"
NUM_TOLD = 5  # damaged samples that a message lists


class TooManyCorruptError(ValueError):
    """More samples are damaged than a run may meet; the message names the ledger, the first ones and a remedy."""


class CorruptSampleLog:
    """All damage that a run met, in order. Every worker holds the same rows."""

    def __init__(self, rows: Iterable[CorruptSample] = ()) -> None:
        self.rows = list(rows)
        self._samples = {(row.shard, row.key) for row in self.rows}  # kept, as it is asked for all the time

    @property
    def num_samples(self) -> int:
        """Different samples: one that is met again in a later epoch is counted once."""
        return len(self._samples)

    def to_dicts(self) -> list[dict[str, Any]]:
        """As plain values, for a checkpoint."""
        return [dataclasses.asdict(row) for row in self.rows]

    @staticmethod
    def from_dicts(rows: Iterable[dict[str, Any]]) -> CorruptSampleLog:
        """What `to_dicts` gave."""
        return CorruptSampleLog(CorruptSample(**row) for row in rows)

    def write(self, folder: Path) -> None:
        """Write all rows to `damage.jsonl` in the folder of a run; without rows it shall not exist."""
        (folder / CORRUPT_LOG).unlink(missing_ok=True)
        self._append(folder, self.rows)

    def add(self, rows: Sequence[CorruptSample], folder: Path | None) -> None:
        """Note what was met, also in the file, on disk at once, where `folder` is given."""
        self.rows += rows
        self._samples.update((row.shard, row.key) for row in rows)
        if folder is not None:
            self._append(folder, rows)

    def _append(self, folder: Path, rows: Sequence[CorruptSample]) -> None:
        if rows:
            with (folder / CORRUPT_LOG).open("a") as file:
                file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)

    def check(self, budget: int, folder: Path) -> None:
        """Make sure that not too many samples are damaged.

        Raises:
            DamageError: more than `budget` different ones are.
        """
        if self.num_samples <= budget:
            return
        first = list({(row.shard, row.key): str(row) for row in self.rows}.values())[:NUM_TOLD]
        listing = "".join(f"\n  {row}" for row in first)
        raise TooManyCorruptError(
            f"{self.num_samples} samples are damaged, and data.max_corrupt allows {budget}; "
            f"{folder / CORRUPT_LOG} lists them, the first are:{listing}\n"
            "Copy these shards again, or write them again, and resume; or allow more with data.max_corrupt."
        )


def default_max_corrupt(num_samples: int) -> int:
    """Damaged samples that a run without `data.max_corrupt` may meet: one in a hundred, at least ten."""
    return max(num_samples // 100, 10)
