from __future__ import annotations

import hashlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydetr.data.order import OrderParameters, SampleOrder

BENCHMARK = Path(__file__).parents[3] / "benchmarks/stream_order.py"

DEFAULT = OrderParameters()
MODEST = settings(deadline=None, max_examples=60)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)  # samples of each shard
SMALL = st.builds(
    OrderParameters, st.integers(1, 9), st.integers(1, 20), st.integers(1, 4), st.integers(1, 5)
)
EPOCHS = st.one_of(st.integers(0, 5), st.integers(0, 10**12))
TOPOLOGIES = st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(1, 7), st.integers(1, 4))


def make_order(
    sizes: list[int], seed: int = 0, parameters: OrderParameters = DEFAULT, fingerprint: str = "f"
) -> SampleOrder:
    shards = np.repeat(np.arange(len(sizes)), sizes)
    return SampleOrder(shards, made_aspects(len(shards)), fingerprint, seed, parameters)


def made_aspects(num_samples: int) -> np.ndarray:
    """Mix five aspect ratios without a library's generator, so that the mix never changes."""
    mixed = np.arange(num_samples) ** 2 * 31 % 1009 % 5
    return np.array([0.67, 0.75, 1, 1.33, 1.5])[mixed]


def plain_order(sizes: list[int], parameters: OrderParameters, epoch: int) -> list[int]:
    """Return tau_e by its definition, sample by sample (seed 0, fingerprint "f")."""
    chunk, window, windows, group_size = (
        getattr(parameters, name) for name in ("chunk_size", "min_window", "windows_per_stream", "group_size")
    )
    num_samples, aspects = sum(sizes), made_aspects(sum(sizes))
    chunks, first = [], 0
    for size in sizes:
        chunks += [
            list(range(begin, min(begin + chunk, first + size)))
            for begin in range(first, first + size, chunk)
        ]
        first += size
    spelled = (
        f"block={chunk}, window={window}, windows={windows}, atom={group_size}"  # as version 2 spells it
    )
    text = f"({epoch}, (2, PlanParameters({spelled}), 0, 'f'))"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]
    sequence = [sample for one in shuffled(chunks, philox(key, 0)) for sample in one]

    head = 0
    while (epoch * num_samples + head) % group_size and head < num_samples:
        head += 1
    num_groups = (num_samples - head) // group_size
    streams = 1
    while 2 * streams * windows * window <= num_samples:
        streams *= 2
    queues, at = [], head
    for stream in range(streams):
        length = len(range(stream, num_groups, streams))
        queue = []
        for v in range(windows):
            begin, end = v * length // windows, (v + 1) * length // windows
            words = philox(key, windows * stream + v + 1)
            samples = shuffled(sequence[at + begin * group_size : at + end * group_size], words)
            samples.sort(key=lambda sample: aspects[sample])
            queue += shuffled(
                [samples[i : i + group_size] for i in range(0, len(samples), group_size)], words
            )
        queues.append(iter(queue))
        at += length * group_size
    body = [sample for j in range(num_groups) for sample in next(queues[j % streams])]
    return sequence[:head] + body + sequence[head + num_groups * group_size :]


def shuffled(items: list, words: Iterator[int]) -> list:
    drawn = [next(words) for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=drawn.__getitem__)]


def philox(key: list[int], high: int) -> Iterator[int]:
    """Yield the words of Philox4x64-10 (Salmon et al., 2011) after the counter (0, 0, 0, high)."""
    low = 0
    while True:
        low += 1  # numpy increments the counter before it draws
        x0, x1, x2, x3 = low, 0, 0, high
        k0, k1 = key
        for _ in range(10):
            one, two = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
            x0, x1, x2, x3 = two >> 64 ^ x1 ^ k0, two % 2**64, one >> 64 ^ x3 ^ k1, one % 2**64
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
        yield from (x0, x1, x2, x3)


@settings(deadline=None, max_examples=150)
@given(SIZES, SMALL, EPOCHS)
def test_the_order_is_as_defined(sizes: list[int], parameters: OrderParameters, epoch: int) -> None:
    order = make_order(sizes, parameters=parameters).order(epoch)
    assert order.tolist() == plain_order(sizes, parameters, epoch)


@MODEST
@given(SIZES, SMALL, st.integers(0, 5), EPOCHS)
def test_an_epoch_holds_every_sample_once(
    sizes: list[int], parameters: OrderParameters, seed: int, epoch: int
) -> None:
    order = make_order(sizes, seed, parameters).order(epoch)
    assert sorted(order.tolist()) == list(range(sum(sizes)))


@MODEST
@given(SIZES, SMALL, st.integers(0, 5), st.data())
def test_any_part_equals_that_of_the_full_order(
    sizes: list[int], parameters: OrderParameters, seed: int, data: st.DataObject
) -> None:
    """Any sequence of requests for a few samples gives the same as one request for the epochs."""
    num_samples = sum(sizes)
    first = data.draw(st.integers(0, 10**6))
    expected = make_order(sizes, seed, parameters).samples(first, 3 * num_samples)
    order = make_order(sizes, seed, parameters)
    for _ in range(8):
        begin = data.draw(st.integers(0, 3 * num_samples))
        count = data.draw(st.integers(0, min(3 * num_samples - begin, 50)))
        assert order.samples(first + begin, count).tolist() == expected[begin : begin + count].tolist()


def consume(
    sizes: list[int], parameters: OrderParameters, position: int, topology: tuple[int, int, int, int]
) -> tuple[int, list[list[list[int]]]]:
    """Run two optimizer steps; return the position after them and the samples of each batch of each rank.

    Each of the `workers` loader processes of a rank has its own order; the processes take turns.
    """
    ranks, workers, batch, accumulation = topology
    seen: list[list[list[int]]] = [[] for _ in range(ranks)]
    for rank in range(ranks):
        orders = [make_order(sizes, 0, parameters) for _ in range(max(workers, 1))]
        for micro_step, order in zip(range(2 * accumulation), itertools.cycle(orders)):
            start = position + micro_step * ranks * batch + rank * batch
            seen[rank].append(order.samples(start, batch).tolist())
    return position + 2 * accumulation * ranks * batch, seen


@settings(deadline=None, max_examples=100)
@given(SIZES, SMALL, st.integers(0, 300), st.lists(TOPOLOGIES, min_size=1, max_size=3))
def test_any_topologies_one_after_another_give_one_run(
    sizes: list[int], parameters: OrderParameters, position: int, topologies: list[tuple[int, int, int, int]]
) -> None:
    """Each sample once per epoch, one global order, batches of one size on all ranks, resumed at any G."""
    found, start = [], position
    for topology in topologies:
        position, seen = consume(sizes, parameters, position, topology)
        assert {len(batch) for batches in seen for batch in batches} == {topology[2]}
        assert {len(batches) for batches in seen} == {2 * topology[3]}
        found += [sample for step in zip(*seen, strict=True) for batch in step for sample in batch]
    last_epoch = position // sum(sizes) + 1
    reference = [sample for epoch in range(last_epoch) for sample in plain_order(sizes, parameters, epoch)]
    assert found == reference[start:position]


def test_any_entry_needs_one_window() -> None:
    """Nothing is replayed after a resume, and only the windows in use are cached."""
    sizes = [1000] * 118 + [287]
    late = 100_000 * sum(sizes)
    for begin, windows, epochs in [(late + 4, 1, 1), (late + 60_000, 1, 1), (late - 2, 2, 2)]:
        order = make_order(sizes)
        order.samples(begin, 4)
        assert order._window.cache_info().misses <= windows
        assert order._epoch.cache_info().misses == epochs
    order = make_order([1000] * 16)
    for begin in range(0, 16_000, 4):  # one rank reads all streams
        order.samples(begin, 4)
    assert order._window.cache_info().misses == 2 * 16  # each window once
    assert order._window.cache_info().currsize <= order.num_streams == 16


def test_seed_epoch_fingerprint_and_parameters_change_the_order() -> None:
    base = make_order([500, 500]).order(0).tolist()
    others = [
        make_order([500, 500], seed=1).order(0),
        make_order([500, 500]).order(1),
        make_order([500, 500], fingerprint="g").order(0),
        make_order([500, 500], parameters=OrderParameters(windows_per_stream=3)).order(0),
    ]
    assert make_order([500, 500]).order(0).tolist() == base
    assert all(order.tolist() != base for order in others)
    assert all(np.mean(order == base) < 0.05 for order in others)


def test_samples_are_spread_evenly_over_the_epoch() -> None:
    """Over many seeds, the entry of a sample in its epoch is uniformly distributed."""
    orders = np.array(
        [make_order([100] * 5, seed, OrderParameters(5, 20, 3, 4)).order(0) for seed in range(200)]
    )
    places = np.argsort(orders, axis=1)  # [seed, sample]
    assert np.abs(places.mean(0) / 499 - 0.5).max() < 0.1  # the mean of 200 uniform draws: sigma 0.02
    assert np.abs(places.std(0) / 500 - 12**-0.5).max() < 0.05


def test_the_order_never_changes() -> None:
    """Another order needs another ORDER_VERSION: a checkpoint's position would mean other samples."""
    orders = [make_order([7, 6], 3, OrderParameters(3, 2, 2, 2)).order(epoch).tolist() for epoch in (0, 1)]
    assert orders == FIXED
    digest = hashlib.sha256(make_order([1000] * 118 + [287]).order(7).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == FIXED_DEFAULT  # also with the default parameters


FIXED_DEFAULT = "67e2d0570fad576b"
FIXED = [[7, 8, 12, 3, 10, 11, 1, 4, 6, 9, 0, 5, 2], [7, 8, 9, 0, 1, 12, 11, 2, 3, 6, 10, 5, 4]]


@pytest.mark.parametrize("num_ranks", [8, 16])
def test_coco_is_read_in_chunks_and_batched_by_shape(num_ranks: int) -> None:
    """118,287 samples: ranks hardly share chunks, and a batch of four has one aspect ratio, also in epoch 3."""
    order = make_order([1000] * 118 + [287])
    num_samples = order.num_samples
    samples = np.arange(num_samples)
    chunk = samples // 1000 * 1000 + samples % 1000 // 32
    run = np.concatenate([order.order(epoch) for epoch in (3, 4)])
    begin = -3 * num_samples % (num_ranks * 4)  # G = 3 N + begin starts a step
    steps = (num_samples - begin) // (num_ranks * 4)
    batches = run[begin : begin + steps * num_ranks * 4].reshape(steps, num_ranks, 4)
    chunks_read = [len(np.unique(chunk[batches[:, rank]])) for rank in range(num_ranks)]
    amplification = sum(chunks_read) / len(np.unique(chunk[batches]))
    aspects = order.aspects[batches]
    alike = np.mean(aspects.max(2) == aspects.min(2))
    assert amplification < 1.05
    assert alike > 0.965


@pytest.fixture(scope="module")
def stream_order() -> Any:
    """Import the module of `make bench-stream` with the simulation."""
    spec = importlib.util.spec_from_file_location("stream_order", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nodes_of_a_large_world_share_no_chunks(stream_order: Any) -> None:
    """Like `make bench-stream` with its 1,024 ranks: every rank requests every batch of an epoch."""
    world = stream_order.simulate(num_ranks=16, ranks_per_node=8, num_samples=20_000, num_shards=200)
    assert world.wrong == 0
    assert world.imbalance <= 4
    assert world.node_amplification < 1.05
    # 24 ranks do not divide the 16 streams: still exact
    other = stream_order.simulate(num_ranks=24, ranks_per_node=8, num_samples=20_000, num_shards=200)
    assert (other.wrong, other.imbalance) == (0, 4)
    assert other.node_amplification > 1.5


def test_batches_of_one_shape_have_hardly_any_padding(stream_order: Any) -> None:
    """With COCO's sizes and one scale per step: under 1% at four images, over 20% in a random order."""
    case = stream_order.padding()
    assert case["ours"] < 1
    assert case["baseline"] > 20
