"""The node cache: shared by processes, verified, within its budget, consistent after a process is killed."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faulty_proxy import Fault, FaultyProxy
from made_coco import write_coco
from object_stores import CREDENTIALS, S3Server, WebServer
from raydetr.config import RemoteConfig, TransformConfig
from raydetr.data.batch import Batch
from raydetr.data.order import SampleOrder
from raydetr.data.stream import evaluation_batches, make_order, train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.shards.reader import Shards, open_shards
from raydetr.shards.remote.cache import CacheFull, NodeCache
from raydetr.shards.remote.chunks import Chunks
from raydetr.shards.remote.eviction import UpcomingReads, choose_evictions, may_replace
from raydetr.shards.writer import write_shards

QUICK = RemoteConfig(connect_timeout=2.0, read_timeout=1.0, attempts=3)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """240 images in three shards: nine chunks."""
    images, annotations = write_coco(tmp_path_factory.mktemp("coco"), 240)
    out = tmp_path_factory.mktemp("shards") / "many"
    write_shards(images, annotations, out, samples_per_shard=80)
    return open_shards(out)


@pytest.fixture
def web(many: Shards) -> Iterator[WebServer]:
    server = WebServer(many.path)
    yield server
    server.close()


def num_bytes(shards: Shards) -> int:
    return sum(shard.size for shard in shards.manifest.shards)


def cached(url: str, folder: Path, budget: int, settings: RemoteConfig = QUICK) -> Shards:
    return open_shards(
        url, remote=settings.model_copy(update={"cache_dir": folder, "cache_gb": budget / 1e9})
    )


def on_disk(folder: Path) -> int:
    """Return the total size of all entries, complete and partial, at one moment."""
    with (folder / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(
            entry.stat().st_size for part in ("partial", "whole") for entry in (folder / part).iterdir()
        )


def fetched_bytes(requests: list[tuple[str, str | None]]) -> list[int]:
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "") for path, wanted in requests if ".tar" in path]
    return [int(found[2]) - int(found[1]) + 1 for found in ranges if found]


def ranges_of_chunks(shards: Shards) -> list[tuple[str, str]]:
    """Return path and Range header of the requests for 32 samples each, counted from the start of each shard."""
    found = []
    for number, file in enumerate(shards.manifest.shards):
        rows = shards.samples[shards.samples["shard"] == number]
        for at in range(0, len(rows), 32):
            last = rows[at : at + 32][-1]
            first, end = int(rows[at]["offset"]), int(last["offset"]) + int(last["length"])
            found.append((f"/{file.name}", f"bytes={first}-{end - 1}"))
    return found


def wait_until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- the folder


def fill_with(content: bytes) -> Callable[[Callable[[bytes], None]], None]:
    return lambda accept: accept(content)


def test_entries_are_stored_completely_and_evicted(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 250)
    assert cache.store("a", 100, fill_with(b"a" * 100), lambda missing: None) == "stored"
    assert cache.store("a", 100, fill_with(b"x" * 100), lambda missing: None) == "present"
    assert cache.read("a", 100, 10, 5) == b"aaaaa"
    assert cache.read("a", 99, 10, 5) is None
    assert cache.read("b", 100, 10, 5) is None
    cache.store("b", 100, fill_with(b"b" * 100), lambda missing: None)
    assert cache.store("c", 100, fill_with(b"c" * 100), lambda missing: None) == "full"
    asked: list[int] = []
    assert (
        cache.store("c", 100, fill_with(b"c" * 100), lambda missing: asked.append(missing) or ["b"])
        == "stored"
    )  # type: ignore[func-returns-value]
    assert asked == [50]
    assert cache.sizes() == {"a": 100, "c": 100}
    assert cache.used() == on_disk(tmp_path) == 200


def test_the_budget_is_kept_where_the_count_was_never_written(tmp_path: Path) -> None:
    """A process was killed between creating the file and writing to it, while another one continues."""
    cache = NodeCache(tmp_path, 250)
    cache.store("a", 100, fill_with(b"a" * 100), lambda missing: None)
    (tmp_path / "used").write_bytes(b"")
    assert cache.store("b", 151, fill_with(b"b" * 151), lambda missing: None) == "full"
    assert cache.store("b", 150, fill_with(b"b" * 150), lambda missing: None) == "stored"
    assert cache.used() == on_disk(tmp_path) == 250


def test_chunk_names_depend_on_url_size_and_sha256_of_the_shard(many: Shards) -> None:
    """Rewritten shards at the same location have other names; all processes use the same names for the same shards."""
    files = many.manifest.shards

    def names(url: str = "s3://bucket", **changes: Any) -> set[str]:
        changed = [dataclasses.replace(file, **changes) for file in files]
        chunks = Chunks(many.samples, changed, [f"{url}/{file.name}" for file in files])
        return {chunks[number].name for number in range(len(chunks))}

    base = names()
    assert len(base) == len(ranges_of_chunks(many))
    assert names() == base
    for other in (names("s3://other"), names(size=files[0].size + 512), names(sha256="0" * 64)):
        assert not base & other


def test_entries_that_are_being_read_are_not_removed(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 100)
    cache.store("a", 100, fill_with(b"a" * 100), lambda missing: None)
    with (tmp_path / "whole" / "a").open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        assert cache.remove(["a"]) == 0
        assert reader.read() == b"a" * 100
    assert cache.remove(["a"]) == 100


def test_an_error_while_filling_leaves_nothing(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 250)

    def fill(accept: Callable[[bytes], None]) -> None:
        accept(b"a" * 50)
        raise KeyError("on purpose")

    with pytest.raises(KeyError):
        cache.store("a", 100, fill, lambda missing: None)
    assert cache.used() == on_disk(tmp_path) == 0
    assert not cache.has("a")


WRITER = """
import sys, time
from pathlib import Path
from raydetr.shards.remote.cache import NodeCache
def fill(accept):
    accept(b"a" * 60)
    print("half", flush=True)
    time.sleep(60)
NodeCache(Path(sys.argv[1]), 250).store("a", 100, fill, lambda missing: None)
"""


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], env=environment, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"half\n"
    cache = NodeCache(tmp_path, 250)
    assert cache.used() == 100  # its size is reserved
    assert cache.store("a", 100, fill_with(b"b" * 100), lambda missing: None) == "present"  # being written
    writer.send_signal(signal.SIGKILL)
    writer.wait(10)
    writer.stdout.close()
    assert not cache.has("a")
    assert cache.store("a", 100, fill_with(b"b" * 100), lambda missing: None) == "stored"
    assert cache.read("a", 100, 0, 3) == b"bbb"
    assert cache.used() == on_disk(tmp_path) == 100
    (tmp_path / "partial" / "stale").write_bytes(bytes(40))
    assert NodeCache(tmp_path, 250).used() == 100
    assert on_disk(tmp_path) == 100


HAMMER = """
import random, sys
from pathlib import Path
from raydetr.shards.remote.cache import NodeCache
cache, rng = NodeCache(Path(sys.argv[1]), 1000), random.Random(sys.argv[2])
def evictions(missing):
    names = sorted(cache.names())
    return rng.sample(names, min(5, len(names)))
for _ in range(200):
    number = rng.randrange(12)
    content = b"%x" % number * (100 + number)
    cache.store(str(number), len(content), lambda accept: accept(content), evictions)
    assert cache.read(str(number), len(content), 0, len(content)) in (None, content)
"""


def test_processes_that_fill_and_empty_it_together_keep_the_budget(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", HAMMER, str(tmp_path), str(seed)], env=environment)
        for seed in range(3)
    ]
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, on_disk(tmp_path))
        time.sleep(0.005)
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert 500 < most <= 1000
    assert cache.used() == on_disk(tmp_path) == sum(cache.sizes().values())


def test_an_unusable_folder_is_an_error(tmp_path: Path, many: Shards, web: WebServer) -> None:
    (tmp_path / "file").write_text("")
    shards = cached(web.url, tmp_path / "file", 10**9)
    with pytest.raises(
        ValueError, match=r"file \(data.remote.cache_dir\) cannot be used as a cache .*name a folder"
    ):
        list(islice(batches(shards, 0, 1), 1))
    with pytest.raises(ValueError, match=r"data.remote.cache_gb=1e-06 is less than a shard of http"):
        cached(web.url, tmp_path / "cache", 1000)


# --- prefetching and eviction


def test_upcoming_reads_give_the_next_use() -> None:
    upcoming = UpcomingReads(iter([[(7, 10), (8, 10)], [(7, 10)], [(9, 10)], [(8, 5), (7, 10)]]))
    assert upcoming.extend(2)
    assert upcoming.next_uses() == {7: 0, 8: 0}
    assert not upcoming.extend(5)
    assert upcoming.next_uses() == {7: 0, 8: 0, 9: 2}
    assert (upcoming.bytes_before(7, 3), upcoming.bytes_before(7, 4), upcoming.bytes_before(8, 9)) == (
        20,
        30,
        15,
    )
    upcoming.advance(2)
    assert upcoming.next_uses() == {9: 0, 8: 1, 7: 1}
    upcoming.advance(4)
    assert upcoming.next_uses() == {}


def test_entries_used_last_are_evicted_first_and_only_if_it_pays() -> None:
    sizes, next_use = {"a": 10, "b": 10, "c": 10, "never": 10}, {"a": 5, "b": 50, "c": 20}
    assert choose_evictions(10, sizes, next_use, lambda steps: True) == ["never"]
    assert choose_evictions(25, sizes, next_use, lambda steps: steps > 10) == ["never", "b", "c"]
    assert choose_evictions(35, sizes, next_use, lambda steps: steps > 10) is None


def test_each_byte_is_fetched_once_over_epochs(many: Shards, web: WebServer, tmp_path: Path) -> None:
    shards = cached(web.url, tmp_path / "cache", 2 * num_bytes(many))
    order = make_order(many, 0)
    batches = [order.samples(4 * step, 4).tolist() for step in range(180)]  # three epochs
    prefetcher = shards.files.prefetch(batches)
    wait_until(lambda: len(list((tmp_path / "cache" / "whole").iterdir())) == 9)
    begun = len(web.requests)
    assert sum(fetched_bytes(web.requests)) == pytest.approx(num_bytes(many), rel=0.03)
    for step, batch in enumerate(batches):
        prefetcher.advance(step)
        assert shards.read_many(batch) == many.read_many(batch)
    prefetcher.close()
    assert len(web.requests) == begun  # all of it came from the cache


def test_a_small_budget_is_kept_and_the_samples_are_right(
    many: Shards, web: WebServer, tmp_path: Path
) -> None:
    folder, budget = tmp_path / "cache", num_bytes(many) // 2
    shards = cached(web.url, folder, budget)
    order = make_order(many, 0)
    batches = [order.samples(4 * step, 4).tolist() for step in range(120)]
    prefetcher = shards.files.prefetch(batches)
    most = 0
    for step, batch in enumerate(batches):
        prefetcher.advance(step)
        assert shards.read_many(batch) == many.read_many(batch)
        time.sleep(0.005)
        most = max(most, on_disk(folder))
    prefetcher.close()
    assert num_bytes(many) // 4 < most <= budget


def test_room_for_half_saves_nearly_half() -> None:
    """The policy alone, on 12,000 samples, if fetching took no time."""
    num_samples, batch_size, epochs = 12_000, 32, 3
    rng = np.random.default_rng(0)
    order = SampleOrder(np.arange(num_samples) // 500, np.exp(rng.normal(0, 0.3, num_samples)), "made", 0)
    chunk = np.arange(num_samples) // 32
    starts = range(0, epochs * num_samples, batch_size)
    steps = [chunk[order.samples(at, batch_size)].tolist() for at in starts]
    upcoming = UpcomingReads([(number, 1) for number in reads] for reads in steps)
    kept: dict[str, int] = {}
    fetched = [0] * epochs
    for step, reads in enumerate(steps):
        epoch = step * batch_size // num_samples
        upcoming.advance(step)
        upcoming.extend(10**6 if step == 0 else 64)
        next_use = {str(number): use for number, use in upcoming.next_uses().items()}
        for name, use in next_use.items() if step % 4 == 0 else ():
            if name in kept:
                continue
            pays = partial(may_replace, upcoming, int(name), use, 32)
            evicted = choose_evictions(1, kept, next_use, pays) if len(kept) >= num_samples // 64 else []
            if evicted is None:
                break
            for entry in evicted:
                del kept[entry]
            kept[name] = 1
            fetched[epoch] += 32
        fetched[epoch] += sum(str(number) not in kept for number in reads)
    assert fetched[0] < 1.1 * num_samples
    assert max(fetched[1:]) < 0.65 * num_samples


def test_reading_does_not_wait_for_a_chunk(many: Shards, web: WebServer, tmp_path: Path) -> None:
    proxy = FaultyProxy(web.address)
    shards = cached(proxy.url, tmp_path / "cache", 2 * num_bytes(many))
    longest = int(many.samples["length"].max())
    finished = threading.Event()

    def faults(request: int) -> Fault | None:
        last = web.requests[-1][1] if web.requests else None
        return (
            None if last is None or finished.is_set() else Fault("stall", 2 * longest)
        )  # only chunks are longer

    proxy.faults = faults
    prefetcher = shards.files.prefetch([[0, 40, 200]])
    prefetcher.advance(0)
    assert shards.read_many([0, 40, 200]) == many.read_many([0, 40, 200])
    assert not list((tmp_path / "cache" / "whole").iterdir())
    finished.set()
    prefetcher.close()
    proxy.close()


def test_corrupt_downloads_are_not_cached(
    many: Shards, web: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = FaultyProxy(web.address)
    shards = cached(proxy.url, tmp_path / "cache", 2 * num_bytes(many))
    begun = proxy.num_requests
    proxy.faults = lambda request: Fault("corrupt", 700) if request == begun else None
    prefetcher = shards.files.prefetch([[0]])
    wait_until(lambda: len(list((tmp_path / "cache" / "whole").iterdir())) == 1)
    assert proxy.num_requests - begun == 2  # discarded, and fetched again
    assert shards.read(0) == many.read(0)
    prefetcher.close()
    proxy.faults = lambda request: Fault("corrupt", 700)
    prefetcher = shards.files.prefetch([[100]])
    with caplog.at_level(logging.WARNING):
        wait_until(lambda: "not cached" in caplog.text)
    assert re.search(r"sample \d{12} at byte \d+ has another crc32, twice", caplog.text)
    prefetcher.close()
    proxy.close()


def test_a_corrupt_copy_is_read_again_from_the_server(many: Shards, web: WebServer, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shards = cached(web.url, folder, 2 * num_bytes(many))
    prefetcher = shards.files.prefetch([[0]])
    wait_until(lambda: len(list((folder / "whole").iterdir())) == 1)
    prefetcher.close()
    (entry,) = (folder / "whole").iterdir()
    content = bytearray(entry.read_bytes())
    content[700] ^= 4
    entry.write_bytes(content)
    (batch,) = islice(
        evaluation_batches(
            shards, rank=0, world_size=1, batch_size=1, transform=Transform(TransformConfig())
        ),
        1,
    )
    assert batch is not None
    assert batch.image_ids.item() == many.samples["image_id"][0]
    assert not entry.exists() or entry.read_bytes() != content


def test_a_full_disk_is_logged_once_and_reading_continues(
    many: Shards,
    web: WebServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    shards = cached(web.url, tmp_path / "cache", 2 * num_bytes(many))
    with caplog.at_level(logging.WARNING):
        prefetcher = shards.files.prefetch([[index] for index in range(240)])
        wait_until(lambda: "stops caching" in caplog.text)
        assert shards.read_many(range(50)) == many.read_many(range(50))
        prefetcher.advance(50)
    assert caplog.text.count("stops caching") == 1
    assert on_disk(tmp_path / "cache") == 0
    prefetcher.close()
    with pytest.raises(CacheFull, match="no space left on the disk"):
        NodeCache(tmp_path / "other", 100).store("a", 9, fill_with(b"a" * 9), lambda _: None)


# --- the stream


def batches(shards: Shards, workers: int, seed: int) -> Iterator[Batch]:
    return train_batches(
        shards, seed=seed, position=0, rank=0, world_size=1, batch_size=4,
        transform=Transform(TransformConfig(horizontal_flip=0.5)), num_workers=workers,
    )  # fmt: skip


def same(ours: Batch, theirs: Batch) -> bool:
    return (
        ours.position == theirs.position
        and bool((ours.image_ids == theirs.image_ids).all())
        and ours.pixels.shape == theirs.pixels.shape
        and bool((ours.pixels == theirs.pixels).all())
    )


@pytest.fixture(scope="module")
def s3(many: Shards) -> Iterator[S3Server]:
    server = S3Server()
    server.upload(many.path, "many")
    yield server
    server.close()


@pytest.mark.parametrize(("workers", "with_cache"), [(0, True), (2, False), (2, True)])
def test_the_stream_from_s3_is_that_of_the_folder(
    many: Shards,
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    with_cache: bool,
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    proxy = FaultyProxy(s3.address)
    faults = {20: Fault("stall", 500), 25: Fault("reset", 50), 26: Fault("short", 300), 31: Fault("busy")}
    proxy.faults = faults.get
    settings = RemoteConfig(options={"endpoint_url": proxy.url}, read_timeout=2.0)
    if with_cache:
        room = 2 * num_bytes(many) / 1e9
        settings = settings.model_copy(update={"cache_dir": tmp_path / "c", "cache_gb": room})
    shards = open_shards("s3://bucket/many", remote=settings)
    num_batches = 90  # an epoch and a half
    pairs = zip(batches(shards, workers, 3), islice(batches(many, 0, 3), num_batches), strict=False)
    assert [same(ours, theirs) for ours, theirs in pairs] == [True] * num_batches
    assert proxy.injected or with_cache
    proxy.close()


def test_two_processes_share_what_one_has_fetched(many: Shards, web: WebServer, tmp_path: Path) -> None:
    shards = cached(web.url, tmp_path / "cache", 2 * num_bytes(many))
    for _ in islice(batches(shards, 2, 0), 240):  # four epochs
        time.sleep(0.005)
    asked = [(path, wanted) for path, wanted in web.requests if (path, wanted) in ranges_of_chunks(many)]
    assert len(asked) == len(set(asked)) == 9
    begun = len(web.requests)
    other = cached(web.url, tmp_path / "cache", 2 * num_bytes(many))  # as another run on this node
    opened = len(web.requests)
    for _ in islice(batches(other, 2, 1), 60):
        pass
    assert len(web.requests) == opened
    assert opened - begun == 2 + 3  # manifest, index, and the sizes
