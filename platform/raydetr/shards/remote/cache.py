"""A folder on a node's own disk that all its processes share: parts of remote files, verified, within a budget.

    lock          held while something is changed: what is there, what is used
    used          bytes that whole and partial entries take together; counted anew by each process that opens it
    whole/NAME    entries; one is read under a shared lock of its file, and removed under an exclusive one
    partial/NAME  entries that are being written, each locked by its writer; of a killed one the lock is free

An entry gets its name in `whole` by a rename, after its content was checked. Room is taken before the first byte is
written, for its whole size, so that the budget holds at every moment.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

SearchResult = Literal["stored", "there", "no room"]
Fill = Callable[[Callable[[bytes], None]], None]  # hands all bytes to the function it is given


class CacheFull(OSError):
    """The disk has no room for what the budget allows."""


class NodeCache:
    """Opens, or makes, the cache.

    Raises:
        ValueError: the folder cannot be used.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._whole, self._partial = self.folder / "whole", self.folder / "partial"
        try:
            self._whole.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(exist_ok=True)
            with self._locked():
                self._count_anew()
        except OSError as error:
            raise ValueError(
                f"{folder} (data.remote.cache_dir) cannot be used as a cache ({error}): name a folder on a disk of "
                "this node that can be written"
            ) from None

    def __reduce__(self) -> tuple[type[NodeCache], tuple[Path, int]]:
        return NodeCache, (self.folder, self.max_bytes)

    def names(self) -> dict[str, int]:
        """Name and size of the entries."""
        sizes = {}
        for entry in _scan(self._whole):
            with suppress(FileNotFoundError):  # removed meanwhile
                sizes[entry.name] = entry.stat().st_size
        return sizes

    def listing(self) -> set[str]:
        """Names of the entries."""
        return set(os.listdir(self._whole))  # noqa: PTH208 no other is as quick

    def has(self, name: str) -> bool:
        """Whether an entry is there."""
        return (self._whole / name).exists()

    def used(self) -> int:
        """Bytes that are taken."""
        with self._locked():
            return self._read_used()

    def read(self, name: str, size: int, offset: int, length: int) -> bytes | None:
        """A part of an entry of `size` bytes, or None where it is not there."""
        with _opened(self._whole / name, os.O_RDONLY, fcntl.LOCK_SH) as descriptor:
            if descriptor is None or os.fstat(descriptor).st_size != size:
                return None
            return os.pread(descriptor, length, offset)

    def remove(self, names: Iterable[str]) -> int:
        """Remove entries that nobody reads just now; returns the bytes that became free."""
        with self._locked():
            return self._remove(names)

    def store(
        self, name: str, size: int, fill: Fill, victims: Callable[[int], Iterable[str] | None]
    ) -> SearchResult:
        """Make an entry, unless it is there or another process is at it.

        Args:
            name: of the entry.
            size: bytes.
            fill: brings the bytes, and raises where they are not what they should be.
            victims: asked, where `n` bytes are missing, for entries to remove in that order; None: for none.

        Returns:
            "there" where it is, or another process is at it.

        Raises:
            CacheFull: the disk is full.
        """
        with self._locked():
            if self.has(name) or self._is_being_written(name):
                return "there"
            missing = self._read_used() + size - self.max_bytes
            if missing > 0:
                chosen = victims(missing)
                if chosen is None or self._remove(chosen, missing) < missing:
                    return "no room"
            self._write_used(self._read_used() + size)
            descriptor = os.open(self._partial / name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, size)  # for who counts
        done = False
        try:
            _fill(descriptor, size, fill)
            with self._locked():
                (self._partial / name).rename(self._whole / name)
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
            path = self._whole / name
            with _opened(path, os.O_RDWR, fcntl.LOCK_EX) as descriptor:
                if descriptor is not None:
                    free += os.fstat(descriptor).st_size
                    os.ftruncate(
                        descriptor, 0
                    )  # whoever has it open finds nothing, and its room is free at once
                    path.unlink()
        self._write_used(max(0, self._read_used() - free))
        return free

    def _discard(self, name: str, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, 0)
        (self._partial / name).unlink(missing_ok=True)
        self._write_used(max(0, self._read_used() - size))

    def _is_being_written(self, name: str) -> bool:
        """Whether a living process is; what a dead one left is removed."""
        path = self._partial / name
        with _opened(path, os.O_RDWR, fcntl.LOCK_EX) as descriptor:
            if descriptor is None:
                return path.exists()
            self._discard(name, descriptor, os.fstat(descriptor).st_size)
        return False

    def _count_anew(self) -> None:
        for entry in _scan(self._partial):
            self._is_being_written(entry.name)
        self._write_used(self._sum_of_entries())

    def _sum_of_entries(self) -> int:
        return sum(entry.stat().st_size for entry in [*_scan(self._whole), *_scan(self._partial)])

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
        return int(written) if written else self._sum_of_entries()  # its writer was killed when it was new

    def _write_used(self, num_bytes: int) -> None:
        descriptor = os.open(self.folder / "used", os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            os.pwrite(descriptor, b"%020d" % num_bytes, 0)  # in one go: a process may be killed at any moment
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
            raise CacheFull(error.errno, "there is no room on the disk") from None
        raise
    assert written == size, (written, size)


@contextmanager
def _opened(path: Path, flags: int, lock: int) -> Iterator[int | None]:
    """A file under a lock; None where it is not there, or another has it locked."""
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
        yield descriptor if os.fstat(descriptor).st_nlink else None
    finally:
        os.close(descriptor)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.is_file()]
