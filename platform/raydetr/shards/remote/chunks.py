"""Divide shards into chunks of `CHUNK_SIZE` consecutive samples, the unit of the node cache.

The unit is not the shard, because the training order shuffles chunks: a rank reads all samples of a chunk within one
epoch, but only its own chunks of a shard. With 8 nodes, caching complete shards would download 8 times what a node
needs. A chunk is verified by the crc32 of each of its samples, which the fingerprint covers.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydetr.shards.manifest import CHUNK_SIZE, ShardFile, sample_key
from raydetr.shards.manifest import Samples as SampleTable


@dataclass(frozen=True)
class Chunk:
    """A range of a shard."""

    name: str  # depends on URL, size and sha256 of the shard, and on the range
    shard: int
    start: int  # bytes, in the shard
    stop: int
    first: int  # index of the first sample
    last: int  # index after the last sample

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


class Chunks:
    """The chunks of shards.

    Args:
        samples: the index.
        shards: the shards of the manifest.
        urls: URL of each shard.
    """

    def __init__(self, samples: SampleTable, shards: Sequence[ShardFile], urls: Sequence[str]) -> None:
        self._samples, self._shards, self._urls = samples, shards, urls
        number = samples["shard"].astype(np.int64)
        rank = np.arange(len(number)) - np.searchsorted(number, number)  # of a sample in its shard
        firsts = np.flatnonzero(rank % CHUNK_SIZE == 0)
        self._firsts: npt.NDArray[np.int64] = np.append(firsts, len(number))
        self.of_sample: npt.NDArray[np.int64] = np.repeat(np.arange(len(firsts)), np.diff(self._firsts))
        self._lengths = samples["length"].astype(np.int64)
        self._starts = number << 40 | samples["offset"].astype(
            np.int64
        )  # (shard, offset), sorted like the index
        self._chunks: dict[int, Chunk] = {}

    @property
    def num_samples(self) -> int:
        """Number of samples in all chunks."""
        return len(self.of_sample)

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, number: int) -> Chunk:
        if number not in self._chunks:
            self._chunks[number] = self._make(number)
        return self._chunks[number]

    def reads(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Return (chunk number, bytes) for each sample."""
        return [(int(self.of_sample[index]), int(self._lengths[index])) for index in indices]

    def _make(self, number: int) -> Chunk:
        first, last = int(self._firsts[number]), int(self._firsts[number + 1])
        rows = self._samples[first:last]
        start = int(rows["offset"].min())
        stop = int((rows["offset"] + rows["length"]).max())
        shard = int(rows["shard"][0])
        file = self._shards[shard]
        key = f"{self._urls[shard]} {file.size} {file.sha256}"
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return Chunk(f"{digest}-{start}-{stop}", shard, start, stop, first, last)

    def find(self, shard: int, offset: int) -> int | None:
        """Return the number of the chunk with the sample that starts at `offset`; None if there is none."""
        start = shard << 40 | offset
        index = int(np.searchsorted(self._starts, start))
        if index == len(self._starts) or self._starts[index] != start:
            return None
        return int(self.of_sample[index])

    def find_corrupt_sample(self, chunk: Chunk, content: bytes | bytearray) -> str | None:
        """Verify the bytes of a chunk; return a message about the first corrupt sample, or None."""
        for row in self._samples[chunk.first : chunk.last]:
            at = int(row["offset"]) - chunk.start
            if zlib.crc32(content[at : at + int(row["length"])]) != row["crc32"]:
                return f"sample {sample_key(row['image_id'])} at byte {row['offset']} has another crc32"
        return None
