"""Handle corrupt samples: one policy per run, a log of those encountered, and a limit to their number.

A sample is corrupt when `Shards.read` or its decoding refuses it, twice. Its substitute depends only on the sample
order and on which samples are corrupt, never on ranks, workers or batches.

The log is a file of rows in the run's folder and a part of its checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

from raydetr.config import OnCorrupt
from raydetr.data.order import SampleOrder
from raydetr.shards.reader import ShardError, Shards
from raydetr.shards.validation import RawSample
from raydetr.store.folders import Folder, write_file

T = TypeVar("T")
Action = Literal["substituted", "masked", "not predicted"]

MAX_TRIES = 64  # candidates for a substitute; if that many are corrupt, more would not help

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorruptSample:
    """A sample that could not be used at its position."""

    position: int  # G; in an evaluation, the position of the training
    shard: str  # path
    key: str
    offset: int  # bytes, in the shard
    reason: str
    action: Action

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key} at byte {self.offset}: {self.reason}; {self.action}"


def apply_policy(
    policy: OnCorrupt,
    shards: Shards,
    index: int,
    position: int,
    make: Callable[[int, RawSample], T],
    fallbacks: Iterable[int],
) -> tuple[T | None, CorruptSample | None]:
    """Read a sample that was corrupt once more; replace or mask it if it still is.

    Args:
        policy: "raise"; "substitute" takes the first valid one of `fallbacks`; "mask" takes none.
        shards: the data set of the sample.
        index: of the sample.
        position: G of the sample.
        make: builds the sample of this position from an index and the raw sample; raises ShardError.
        fallbacks: indices of samples that may replace it, in order of preference.

    Returns:
        the sample, or None if it is masked; and the row for the log, or None if the second read succeeded.

    Raises:
        ShardError: the policy is "raise", or the first MAX_TRIES fallbacks are all corrupt.
        RemoteError: a server cannot be reached.
    """
    try:
        sample = make(index, shards.reread(index))
    except ShardError as error:
        if policy == "raise":
            raise
        row = CorruptSample(position, error.shard, error.key, error.offset, error.reason, "masked")
        if policy == "mask":
            return None, row
        return _substitute(shards, error, make, fallbacks), dataclasses.replace(row, action="substituted")
    log.warning("sample %s was corrupt when first read, and valid when read again", shards.key(index))
    return sample, None


def _substitute(
    shards: Shards, error: ShardError, make: Callable[[int, RawSample], T], fallbacks: Iterable[int]
) -> T:
    num_tried = 0
    for other in islice(fallbacks, MAX_TRIES):
        num_tried += 1
        for read in (shards.read, shards.reread):
            try:
                return make(other, read(other))
            except ShardError as other_error:
                log.info("no substitute: %s", other_error)
    raise ShardError(
        f"{error}; none of the {num_tried} samples before it can replace it, they are corrupt too"
    )


def earlier_samples(order: SampleOrder, position: int) -> Iterator[int]:
    """Yield the other samples of the position's epoch, backwards from it; the epoch's last follows its first."""
    epoch, index = divmod(position, order.num_samples)
    for back in range(1, order.num_samples):
        earlier = (index - back) % order.num_samples
        yield int(order.samples(epoch * order.num_samples + earlier, 1)[0])


CORRUPT_LOG = "corrupt_samples.jsonl"
MAX_LISTED = 5  # corrupt samples in an error message


class TooManyCorruptError(ValueError):
    """More samples are corrupt than a run may encounter; the message names the log, the first ones and a remedy."""


class CorruptSampleLog:
    """All corrupt samples that a run encountered, in order. Every worker has the same rows."""

    def __init__(self, rows: Iterable[CorruptSample] = ()) -> None:
        self.rows = list(rows)
        # Cached, because its size is needed in every step
        self._samples = {(row.shard, row.key) for row in self.rows}

    @property
    def num_samples(self) -> int:
        """Number of different samples: one that recurs in a later epoch counts once."""
        return len(self._samples)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as plain values, for a checkpoint."""
        return [dataclasses.asdict(row) for row in self.rows]

    @staticmethod
    def from_dicts(rows: Iterable[dict[str, Any]]) -> CorruptSampleLog:
        """Restore the log from the result of `to_dicts`."""
        return CorruptSampleLog(CorruptSample(**row) for row in rows)

    def write(self, run: Folder) -> None:
        """Write all rows to the log file in the folder of a run; without rows, remove the file."""
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in self.to_dicts()]
        if lines:
            write_file(run / CORRUPT_LOG, "".join(lines).encode())
        else:
            (run / CORRUPT_LOG).unlink(missing_ok=True)

    def add(self, rows: Sequence[CorruptSample]) -> None:
        """Add rows."""
        self.rows += rows
        self._samples.update((row.shard, row.key) for row in rows)

    def check(self, limit: int, folder: Folder) -> None:
        """Check that at most `limit` different samples are corrupt; `folder` is that of the run.

        Raises:
            TooManyCorruptError: more are.
        """
        if self.num_samples <= limit:
            return
        first = list({(row.shard, row.key): str(row) for row in self.rows}.values())[:MAX_LISTED]
        listing = "".join(f"\n  {row}" for row in first)
        raise TooManyCorruptError(
            f"{self.num_samples} samples are corrupt, and data.max_corrupt allows {limit}; "
            f"{folder / CORRUPT_LOG} lists them, the first are:{listing}\n"
            "Copy these shards again, or write them again, and resume; or allow more with data.max_corrupt."
        )


def default_max_corrupt(num_samples: int) -> int:
    """Return the limit of a run without `data.max_corrupt`: 1% of the samples, at least ten."""
    return max(num_samples // 100, 10)
