"""Prefetch chunks into the node cache, and read samples from it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from raydetr.shards.files import Span
from raydetr.shards.remote.cache import NodeCache
from raydetr.shards.remote.chunks import Chunk, Chunks
from raydetr.shards.remote.eviction import (
    MAX_UPCOMING_READS,
    UpcomingReads,
    UseTables,
    choose_evictions,
    may_replace,
)
from raydetr.store.background import BackgroundThreads
from raydetr.store.transfer import RemoteError

log = logging.getLogger(__name__)

MAX_DOWNLOADS = 3  # concurrent downloads of a process
STEPS_PER_POLL = 256  # steps added to the upcoming reads between two polls of the cache
IDLE_SECONDS = 0.2  # between two polls when there is nothing to do
RETRY_SECONDS = 1.0  # after the cache was full, or another process was writing a chunk
BACKOFF_SECONDS = 5.0  # after a server failed

Download = Callable[[Chunk, Callable[[bytes], None]], None]


class CachedChunks:
    """The chunks of shards in the node cache.

    The cache is created when a process starts prefetching: a driver that only opens the shards needs no such disk.
    """

    def __init__(self, folder: Path, max_bytes: int, chunks: Chunks) -> None:
        self._folder, self._max_bytes, self.chunks = folder, max_bytes, chunks
        self._cache: NodeCache | None = None

    @property
    def cache(self) -> NodeCache:
        """Node cache, created on first access.

        Raises:
            ValueError: its folder cannot be used.
        """
        if self._cache is None:
            self._cache = NodeCache(self._folder, self._max_bytes)
        return self._cache

    def read(self, span: Span) -> bytes | None:
        """Read a sample's bytes from the cache; None if its chunk is not cached."""
        if self._cache is None:
            return None
        shard, offset, length = span
        number = self.chunks.find(shard, offset)
        if number is None:
            return None
        chunk = self.chunks[number]
        try:
            return self.cache.read(chunk.name, chunk.size, offset - chunk.start, length)
        except OSError as error:
            log.warning("%s: the cached copy cannot be read (%s)", chunk.name, error)
            return None

    def drop(self, span: Span) -> None:
        """Remove the chunk that holds a sample, because its copy may be corrupt."""
        number = self.chunks.find(*span[:2])
        if number is not None and self._cache is not None:
            self._cache.remove([self.chunks[number].name])


class ChecksumError(Exception):
    """A chunk was corrupt in two downloads."""


class CachePrefetcher:
    """A thread that fetches the chunks a rank will read, in that order, and evicts those used last.

    Args:
        cached: the cache to fill.
        download: fetches the bytes of a chunk.
        batches: the samples of each step of the rank, over all its processes.
    """

    def __init__(self, cached: CachedChunks, download: Download, batches: Iterable[Sequence[int]]) -> None:
        self._cached, self._download = cached, download
        # Two epochs suffice: later reads decide nothing.
        max_reads = min(MAX_UPCOMING_READS, 2 * cached.chunks.num_samples)
        self._upcoming = UpcomingReads((cached.chunks.reads(batch) for batch in batches), max_reads)
        self._tables = UseTables(cached.cache.folder / "uses")
        self._threads = BackgroundThreads(MAX_DOWNLOADS, "node cache")
        self._not_before: dict[int, float] = {}  # chunk -> time of the next attempt
        self._step = 0
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetcher", daemon=True)
        self._thread.start()

    def advance(self, step: int) -> None:
        """Report that this process is about to read the samples of a step.

        Raises:
            BaseException: the error that ended the thread, unless it was an OSError of the cache, which is logged.
        """
        if self._failure is not None:
            raise self._failure
        self._step = step

    def close(self) -> None:
        """Stop fetching."""
        self._closed.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                self._upcoming.advance(self._step)
                grew = self._upcoming.extend(STEPS_PER_POLL)
                if not self._fetch_some():
                    self._closed.wait(0.02 if grew else IDLE_SECONDS)  # leave the CPU to the loader
        except OSError as error:
            log.warning(
                "%s (data.remote.cache_dir): %s; this process stops caching and reads from the server",
                self._cached.cache.folder, error,
            )  # fmt: skip
        except BaseException as error:
            self._failure = error
        finally:
            self._tables.close()

    def _fetch_some(self) -> bool:
        """Fetch the next missing chunks; return True if any was fetched."""
        next_uses = self._upcoming.next_uses()
        self._tables.publish({self._cached.chunks[number].name: use for number, use in next_uses.items()})
        now, present, futures = time.monotonic(), self._cached.cache.names(), []
        # The nearest missing chunks first; a few at a time, because the uses change while they are fetched.
        for number, use in next_uses.items():
            if self._not_before.get(number, 0.0) <= now and self._cached.chunks[number].name not in present:
                futures.append(self._threads.submit(self._store, number, use))
            if len(futures) == MAX_DOWNLOADS:
                break
        fetched = [future.result() for future in futures]
        return any(fetched)

    def _store(self, number: int, use: int) -> bool:
        chunk, cache = self._cached.chunks[number], self._cached.cache

        def evictions(missing: int) -> list[str] | None:
            sizes = cache.sizes()
            may_evict = partial(may_replace, self._upcoming, number, use, chunk.size)
            return choose_evictions(missing, sizes, self._tables.next_uses(sizes), may_evict)

        try:
            result = cache.store(chunk.name, chunk.size, lambda accept: self._fetch(chunk, accept), evictions)
        except ChecksumError as error:
            log.warning("%s: not cached: %s, twice; its samples are read one by one", chunk.name, error)
            self._not_before[number] = float("inf")
            return True
        except RemoteError as error:
            log.warning("not cached for now: %s", error)
            self._not_before[number] = time.monotonic() + BACKOFF_SECONDS
            return False
        if result != "stored":
            self._not_before[number] = time.monotonic() + RETRY_SECONDS
        return result == "stored"

    def _fetch(self, chunk: Chunk, accept: Callable[[bytes], None]) -> None:
        problem: str | None = None
        for _ in range(2):
            content = bytearray()
            self._download(chunk, content.extend)
            problem = self._cached.chunks.find_corrupt_sample(chunk, content)
            if problem is None:
                accept(bytes(content))
                return
        raise ChecksumError(problem)
