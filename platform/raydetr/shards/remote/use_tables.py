"""When the processes of a node will use the entries of their cache: each says it in a file, locked while it lives."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

TABLE_DTYPE = np.dtype([("entry", "<u8"), ("steps", "<i8")])
REFRESH_SECONDS = 1.0  # how old may be what is known of other processes


class UseTables:
    """This process's table, and the sight of all others' in the same folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._name = folder, f"{os.getpid()}-{secrets.token_hex(4)}"
        self._lock = os.open(folder / f"{self._name}.lock", os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._own: Mapping[str, int] = {}
        self._others: dict[int, int] = {}
        self._published = self._looked = float("-inf")

    def publish(self, next_uses: Mapping[str, int]) -> None:
        """Say in how many steps this process's rank uses each entry next. Others learn it within a second."""
        self._own = next_uses
        if time.monotonic() - self._published < REFRESH_SECONDS:
            return
        self._published = time.monotonic()
        table = np.array([(_number(name), steps) for name, steps in next_uses.items()], TABLE_DTYPE)
        new = self._folder / f"{self._name}.new"
        new.write_bytes(table.tobytes())
        new.rename(self._folder / f"{self._name}.table")

    def next_uses(self, entries: Iterable[str]) -> dict[str, int]:
        """In how many steps any process uses an entry; nothing for those that none is known to use."""
        self._look()
        found = {}
        for entry in entries:
            steps = [s for s in (self._own.get(entry), self._others.get(_number(entry))) if s is not None]
            if steps:
                found[entry] = min(steps)
        return found

    def close(self) -> None:
        """Take back what was said."""
        for suffix in ("new", "table", "lock"):
            (self._folder / f"{self._name}.{suffix}").unlink(missing_ok=True)
        os.close(self._lock)

    def _look(self) -> None:
        if time.monotonic() - self._looked < REFRESH_SECONDS:
            return
        self._looked = time.monotonic()
        self._others = {}
        for lock in self._folder.glob("*.lock"):
            if lock.stem == self._name or _is_dead(lock):
                continue
            with suppress(FileNotFoundError):  # has said nothing yet
                content = lock.with_suffix(".table").read_bytes()
                for entry, steps in np.frombuffer(content, TABLE_DTYPE).tolist():
                    self._others[entry] = min(steps, self._others.get(entry, steps))


def _number(entry: str) -> int:
    return int.from_bytes(hashlib.blake2b(entry.encode(), digest_size=8).digest(), "little")


def _is_dead(lock: Path) -> bool:
    """Whether the process of a table is; its files are removed then."""
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
