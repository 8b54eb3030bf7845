"""The bytes of shards: what reading needs of them, and how a local folder gives it."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from raydetr.config.paths import local_folder
from raydetr.store.output_folder import PARTIAL

MAX_OPEN_FILES = 64

Span = tuple[int, int, int]  # number of the shard, offset, length


class Prefetcher(Protocol):
    """Knows what will be read, and is told how far the reading is."""

    def advance(self, step: int) -> None:
        """This process is about to read for a step."""

    def close(self) -> None:
        """Nothing more will be read."""


class ShardFiles(Protocol):
    """Reads at an offset. One thread uses it at a time; forks and copies make what they need themselves."""

    @property
    def names(self) -> Sequence[str]:
        """Each shard for messages, as a user would write it."""

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read `length` bytes, or fewer where the file ends.

        Raises:
            OSError: they cannot be read.
        """

    def reread(self, shard: int, offset: int, length: int) -> bytes:
        """The same, from where the shard comes from, past every copy of it."""

    def start(self, spans: Sequence[Span]) -> Callable[[], list[bytes | OSError]]:
        """Begin to read several spans together; the function that is returned waits for them."""

    def prefetch(self, turns: Iterable[Sequence[int]]) -> Prefetcher:
        """Prepare for what will be read: the samples of each step of this rank, from step 0 on.

        `turns` is read by another thread, as far ahead as is useful.
        """


class Folder(Protocol):
    """A folder of shards, before it is known to be one."""

    def read(self, name: str) -> bytes:
        """A whole small file.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """

    def check_sizes(self, sizes: Mapping[str, int]) -> list[str]:
        """What is wrong with some files of known sizes, in words; the first faults at least."""

    def without_manifest(self) -> str:
        """What the folder is, if not one of shards, and what to do."""


class NullPrefetcher:
    """A Follower with nothing to do."""

    def advance(self, step: int) -> None:
        """As Follower."""

    def close(self) -> None:
        """As Follower."""


class LocalFiles:
    """Open shards, the latest used ones only."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.names = [str(path) for path in paths]
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """As ShardFiles."""
        return os.pread(self._descriptor(shard), length, offset)

    def reread(self, shard: int, offset: int, length: int) -> bytes:
        """As ShardFiles; there are no copies."""
        return self.read(shard, offset, length)

    def start(self, spans: Sequence[Span]) -> Callable[[], list[bytes | OSError]]:
        """As ShardFiles; nothing is gained by beginning early."""
        return lambda: [self._bytes_or_error(*span) for span in spans]

    def prefetch(self, turns: Iterable[Sequence[int]]) -> Prefetcher:
        """As ShardFiles; there is nothing to prepare."""
        return NullPrefetcher()

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
        return LocalFiles, (self.paths,)  # another process opens the files itself

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class LocalFolder:
    """A folder of this machine's file systems."""

    def __init__(self, location: str | Path) -> None:
        self.path = local_folder(location)
        self.location = str(self.path)

    def read(self, name: str) -> bytes:
        """As Folder."""
        return (self.path / name).read_bytes()

    def check_sizes(self, sizes: Mapping[str, int]) -> list[str]:
        """As Folder."""
        faults = []
        for name, size in sizes.items():
            file = self.path / name
            if not file.is_file():
                faults.append(f"{name} is missing")
            elif file.stat().st_size != size:
                faults.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
        return faults

    def without_manifest(self) -> str:
        """As Folder."""
        if (self.path / PARTIAL).is_dir():
            return "writing the shards did not end: run that command again, it goes on where it stopped"
        write = f"`raydetr shards write --images DIR --annotations FILE --out {self.path}`"
        if any(self.path.glob("*.tar")):
            index = f"`raydetr shards index {self.path}`, if others wrote them"
            return f"the shards have no manifest.json, so writing did not end; write them with {write}, or {index}"
        return f"no shards found; write them with {write}"
