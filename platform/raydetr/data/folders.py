"""Output folders that are either whole or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def new_folder(out: Path, *, last: str) -> Iterator[Path]:
    """Give a folder to write into; its entries appear in `out` only when the block ends without an error.

    The temporary folder lies inside `out`, so that renaming never crosses file systems. The entry `last`
    is renamed after all others: where it exists, everything does. What a killed writer left is removed.

    Args:
        out: the folder to fill; missing, or empty.
        last: name of the entry whose presence means "complete".

    Raises:
        ValueError: `out` holds something, or is no folder.
        OSError: writing failed (disk full, no permission); nothing is left behind.
    """
    existed = out.exists()
    _refuse_occupied(out)
    partial = out / PARTIAL
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for entry in sorted(partial.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
            entry.rename(out / entry.name)
        partial.rmdir()
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        if isinstance(error, OSError) and error.errno is not None:
            remedy = "free space or check permissions, then run again"
            raise OSError(
                error.errno, f"{out}: writing stopped ({error.strerror or error}); {remedy}"
            ) from error
        raise


def _refuse_occupied(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, not a folder: name another output folder")
    found = [entry.name for entry in out.iterdir() if entry.name != PARTIAL] if out.is_dir() else []
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"{out} is not empty (it holds {min(found)}{more}): name another output folder, or remove it"
        )
