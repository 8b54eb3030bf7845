r"""Define the order of training samples: a pure function of seed, epoch and data, and of nothing else.

One counter G, the position, numbers all samples of a run, over epochs. Sample G is entry i of the order tau_e of epoch
e, where G = e N + i and N is the number of samples. With R ranks, b samples per rank and a start at G0, slot k of rank
r in step s takes sample G0 + s R b + r b + k: every epoch holds every sample once, for any R and b, and a run resumes
at any G with any other R and b.

tau_e, for chunks of k, aspect groups of a, windows of at least w samples and V windows per stream (`OrderParameters`):

1. Chunks. Cut each shard into chunks of k consecutive samples and permute the chunks: the sequence sigma_e.
2. Head. Its first h = min(N, (-e N) mod a) entries stay as they are, so that the aspect groups of the body begin where
   G is a multiple of a, in every epoch. Hence no group is split between two batches of m a samples.
3. Streams. Cut the body, J = floor((N - h) / a) groups, into C runs, the streams, of J div C groups and, the first
   J mod C of them, one more; C is the largest power of two <= N / (V w). Group j of the body is the (j div C)-th group
   of stream j mod C. Where b = a and R divides C, a rank reads C / R streams, and the chunks of no others.
4. Windows. Cut a stream of A groups at the groups floor(v A / V). In each window permute the samples, sort them by
   width / height, cut them into groups of nearly one aspect ratio, and permute the groups.
5. Tail. The fewer than a samples that are left over come last, as they are.

One sort of the N / k chunks and one window give any entry of tau_e, so a run resumes anywhere at once. Random numbers
are the words of Philox4x64, a function of key and counter. The key is a hash of version, parameters, seed, fingerprint
and e; the counter begins at 0 for the chunks and at (0, 0, 0, V c + v + 1) for window v of stream c. A permutation is a
stable sort of such words, so that no library's shuffle is part of the definition.
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

ORDER_VERSION = 2
# What is hashed is part of the definition. Version 2 spells its parameters like this, whatever the code calls them:
# another spelling would be another order, and the position in older checkpoints would mean other samples.
_KEY_TEXT = "({}, (2, PlanParameters(block={}, window={}, windows={}, atom={}), {}, {!r}))"


@dataclass(frozen=True)
class OrderParameters:
    """The lengths in the order's definition, in samples, and the number of windows."""

    chunk_size: int = CHUNK_SIZE  # k
    min_window: int = 384  # w; windows hold fewer than 2 w
    windows_per_stream: int = 2  # V
    group_size: int = 4  # a


@dataclass(frozen=True)
class _Epoch:
    """sigma_e, as its chunks, and the sizes of its parts."""

    key: Words
    samples: IntArray  # first sample of each chunk
    starts: IntArray  # where the chunks begin in sigma_e, and N
    head: int  # h
    cuts: IntArray  # first groups of all windows, stream after stream, and J

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
        min_stream = parameters.windows_per_stream * parameters.min_window
        self.num_streams = 1 << max(self.num_samples // min_stream, 1).bit_length() - 1
        in_shard = np.arange(len(shards)) - np.searchsorted(shards, shards)
        self.chunks = np.append(np.flatnonzero(in_shard % parameters.chunk_size == 0), len(shards))
        # Two epochs, because a batch may hold the end of one and the beginning of the next
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        # Consecutive groups come from different streams: one window of each is in use at a time
        self._window = lru_cache(maxsize=self.num_streams)(self._make_window)

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
        cuts = self._epoch(number).cuts
        # Position of each group before the streams were interleaved
        sources = (
            cuts[(groups % self.num_streams) * self.parameters.windows_per_stream]
            + groups // self.num_streams
        )
        windows, which = np.unique(np.searchsorted(cuts, sources, side="right") - 1, return_inverse=True)
        contents = [self._window(number, window) for window in windows.tolist()]
        shifts = np.cumsum([len(content) for content in contents]) - cuts[windows + 1]
        found: IntArray = np.concatenate(contents)[sources + shifts[which]]
        return found

    def _make_window(self, number: int, window: int) -> IntArray:
        """Return the groups of a window in their order: [groups, a]."""
        epoch, size = self._epoch(number), self.parameters.group_size
        begin, end = epoch.cuts[window : window + 2].tolist()
        samples = epoch.sequence(epoch.head + begin * size, epoch.head + end * size)
        words = _words(epoch.key, len(samples) + end - begin, window + 1)
        # Permuted first and sorted stably then, so that images of one aspect ratio are in random order
        samples = samples[_order(words[: len(samples)])]
        groups = samples[_order(self.aspects[samples])].reshape(-1, size)
        return groups[_order(words[len(samples) :])]

    def _make_epoch(self, number: int) -> _Epoch:
        p = self.parameters
        text = _KEY_TEXT.format(
            number,
            p.chunk_size,
            p.min_window,
            p.windows_per_stream,
            p.group_size,
            self.seed,
            self.fingerprint,
        )
        key = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8")
        permuted = _order(_words(key, len(self.chunks) - 1, 0))
        starts = np.append(0, np.diff(self.chunks)[permuted].cumsum())
        head = min(-number * self.num_samples % p.group_size, self.num_samples)
        num_groups = (self.num_samples - head) // p.group_size
        lengths = (num_groups + np.arange(self.num_streams)[::-1]) // self.num_streams
        windows = np.arange(p.windows_per_stream) * lengths[:, None] // p.windows_per_stream
        cuts = np.append((lengths.cumsum() - lengths)[:, None] + windows, num_groups)
        return _Epoch(key, self.chunks[permuted], starts, head, cuts)


def _words(key: Words, count: int, counter: int) -> Words:
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, counter], np.uint64)).random_raw(count)


def _order(values: npt.NDArray[Any]) -> IntArray:
    return np.argsort(values, kind="stable")
