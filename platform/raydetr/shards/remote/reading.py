"""Read shards from a server: small files completely, samples by byte ranges, nearby ones in one request."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from raydetr.config import RemoteConfig
from raydetr.shards.files import NullPrefetcher, Prefetcher, Span
from raydetr.shards.manifest import Manifest, Samples
from raydetr.shards.remote.chunks import Chunk, Chunks
from raydetr.shards.remote.prefetch import CachedChunks, CachePrefetcher
from raydetr.store.background import BackgroundThreads
from raydetr.store.origins import Origin
from raydetr.store.transfer import RemoteError, Transfers

MAX_MERGED_BYTES = (
    4 * 1024 * 1024
)  # ranges are not merged beyond this size, so that they are fetched in parallel
MAX_PROBLEMS = 10  # after which no more files are checked


@dataclass(frozen=True)
class Request:
    """One range of a shard that contains the spans with the numbers `wanted`."""

    shard: int
    start: int
    stop: int
    wanted: tuple[int, ...]


def merge(spans: Sequence[Span], gap: int) -> list[Request]:
    """Merge spans of the same shard into one request if they lie within `gap` bytes of each other."""
    requests: list[Request] = []
    for number in sorted(range(len(spans)), key=lambda number: spans[number]):
        shard, start, length = spans[number]
        last = requests[-1] if requests else None
        if (
            last is not None
            and last.shard == shard
            and start - last.stop <= gap
            and start + length - last.start <= MAX_MERGED_BYTES
        ):
            stop = max(last.stop, start + length)
            requests[-1] = Request(shard, last.start, stop, (*last.wanted, number))
        else:
            requests.append(Request(shard, start, start + length, (number,)))
    return requests


class Connection:
    """Fetches files of one remote folder. Recreates its connections after a fork, and in unpickled copies."""

    def __init__(self, location: str, config: RemoteConfig) -> None:
        self.origin, self.config = Origin(location, config.options), config
        self._pid = 0
        self.connect()

    def __reduce__(self) -> tuple[type[Connection], tuple[str, RemoteConfig]]:
        return Connection, (self.origin.location, self.config)

    @property
    def threads(self) -> BackgroundThreads:
        """Threads that perform the requests."""
        self.connect()
        return self._threads

    def fetch(self, name: str, start: int, stop: int | None, size: int | None) -> bytes:
        """Fetch a range of a file; `size` is that of the complete file, if known.

        Raises:
            RemoteError: it cannot be read.
        """
        content = bytearray()
        self.fetch_into(name, start, stop, size, content.extend)
        return bytes(content)

    def fetch_into(
        self, name: str, start: int, stop: int | None, size: int | None, accept: Callable[[bytes], None]
    ) -> None:
        """Fetch a range of a file, and pass its bytes to `accept` as they arrive."""
        self.connect()
        origin = self.origin
        self._transfers.fetch(origin.name(name), lambda: origin.address(name), start, stop, size, accept)

    def connect(self) -> None:
        """Create the connections of this process. Not thread-safe: call it before using several threads."""
        if self._pid != os.getpid():
            self.origin.connect()
            self._transfers = Transfers(self.config)
            self._threads = BackgroundThreads(self.config.max_requests, "remote")
            self._pid = os.getpid()


class RemoteFolder:
    """A `Folder` on a server."""

    def __init__(self, location: str, config: RemoteConfig) -> None:
        self.location, self.connection = location, Connection(location, config)

    def read(self, name: str) -> bytes:
        """Read a complete small file."""
        try:
            return self.connection.fetch(name, 0, None, None)
        except RemoteError as error:
            if error.status == 404:
                raise FileNotFoundError(f"there is no {self.connection.origin.name(name)}") from None
            raise

    def check_sizes(self, sizes: Mapping[str, int]) -> list[str]:
        """Request one byte of each file: the response has its size, and shows whether ranges are supported."""
        threads = self.connection.threads
        problems: list[str] = []
        futures = [threads.submit(self._check_size, name, size) for name, size in sizes.items()]
        for future in futures:
            if len(problems) >= MAX_PROBLEMS:
                future.cancel()
            elif (problem := future.result()) is not None:
                problems.append(problem)
        return problems

    def explain_missing_manifest(self) -> str:
        """Return a message: why there is no manifest, and the remedy."""
        return "no shards found there (no manifest.json); copy a folder of shards to it"

    def _check_size(self, name: str, size: int) -> str | None:
        try:
            self.connection.fetch(name, 0, min(1, size), size)
        except RemoteError as error:
            return str(error)
        return None


class RemoteFiles:
    """The `ShardFiles` of a remote folder.

    Args:
        connection: connection to the folder.
        sizes: name and size of each shard.
        cached: the chunks in the node cache, if there is one.
    """

    def __init__(
        self, connection: Connection, sizes: Mapping[str, int], cached: CachedChunks | None = None
    ) -> None:
        self.connection, self._cached = connection, cached
        self._files, self._sizes = list(sizes), list(sizes.values())
        self.names = [connection.origin.name(file) for file in self._files]

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read a range of a shard, from the node cache if possible."""
        copy = self._cached.read((shard, offset, length)) if self._cached else None
        return self._fetch(shard, offset, length) if copy is None else copy

    def reread(self, shard: int, offset: int, length: int) -> bytes:
        """Read a range of a shard from the server, and remove a copy in the node cache."""
        if self._cached is not None:
            self._cached.drop((shard, offset, length))
        return self._fetch(shard, offset, length)

    def start(self, spans: Sequence[Span]) -> Callable[[], list[bytes | OSError]]:
        """Start reading several spans together; return a function that waits for the results."""
        copies = [self._cached.read(span) if self._cached else None for span in spans]
        missing = [span for span, copy in zip(spans, copies, strict=True) if copy is None]
        requests = merge(missing, self.connection.config.merge_gap_kb * 1024)
        threads = self.connection.threads
        futures = [
            threads.submit(self._fetch, request.shard, request.start, request.stop - request.start)
            for request in requests
        ]

        def wait() -> list[bytes | OSError]:
            fetched = iter(_cut(missing, requests, futures))
            return [next(fetched) if copy is None else copy for copy in copies]

        return wait

    def prefetch(self, batches: Iterable[Sequence[int]]) -> Prefetcher:
        """Start filling the node cache, if there is one."""
        if self._cached is None:
            return NullPrefetcher()
        self.connection.connect()
        return CachePrefetcher(self._cached, self._download, batches)

    def _fetch(self, shard: int, offset: int, length: int) -> bytes:
        return self.connection.fetch(self._files[shard], offset, offset + length, self._sizes[shard])

    def _download(self, chunk: Chunk, accept: Callable[[bytes], None]) -> None:
        shard = chunk.shard
        self.connection.fetch_into(self._files[shard], chunk.start, chunk.stop, self._sizes[shard], accept)


def make_remote_files(connection: Connection, manifest: Manifest, samples: Samples) -> RemoteFiles:
    """Open the shards of a manifest, with the node cache if one is configured.

    Raises:
        ValueError: the cache cannot be used, or is smaller than a shard.
    """
    files = RemoteFiles(connection, {shard.name: shard.size for shard in manifest.shards})
    config = connection.config
    if config.cache_dir is None or config.cache_gb is None:
        return files
    largest, max_bytes = max(shard.size for shard in manifest.shards), round(config.cache_gb * 1e9)
    if max_bytes < largest:
        raise ValueError(
            f"data.remote.cache_gb={config.cache_gb:g} is less than a shard of {connection.origin.location} "
            f"({largest / 1e9:g} GB), too little to help: raise it, or omit data.remote.cache_dir"
        )
    cached = CachedChunks(config.cache_dir, max_bytes, Chunks(samples, manifest.shards, files.names))
    return RemoteFiles(connection, {shard.name: shard.size for shard in manifest.shards}, cached)


def _cut(
    spans: Sequence[Span], requests: Sequence[Request], futures: Sequence[Future[bytes]]
) -> list[bytes | OSError]:
    """Cut the bytes of each span out of the responses; a failed request gives its error."""
    found: dict[int, bytes | OSError] = {}
    for request, future in zip(requests, futures, strict=True):
        try:
            content = future.result()
        except OSError as error:
            found |= dict.fromkeys(request.wanted, error)
            continue
        for number in request.wanted:
            _, offset, length = spans[number]
            found[number] = content[offset - request.start : offset - request.start + length]
    return [found[number] for number in range(len(spans))]
