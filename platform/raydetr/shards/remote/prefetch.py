"""Fills the node cache with what comes next, and reads from it what is there."""

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
from raydetr.shards.remote.lookahead import MOST_USES, Lookahead, choose_victims, is_worth_it
from raydetr.shards.remote.use_tables import UseTables
from raydetr.store.background import BackgroundThreads
from raydetr.store.transfer import RemoteError

log = logging.getLogger(__name__)

DOWNLOADS = 3  # at a time, of a process
STEPS_AT_ONCE = 256  # that are looked ahead between two looks at the cache
IDLE_SECONDS = 0.2  # between two looks where nothing is to be done
RETRY_SECONDS = 1.0  # after there was no room, or another process was at a piece
PAUSE_SECONDS = 5.0  # after a server failed

Download = Callable[[Chunk, Callable[[bytes], None]], None]


class CachedChunks:
    """The pieces of some shards in the node cache, which is made by the first process that follows a plan.

    A driver that only looks at the shards needs no such disk.
    """

    def __init__(self, folder: Path, max_bytes: int, chunks: Chunks) -> None:
        self._folder, self._max_bytes, self.chunks = folder, max_bytes, chunks
        self._cache: NodeCache | None = None

    @property
    def cache(self) -> NodeCache:
        """The cache.

        Raises:
            ValueError: its folder cannot be used.
        """
        if self._cache is None:
            self._cache = NodeCache(self._folder, self._max_bytes)
        return self._cache

    def read(self, span: Span) -> bytes | None:
        """A sample's bytes, if its piece is there."""
        if self._cache is None:
            return None
        shard, offset, length = span
        number = self.chunks.at(shard, offset)
        if number is None:
            return None
        chunk = self.chunks[number]
        try:
            return self.cache.read(chunk.name, chunk.size, offset - chunk.start, length)
        except OSError as error:
            log.warning("%s: the cached copy cannot be read (%s)", chunk.name, error)
            return None

    def drop(self, span: Span) -> None:
        """Remove the piece that holds a sample: its copy may be damaged."""
        number = self.chunks.at(*span[:2])
        if number is not None and self._cache is not None:
            self._cache.remove([self.chunks[number].name])


class WrongBytes(Exception):
    """A piece that came wrong twice."""


class CachePrefetcher:
    """A thread that brings the pieces a rank will read, in that order, and removes those that are used last.

    Args:
        cached: where they go.
        download: brings the bytes of a piece.
        turns: the samples that each step of the rank reads, of all its processes together.
    """

    def __init__(self, cached: CachedChunks, download: Download, turns: Iterable[Sequence[int]]) -> None:
        self._cached, self._download = cached, download
        most_uses = min(MOST_USES, 2 * cached.chunks.num_samples)  # farther, nothing depends on it
        self._ahead = Lookahead((cached.chunks.turn(turn) for turn in turns), most_uses)
        self._tables = UseTables(cached.cache.folder / "uses")
        self._threads = BackgroundThreads(DOWNLOADS, "node cache")
        self._not_before: dict[int, float] = {}  # piece -> when to look at it again
        self._step = 0
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetcher", daemon=True)
        self._thread.start()

    def advance(self, step: int) -> None:
        """This process is about to read for a step.

        Raises:
            BaseException: what ended the thread, if it was not what caches are known to suffer.
        """
        if self._failure is not None:
            raise self._failure
        self._step = step

    def close(self) -> None:
        """Fetch nothing more."""
        self._closed.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                self._ahead.advance(self._step)
                grew = self._ahead.extend(STEPS_AT_ONCE)
                if not self._fetch_some():
                    self._closed.wait(0.02 if grew else IDLE_SECONDS)  # the batches need this processor
        except OSError as error:
            log.warning(
                "%s (data.remote.cache_dir): %s; this process caches nothing more and reads from the server",
                self._cached.cache.folder, error,
            )  # fmt: skip
        except BaseException as error:
            self._failure = error
        finally:
            self._tables.close()

    def _fetch_some(self) -> bool:
        """Fetch the next pieces that are not there; whether anything was fetched."""
        next_uses = self._ahead.next_uses()
        self._tables.publish({self._cached.chunks[number].name: use for number, use in next_uses.items()})
        now, there, futures = time.monotonic(), self._cached.cache.listing(), []
        for number, use in next_uses.items():
            if self._not_before.get(number, 0.0) <= now and self._cached.chunks[number].name not in there:
                futures.append(self._threads.submit(self._store, number, use))
            if len(futures) == DOWNLOADS:
                break
        fetched = [future.result() for future in futures]
        return any(fetched)

    def _store(self, number: int, use: int) -> bool:
        chunk, cache = self._cached.chunks[number], self._cached.cache

        def victims(missing: int) -> list[str] | None:
            sizes = cache.names()
            pays = partial(is_worth_it, self._ahead, number, use, chunk.size)
            return choose_victims(missing, sizes, self._tables.next_uses(sizes), pays)

        try:
            outcome = cache.store(chunk.name, chunk.size, lambda accept: self._bring(chunk, accept), victims)
        except WrongBytes as fault:
            log.warning("%s: not cached: %s, twice; its samples are read one by one", chunk.name, fault)
            self._not_before[number] = float("inf")
            return True
        except RemoteError as error:
            log.warning("not cached for now: %s", error)
            self._not_before[number] = time.monotonic() + PAUSE_SECONDS
            return False
        if outcome != "stored":
            self._not_before[number] = time.monotonic() + RETRY_SECONDS
        return outcome == "stored"

    def _bring(self, chunk: Chunk, accept: Callable[[bytes], None]) -> None:
        fault: str | None = None
        for _ in range(2):
            content = bytearray()
            self._download(chunk, content.extend)
            fault = self._cached.chunks.fault(chunk, content)
            if fault is None:
                accept(bytes(content))
                return
        raise WrongBytes(fault)
