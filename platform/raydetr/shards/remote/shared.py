"""Download manifest and index once per node; its other processes read the copy on the disk."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from pathlib import Path

from raydetr.shards.remote.cache import locked
from raydetr.store.output_folder import write_atomically
from raydetr.store.retry import RemoteError
from raydetr.store.store import Store

KEPT_SECONDS = 7 * 24 * 3600  # of copies that nobody reads

log = logging.getLogger(__name__)


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
