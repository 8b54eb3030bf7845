"""Read shards from a server: small files completely, samples by byte ranges or from the node cache."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from raydetr.config import RemoteConfig
from raydetr.shards.files import Span
from raydetr.shards.manifest import CHUNK_SIZE, Manifest, Samples
from raydetr.shards.remote.cache import NodeCache
from raydetr.store.background import BackgroundThreads
from raydetr.store.node_copies import read_shared
from raydetr.store.retry import RemoteError
from raydetr.store.store import Store

log = logging.getLogger(__name__)

Found = dict[Span, bytes]

MERGED_GAP = 64 * 1024  # bytes: samples of a chunk that are closer are read in one request


def merge(spans: Sequence[Span], gap: int) -> list[tuple[int, int, list[Span]]]:
    """Merge spans of a shard that lie within `gap` bytes of each other; return start, stop and spans of each."""
    merged: list[tuple[int, int, list[Span]]] = []
    for span in sorted(spans):
        start, stop = span[1], span[1] + span[2]
        if merged and start - merged[-1][1] <= gap:
            first, last, members = merged[-1]
            merged[-1] = (first, max(last, stop), [*members, span])
        else:
            merged.append((start, stop, [span]))
    return merged


class RemoteFolder:
    """A folder on a server, like `LocalFolder`."""

    def __init__(self, location: str, config: RemoteConfig) -> None:
        self.location, self.store = location, Store(location, config)

    def read(self, name: str, *, again: bool = False) -> bytes:
        """Read a complete small file, downloaded once per node."""
        return read_shared(self.store, name, again=again)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Return the sizes in bytes of those files that exist, by one listing or a request for each file."""
        found = self.store.sizes()
        if found is not None:
            return found
        threads = BackgroundThreads(self.store.config.max_requests, "sizes")
        futures = {name: threads.submit(self.store.info, name) for name in names}
        found = {}
        for name, future in futures.items():
            with suppress(FileNotFoundError):
                found[name] = future.result().size
        return found

    def files(self, manifest: Manifest, samples: Samples) -> RemoteFiles:
        """Return the shards of a manifest and an index to read from."""
        return RemoteFiles(self.store, manifest, samples)

    def explain_missing_manifest(self) -> str:
        """Return a message: why there is no manifest, and the remedy."""
        return "no shards found there (no manifest.json); copy a folder of shards to it"


@dataclass(frozen=True)
class Chunk:
    """`CHUNK_SIZE` consecutive samples of a shard, the unit of the node cache: their range. Equal for all of them.

    The unit is not the shard, because the training order shuffles chunks: a rank reads all samples of a chunk within
    one epoch, but only its own chunks of a shard. With 8 nodes, caching complete shards would download 8 times what a
    node needs.
    """

    shard: int
    start: int  # bytes, in the shard
    stop: int
    first: int  # index of its first sample


class Chunks:
    """The chunks of shards with the index `samples`."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        number = np.ascontiguousarray(samples["shard"])
        # Sample of each shard
        self._firsts = np.searchsorted(number, np.arange(int(number.max(initial=0)) + 2))

    def find(self, span: Span) -> Chunk:
        """Return the chunk that holds a sample or a part of it."""
        row = self._row(span)
        first = int(self._firsts[span[0]])
        first += (row - first) // CHUNK_SIZE * CHUNK_SIZE
        rows = self._samples[first : min(first + CHUNK_SIZE, int(self._firsts[span[0] + 1]))]
        stop = int(rows["offset"][-1]) + int(rows["length"][-1])
        return Chunk(span[0], int(rows["offset"][0]), stop, first)

    def is_intact(self, span: Span, content: bytes) -> bool:
        """Check the crc32 of a sample; of a part of one, only the length."""
        sample = self._samples[self._row(span)]
        if len(content) != span[2]:
            return False
        return span[1:] != (sample["offset"], sample["length"]) or zlib.crc32(content) == sample["crc32"]

    def _row(self, span: Span) -> int:
        first, last = self._firsts[span[0]], self._firsts[span[0] + 1]
        return int(first + np.searchsorted(self._samples["offset"][first:last], span[1], side="right") - 1)


class RemoteFiles:
    """The `ShardFiles` of a remote folder with this manifest and index."""

    def __init__(self, store: Store, manifest: Manifest, samples: Samples) -> None:
        self._arguments = (store, manifest, samples)
        self._store, self._fingerprint = store, manifest.fingerprint
        self._files = [shard.name for shard in manifest.shards]
        self._sizes = [shard.size for shard in manifest.shards]
        self._chunks = Chunks(samples)
        self._threads = BackgroundThreads(store.config.max_requests, "remote")
        self.names = [store.name(file) for file in self._files]

    def __reduce__(self) -> tuple[type[RemoteFiles], tuple[Store, Manifest, Samples]]:
        # While this process uses the cache, it is kept for loaders that are started later, in the next evaluation
        _ = self._cache
        return RemoteFiles, self._arguments

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read a range of a shard, from the node cache if possible."""
        (content,) = self.start([(shard, offset, length)])()
        if isinstance(content, OSError):
            raise content
        return content

    def reread(self, shard: int, offset: int, length: int) -> bytes:
        """Read a range of a shard from the server, and remove a copy in the node cache."""
        if self._cache is not None:
            self._cache.drop(self._chunks.find((shard, offset, length)).first)
        return self._fetch(shard, offset, offset + length)

    def start(self, spans: Sequence[Span]) -> Callable[[], list[bytes | OSError]]:
        """Start reading several spans together; return a function that waits for the results."""
        found: dict[Span, bytes | OSError] = {}
        missing: dict[Chunk, list[Span]] = {}
        for span in spans:
            chunk = self._chunks.find(span)
            copy = self._read_copy(chunk, span)
            if copy is None:
                missing.setdefault(chunk, []).append(span)
            else:
                found[span] = copy
        started = [started for chunk, wanted in missing.items() for started in self._start(chunk, wanted)]

        def wait() -> list[bytes | OSError]:
            for wanted, future in started:
                try:
                    found.update(future.result())
                except OSError as error:
                    found.update(dict.fromkeys(wanted, error))
            return [found[span] for span in spans]

        return wait

    def _start(self, chunk: Chunk, spans: Sequence[Span]) -> list[tuple[Sequence[Span], Future[Found]]]:
        """Start reading spans of a chunk: all of it while the node cache has room, else by merged requests."""
        if self._cache is not None and not self._cache.is_full:
            return [(spans, self._threads.submit(self._read_chunk, self._cache, chunk, spans))]
        return [
            (members, self._threads.submit(self._read_range, chunk.shard, start, stop, members))
            for start, stop, members in merge(spans, MERGED_GAP)
        ]

    def _read_copy(self, chunk: Chunk, span: Span) -> bytes | None:
        """Read a sample from the node cache; None if it is not there, or was corrupt and is removed."""
        if self._cache is None:
            return None
        content = self._cache.read(chunk.first, span[1] - chunk.start, span[2])
        if content is not None and not self._chunks.is_intact(span, content):
            self._cache.drop(chunk.first)
            return None
        return content

    def _read_chunk(self, cache: NodeCache, chunk: Chunk, spans: Sequence[Span]) -> Found:
        download = partial(self._fetch, chunk.shard, chunk.start, chunk.stop)
        try:
            content = cache.fill(chunk.first, chunk.stop - chunk.start, download)
        except RemoteError:
            raise
        except OSError as error:
            self._cache, content = None, None
            log.warning("data.remote.cache_dir: %s; this process stops caching", error)
        if content is None:  # no room
            return {span: self._fetch(span[0], span[1], span[1] + span[2]) for span in spans}
        return _cut(content, chunk.start, spans)

    def _read_range(self, shard: int, start: int, stop: int, spans: Sequence[Span]) -> Found:
        return _cut(self._fetch(shard, start, stop), start, spans)

    def _fetch(self, shard: int, start: int, stop: int) -> bytes:
        return self._store.read(self._files[shard], start, stop, self._sizes[shard])

    @cached_property
    def _cache(self) -> NodeCache | None:
        """The node cache, opened when a process reads samples: a driver that only opens shards needs no such disk."""
        config = self._store.config
        if config.cache_dir is None or config.cache_gb is None:
            return None
        return NodeCache(config.cache_dir, self._fingerprint, round(config.cache_gb * 1e9))


def _cut(content: bytes, start: int, spans: Sequence[Span]) -> Found:
    return {span: content[span[1] - start : span[1] - start + span[2]] for span in spans}
