"""Find the chunk of a sample: `CHUNK_SIZE` consecutive samples of a shard, the unit of the node cache.

The unit is not the shard, because the training order shuffles chunks: a rank reads all samples of a chunk within one
epoch, but only its own chunks of a shard. With 8 nodes, caching complete shards would download 8 times what a node
needs.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from raydetr.shards.files import Span
from raydetr.shards.manifest import CHUNK_SIZE, Samples


@dataclass(frozen=True)
class Chunk:
    """A range of a shard. Equal for all its samples."""

    shard: int
    start: int  # bytes, in the shard
    stop: int
    first: int  # index of its first sample

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


class Chunks:
    """The chunks of shards with the index `samples`."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        number = np.ascontiguousarray(samples["shard"])
        self._firsts = np.searchsorted(
            number, np.arange(int(number.max(initial=0)) + 2)
        )  # sample of each shard

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
