"""Cache verified chunks of remote files in a folder on a node's local disk, shared by all its processes.

    lock          locked exclusively while entries or `used` change
    used          total bytes of complete and partial entries; recounted by each process that opens the cache
    whole/NAME    complete entries; read under a shared lock of the file, removed under an exclusive one
    partial/NAME  entries being written, each locked by its writer; the kernel releases the lock of a killed writer

An entry is renamed into `whole` after its content was verified. Its full size is reserved in `used` before its first
byte is written, so that the budget is never exceeded.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

StoreResult = Literal["stored", "present", "full"]
Fill = Callable[[Callable[[bytes], None]], None]  # passes all bytes to the given function


class CacheFull(OSError):
    """The disk is full although the budget is not used up."""


class NodeCache:
    """A cache folder with a budget of `max_bytes`; created if missing.

    Raises:
        ValueError: the folder cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._complete, self._partial = self.folder / "whole", self.folder / "partial"
        try:
            self._complete.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(exist_ok=True)
            with self._locked():
                self._recount()
        except OSError as error:
            raise ValueError(
                f"{folder} (data.remote.cache_dir) cannot be used as a cache ({error}): name a folder on a disk of "
                "this node that can be written"
            ) from None

    def __reduce__(self) -> tuple[type[NodeCache], tuple[Path, int]]:
        return NodeCache, (self.folder, self.max_bytes)

    def sizes(self) -> dict[str, int]:
        """Return the size of each entry in bytes."""
        sizes = {}
        for entry in _scan(self._complete):
            with suppress(FileNotFoundError):  # removed by another process
                sizes[entry.name] = entry.stat().st_size
        return sizes

    def names(self) -> set[str]:
        """Return the names of the entries; much faster than `sizes`."""
        return set(os.listdir(self._complete))  # noqa: PTH208 the fastest way

    def has(self, name: str) -> bool:
        """Return True if an entry exists."""
        return (self._complete / name).exists()

    def used(self) -> int:
        """Return the number of bytes in use, including reservations."""
        with self._locked():
            return self._read_used()

    def read(self, name: str, size: int, offset: int, length: int) -> bytes | None:
        """Read a range of an entry of `size` bytes; None if there is no such entry."""
        with _opened(self._complete / name, os.O_RDONLY, fcntl.LOCK_SH) as descriptor:
            if descriptor is None or os.fstat(descriptor).st_size != size:
                return None
            return os.pread(descriptor, length, offset)

    def remove(self, names: Iterable[str]) -> int:
        """Remove entries that are not being read; return the number of bytes freed."""
        with self._locked():
            return self._remove(names)

    def store(
        self, name: str, size: int, fill: Fill, choose_evictions: Callable[[int], Iterable[str] | None]
    ) -> StoreResult:
        """Write an entry, unless it exists or another process is writing it.

        Args:
            name: name of the entry.
            size: its size in bytes.
            fill: supplies the bytes; raises if they are invalid.
            choose_evictions: given the number of missing bytes, returns entries to evict in this order, or None to
                evict nothing.

        Returns:
            "stored"; "present" if it exists or another process is writing it; "full" if not enough was evicted.

        Raises:
            CacheFull: the disk is full.
        """
        with self._locked():
            if self.has(name) or self._is_being_written(name):
                return "present"
            missing = self._read_used() + size - self.max_bytes
            if missing > 0:
                evicted = choose_evictions(missing)
                if evicted is None or self._remove(evicted, missing) < missing:
                    return "full"
            # The reservation comes first: if this process is killed here, `used` is too large, never too small.
            self._write_used(self._read_used() + size)
            descriptor = os.open(self._partial / name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, size)  # a recount sees the reserved size
        done = False
        try:
            _fill(descriptor, size, fill)
            with self._locked():
                (self._partial / name).rename(self._complete / name)
            done = True
        finally:
            if not done:
                with self._locked():
                    self._discard(name, descriptor, size)
            os.close(descriptor)
        return "stored"

    def _remove(self, names: Iterable[str], enough: int | None = None) -> int:
        free = 0
        for name in names:
            if enough is not None and free >= enough:
                break
            path = self._complete / name
            with _opened(path, os.O_RDWR, fcntl.LOCK_EX) as descriptor:
                if descriptor is not None:
                    free += os.fstat(descriptor).st_size
                    # A process that has opened the file, but not locked it, sees size 0 and ignores it. The disk
                    # space is free at once.
                    os.ftruncate(descriptor, 0)
                    path.unlink()
        self._write_used(max(0, self._read_used() - free))
        return free

    def _discard(self, name: str, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, 0)
        (self._partial / name).unlink(missing_ok=True)
        self._write_used(max(0, self._read_used() - size))

    def _is_being_written(self, name: str) -> bool:
        """Return True if a running process writes the entry; remove what a killed one left."""
        path = self._partial / name
        with _opened(path, os.O_RDWR, fcntl.LOCK_EX) as descriptor:
            if descriptor is None:  # no such file, or locked by its writer
                return path.exists()
            self._discard(name, descriptor, os.fstat(descriptor).st_size)
        return False

    def _recount(self) -> None:
        for entry in _scan(self._partial):
            self._is_being_written(entry.name)
        self._write_used(self._sum_of_entries())

    def _sum_of_entries(self) -> int:
        return sum(entry.stat().st_size for entry in [*_scan(self._complete), *_scan(self._partial)])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _read_used(self) -> int:
        written = (self.folder / "used").read_bytes()
        return int(written) if written else self._sum_of_entries()  # empty: its first writer was killed

    def _write_used(self, num_bytes: int) -> None:
        descriptor = os.open(self.folder / "used", os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            os.pwrite(descriptor, b"%020d" % num_bytes, 0)  # one system call: cannot be interrupted halfway
        finally:
            os.close(descriptor)


def _fill(descriptor: int, size: int, fill: Fill) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
        written = 0

        def accept(chunk: bytes) -> None:
            nonlocal written
            written += os.pwrite(descriptor, chunk, written)

        fill(accept)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CacheFull(error.errno, "no space left on the disk") from None
        raise
    assert written == size, (written, size)


@contextmanager
def _opened(path: Path, flags: int, lock: int) -> Iterator[int | None]:
    """Open and lock a file; yield None if it does not exist or another process has locked it."""
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        # The file may have been unlinked between open and flock.
        yield descriptor if os.fstat(descriptor).st_nlink else None
    finally:
        os.close(descriptor)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.is_file()]
