"""What the node cache keeps: pieces of shards, runs of as many consecutive samples as a block of the plan has.

Pieces and not whole shards, because the plan's unit is the block. A rank reads all samples of a block within one
window, and of a shard only as many blocks as are its share: with 8 nodes, whole shards would bring 8 times what a
node needs. A piece is proved by the crc32 of each of its samples, which the fingerprint vouches for.
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

    name: str  # the same for equal url, size and sha256 of the shard, and range
    shard: int
    start: int  # bytes, in the shard
    stop: int
    first: int  # sample
    last: int  # after it

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start


class Chunks:
    """The pieces of some shards.

    Args:
        samples: the index.
        shards: of the manifest.
        urls: of each shard.
    """

    def __init__(self, samples: SampleTable, shards: Sequence[ShardFile], urls: Sequence[str]) -> None:
        self._samples, self._shards, self._urls = samples, shards, urls
        number = samples["shard"].astype(np.int64)
        place = np.arange(len(number)) - np.searchsorted(number, number)  # of a sample in its shard
        begins = np.flatnonzero(place % CHUNK_SIZE == 0)
        self._firsts: npt.NDArray[np.int64] = np.append(begins, len(number))
        self.of_sample: npt.NDArray[np.int64] = np.repeat(np.arange(len(begins)), np.diff(self._firsts))
        self._lengths = samples["length"].astype(np.int64)
        self._begins = number << 40 | samples["offset"].astype(np.int64)  # ascending, as the index is
        self._made: dict[int, Chunk] = {}

    @property
    def num_samples(self) -> int:
        """Of all pieces."""
        return len(self.of_sample)

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, number: int) -> Chunk:
        if number not in self._made:
            self._made[number] = self._make(number)
        return self._made[number]

    def turn(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Piece and bytes of each of some samples."""
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

    def at(self, shard: int, offset: int) -> int | None:
        """Number of the piece that holds the sample which begins there."""
        begin = shard << 40 | offset
        index = int(np.searchsorted(self._begins, begin))
        if index == len(self._begins) or self._begins[index] != begin:
            return None
        return int(self.of_sample[index])

    def fault(self, chunk: Chunk, content: bytes | bytearray) -> str | None:
        """The first sample of a piece that its bytes do not hold, in words."""
        for row in self._samples[chunk.first : chunk.last]:
            at = int(row["offset"]) - chunk.start
            if zlib.crc32(content[at : at + int(row["length"])]) != row["crc32"]:
                return f"sample {sample_key(row['image_id'])} at byte {row['offset']} has another crc32"
        return None
