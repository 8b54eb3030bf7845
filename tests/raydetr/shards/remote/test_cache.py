"""The node cache: shared by processes, checked, within its budget, consistent after a process is killed."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import pytest

from faulty_proxy import Fault, FaultyProxy
from made_coco import write_coco
from object_stores import CREDENTIALS, S3Server, WebServer
from raydetr.config import RemoteConfig, TransformConfig
from raydetr.data.batch import Batch
from raydetr.data.layout import Layout
from raydetr.data.stream import evaluation_batches, make_order, train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.shards.reader import Shards, open_shards
from raydetr.shards.remote import cache as cache_module
from raydetr.shards.remote import reading
from raydetr.shards.remote.cache import FULL_SECONDS, NodeCache, locked
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source

QUICK = RemoteConfig(connect_timeout=2.0, read_timeout=1.0, retry_seconds=2.0)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """320 images in two shards: ten chunks."""
    images, annotations = write_coco(tmp_path_factory.mktemp("coco"), 320)
    out = tmp_path_factory.mktemp("shards") / "many"
    write_source(coco_source(images, annotations), out, samples_per_shard=160)
    return open_shards(out)


@pytest.fixture
def web(many: Shards) -> Iterator[WebServer]:
    server = WebServer(many.path)
    yield server
    server.close()


def num_bytes(shards: Shards) -> int:
    return int(shards.samples["length"].sum())


def cached(url: str, folder: Path, budget: int, settings: RemoteConfig = QUICK) -> Shards:
    return open_shards(
        url, remote=settings.model_copy(update={"cache_dir": folder, "cache_gb": budget / 1e9})
    )


def on_disk(folder: Path) -> int:
    """Return the total size of all chunks, complete and partial."""
    sizes: dict[int, int] = {}  # by inode: a chunk may be renamed in the meantime
    for entry in folder.glob("*/*"):
        if re.match(r"\d+(\.|$)", entry.name):
            with suppress(FileNotFoundError):
                found = entry.stat()
                sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


def fetched_bytes(requests: Sequence[tuple[str, str | None]]) -> list[int]:
    """Return the number of bytes of each request to a shard, without those for its size."""
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "") for path, wanted in requests if ".tar" in path]
    sizes = [int(found[2]) - int(found[1]) + 1 for found in ranges if found]
    return [size for size in sizes if size > 1]


# --- the folder


def test_chunks_are_kept_until_there_is_no_room(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, "data", 250)
    assert cache.fill(0, 100, lambda: b"a" * 100) == b"a" * 100
    assert cache.fill(0, 100, lambda: pytest.fail("is there")) == b"a" * 100
    assert cache.read(0, 98, 5) == b"aa"
    assert cache.read(32, 0, 5) is None
    assert cache.fill(32, 150, lambda: b"b" * 150) == b"b" * 150
    assert cache.fill(64, 1, lambda: pytest.fail("no room")) is None
    assert on_disk(tmp_path) == 250
    cache.drop(0)
    cache.drop(0)
    assert cache.fill(64, 101, lambda: pytest.fail("no room")) is None
    assert cache.fill(64, 100, lambda: b"c" * 100) == b"c" * 100
    assert (cache.read(0, 0, 1), cache.read(32, 0, 1), cache.read(64, 0, 1)) == (None, b"b", b"c")


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, "data", 100)

    def fail() -> bytes:
        raise KeyError("on purpose")

    for _ in range(2):
        with pytest.raises(KeyError):
            cache.fill(0, 100, fail)
    assert cache.fill(0, 100, lambda: b"a" * 100) == b"a" * 100


def test_reserved_room_is_not_lost_when_another_thread_finds_none_at_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other thread asks when the first has released the lock of the counts, before its download."""
    cache, refused = NodeCache(tmp_path, "data", 100), []

    @contextmanager
    def interrupted(path: Path) -> Iterator[None]:
        with locked(path):
            yield
        if path == tmp_path / "lock" and not refused:
            refused.append(True)
            other = threading.Thread(
                target=lambda: refused.append(cache.fill(32, 100, lambda: pytest.fail("no room")) is None)
            )
            other.start()
            other.join()

    monkeypatch.setattr(cache_module, "locked", interrupted)
    assert cache.fill(0, 100, lambda: b"a" * 100) == b"a" * 100
    assert refused == [True, True]
    assert cache.read(0, 0, 100) == b"a" * 100
    cache.drop(0)
    assert cache.fill(32, 100, lambda: b"b" * 100) == b"b" * 100


def test_room_of_a_failed_download_can_be_asked_for_at_once(tmp_path: Path) -> None:
    """Another thread, which found none in the meantime, must not wait for it."""
    cache = NodeCache(tmp_path, "data", 100)

    def fail() -> bytes:
        assert cache.fill(32, 100, lambda: pytest.fail("no room")) is None
        assert cache.is_full
        raise KeyError("on purpose")

    with pytest.raises(KeyError):
        cache.fill(0, 100, fail)
    assert not cache.is_full


PROGRAM = """
import random, sys, time
from pathlib import Path
from raydetr.shards.remote import reading
from raydetr.shards.remote.cache import NodeCache

def hang():
    (root / "data" / f"0.{os.getpid()}.tmp").write_bytes(b"a" * 60)
    print("half", flush=True)
    time.sleep(60)

def download(number):
    with log.open("a") as file:
        file.write(f"{number}\\n")
    time.sleep(0.003)
    return b"%02x" % number * (50 + number)

import os
root, log, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
cache = NodeCache(root, "data" if what in ("hang", "hold") else what.split(":")[0], 2000)
if what == "hang":
    cache.fill(0, 100, hang)
elif what == "hold":
    cache.fill(0, 1500, lambda: bytes(1500))
    print("held", flush=True)
    time.sleep(60)
else:
    rng = random.Random(what)
    for _ in range(300):
        number = rng.randrange(30)
        content = b"%02x" % number * (50 + number)
        found = cache.fill(32 * number, len(content), lambda: download(number))
        assert found in (None, content), number
        assert cache.read(32 * number, 0, 999) in (None, content)
"""


def start(root: Path, what: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, str(root), str(root) + ".log", what]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def wait_for(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == line + b"\n"


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)


def test_processes_download_each_chunk_once_and_keep_the_budget(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    processes = [start(root, f"data:{seed}") for seed in range(3)]
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, on_disk(root))
    assert [process.wait() for process in processes] == [0, 0, 0]
    for process in processes:
        process.communicate()
    assert 1700 < most <= 2000  # thirty chunks are 3,870 bytes
    downloads = Path(f"{root}.log").read_text().split()
    assert len(downloads) == len(set(downloads)) == len(list((root / "data").glob("[0-9]*")))


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    writer = start(tmp_path, "hang")
    wait_for(writer, b"half")
    assert NodeCache(tmp_path, "data", 2000).read(0, 0, 1) is None
    kill(writer)
    cache = NodeCache(tmp_path, "data", 100)
    assert on_disk(tmp_path) == 0
    assert cache.fill(0, 100, lambda: b"b" * 100) == b"b" * 100  # its room is free again


def test_data_sets_are_removed_when_nobody_uses_them_and_room_is_needed(tmp_path: Path) -> None:
    holder = start(tmp_path, "hold")
    wait_for(holder, b"held")
    NodeCache(tmp_path, "finished", 2000).fill(0, 400, lambda: bytes(400))
    cache = NodeCache(tmp_path, "ours", 2000)
    assert cache.fill(0, 100, lambda: bytes(100)) is not None
    assert (tmp_path / "finished").exists()  # there was room
    assert cache.fill(32, 300, lambda: bytes(300)) is not None
    assert not (tmp_path / "finished").exists()
    assert cache.fill(64, 101, lambda: pytest.fail("no room")) is None  # the data of a run that goes on stays
    kill(holder)
    assert cache.fill(64, 1600, lambda: bytes(1600)) is not None
    assert not (tmp_path / "data").exists()
    assert cache.fill(96, 1, lambda: pytest.fail("no room")) is None  # its own chunks stay
    assert on_disk(tmp_path) == 2000


def test_room_of_a_run_that_ended_is_used_after_a_while(
    many: Shards, web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that found none does not ask before each read, but it asks again."""
    now = 1000.0
    monkeypatch.setattr(cache_module.time, "monotonic", lambda: now)
    asked = []
    reserve = NodeCache._reserve
    monkeypatch.setattr(NodeCache, "_reserve", lambda cache, size: asked.append(size) or reserve(cache, size))
    size = num_bytes(many)
    other = NodeCache(tmp_path, "other", size)
    assert other.fill(0, size, lambda: bytes(size)) is not None
    asked.clear()
    shards = cached(web.url, tmp_path, size)
    for index in (0, 40, 80):
        assert shards.read(index) == many.read(index)
    assert len(asked) == 1
    del other  # as at the end of its process
    now += FULL_SECONDS - 1
    assert shards.read(0) == many.read(0)
    assert len(asked) == 1
    now += 1
    assert shards.read(0) == many.read(0)
    assert len(asked) == 2
    assert not (tmp_path / "other").exists()
    begun = len(web.requests)
    assert shards.read(31) == many.read(31)
    assert len(web.requests) == begun  # from the chunk that was kept


def test_data_sets_that_were_used_longest_ago_are_removed_first(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    for name, age in (("older", 20), ("oldest", 30), ("newer", 10)):
        NodeCache(root, name, 300).fill(0, 100, lambda: bytes(100))
        seen = (root / name / "used").stat().st_mtime - age
        os.utime(root / name / "used", (seen, seen))
    cache = NodeCache(root, "ours", 300)
    assert cache.fill(0, 150, lambda: bytes(150)) is not None
    assert sorted(folder.name for folder in root.iterdir() if folder.is_dir()) == ["newer", "ours"]


def test_an_unusable_folder_is_an_error(tmp_path: Path, web: WebServer) -> None:
    (tmp_path / "file").write_text("")
    shards = cached(web.url, tmp_path / "file", 10**9)
    with pytest.raises(
        ValueError, match=r"file \(data.remote.cache_dir\) cannot be used as a cache .*name a folder"
    ):
        next(batches(shards, 0, 1))


# --- reading through it


@pytest.mark.parametrize("share", [0.35, 0.65, 1.0])
def test_a_share_of_the_room_serves_that_share_of_the_reads(
    many: Shards, web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(reading, "MERGED_GAP", 0)  # these images are smaller than the gaps between real ones
    order, size = make_order(many, 0), num_bytes(many)
    shards = cached(web.url, tmp_path, round(share * size))
    fetched = []
    for epoch in range(3):
        begun = len(web.requests)
        for start in range(320 * epoch, 320 * (epoch + 1), 8):
            batch = order.samples(start, 8).tolist()
            assert shards.read_many(batch) == many.read_many(batch)
        fetched.append(sum(fetched_bytes(web.requests[begun:])) / size)
    assert fetched[0] < 1.1
    assert all(1 - share <= found < 1 - share + 0.1 for found in fetched[1:]), fetched  # a chunk is a tenth
    assert on_disk(tmp_path) <= round(share * size)


def test_corrupt_downloads_are_replaced(many: Shards, web: WebServer, tmp_path: Path) -> None:
    proxy = FaultyProxy(web.address)
    shards = cached(proxy.url, tmp_path, 2 * num_bytes(many))
    begun = proxy.num_requests
    proxy.faults = lambda request: Fault("corrupt", 700) if request == begun else None
    (sample,) = shards.read_many([0])
    assert not isinstance(sample, type(many.read(0)))
    assert shards.read(0) == shards.reread(0) == many.read(0)
    proxy.close()


def test_a_corrupt_copy_is_fetched_again(many: Shards, web: WebServer, tmp_path: Path) -> None:
    shards = cached(web.url, tmp_path, 2 * num_bytes(many))
    shards.read(0)
    (entry,) = tmp_path.glob("*/0")
    intact = entry.read_bytes()
    for damaged in (intact[:700] + b"?" + intact[701:], intact[:700], b""):
        entry.write_bytes(damaged)
        assert shards.read(0) == many.read(0)
        assert entry.read_bytes() == intact
    (batch,) = islice(
        evaluation_batches(
            shards, rank=0, world_size=1, batch_size=1, transform=Transform(TransformConfig())
        ),
        1,
    )
    assert batch is not None
    assert batch.image_ids.item() == many.samples["image_id"][0]


def test_a_full_disk_is_logged_once_and_reading_continues(
    many: Shards,
    web: WebServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shards = cached(web.url, tmp_path, 2 * num_bytes(many))
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.suffix == ".tmp":
            write(path, content[:50])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        for at in range(0, 200, 40):
            assert shards.read_many([at]) == many.read_many([at])
    assert caplog.text.count("stops caching") == 1
    assert on_disk(tmp_path) == 0


# --- the stream


def batches(shards: Shards, workers: int, seed: int) -> Iterator[Batch]:
    return train_batches(
        shards, seed=seed, position=0, layout=Layout(4),
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


@pytest.mark.parametrize(("workers", "share"), [(0, 2.0), (2, 0.0), (2, 0.5)])
def test_the_stream_from_s3_is_that_of_the_folder(
    many: Shards, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, share: float
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    proxy = FaultyProxy(s3.address)
    faults = {6: Fault("stall", 500), 8: Fault("reset", 50), 9: Fault("short", 300), 11: Fault("busy")}
    proxy.faults = faults.get
    settings = RemoteConfig(options={"endpoint": proxy.url}, read_timeout=2.0)
    if share:
        room = share * num_bytes(many) / 1e9
        settings = settings.model_copy(update={"cache_dir": tmp_path / "c", "cache_gb": room})
    shards = open_shards("s3://bucket/many", remote=settings)
    num_batches = 120  # an epoch and a half
    pairs = zip(batches(shards, workers, 3), islice(batches(many, 0, 3), num_batches), strict=False)
    assert [same(ours, theirs) for ours, theirs in pairs] == [True] * num_batches
    assert len(proxy.injected) == 4
    proxy.close()


def test_loaders_and_runs_share_what_one_has_fetched(many: Shards, web: WebServer, tmp_path: Path) -> None:
    shards = cached(web.url, tmp_path / "cache", 2 * num_bytes(many))
    for _ in islice(batches(shards, 2, 0), 240):  # three epochs
        pass
    fetched = fetched_bytes(web.requests)
    assert (len(fetched), sum(fetched)) == (10, num_bytes(many))
    other = cached(web.url, tmp_path / "cache", 2 * num_bytes(many))  # as another run on this node
    for _ in islice(batches(other, 2, 1), 60):
        pass
    assert len(fetched_bytes(web.requests)) == 10


def test_the_cache_is_kept_while_the_process_that_started_loaders_lives(
    many: Shards, web: WebServer, tmp_path: Path
) -> None:
    shards = cached(web.url, tmp_path, 2 * num_bytes(many))
    for _ in islice(batches(shards, 1, 0), 20):
        pass
    other = NodeCache(tmp_path, "other", 2 * num_bytes(many))
    assert other.fill(0, 2 * num_bytes(many), lambda: pytest.fail("no room")) is None
    assert next(tmp_path.glob("*/[0-9]*"))
