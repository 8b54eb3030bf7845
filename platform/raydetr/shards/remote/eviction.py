"""Decide which chunks to evict from the node cache: what every process of the node will read next is known."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

TABLE_DTYPE = np.dtype([("entry", "<u8"), ("steps", "<i8")])
REFRESH_SECONDS = 1.0  # maximum age of the knowledge about other processes


class UseTables:
    """Writes the table of this process, and reads those of the others in the same folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._name = folder, f"{os.getpid()}-{secrets.token_hex(4)}"
        self._lock = os.open(folder / f"{self._name}.lock", os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._own: Mapping[str, int] = {}
        self._others: dict[int, int] = {}
        self._published = self._refreshed = float("-inf")

    def publish(self, next_uses: Mapping[str, int]) -> None:
        """Publish the steps until this rank's next use of each entry; visible to others within about a second."""
        self._own = next_uses
        if time.monotonic() - self._published < REFRESH_SECONDS:
            return
        self._published = time.monotonic()
        table = np.array([(_number(name), steps) for name, steps in next_uses.items()], TABLE_DTYPE)
        new = self._folder / f"{self._name}.new"
        new.write_bytes(table.tobytes())
        new.rename(self._folder / f"{self._name}.table")

    def next_uses(self, entries: Iterable[str]) -> dict[str, int]:
        """Return the steps until the next use of each entry by any process; entries without one are absent."""
        self._refresh()
        found = {}
        for entry in entries:
            steps = [s for s in (self._own.get(entry), self._others.get(_number(entry))) if s is not None]
            if steps:
                found[entry] = min(steps)
        return found

    def close(self) -> None:
        """Withdraw the table of this process."""
        for suffix in ("new", "table", "lock"):
            (self._folder / f"{self._name}.{suffix}").unlink(missing_ok=True)
        os.close(self._lock)

    def _refresh(self) -> None:
        if time.monotonic() - self._refreshed < REFRESH_SECONDS:
            return
        self._refreshed = time.monotonic()
        self._others = {}
        for lock in self._folder.glob("*.lock"):
            if lock.stem == self._name or _is_dead(lock):
                continue
            with suppress(FileNotFoundError):  # nothing published yet
                content = lock.with_suffix(".table").read_bytes()
                for entry, steps in np.frombuffer(content, TABLE_DTYPE).tolist():
                    self._others[entry] = min(steps, self._others.get(entry, steps))


def _number(entry: str) -> int:
    return int.from_bytes(hashlib.blake2b(entry.encode(), digest_size=8).digest(), "little")


def _is_dead(lock: Path) -> bool:
    """Return True, and remove the files of a table, if its process has ended."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        for suffix in (".new", ".table", ".lock"):
            lock.with_suffix(suffix).unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


MIN_READ_FRACTION = 0.75  # fraction of a new chunk that must be read before the next read of the evicted one
MAX_UPCOMING_READS = 65_536  # samples of a rank

Reads = Sequence[tuple[int, int]]  # reads of a step: (chunk number, bytes)


class UpcomingReads:
    """The next reads of chunks by one rank.

    Args:
        steps: the reads of each step, from step 0 on; consumed only as far as needed.
        max_reads: maximum number of reads to hold at a time.
    """

    def __init__(self, steps: Iterable[Reads], max_reads: int = MAX_UPCOMING_READS) -> None:
        self._max_reads = max_reads
        self._remaining: Iterator[Reads] = iter(steps)
        self._by_chunk: dict[int, deque[tuple[int, int]]] = {}  # chunk -> (step, bytes), the next read first
        self._by_step: deque[tuple[int, Reads]] = deque()
        self._num_reads = 0
        self._next_step = 0
        self.step = 0  # reads of earlier steps are done
        self.is_complete = False  # all future reads are known

    def extend(self, num_steps: int) -> bool:
        """Add the reads of further steps, up to the maximum; return False if there was nothing left to add."""
        for _ in range(num_steps):
            if self.is_complete or self._num_reads >= self._max_reads:
                return False
            reads = next(self._remaining, None)
            if reads is None:
                self.is_complete = True
                return False
            self._by_step.append((self._next_step, reads))
            for chunk, num_bytes in reads:
                self._by_chunk.setdefault(chunk, deque()).append((self._next_step, num_bytes))
            self._num_reads += len(reads)
            self._next_step += 1
        return True

    def advance(self, step: int) -> None:
        """Remove the reads before a step."""
        self.step = max(self.step, step)
        while self._by_step and self._by_step[0][0] < self.step:
            for chunk, _ in self._by_step.popleft()[1]:
                self._num_reads -= 1
                reads = self._by_chunk[chunk]
                reads.popleft()
                if not reads:
                    del self._by_chunk[chunk]

    def next_uses(self) -> dict[int, int]:
        """Return the number of steps until the next read of each chunk, the nearest first."""
        return dict(
            sorted(
                ((c, reads[0][0] - self.step) for c, reads in self._by_chunk.items()), key=lambda use: use[1]
            )
        )

    def bytes_before(self, chunk: int, steps: float) -> int:
        """Return the number of bytes of a chunk that are read in fewer than `steps` steps."""
        return sum(n for step, n in self._by_chunk.get(chunk, ()) if step - self.step < steps)


def may_replace(upcoming: UpcomingReads, chunk: int, use: float, size: int, evicted_use: float) -> bool:
    """Decide whether a chunk may replace a cached one.

    Args:
        upcoming: the next reads of this rank.
        chunk: number of the new chunk.
        use: steps until its next read.
        size: its size in bytes.
        evicted_use: steps until the next read of the cached chunk.
    """
    return evicted_use > use and upcoming.bytes_before(chunk, evicted_use) >= MIN_READ_FRACTION * size


def choose_evictions(
    missing: int,
    sizes: Mapping[str, int],
    next_use: Mapping[str, float],
    may_evict: Callable[[float], bool],
) -> list[str] | None:
    """Choose the entries to evict for a new chunk: those used last, if that pays off; else return None.

    Belady's rule assumes that a page is fetched completely for each use. A chunk, however, is used one sample at a
    time, and a sample of a missing chunk can be read on its own. Replacing a chunk therefore pays off only if most of
    the new one is read before the old one is needed again; otherwise a small cache would fetch the same chunks over
    and over.

    Args:
        missing: bytes to free.
        sizes: size of each entry in bytes.
        next_use: steps until the next use of an entry; entries without a known use are absent.
        may_evict: returns whether an entry may be evicted, given the steps until its next use.
    """
    chosen, free = [], 0
    for name in sorted(sizes, key=lambda name: -next_use.get(name, math.inf)):
        if not may_evict(next_use.get(name, math.inf)):
            return None
        chosen.append(name)
        free += sizes[name]
        if free >= missing:
            return chosen
    return None
