"""Write output folders atomically: they are complete, or they do not exist."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
PUBLISHING = "publishing.json"  # names of the entries that are being renamed into place
LOCK = "lock"


@contextmanager
def atomic_folder(out: Path, *, last: str) -> Iterator[Path]:
    """Yield a folder to write into; its entries appear in `out` only when the block ends without an error.

    The temporary folder lies inside `out`, so renaming never crosses file systems. The entry `last` is renamed
    after all others: if it exists, so does everything else. The leftovers of a killed writer are removed.

    Args:
        out: the folder to fill; missing or empty.
        last: name of the entry whose presence means "complete".

    Raises:
        ValueError: `out` is not empty, or is not a folder.
        OSError: writing failed (disk full, no permission); nothing is left behind.
    """
    existed = out.exists()
    check_out_folder(out)
    partial = out / PARTIAL
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for entry in sorted(partial.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
            entry.rename(out / entry.name)
        partial.rmdir()
    except BaseException as error:
        _remove(out, existed)
        if isinstance(error, OSError) and error.errno is not None:
            raise _interrupted(out, error, "free space or check permissions, then run again") from error
        raise


@contextmanager
def resumable_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into that survives an interruption, for a writer that can resume from its content.

    It is `.partial` inside `out`, as for `atomic_folder`. The block must end with `publish`. If it ends in any other
    way (invalid input, Ctrl-C, a full disk, a killed process), the next run gets the folder with everything that was
    finished. If nothing was, the folder is removed.

    Args:
        out: the folder to fill; missing, empty, or left by an interrupted run.

    Raises:
        ValueError: `out` holds something else, is not a folder, or is being written by another process.
        OSError: writing failed (disk full, no permission).
    """
    existed = out.exists()
    partial = out / PARTIAL
    if not partial.is_dir():
        check_out_folder(out)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = (partial / LOCK).open("ab")
    except OSError as error:
        raise _interrupted(out, error, "check permissions, then run again") from error
    with lock:
        _lock(out, lock.fileno())
        _undo_publish(out)
        check_out_folder(out)
        try:
            for entry in partial.glob("*.tmp"):
                entry.unlink()
            yield partial
            shutil.rmtree(partial)
        except ValueError:
            if [entry.name for entry in partial.iterdir()] == [LOCK]:
                _remove(out, existed)
            raise
        except OSError as error:
            remedy = "free space or check permissions, then run again: it resumes where it stopped"
            raise _interrupted(out, error, remedy) from error


def publish(partial: Path, names: Sequence[str]) -> None:
    """Move entries of a resumable folder into place, in this order; the last one means "complete".

    The next `resumable_folder` undoes an interrupted call.
    """
    out = partial.parent
    # Contents and the list of names must be on the disk before the first rename: after a power failure, an entry in
    # `out` is either complete or can be moved back.
    for name in names:
        fsync_path(partial / name)
    write_atomically(partial / PUBLISHING, json.dumps(names).encode())
    fsync_path(partial)
    for name in names[:-1]:
        (partial / name).rename(out / name)
    fsync_path(out)
    (partial / names[-1]).rename(out / names[-1])
    fsync_path(out)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that it either has this content or is unchanged, even after a crash."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    fsync_path(temporary)
    temporary.rename(path)


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_out_file(path: Path) -> None:
    """Raise before minutes of work if a file cannot be written to `path`.

    Raises:
        ValueError: its folder is missing, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}: create it first")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder: name a file")


def check_out_folder(out: Path) -> None:
    """Raise before minutes of work if `out` is neither an empty folder nor a new one.

    What an interrupted writer has left there (`.partial`) does not count.

    Raises:
        ValueError: it is a file, or holds something.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, not a folder: name another output folder")
    found = [entry.name for entry in out.iterdir() if entry.name != PARTIAL] if out.is_dir() else []
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"{out} is not empty (it holds {min(found)}{more}): name another output folder, or remove it"
        )


def _undo_publish(out: Path) -> None:
    """Move back what an interrupted `publish` had renamed."""
    listing = out / PARTIAL / PUBLISHING
    if not listing.is_file():
        return
    names = json.loads(listing.read_bytes())
    if (out / names[-1]).exists():  # Everything was renamed: the folder is complete.
        shutil.rmtree(out / PARTIAL)
        return
    for name in names:
        if (out / name).exists():
            (out / name).rename(out / PARTIAL / name)
    listing.unlink()


def _lock(out: Path, descriptor: int) -> None:
    """Lock out other writers; the kernel releases the lock when the process ends, in any way."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{out}: another process is writing there: wait for it, or name another folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # the file system has no locks
            raise _interrupted(out, error, "check permissions, then run again") from error


def _remove(out: Path, existed: bool) -> None:
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    if not existed and out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def _interrupted(out: Path, error: OSError, remedy: str) -> OSError:
    return OSError(error.errno, f"{out}: writing stopped ({error.strerror or error}); {remedy}")
