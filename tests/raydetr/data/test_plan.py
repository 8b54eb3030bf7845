from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydetr.data.plan import IntArray, Plan, PlanParameters

DEFAULT = PlanParameters()
MODEST = settings(deadline=None, max_examples=60)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)  # samples of each shard
SMALL = st.builds(
    lambda block, lanes, atoms, atom: PlanParameters(block, lanes, atoms * atom, atom),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(1, 5),
)


def make_plan(
    sizes: list[int], seed: int = 0, parameters: PlanParameters = DEFAULT, fingerprint: str = "f"
) -> Plan:
    shards = np.repeat(np.arange(len(sizes)), sizes)
    aspects = np.log(np.random.default_rng(1).choice([0.67, 0.75, 1, 1.33, 1.5], len(shards)))
    return Plan(shards, aspects, fingerprint, seed, parameters)


@MODEST
@given(SIZES, SMALL, st.integers(0, 5), st.integers(0, 10**12))
def test_an_epoch_holds_every_sample_once(
    sizes: list[int], parameters: PlanParameters, seed: int, epoch: int
) -> None:
    order = make_plan(sizes, seed, parameters).order(epoch)
    assert sorted(order.tolist()) == list(range(sum(sizes)))


@MODEST
@given(SIZES, SMALL, st.integers(0, 3))
def test_the_order_is_as_defined(sizes: list[int], parameters: PlanParameters, epoch: int) -> None:
    """Each property in the definition, checked sample by sample on what came out."""
    plan = make_plan(sizes, 0, parameters)
    order = plan.order(epoch)
    block, lanes, atom = parameters.block, parameters.lanes, parameters.atom
    sequence = plan._permuted_blocks(plan._generator(epoch))
    assert _keeps_blocks(sequence, sizes, block)
    consumed = epoch * len(order)
    head = 0
    while (consumed + head) % atom and head < len(order):
        head += 1
    num_atoms = (len(order) - head) // atom
    assert order[:head].tolist() == sequence[:head].tolist()
    assert order[head + num_atoms * atom :].tolist() == sequence[head + num_atoms * atom :].tolist()
    drawn: list[list[int]] = [[] for _ in range(lanes)]
    for j in range(num_atoms):
        lane = ((consumed + head) // atom + j) % lanes
        drawn[lane] += order[head + j * atom : head + (j + 1) * atom].tolist()
    at = head
    for lane_samples in drawn:
        for start in range(0, len(lane_samples), parameters.window):
            window = lane_samples[start : start + parameters.window]
            assert sorted(window) == sorted(sequence[at : at + len(window)].tolist())
            assert _atoms_are_alike(plan.log_aspects[window].reshape(-1, atom))
            at += len(window)
    assert at == head + num_atoms * atom


def _keeps_blocks(sequence: IntArray, sizes: list[int], block: int) -> bool:
    ends = np.cumsum(sizes)
    starts = {s for end, size in zip(ends, sizes, strict=True) for s in range(end - size, end, block)}
    pairs = itertools.pairwise([-2, *sequence])
    return all(now in starts or now == before + 1 for before, now in pairs)


def _atoms_are_alike(atoms: np.ndarray) -> bool:
    """The atoms of a sorted window: put in the order of their aspects, they do not overlap."""
    ordered = atoms[np.lexsort((atoms.max(1), atoms.min(1)))]
    return bool((ordered[:-1].max(1) <= ordered[1:].min(1) + 1e-12).all())


@MODEST
@given(SIZES, st.integers(0, 200), st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
def test_any_topology_gives_the_same_run(
    sizes: list[int], position: int, world_size: int, batch: int, later_world_size: int, later_batch: int
) -> None:
    plan = make_plan(sizes, parameters=PlanParameters(4, 3, 8, 2))
    reference = np.concatenate([plan.order(epoch) for epoch in range(500 // sum(sizes) + 2)])

    def run(start: int, steps: int, ranks: int, size: int) -> list[int]:
        return [
            sample
            for step in range(steps)
            for rank in range(ranks)
            for sample in plan.samples(start + (step * ranks + rank) * size, size).tolist()
        ]

    stop = position + 3 * world_size * batch
    first = run(position, 3, world_size, batch)
    second = run(stop, 3, later_world_size, later_batch)
    end = stop + 3 * later_world_size * later_batch
    assert first + second == reference[position:end].tolist()


def test_seed_epoch_fingerprint_and_parameters_change_the_order() -> None:
    base = make_plan([500, 500]).order(0).tolist()
    others = [
        make_plan([500, 500], seed=1).order(0),
        make_plan([500, 500]).order(1),
        make_plan([500, 500], fingerprint="g").order(0),
        make_plan([500, 500], parameters=PlanParameters(lanes=32)).order(0),
    ]
    assert make_plan([500, 500]).order(0).tolist() == base
    assert all(order.tolist() != base for order in others)
    assert all(np.mean(order == base) < 0.05 for order in others)


def test_the_order_is_fixed_for_all_time() -> None:
    """A checkpoint's position means nothing to a program that orders otherwise: raise PLAN_VERSION then."""
    orders = [make_plan([7, 6], 3, PlanParameters(3, 2, 4, 2)).order(epoch).tolist() for epoch in (0, 1)]
    assert orders == FIXED


FIXED = [[12, 11, 2, 6, 10, 3, 1, 0, 5, 4, 8, 7, 9], [3, 10, 7, 1, 0, 9, 8, 4, 5, 12, 11, 2, 6]]


@pytest.mark.parametrize("num_ranks", [8, 16])
def test_coco_is_read_in_blocks_and_batched_by_shape(num_ranks: int) -> None:
    """118,287 samples: ranks hardly share blocks, and a batch of four has one aspect, also in epoch 3."""
    plan = make_plan([1000] * 118 + [287])
    num_samples = len(plan.shards)
    block = plan.shards * 1000 + np.arange(num_samples) % 1000 // 32
    run = np.concatenate([plan.order(epoch) for epoch in (3, 4)])
    begin = -3 * num_samples % (num_ranks * 4)  # G = 3 N + begin starts a step
    steps = (num_samples - begin) // (num_ranks * 4)
    batches = run[begin : begin + steps * num_ranks * 4].reshape(steps, num_ranks, 4)
    blocks_read = [len(np.unique(block[batches[:, rank]])) for rank in range(num_ranks)]
    assert sum(blocks_read) / len(np.unique(block[batches])) < 1.05
    aspects = plan.log_aspects[batches]
    assert np.mean(aspects.max(2) == aspects.min(2)) > 0.95
