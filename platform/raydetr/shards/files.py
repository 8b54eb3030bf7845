"""Define how the bytes of shards are read (`ShardFiles`), and read them from a local folder."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from raydetr.locations import local_folder
from raydetr.shards.manifest import Manifest, Samples
from raydetr.store.output_folder import PARTIAL

MAX_OPEN_FILES = 64

Span = tuple[int, int, int]  # shard number, offset, length


class ShardFiles(Protocol):
    """Reads byte ranges of shards. Not thread-safe; unpickled copies open their own files."""

    names: list[str]  # location of each shard, for messages

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read `length` bytes, or fewer at the end of the file.

        Raises:
            OSError: they cannot be read.
        """

    def reread(self, shard: int, offset: int, length: int) -> bytes:
        """Read like `read`, but from the origin of the shard, bypassing every cached copy."""

    def start(self, spans: Sequence[Span]) -> Callable[[], list[bytes | OSError]]:
        """Start reading several spans together; return a function that waits for the results."""


class LocalFiles:
    """Shards in local files, of which the most recently used ones stay open."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.names = [str(path) for path in paths]
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read a range of a shard."""
        return os.pread(self._descriptor(shard), length, offset)

    def reread(self, shard: int, offset: int, length: int) -> bytes:
        """Read a range of a shard; there are no cached copies to bypass."""
        return self.read(shard, offset, length)

    def start(self, spans: Sequence[Span]) -> Callable[[], list[bytes | OSError]]:
        """Return a function that reads the spans; starting early gains nothing for local files."""
        return lambda: [self._bytes_or_error(*span) for span in spans]

    def _bytes_or_error(self, shard: int, offset: int, length: int) -> bytes | OSError:
        try:
            return self.read(shard, offset, length)
        except OSError as error:
            return error

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return self._open[shard]

    def __reduce__(self) -> tuple[type[LocalFiles], tuple[list[Path]]]:
        return LocalFiles, (self.paths,)  # the other process opens the files itself

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class LocalFolder:
    """A folder in this machine's file system that should hold shards; not validated yet."""

    def __init__(self, location: str | Path) -> None:
        self.path = local_folder(location)
        self.location = str(self.path)

    def read(self, name: str, *, again: bool = False) -> bytes:
        """Read a complete small file; `again` after it was found corrupt.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such file.
            OSError: it cannot be read.
        """
        return (self.path / name).read_bytes()

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Return the sizes in bytes of those files that exist."""
        return {name: (self.path / name).stat().st_size for name in names if (self.path / name).is_file()}

    def files(self, manifest: Manifest, samples: Samples) -> LocalFiles:
        """Return the shards of a manifest, and of an index that local files do not need, to read from."""
        return LocalFiles([self.path / shard.name for shard in manifest.shards])

    def explain_missing_manifest(self) -> str:
        """Return a message: why there is no manifest, and the remedy."""
        if (self.path / PARTIAL).is_dir():
            return "writing the shards did not finish: run that command again, it resumes where it stopped"
        write = f"`raydetr shards write --images DIR --annotations FILE --out {self.path}`"
        if any(self.path.glob("*.tar")):
            convert = f"`raydetr shards write --webdataset {self.path} --out DIR`"
            return (
                f"the shards have no manifest.json, so writing did not finish; write them with {write}, or, if another "
                f"program wrote them, {convert}"
            )
        return f"no shards found; write them with {write}"
