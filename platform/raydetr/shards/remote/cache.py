"""Keep chunks of remote shards on a node's local disk, shared by all its processes.

    lock                    locked exclusively while a `used` changes or a data set is removed
    FINGERPRINT/used        total bytes of the chunks, those being written included; locked shared by every process
                            that reads these shards
    FINGERPRINT/N           the chunk whose first sample is N
    FINGERPRINT/N.PID.tmp   being written
    FINGERPRINT/lock-NN     held while a chunk is downloaded, so that no other process downloads it too

Nothing is evicted while it is used: each sample is read once per epoch in a new order, so any set of chunks with a
share s of the bytes serves a share s of the reads, and replacing one chunk by another gains nothing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from raydetr.store.node_copies import locked

NUM_LOCKS = 256  # locks of chunks: of two with the same lock, one waits for the other's download
FULL_SECONDS = 60.0  # after finding no room, a process does not ask for some; then another run may have ended


class NodeCache:
    """The chunks of one data set, in a folder for several whose chunks have at most `max_bytes` in total.

    Raises:
        ValueError: the folder cannot be used.
    """

    def __init__(self, root: Path, fingerprint: str, max_bytes: int) -> None:
        self._root, self._folder, self._max_bytes = root, root / fingerprint, max_bytes
        self._full_until = 0.0  # on the monotonic clock
        try:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root / "lock"):
                self._folder.mkdir(exist_ok=True)
                self._used = os.open(self._folder / "used", os.O_CREAT | os.O_RDWR, 0o644)
                if _try_lock(self._used):
                    self._recount()
                fcntl.flock(self._used, fcntl.LOCK_SH)
                os.utime(self._used)
        except OSError as error:
            raise ValueError(
                f"{root} (data.remote.cache_dir) cannot be used as a cache ({error}): name a folder on a disk of "
                "this node that can be written"
            ) from None

    def __del__(self) -> None:
        if hasattr(self, "_used"):
            os.close(self._used)

    @property
    def is_full(self) -> bool:
        """Whether this process found no room less than FULL_SECONDS ago, and has given none back since then."""
        return time.monotonic() < self._full_until

    def read(self, number: int, offset: int, length: int) -> bytes | None:
        """Read a range of a chunk; None if it is not there."""
        try:
            with (self._folder / str(number)).open("rb", buffering=0) as file:
                file.seek(offset)
                return file.read(length)
        except OSError:  # not there, or the disk is broken
            return None

    def fill(self, number: int, size: int, download: Callable[[], bytes]) -> bytes | None:
        """Return a chunk after it was downloaded and kept, by this process or by another one in the meantime.

        Returns None, without a download, if there is no room for its `size` bytes.

        Raises:
            OSError: the download failed, or the disk is full.
        """
        path = self._folder / str(number)
        temporary = self._folder / f"{number}.{os.getpid()}.tmp"
        with locked(self._folder / f"lock-{number // 32 % NUM_LOCKS:02x}"):
            if path.exists():
                return path.read_bytes()
            if not self._reserve(size):
                return None
            try:
                content = download()
                temporary.write_bytes(content)
                temporary.rename(path)
            except BaseException:
                with locked(self._root / "lock"):
                    self._remove(temporary, size)
                raise
        return content

    def drop(self, number: int) -> None:
        """Remove a chunk, because it is corrupt."""
        path = self._folder / str(number)
        with locked(self._root / "lock"), suppress(FileNotFoundError):
            self._remove(path, path.stat().st_size)

    def _remove(self, path: Path, size: int) -> None:
        path.unlink(missing_ok=True)
        self._write_used(_num_bytes(self._folder / "used") - size)
        self._full_until = 0.0  # another thread may have found no room because of this chunk

    def _reserve(self, size: int) -> bool:
        """Add a chunk to the bytes in use if there is room, for which finished runs' data sets are removed."""
        with locked(self._root / "lock"):
            own = _num_bytes(self._folder / "used")
            missing = sum(map(_num_bytes, self._root.glob("*/used"))) + size - self._max_bytes
            if missing > 0 and own + size <= self._max_bytes:
                missing -= _remove_unused(self._root, missing)
            if missing <= 0:
                self._write_used(own + size)
            else:
                self._full_until = time.monotonic() + FULL_SECONDS
        return missing <= 0

    def _recount(self) -> None:
        """Remove what killed processes left, and count the rest."""
        for unfinished in self._folder.glob("*.tmp"):
            unfinished.unlink()
        self._write_used(sum(chunk.stat().st_size for chunk in self._folder.glob("[0-9]*")))

    def _write_used(self, num_bytes: int) -> None:
        os.pwrite(self._used, b"%020d" % num_bytes, 0)  # one system call: cannot be interrupted halfway


def _remove_unused(root: Path, missing: int) -> int:
    """Remove data sets that no process uses, those used longest ago first, until enough bytes are free; count them."""
    freed = 0
    for used in sorted(root.glob("*/used"), key=lambda used: used.stat().st_mtime):
        with used.open("r+b") as file:
            if freed < missing and _try_lock(file.fileno()):
                freed += _num_bytes(used)
                shutil.rmtree(used.parent)
    return freed


def _num_bytes(used: Path) -> int:
    return int(used.read_bytes() or b"0")  # empty: the process that created it was killed


def _try_lock(descriptor: int) -> bool:
    """Lock exclusively unless another process has locked it, shared or exclusively."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
