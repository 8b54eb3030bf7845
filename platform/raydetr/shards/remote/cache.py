"""Keep on a node's local disk what all its processes read from a server: chunks of shards, manifests and indexes.

    lock                    locked exclusively while a `used` changes or a data set is removed
    FINGERPRINT/users       locked shared by every process that reads these shards
    FINGERPRINT/used        total bytes of the chunks, those being written included
    FINGERPRINT/N           the chunk whose first sample is N
    FINGERPRINT/N.PID.tmp   being written
    FINGERPRINT/lock-NN     held while a chunk is downloaded, so that no other process downloads it too
    headers/                manifests and indexes; without a cache folder, in the folder for temporary files

Nothing is evicted while it is used: each sample is read once per epoch in a new order, so any set of chunks with a
share s of the bytes serves a share s of the reads, and replacing one chunk by another gains nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raydetr.store.output_folder import write_atomically
from raydetr.store.retry import RemoteError
from raydetr.store.store import Store

KEPT_SECONDS = 7 * 24 * 3600  # of manifests and indexes that nobody reads
NUM_LOCKS = 256  # locks of chunks: of two with the same lock, one waits for the other's download


log = logging.getLogger(__name__)


class NodeCache:
    """The chunks of one data set, in a folder for several whose chunks have at most `max_bytes` in total.

    Raises:
        ValueError: the folder cannot be used.
    """

    def __init__(self, root: Path, fingerprint: str, max_bytes: int) -> None:
        self._root, self._folder, self._max_bytes = root, root / fingerprint, max_bytes
        self.is_full = False  # there was no room, and this process has removed no chunk since then
        try:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root / "lock"):
                self._folder.mkdir(exist_ok=True)
                self._users = os.open(self._folder / "users", os.O_CREAT | os.O_RDWR, 0o644)
                if _try_lock(self._users):
                    self._recount()
                fcntl.flock(self._users, fcntl.LOCK_SH)
                os.utime(self._users)
        except OSError as error:
            raise ValueError(
                f"{root} (data.remote.cache_dir) cannot be used as a cache ({error}): name a folder on a disk of "
                "this node that can be written"
            ) from None

    def __del__(self) -> None:
        if hasattr(self, "_users"):
            os.close(self._users)

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

        Args:
            number: of the chunk.
            size: of the chunk in bytes.
            download: returns the bytes.

        Returns:
            None, without a download, if there is no room.

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
                temporary.unlink(missing_ok=True)
                with locked(self._root / "lock"):
                    self._add(-size)
                    self.is_full = False  # another thread may have found no room because of this chunk
                raise
        return content

    def drop(self, number: int) -> None:
        """Remove a chunk, because it is corrupt."""
        path = self._folder / str(number)
        with locked(self._root / "lock"):
            if path.exists():
                self._add(-path.stat().st_size)
                path.unlink()
                self.is_full = False

    def _reserve(self, size: int) -> bool:
        """Add a chunk to the bytes in use if there is room, for which finished runs' data sets are removed."""
        with locked(self._root / "lock"):
            missing = self._total() + size - self._max_bytes
            if missing > 0 and _used(self._folder) + size <= self._max_bytes:
                _remove_unused(self._root, missing)
                missing = self._total() + size - self._max_bytes
            has_room = missing <= 0  # unlike `is_full`, which another thread may change before the return
            self.is_full = not has_room
            if has_room:
                self._add(size)
        return has_room

    def _total(self) -> int:
        return sum(_used(users.parent) for users in self._root.glob("*/users"))

    def _add(self, size: int) -> None:
        _write_used(self._folder, _used(self._folder) + size)

    def _recount(self) -> None:
        """Remove what killed processes left, and count the rest."""
        for unfinished in self._folder.glob("*.tmp"):
            unfinished.unlink()
        with os.scandir(self._folder) as entries:
            _write_used(
                self._folder, sum(entry.stat().st_size for entry in entries if entry.name.isdecimal())
            )


def _remove_unused(root: Path, missing: int) -> None:
    """Remove data sets that no process uses, those opened longest ago first, until enough bytes are free."""
    for users in sorted(root.glob("*/users"), key=lambda users: users.stat().st_mtime):
        if missing <= 0:
            return
        with users.open("r+b") as file:
            if _try_lock(file.fileno()):
                missing -= _used(users.parent)
                shutil.rmtree(users.parent)


def _used(folder: Path) -> int:
    try:
        return int((folder / "used").read_bytes() or b"0")
    except FileNotFoundError:  # a process is creating the folder, or was killed while it did
        return 0


def _write_used(folder: Path, num_bytes: int) -> None:
    (folder / "used").touch()
    with (folder / "used").open("r+b", buffering=0) as file:
        file.write(b"%020d" % num_bytes)  # one system call: cannot be interrupted halfway


def _try_lock(descriptor: int) -> bool:
    """Lock exclusively unless another process has locked it, shared or exclusively."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock of a file, which is created if missing; wait for it if necessary."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_shared(store: Store, name: str, *, again: bool = False) -> bytes:
    """Read a file of a remote folder, from this node's copy if the server still has the same version.

    Copies are in `data.remote.cache_dir`, or in the folder for temporary files.

    Args:
        store: the remote folder.
        name: the file.
        again: download it although there is a copy, which may be corrupt.

    Raises:
        FileNotFoundError, RemoteError: as `Store.read`.
    """
    info = store.info(name)
    if not info.version:  # a copy could be outdated
        return store.read(name)
    key = hashlib.sha256(f"{store.name(name)} {info.size} {info.version}".encode()).hexdigest()[:32]
    try:
        folder = _folder(store.config.cache_dir)
        with locked(folder / "lock"):
            copy = folder / key
            if again or not copy.is_file():
                _remove_old(folder)
                write_atomically(copy, store.read(name))
            os.utime(copy)
            return copy.read_bytes()
    except (RemoteError, FileNotFoundError):
        raise
    except OSError as error:
        log.warning("%s is not shared by the processes of this node: %s", store.name(name), error)
        return store.read(name)


def _folder(cache_dir: Path | None) -> Path:
    folder = (cache_dir or Path(tempfile.gettempdir()) / f"raydetr-{os.getuid()}") / "headers"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def _remove_old(folder: Path) -> None:
    for copy in folder.iterdir():
        if copy.name != "lock" and copy.stat().st_mtime < time.time() - KEPT_SECONDS:
            copy.unlink()
