r"""Define the order of training samples: a pure function of seed, epoch and data, and of nothing else.

One counter G, the position, numbers all samples of a run, over epochs. Sample G is entry i of the order tau_e of epoch
e, where G = e N + i and N is the number of samples. With R ranks, b samples per rank and a start at G0, slot k of rank
r in step s takes sample G0 + s R b + r b + k: every epoch holds every sample once, for any R and b, and a run resumes
at any G with any other R and b.

tau_e, for chunks of k, streams of at least w and aspect groups of a samples (`OrderParameters`):

1. Chunks. Cut each shard into chunks of k consecutive samples, or of 1 where N < n, and permute the chunks: the
   sequence sigma_e. Where N < n, this full shuffle is tau_e, and what follows is for N >= n.
2. Head. Its first h = min(N, (-e N) mod a) entries stay as they are, so that the aspect groups of the body begin where
   G is a multiple of a, in every epoch. Hence no group is split between two batches of m a samples.
3. Streams. Cut the body, J = floor((N - h) / a) groups, into C runs, the streams, of J div C groups and, the first
   J mod C of them, one more; C is the largest power of two <= N / w, or 1. Group j of the body is the (j div C)-th
   group of stream j mod C. Where b = a and R divides C, a rank reads C / R streams, and the chunks of no others.
4. Aspect groups. In each stream, permute the samples of each chunk. Sort all by shape, 32 width / height rounded to an
   integer (halves to even); those of one shape by their place in their permuted chunk; those of one place by chunk, as
   in sigma_e. Cut this into groups and permute the groups. So a group has nearly one aspect ratio and, where enough
   chunks have that shape, no two samples of a chunk, which may be frames of one video.
5. Tail. The fewer than a samples that are left over come last, as they are.

One sort of the chunks and one stream give any entry of tau_e, so a run resumes anywhere at once. Random numbers are the
words of Philox4x64, a function of key and counter. The key is a hash of version, parameters, seed, fingerprint and e;
the counter begins at 0 for the chunks and at (0, 0, 0, c + 1) for stream c. A permutation is a stable sort of such
words, so that no library's shuffle is part of the definition.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from raydetr.shards.manifest import CHUNK_SIZE

IntArray = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ORDER_VERSION = 3


@dataclass(frozen=True)
class OrderParameters:
    """The lengths in the order's definition, in samples.

    Names and values are hashed: another spelling is another order, and needs another `ORDER_VERSION`.
    """

    chunk_size: int = CHUNK_SIZE  # k
    min_stream: int = 768  # w; streams hold fewer than 2 w
    group_size: int = 4  # a
    min_chunked: int = 8192  # n; fewer samples are shuffled freely


@dataclass(frozen=True)
class _Epoch:
    """sigma_e, as its chunks, and the sizes of its parts."""

    key: Words
    samples: IntArray  # first sample of each chunk
    starts: IntArray  # where the chunks begin in sigma_e, and N
    head: int  # h
    cuts: IntArray  # first groups of the streams, and J

    def sequence(self, begin: int, end: int) -> IntArray:
        """Return entries `begin` to `end` > `begin` of sigma_e."""
        first, last = np.searchsorted(self.starts, (begin, end - 1), side="right")
        # Within a chunk, sample minus entry is constant: repeat it for as many entries as fall into the chunk
        shifts = self.samples[first - 1 : last] - self.starts[first - 1 : last]
        edges = self.starts[first - 1 : last + 1].clip(begin, end)
        return np.arange(begin, end) + np.repeat(shifts, np.diff(edges))


class SampleOrder:
    """The order of one data set with one seed.

    Args:
        shards: [n] number of the shard of each sample, ascending.
        aspects: [n] width / height of each image.
        fingerprint: of the data.
        seed: another seed gives another order.
        parameters: part of the order's definition, fixed for a run.
    """

    def __init__(
        self,
        shards: IntArray,
        aspects: npt.NDArray[np.float64],
        fingerprint: str,
        seed: int,
        parameters: OrderParameters = OrderParameters(),
    ) -> None:
        self.aspects, self.parameters, self.num_samples = aspects, parameters, len(shards)
        self.seed, self.fingerprint = seed, fingerprint
        self.is_chunked = self.num_samples >= parameters.min_chunked
        self.num_streams = 1 << max(self.num_samples // parameters.min_stream, 1).bit_length() - 1
        in_shard = np.arange(len(shards)) - np.searchsorted(shards, shards)
        chunk_size = parameters.chunk_size if self.is_chunked else 1
        self.chunks = np.append(np.flatnonzero(in_shard % chunk_size == 0), len(shards))
        # Two epochs, because a batch may hold the end of one and the beginning of the next
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        # Consecutive groups come from different streams
        self._stream = lru_cache(maxsize=self.num_streams)(self._make_stream)

    def samples(self, position: int, count: int) -> IntArray:
        """Return samples `position` to `position + count` of the run, also across epochs."""
        parts = [np.empty(0, np.int64)]
        while count > 0:
            epoch, begin = divmod(position, self.num_samples)
            parts.append(self._entries(epoch, begin, min(begin + count, self.num_samples)))
            position, count = position + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def order(self, epoch: int) -> IntArray:
        """Return tau_e, a permutation of all samples."""
        return self.samples(epoch * self.num_samples, self.num_samples)

    def _entries(self, number: int, begin: int, end: int) -> IntArray:
        """Return entries `begin` to `end` > `begin` of tau_e."""
        epoch, size = self._epoch(number), self.parameters.group_size
        entries = epoch.sequence(begin, end)  # right for head and tail
        low, high = max(begin - epoch.head, 0), min(end - epoch.head, int(epoch.cuts[-1]) * size)
        if low < high:  # some of the entries are of the body
            first = low // size
            body = self._groups(number, np.arange(first, -(-high // size))).reshape(-1)
            at = low + epoch.head - begin
            entries[at : at + high - low] = body[low - first * size : high - first * size]
        return entries

    def _groups(self, number: int, groups: IntArray) -> IntArray:
        """Return the samples of groups of the body: [n] -> [n, a]."""
        streams, which = np.unique(groups % self.num_streams, return_inverse=True)
        contents = [self._stream(number, stream) for stream in streams.tolist()]
        starts = np.cumsum([0] + [len(content) for content in contents])
        found: IntArray = np.concatenate(contents)[starts[which] + groups // self.num_streams]
        return found

    def _make_stream(self, number: int, stream: int) -> IntArray:
        """Return the groups of a stream in their order: [groups, a]."""
        epoch, size = self._epoch(number), self.parameters.group_size
        begin, end = (epoch.head + epoch.cuts[stream : stream + 2] * size).tolist()
        words = _words(epoch.key, end - begin + (end - begin) // size, stream + 1)
        entries = np.arange(begin, end)
        chunks = np.searchsorted(epoch.starts, entries, side="right")  # ascending
        samples = epoch.sequence(begin, end)[np.lexsort((words[: end - begin], chunks))]
        places = entries - begin - np.searchsorted(chunks, chunks)
        shapes = np.rint(32 * self.aspects[samples])
        groups = samples[np.lexsort((places, shapes))].reshape(-1, size)  # stable, so then by chunk
        return groups[_order(words[end - begin :])]

    def _make_epoch(self, number: int) -> _Epoch:
        run = f"order {ORDER_VERSION}, {self.parameters}, seed {self.seed}, {self.fingerprint}"
        key = np.frombuffer(
            hashlib.blake2b(f"{run}, epoch {number}".encode(), digest_size=16).digest(), "<u8"
        )
        permuted = _order(_words(key, len(self.chunks) - 1, 0))
        starts = np.append(0, np.diff(self.chunks)[permuted].cumsum())
        size = self.parameters.group_size
        head = min(-number * self.num_samples % size, self.num_samples)
        num_groups = (self.num_samples - head) // size if self.is_chunked else 0
        lengths = (num_groups + np.arange(self.num_streams)[::-1]) // self.num_streams
        return _Epoch(key, self.chunks[permuted], starts, head, np.append(0, lengths.cumsum()))


def _words(key: Words, count: int, counter: int) -> Words:
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, counter], np.uint64)).random_raw(count)


def _order(values: npt.NDArray[Any]) -> IntArray:
    return np.argsort(values, kind="stable")
