"""Work with the folder of a run or a checkpoint, on a disk or at a URL, in the same way."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from raydetr.locations import is_remote, local_folder
from raydetr.store.node_copies import copy_to_node
from raydetr.store.output_folder import fsync_path, write_atomically
from raydetr.store.retry import RemoteError
from raydetr.store.url_path import UrlPath

Folder: TypeAlias = Path | UrlPath  # or a file in one

# Of mounted buckets and Windows shares, which have no hard links
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP)
COPY_KEPT_SECONDS = 3600  # a copy of a checkpoint's state can have gigabytes


def open_folder(location: str | Path) -> Folder:
    """Return the folder or file at a location; a relative path starts at the working directory.

    Raises:
        ValueError: a URL is not one of a known kind.
    """
    text = str(location)
    return UrlPath.parse(text) if is_remote(text) else local_folder(text).expanduser().absolute()


def with_retry_seconds(folder: Folder, seconds: float) -> Folder:
    """Return the same folder, whose calls raise after an outage of its server of this length."""
    return folder if isinstance(folder, Path) else folder.with_retry_seconds(seconds)


def file_sizes(folder: Folder) -> dict[str, int]:
    """Return the names of the files directly in a folder, and their sizes in bytes; nothing if there is no folder.

    Raises:
        OSError: it cannot be read.
    """
    if not isinstance(folder, Path):
        return {name: size for name, size in folder.store.list(folder.key).items() if "/" not in name}
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except FileNotFoundError:
        return {}


def read_part(path: Folder, start: int, stop: int) -> bytes:
    """Read the bytes of a file from `start` to `stop`.

    Raises:
        OSError: it cannot be read.
    """
    if not isinstance(path, Path):
        return path.store.read(path.key, start, stop)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def modified(path: Folder) -> float:
    """Return when a file that is not empty was written, in seconds since 1970 by the clock of its storage.

    Raises:
        OSError: it cannot be read.
    """
    return path.stat().st_mtime if isinstance(path, Path) else path.store.info(path.key).modified


def write_file(path: Folder, content: bytes | memoryview) -> None:
    """Write a file, or replace it; readers see all of it or nothing, even after a crash. Make its folder.

    Raises:
        OSError: it cannot be written.
    """
    if isinstance(path, Path):
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
    else:
        path.write_bytes(content)


def create_file(path: Folder, content: bytes) -> bool:
    """Write a file that does not exist; return False if it does. Of several processes, one succeeds.

    Raises:
        OSError: it cannot be written.
    """
    if not isinstance(path, Path):
        try:
            path.store.create(path.key, content)
        except FileExistsError:
            return False
        return True
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link makes it appear with its content; O_EXCL shows an empty file first
        temporary = path.with_name(f"{path.name}.{os.urandom(8).hex()}.tmp")
        temporary.write_bytes(content)
        fsync_path(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _create_without_link(path, content)
        finally:
            temporary.unlink()
    return True


def _create_without_link(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise an error of the file system as one that names the file and what to do."""
    try:
        yield
    except OSError as error:
        remedy = "free space, or check permissions and the mount"
        raise OSError(
            error.errno, f"{path}: cannot be written ({error.strerror or error}): {remedy}"
        ) from error


def remove_folder(folder: Folder) -> None:
    """Remove a folder with everything in it, if it is there.

    Raises:
        OSError: it cannot be removed.
    """
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=not folder.exists())
        return
    for key in folder.store.list(folder.key):
        (folder / key).unlink(missing_ok=True)


def local_file(path: Folder, *, again: bool = False) -> Path:
    """Return a file of this machine with the content of `path`: itself, or a copy that all processes of a node share.

    Args:
        path: the file.
        again: copy it although there is a copy.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
    """
    if isinstance(path, Path):
        return path
    try:
        return copy_to_node(path.store, path.key, "states", COPY_KEPT_SECONDS, again=again)
    except (FileNotFoundError, RemoteError):
        raise
    except OSError as error:
        folder, cause = tempfile.gettempdir(), error.strerror or error
        raise OSError(
            error.errno, f"{path}: cannot be copied to {folder} ({cause}): free space there, or set TMPDIR"
        ) from error


@contextmanager
def local_output(folder: Folder) -> Iterator[Path]:
    """Yield a folder of this machine to write files into, which are in `folder` after the block.

    Raises:
        OSError: they cannot be written.
    """
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="raydetr-") as name:
        yield Path(name)
        for path in Path(name).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
