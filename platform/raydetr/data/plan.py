r"""The order of training samples: a pure function of seed, epoch and data, and of nothing else.

One counter G numbers all samples of a run, over epochs. Sample G is entry i of the order tau_e of epoch e,
where G = e N + i and N is the number of samples. With R ranks, b samples a rank and a start at G0, slot k
of rank r in step s takes sample G0 + s R b + r b + k: every epoch holds every sample once, for any R and b,
and a run goes on at any G with any other R and b.

tau_e, for a atoms' length, C lanes, windows of w and blocks of k samples (`PlanParameters`):

1. Cut each shard into blocks of k consecutive samples and permute the blocks. A rank reads whole blocks.
2. Leave the first h_e = (-e N) mod a samples as they are, the head. With it, multiples of a in G are
   multiples of a in every epoch's body, so an atom is never split between two batches of m a samples.
3. Cut the body into C lanes. Atom j of the body is atom g = (e N + h_e) / a + j of the run and comes from
   lane g mod C. Where R divides C (and b = a), rank r only ever reads the lanes c = r mod R.
4. In a lane, permute windows of w samples, sort each by aspect ratio, cut it into atoms of a samples of
   nearly the same shape, and permute the atoms. Fewer than a samples are left over: the tail.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

PLAN_VERSION = 1


@dataclass(frozen=True)
class PlanParameters:
    """The lengths in the order's definition, all in samples but for the number of lanes."""

    block: int = 32
    lanes: int = 64
    window: int = 512  # a multiple of `atom`
    atom: int = 4


class Plan:
    """The order of one data set under one seed.

    Args:
        shards: [n] number of the shard of each sample, ascending.
        log_aspects: [n] log(width / height) of each image.
        fingerprint: of the data.
        seed: another seed, another order.
        parameters: part of the order's definition, fixed for a run.
    """

    def __init__(
        self,
        shards: IntArray,
        log_aspects: npt.NDArray[np.float64],
        fingerprint: str,
        seed: int,
        parameters: PlanParameters = PlanParameters(),
    ) -> None:
        assert parameters.window % parameters.atom == 0, parameters
        self.shards, self.log_aspects, self.parameters = shards, log_aspects, parameters
        self.identity = (PLAN_VERSION, seed, fingerprint, parameters)
        self._cached: tuple[int, IntArray] | None = None

    def samples(self, position: int, count: int) -> IntArray:
        """Samples `position` to `position + count` of the run, also across epochs."""
        parts = []
        while count > 0:
            epoch, first = divmod(position, len(self.shards))
            parts.append(self.order(epoch)[first : first + count])
            position, count = position + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def order(self, epoch: int) -> IntArray:
        """tau_e: a permutation of all samples. The latest epoch is kept."""
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._make_order(epoch))
        return self._cached[1]

    def _make_order(self, epoch: int) -> IntArray:
        atom, num_lanes = self.parameters.atom, self.parameters.lanes
        rng = self._generator(epoch)
        sequence = self._permuted_blocks(rng)
        consumed = epoch * len(sequence)
        head = min(-consumed % atom, len(sequence))
        num_atoms = (len(sequence) - head) // atom
        body = sequence[head : head + num_atoms * atom]

        lane_of_slot = ((consumed + head) // atom + np.arange(num_atoms)) % num_lanes
        atoms_of_lane = np.bincount(lane_of_slot, minlength=num_lanes)
        first_atom_of_lane = np.repeat(np.cumsum(atoms_of_lane) - atoms_of_lane, atoms_of_lane)
        window_in_lane = (np.arange(num_atoms) - first_atom_of_lane) // (self.parameters.window // atom)
        window = np.repeat(np.arange(num_lanes), atoms_of_lane) * (num_atoms + 1) + window_in_lane

        shuffled = np.lexsort((rng.random(len(body)), self.log_aspects[body], np.repeat(window, atom)))
        atoms = body[shuffled].reshape(-1, atom)[np.lexsort((rng.random(num_atoms), window))]
        placed = np.empty_like(atoms)
        placed[np.argsort(lane_of_slot, kind="stable")] = atoms
        return np.concatenate([sequence[:head], placed.reshape(-1), sequence[head + len(body) :]])

    def _permuted_blocks(self, rng: np.random.Generator) -> IntArray:
        first_of_shard = np.searchsorted(self.shards, self.shards)
        starts = (np.arange(len(self.shards)) - first_of_shard) % self.parameters.block == 0
        block = np.cumsum(starts) - 1
        return np.argsort(rng.permutation(block[-1] + 1)[block], kind="stable")

    def _generator(self, epoch: int) -> np.random.Generator:
        """A counter-based generator: what it draws depends on its key only."""
        digest = hashlib.blake2b(repr((epoch, self.identity)).encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, "<u8")))
