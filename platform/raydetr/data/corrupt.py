"""What happens with a sample that is damaged: one policy for a run.

A sample is damaged when `Shards.read` or its decoding refuses it. It is read once more first. What comes instead
of it is a function of the plan and of which samples are damaged, never of ranks, workers or batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from raydetr.data.order import Plan
from raydetr.shards.reader import ShardError, Shards
from raydetr.shards.validation import RawSample

T = TypeVar("T")
OnDamage = Literal["raise", "substitute", "mask"]

MAX_TRIES = 64  # samples that are tried as a substitute; where as many are damaged, so is the whole set

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Damage:
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
    policy: OnDamage,
    shards: Shards,
    index: int,
    position: int,
    make: Callable[[int, RawSample], T],
    others: Iterable[int],
) -> tuple[T | None, Damage | None]:
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


def earlier_samples(plan: Plan, position: int) -> Iterator[int]:
    """The other samples of the position's epoch, the one just before it in the order first, then around."""
    epoch, place = divmod(position, plan.num_samples)
    for back in range(1, plan.num_samples):
        place_before = (place - back) % plan.num_samples
        yield int(plan.samples(epoch * plan.num_samples + place_before, 1)[0])


def note(
    error: ShardError, position: int, action: Literal["substituted", "masked", "not evaluated"]
) -> Damage:
    """The row for the ledger."""
    return Damage(position, error.shard, error.key, error.offset, error.reason, action)
