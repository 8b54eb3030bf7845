r"""The order of training samples: a pure function of seed, epoch and data, and of nothing else.

One counter G numbers all samples of a run, over epochs. Sample G is entry i of the order tau_e of epoch e,
where G = e N + i and N is the number of samples. With R ranks, b samples a rank and a start at G0, slot k
of rank r in step s takes sample G0 + s R b + r b + k: every epoch holds every sample once, for any R and b,
and a run goes on at any G with any other R and b.

tau_e, for blocks of k, windows of w and atoms of a samples, V windows a lane (`PlanParameters`):

1. Blocks. Cut each shard into blocks of k consecutive samples and permute the blocks: the sequence sigma_e.
2. Head. Its first h = min(N, (-e N) mod a) entries stay as they are, so that body atoms begin where G is a
   multiple of a, in every epoch. Hence no atom is split between two batches of m a samples.
3. Lanes. Cut the body, J = floor((N - h) / a) atoms, into C runs, the lanes, of J div C atoms and, the first
   J mod C of them, one more; C is the largest power of two <= N / (V w). Body atom j is the (j div C)-th atom
   of lane j mod C. Where b = a and R divides C, a rank meets C / R lanes and reads the blocks of no others.
4. Windows. Cut a lane of A atoms at the atoms floor(v A / V). In each window permute the samples, sort them
   by width / height, cut them into atoms of nearly one shape, and permute the atoms.
5. Tail. The fewer than a samples that are left over come last, as they are.

One sort of the N / k blocks and one window give any entry of tau_e: a run goes on anywhere at once. Random
numbers are the words of Philox4x64, a function of key and counter. The key is a hash of version, parameters,
seed, fingerprint and e; the counter begins at 0 for the blocks and at (0, 0, 0, V c + v + 1) for window v of
lane c.
A permutation is a stable sort of words, so that no library's way to shuffle is part of the definition.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

PLAN_VERSION = 2


@dataclass(frozen=True)
class PlanParameters:
    """The lengths in the order's definition, in samples, and the number of windows."""

    block: int = 32  # k
    window: int = 384  # w, the least; nearly 2 w at most
    windows: int = 2  # V, of a lane
    atom: int = 4  # a


@dataclass(frozen=True)
class _Epoch:
    """sigma_e, by its blocks, and the sizes of its parts."""

    key: Words
    samples: IntArray  # the first of each block
    places: IntArray  # where the blocks begin in sigma_e, and N
    head: int  # h
    cuts: IntArray  # first body atoms of all windows, lane after lane, and J

    def sequence(self, begin: int, end: int) -> IntArray:
        """Entries `begin` to `end` > `begin` of sigma_e."""
        first, last = np.searchsorted(self.places, (begin, end - 1), side="right")
        shifts = self.samples[first - 1 : last] - self.places[first - 1 : last]
        edges = self.places[first - 1 : last + 1].clip(begin, end)
        return np.arange(begin, end) + np.repeat(shifts, np.diff(edges))


class Plan:
    """The order of one data set under one seed.

    Args:
        shards: [n] number of the shard of each sample, ascending.
        aspects: [n] width / height of each image.
        fingerprint: of the data.
        seed: another seed, another order.
        parameters: part of the order's definition, fixed for a run.
    """

    def __init__(
        self,
        shards: IntArray,
        aspects: npt.NDArray[np.float64],
        fingerprint: str,
        seed: int,
        parameters: PlanParameters = PlanParameters(),
    ) -> None:
        self.aspects, self.parameters, self.num_samples = aspects, parameters, len(shards)
        self.identity = (PLAN_VERSION, parameters, seed, fingerprint)
        least = parameters.windows * parameters.window
        self.num_lanes = 1 << max(self.num_samples // least, 1).bit_length() - 1
        in_shard = np.arange(len(shards)) - np.searchsorted(shards, shards)
        self.blocks = np.append(np.flatnonzero(in_shard % parameters.block == 0), len(shards))
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=self.num_lanes)(self._make_window)  # as many are in use at a time

    def samples(self, position: int, count: int) -> IntArray:
        """Samples `position` to `position + count` of the run, also across epochs."""
        parts = [np.empty(0, np.int64)]
        while count > 0:
            epoch, begin = divmod(position, self.num_samples)
            parts.append(self._entries(epoch, begin, min(begin + count, self.num_samples)))
            position, count = position + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def order(self, epoch: int) -> IntArray:
        """tau_e: a permutation of all samples."""
        return self.samples(epoch * self.num_samples, self.num_samples)

    def _entries(self, number: int, begin: int, end: int) -> IntArray:
        """Entries `begin` to `end` > `begin` of tau_e."""
        epoch, atom = self._epoch(number), self.parameters.atom
        entries = epoch.sequence(begin, end)  # right for head and tail
        low, high = max(begin - epoch.head, 0), min(end - epoch.head, int(epoch.cuts[-1]) * atom)
        if low < high:  # they hold these entries of the body
            first = low // atom
            body = self._atoms(number, np.arange(first, -(-high // atom))).reshape(-1)
            at = low + epoch.head - begin
            entries[at : at + high - low] = body[low - first * atom : high - first * atom]
        return entries

    def _atoms(self, number: int, atoms: IntArray) -> IntArray:
        """The samples of body atoms: [n] -> [n, a]."""
        cuts = self._epoch(number).cuts
        sources = cuts[(atoms % self.num_lanes) * self.parameters.windows] + atoms // self.num_lanes
        windows, which = np.unique(np.searchsorted(cuts, sources, side="right") - 1, return_inverse=True)
        contents = [self._window(number, window) for window in windows.tolist()]
        shifts = np.cumsum([len(content) for content in contents]) - cuts[windows + 1]
        found: IntArray = np.concatenate(contents)[sources + shifts[which]]
        return found

    def _make_window(self, number: int, window: int) -> IntArray:
        """A window's atoms in their order: [atoms, a]."""
        epoch, atom = self._epoch(number), self.parameters.atom
        begin, end = epoch.cuts[window : window + 2].tolist()
        samples = epoch.sequence(epoch.head + begin * atom, epoch.head + end * atom)
        words = _words(epoch.key, len(samples) + end - begin, window + 1)
        samples = samples[_order(words[: len(samples)])]
        atoms = samples[_order(self.aspects[samples])].reshape(-1, atom)
        return atoms[_order(words[len(samples) :])]

    def _make_epoch(self, number: int) -> _Epoch:
        digest = hashlib.blake2b(repr((number, self.identity)).encode(), digest_size=16).digest()
        key = np.frombuffer(digest, "<u8")
        permuted = _order(_words(key, len(self.blocks) - 1, 0))
        places = np.append(0, np.diff(self.blocks)[permuted].cumsum())
        head = min(-number * self.num_samples % self.parameters.atom, self.num_samples)
        num_atoms = (self.num_samples - head) // self.parameters.atom
        lengths = (num_atoms + np.arange(self.num_lanes)[::-1]) // self.num_lanes
        windows = np.arange(self.parameters.windows) * lengths[:, None] // self.parameters.windows
        cuts = np.append((lengths.cumsum() - lengths)[:, None] + windows, num_atoms)
        return _Epoch(key, self.blocks[permuted], places, head, cuts)


def _words(key: Words, count: int, counter: int) -> Words:
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, counter], np.uint64)).random_raw(count)


def _order(values: npt.NDArray[Any]) -> IntArray:
    return np.argsort(values, kind="stable")
