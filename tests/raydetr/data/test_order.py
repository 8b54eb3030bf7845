from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
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
# From 60 samples on, chunks; or always
SMALL = st.builds(
    OrderParameters, st.integers(1, 9), st.integers(1, 40), st.integers(1, 5), st.sampled_from([0, 60])
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
    chunk, min_stream, group_size, min_chunked = (
        getattr(parameters, name) for name in ("chunk_size", "min_stream", "group_size", "min_chunked")
    )
    num_samples, aspects = sum(sizes), made_aspects(sum(sizes))
    is_chunked = num_samples >= min_chunked
    chunks, first = [], 0
    for size in sizes:
        step = chunk if is_chunked else 1
        chunks += [
            list(range(begin, min(begin + step, first + size))) for begin in range(first, first + size, step)
        ]
        first += size
    spelled = (
        f"chunk_size={chunk}, min_stream={min_stream}, group_size={group_size}, min_chunked={min_chunked}"
    )
    text = f"order 3, OrderParameters({spelled}), seed 0, f, epoch {epoch}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]
    chunks = shuffled(chunks, philox(key, 0))
    sequence = [sample for one in chunks for sample in one]
    if not is_chunked:
        return sequence

    head = 0
    while (epoch * num_samples + head) % group_size and head < num_samples:
        head += 1
    num_groups = (num_samples - head) // group_size
    num_streams = 1
    while 2 * num_streams * min_stream <= num_samples:
        num_streams *= 2
    streams, at = [], head
    for number in range(num_streams):
        length = len(range(number, num_groups, num_streams))
        inside = set(sequence[at : at + length * group_size])
        words = philox(key, number + 1)
        ranked = []
        for turn, one in enumerate(chunks):
            permuted = shuffled([sample for sample in one if sample in inside], words)
            ranked += [(round(32 * aspects[s]), place, turn, s) for place, s in enumerate(permuted)]
        samples = [sample for *_, sample in sorted(ranked)]
        groups = [samples[i : i + group_size] for i in range(0, len(samples), group_size)]
        streams.append(iter(shuffled(groups, words)))
        at += length * group_size
    body = [sample for j in range(num_groups) for sample in next(streams[j % num_streams])]
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


def test_any_entry_needs_one_stream() -> None:
    """Nothing is replayed after a resume, and only the streams in use are cached."""
    sizes = [1000] * 118 + [287]
    late = 100_000 * sum(sizes)
    for begin, streams, epochs in [(late + 4, 1, 1), (late + 60_000, 1, 1), (late - 2, 2, 2)]:
        order = make_order(sizes)
        order.samples(begin, 4)
        assert order._stream.cache_info().misses <= streams
        assert order._epoch.cache_info().misses == epochs
    order = make_order([1000] * 16)
    for begin in range(0, 16_000, 4):  # one rank reads all streams
        order.samples(begin, 4)
    assert order._stream.cache_info().misses == order.num_streams == 16  # each stream once


def test_seed_epoch_fingerprint_and_parameters_change_the_order() -> None:
    base = make_order([500, 500]).order(0).tolist()
    others = [
        make_order([500, 500], seed=1).order(0),
        make_order([500, 500]).order(1),
        make_order([500, 500], fingerprint="g").order(0),
        make_order([500, 500], parameters=OrderParameters(min_chunked=100)).order(0),
    ]
    assert make_order([500, 500]).order(0).tolist() == base
    assert all(order.tolist() != base for order in others)
    assert all(np.mean(order == base) < 0.05 for order in others)


def test_samples_are_spread_evenly_over_the_epoch() -> None:
    """Over many seeds, the entry of a sample in its epoch is uniformly distributed."""
    orders = np.array(
        [make_order([100] * 5, seed, OrderParameters(5, 60, 4, 0)).order(0) for seed in range(200)]
    )
    places = np.argsort(orders, axis=1)  # [seed, sample]
    assert np.abs(places.mean(0) / 499 - 0.5).max() < 0.1  # the mean of 200 uniform draws: sigma 0.02
    assert np.abs(places.std(0) / 500 - 12**-0.5).max() < 0.05


def test_the_order_never_changes() -> None:
    """Another order needs another ORDER_VERSION: a checkpoint's position would mean other samples."""
    orders = [make_order([7, 6], 3, OrderParameters(3, 4, 2, 0)).order(epoch).tolist() for epoch in (0, 1)]
    assert orders == FIXED
    for sizes, expected in FIXED_DEFAULT:  # also with the default parameters
        order = make_order(sizes).order(7)
        assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == expected


FIXED_DEFAULT = [([500], "2bcef8a06d4a303d"), ([1000] * 118 + [287], "31fe09c83b107d49")]
FIXED = [[10, 12, 7, 8, 0, 1, 9, 3, 2, 11, 4, 6, 5], [7, 12, 11, 5, 0, 10, 9, 4, 1, 8, 6, 3, 2]]


# --- Statistics of batches, with samples sorted by class ---

FIVE_ASPECTS = np.array([0.67, 0.75, 1, 1.33, 1.5])
SMALL_SIZES = [8, 16, 32, 64, 200, 500, 1000, 2000, 5000]


def sorted_classes(num_samples: int) -> np.ndarray:
    return np.arange(num_samples) * min(10, num_samples // 4) // num_samples


def one_shape_per_class(num_samples: int) -> np.ndarray:
    return FIVE_ASPECTS[sorted_classes(num_samples) % 5]


def any_shapes(num_samples: int) -> np.ndarray:
    return np.random.default_rng(1).choice(FIVE_ASPECTS, num_samples)


def order_of(aspects: np.ndarray, parameters: OrderParameters = DEFAULT) -> SampleOrder:
    return SampleOrder(np.arange(len(aspects)) // 1000, aspects, "f", 5, parameters)


def class_variance(order: SampleOrder, batch: int, num_drawn: int) -> float:
    """Return the variance of the number of samples of a class in a batch, over that of a free shuffle.

    The latter is that of draws without replacement, for each of the epochs that a batch holds samples of.
    """
    size, classes = order.num_samples, sorted_classes(order.num_samples)
    num_batches, num_classes = num_drawn // batch, classes[-1] + 1
    cells = (
        np.arange(num_batches).repeat(batch) * num_classes + classes[order.samples(0, num_batches * batch)]
    )
    counts = np.bincount(cells, minlength=num_batches * num_classes).reshape(num_batches, num_classes)
    share = np.bincount(classes) / size
    before = np.minimum(size - np.arange(num_batches) * batch % size, batch)  # samples of the first epoch
    factor = sum(part * (size - part) / (size - 1) for part in (before, batch - before))
    return float(np.square(counts - batch * share).sum() / np.outer(factor, share * (1 - share)).sum())


@pytest.mark.parametrize("num_samples", SMALL_SIZES)
def test_classes_of_small_data_vary_as_in_a_free_shuffle(num_samples: int) -> None:
    """Within 5%, even if each class has its own aspect ratio. The sampling error is about 1%."""
    aspects = one_shape_per_class(num_samples)
    for batch in (4, 8, 16):
        if batch < num_samples:
            assert class_variance(order_of(aspects), batch, 120_000) == pytest.approx(1, abs=0.05)
    grouped = order_of(aspects, OrderParameters(min_chunked=0))
    assert class_variance(grouped, 4, 40_000) > 1.5  # the statistic would show it


@pytest.mark.parametrize("num_samples", [10_000, 20_000])
def test_chunks_and_aspect_groups_hardly_change_the_variation_of_classes(num_samples: int) -> None:
    """The remaining bias: a class with a shape of its own comes in groups. Its batches vary more, at any size."""
    for batch in (4, 8, 16):
        variance = class_variance(order_of(any_shapes(num_samples)), batch, 400_000)
        assert variance == pytest.approx(1, abs=0.06)
    assert 2 < class_variance(order_of(one_shape_per_class(num_samples)), 4, 400_000) < 2.5


def pair_deviation(order: SampleOrder, size: int, parts_used: int) -> float:
    """Return how unequally often two samples share a part of the epoch, over what chance explains: about 1.

    Each of 4,000 epochs is cut into parts of `size`; the first `parts_used` of them count.
    """
    num_samples, num_epochs = order.num_samples, 4000
    epochs = order.samples(0, num_epochs * num_samples).reshape(num_epochs, num_samples // size, size)
    parts = epochs[:, :parts_used].reshape(-1, size)
    present = np.zeros((len(parts), num_samples), np.float32)
    np.put_along_axis(present, parts, 1, axis=1)
    times = (present.T @ present)[np.triu_indices(num_samples, 1)]
    chance = parts_used * size * (size - 1) / (num_samples * (num_samples - 1))
    return float(np.square(times - num_epochs * chance).mean() / (num_epochs * chance * (1 - chance)))


@pytest.mark.parametrize("num_samples", [8, 16, 32, 64, 200])
def test_any_two_samples_share_a_batch_or_half_an_epoch_equally_often(num_samples: int) -> None:
    """No image is shaped like another, so that aspect groups would always be the same."""
    aspects = np.linspace(0.5, 2, num_samples)
    assert pair_deviation(order_of(aspects), 4, num_samples // 4) < 1.5
    assert pair_deviation(order_of(aspects), num_samples // 2, 1) < 1.5
    grouped = order_of(aspects, OrderParameters(min_chunked=0))
    assert pair_deviation(grouped, 4, num_samples // 4) > 10  # the statistic would show it


@pytest.mark.parametrize("num_samples", [16, 32])
def test_the_first_half_of_an_epoch_is_always_another_set(num_samples: int) -> None:
    order = order_of(one_shape_per_class(num_samples))
    halves = {frozenset(order.order(epoch)[: num_samples // 2].tolist()) for epoch in range(100)}
    assert len(halves) >= 98  # of 12,870 sets, or many more


def test_a_class_is_hardly_ever_missing_from_a_tenth_of_an_epoch() -> None:
    """500 images, 50 of each class: a free shuffle misses one in 0.4% of all tenths."""
    order, classes = order_of(one_shape_per_class(500)), sorted_classes(500)
    tenths = np.concatenate([classes[order.order(epoch)].reshape(10, 50) for epoch in range(200)])
    missing = np.mean([(tenths != one).all(axis=1) for one in range(10)])
    free = math.comb(450, 50) / math.comb(500, 50)
    assert 0.7 * free < missing < 1.3 * free


def sharing_a_chunk(order: SampleOrder, batch: int) -> float:
    """Return the fraction of batches, over two epochs, in which two samples are of one chunk of 32."""
    chunks = np.arange(order.num_samples) // 1000 * 1000 + np.arange(order.num_samples) % 1000 // 32
    drawn = chunks[order.samples(0, 2 * order.num_samples // batch * batch)].reshape(-1, batch)
    drawn.sort(axis=1)
    return float((drawn[:, 1:] == drawn[:, :-1]).any(axis=1).mean())


@pytest.mark.parametrize("num_samples", [20_000, 118_287])
def test_frames_of_a_video_rarely_share_a_batch(num_samples: int) -> None:
    """A chunk is a video; all have one shape, or each has one out of five. Then some streams have few of a shape.

    In a free shuffle, two images of a chunk share 3% to 17% of the batches of 16.
    """
    alike = order_of(np.ones(num_samples))
    assert sharing_a_chunk(alike, 4) < 0.001
    assert sharing_a_chunk(alike, 16) < 0.01
    videos = np.arange(num_samples) // 1000 * 32 + np.arange(num_samples) % 1000 // 32
    assert sharing_a_chunk(order_of(any_shapes(num_samples)[videos]), 4) < 0.07
    assert sharing_a_chunk(order_of(any_shapes(num_samples)), 4) < 0.02  # photographs: of mixed shapes


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
