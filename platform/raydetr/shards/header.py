"""What shards say about themselves: manifest and index, read and checked before anything else."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from raydetr.shards.files import Folder
from raydetr.shards.manifest import INDEX, MANIFEST, SAMPLE_DTYPE, Manifest, Samples, data_fingerprint
from raydetr.shards.validation import Fault, check_index, check_manifest
from raydetr.store.transfer import RemoteError

T = TypeVar("T")
NOT_THERE = (FileNotFoundError, NotADirectoryError)

# what numpy and zipfile raise for a damaged npz; a size that was changed may ask for more than the memory
UNREADABLE_INDEX = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, SyntaxError, EOFError, RuntimeError,
    NotImplementedError, MemoryError, OverflowError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


def load_header(folder: Folder, location: str, *, reads: int) -> tuple[Manifest, Samples]:
    """The manifest and the index of a folder of shards, which belong together.

    Args:
        folder: where they are.
        location: its name for messages.
        reads: how often a file is read that turns out wrong, which on its way it may have become.

    Raises:
        ValueError: there is none, or they are damaged, or of different shards.
    """
    try:
        manifest = _load(folder, MANIFEST, _parse_manifest, location, reads)
    except NOT_THERE:
        raise ValueError(f"{location}: {folder.without_manifest()}") from None
    return manifest, _load(folder, INDEX, lambda content: _parse_index(content, manifest), location, reads)


def check_sizes(folder: Folder, location: str, manifest: Manifest) -> None:
    """Make sure that every shard is there, with its size.

    Raises:
        ValueError: they are not; lists up to ten.
    """
    faults = folder.check_sizes({shard.name: shard.size for shard in manifest.shards})
    if faults:
        listing = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
        raise ValueError(f"{location}: {listing}: copy these shards again, or write the shards again")


def _load(folder: Folder, name: str, parse: Callable[[bytes], T], location: str, reads: int) -> T:
    fault: Exception | None = None
    for _ in range(reads):
        try:
            return parse(folder.read(name))
        except (Fault, MemoryError) as error:
            fault = error
        except OSError as error:
            if isinstance(error, RemoteError) or (name == MANIFEST and isinstance(error, NOT_THERE)):
                raise
            raise ValueError(f"{location}/{name}: cannot be read ({error}): write the shards again") from None
    raise ValueError(f"{location}/{name}: {fault}: write the shards again")


def _parse_manifest(content: bytes) -> Manifest:
    try:
        manifest = Manifest.parse(content)
    except ValueError as error:
        raise Fault(str(error)) from None
    check_manifest(manifest)
    return manifest


def _parse_index(content: bytes, manifest: Manifest) -> Samples:
    try:
        with np.load(io.BytesIO(content)) as arrays:
            samples: Samples = arrays["samples"]
    except UNREADABLE_INDEX as error:
        raise Fault(f"cannot be read ({error})") from None
    if (
        samples.dtype != SAMPLE_DTYPE
        or data_fingerprint(samples, manifest.categories) != manifest.fingerprint
    ):
        raise Fault("is not the index of this manifest")
    check_index(samples, manifest)
    return samples
