"""Download a file once per node; its other processes read the copy on the disk."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raydetr.store.output_folder import write_atomically
from raydetr.store.retry import RemoteError
from raydetr.store.store import Store

KEPT_SECONDS = 7 * 24 * 3600  # of copies that nobody reads

log = logging.getLogger(__name__)


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
    try:
        return copy_to_node(store, name, "headers", KEPT_SECONDS, again=again).read_bytes()
    except (RemoteError, FileNotFoundError):
        raise
    except OSError as error:
        log.warning("%s is not shared by the processes of this node: %s", store.name(name), error)
        return store.read(name)


def copy_to_node(store: Store, name: str, kind: str, kept_seconds: float, *, again: bool = False) -> Path:
    """Return this node's copy of a remote file; download it unless the copy has the version that the server has.

    Args:
        store: the remote folder.
        name: the file.
        kind: name of the folder of the copies.
        kept_seconds: after this time without use, a copy is removed.
        again: download it although there is a copy, which may be corrupt.

    Raises:
        FileNotFoundError, RemoteError: as `Store.read`.
        OSError: this node cannot keep a copy.
    """
    info = store.info(name)
    # Without a version a copy could be outdated
    version = info.version or os.urandom(8).hex()
    key = hashlib.sha256(f"{store.name(name)} {info.size} {version}".encode()).hexdigest()[:32]
    folder = _folder(store.config.cache_dir, kind)
    with locked(folder / "lock"):
        copy = folder / key
        if again or not copy.is_file():
            _remove_old(folder, kept_seconds)
            write_atomically(copy, store.read(name))
        os.utime(copy)
        return copy


def _folder(cache_dir: Path | None, kind: str) -> Path:
    folder = (cache_dir or Path(tempfile.gettempdir()) / f"raydetr-{os.getuid()}") / kind
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def _remove_old(folder: Path, kept_seconds: float) -> None:
    for copy in folder.iterdir():
        if copy.name != "lock" and copy.stat().st_mtime < time.time() - kept_seconds:
            copy.unlink()
