"""Test real loader processes that fail, are killed, or are abandoned."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from raydetr.data.batch import Batch
from raydetr.data.loader.loader import Out, load
from raydetr.data.loader.ring import NUM_SLOTS, LoaderError
from raydetr.shards.reader import Shards

ROOT = Path(__file__).parents[4]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT / "platform"), str(ROOT / "models"), str(ROOT / "tests/support")]
    ),
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Numbers:
    """Batches of small images; all pixels and the position equal the number of the batch."""

    count: int = 10**9
    fails_at: int | None = None
    missing: tuple[int, ...] = ()
    kills_its_parent: bool = False

    def batches(self, worker: int, num_workers: int, out: Out | None) -> Iterator[Batch | None]:
        if self.kills_its_parent and worker == 0:
            os.kill(os.getppid(), signal.SIGKILL)
        for number in range(worker, self.count, num_workers):
            if number == self.fails_at:
                raise FileNotFoundError(2, "no such number", str(number))
            yield None if number in self.missing else numbered(number, out)


class FromEnvironment:
    """One batch, whose number is a variable of the environment."""

    def batches(self, worker: int, num_workers: int, out: Out | None) -> Iterator[Batch | None]:
        yield numbered(int(os.environ["RAYDETR_TEST_NUMBER"]), out)


def numbered(number: int, out: Out | None) -> Batch:
    shape = (1, 8 + number % 5, 9, 3)
    pixels = np.empty(shape, np.uint8) if out is None else out(shape)
    pixels[...] = number % 256
    return Batch(
        torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([shape[1:3]]), torch.tensor([number]),
        torch.zeros(1, 4), (1,), torch.tensor([number]), torch.tensor([shape[1:3]]), number,
    )  # fmt: skip


def is_correct(batch: Batch, number: int) -> bool:
    return batch.position == number and bool((batch.pixels == number % 256).all())


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Check that no process, open file or tensor in /dev/shm is left."""
    before = open_files()
    yield
    _, alive = psutil.wait_procs(loaders(), timeout=10)
    assert not alive
    gc.collect()
    server = forkserver._forkserver._forkserver_pid is not None  # type: ignore[attr-defined]
    allowed = 1 if server else 0  # the pipe that keeps the fork server alive
    assert len(open_files() - before - {"pipe of the resource tracker"}) <= allowed
    assert not list(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))


def loaders() -> list[psutil.Process]:
    """List the processes forked by this one or by its fork server, which stays."""
    found = psutil.Process().children(recursive=True)
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    tracker = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    return [process for process in found if process.pid not in (server, tracker)]


def open_files() -> set[str]:
    tracker = resource_tracker._resource_tracker._fd  # type: ignore[attr-defined]
    found = set()
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            found.add("pipe of the resource tracker" if file.name == str(tracker) else str(file.readlink()))
    return found


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_come_in_order(num_workers: int) -> None:
    source = Numbers(count=50, missing=(48, 49))
    found = list(load(source.batches, num_workers))
    assert all(is_correct(batch, number) for number, batch in enumerate(found[:48]) if batch is not None)
    assert [batch is None for batch in found] == [False] * 48 + [True] * 2


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_consumer_may_keep_all_batches(num_workers: int) -> None:
    stream = load(Numbers().batches, num_workers)
    kept = list(itertools.islice(stream, 3 * NUM_SLOTS * num_workers))
    assert all(is_correct(batch, number) for number, batch in enumerate(kept) if batch is not None)
    expected = [batch.pixels.clone() for batch in kept if batch is not None]
    for _ in range(50):  # the loaders continue to write, elsewhere
        next(stream)
    assert all(torch.equal(b.pixels, e) for b, e in zip(kept, expected, strict=True) if b is not None)
    stream.close()  # type: ignore[attr-defined]


def test_kept_batches_outlive_the_processes() -> None:
    stream = load(Numbers().batches, 2)
    kept = list(itertools.islice(stream, 7))
    stream.close()  # type: ignore[attr-defined]
    psutil.wait_procs(loaders(), timeout=10)
    assert all(is_correct(batch, number) for number, batch in enumerate(kept) if batch is not None)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_is_raised_unchanged_and_in_order(num_workers: int) -> None:
    stream = load(Numbers(fails_at=11).batches, num_workers)
    assert all(is_correct(next(stream), number) for number in range(11))
    with pytest.raises(FileNotFoundError) as caught:
        next(stream)
    assert not loaders()  # although the exception is still held
    assert caught.value.filename == "11"
    assert str(caught.value) == "[Errno 2] no such number: '11'"


def test_a_thread_does_not_fork() -> None:
    """Other threads may hold a lock of the interpreter, and the child would wait for it."""
    parents: list[int] = []

    def consume() -> None:
        stream = load(Numbers().batches, 1)
        assert is_correct(next(stream), 0)
        parents.append(loaders()[0].ppid())
        stream.close()  # type: ignore[attr-defined]

    consumer = threading.Thread(target=consume)
    consumer.start()
    consumer.join(timeout=60)
    assert parents == [forkserver._forkserver._forkserver_pid]  # type: ignore[attr-defined]


def test_a_fork_server_passes_on_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own is that of its start, which may lack credentials that were set later."""
    found: list[int] = []

    def consume() -> None:
        for batch in load(FromEnvironment().batches, 1):
            found.append(batch.position)

    for number in (3, 7):
        monkeypatch.setenv("RAYDETR_TEST_NUMBER", str(number))
        consumer = threading.Thread(target=consume)
        consumer.start()
        consumer.join(timeout=60)
    assert found == [3, 7]
    assert forkserver._forkserver._forkserver_pid is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize("thread", [False, True])
def test_a_killed_loader_is_an_error(thread: bool) -> None:
    """Also where the trainer is not the main thread and gets no signal, as in a worker of Ray Train."""
    caught: list[BaseException] = []

    def consume() -> None:
        stream = load(Numbers().batches, 2)
        try:
            for number, _ in enumerate(stream):
                if number == 20:
                    loaders()[0].kill()
        except RuntimeError as error:
            caught.append(error)
        finally:
            stream.close()  # type: ignore[attr-defined]

    start = time.monotonic()
    if thread:
        consumer = threading.Thread(target=consume)
        consumer.start()
        consumer.join(timeout=60)
    else:
        consume()
    assert time.monotonic() - start < 30
    message = str(caught[0])
    assert "DataLoader worker" in message
    if thread:
        assert isinstance(caught[0], LoaderError)
        assert "data.num_loader_workers" in message
    caught.clear()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_start_methods(shards: Shards, method: str, tmp_path: Path) -> None:
    """They give the stream of this process, without warnings."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import itertools, multiprocessing, zlib
from raydetr.config import TransformConfig
from raydetr.shards.reader import open_shards
from raydetr.data.layout import Layout
from raydetr.data.stream import train_batches
from raydetr.data.transforms.transform import Transform

def sums(num_workers):
    stream = train_batches(open_shards({shards.location!r}), seed=3, position=7, layout=Layout(6, 2), rank=1,
                           num_workers=num_workers, transform=Transform(TransformConfig(short_sides=(24, 40))))
    return [zlib.crc32(batch.pixels.contiguous().numpy()) for batch in itertools.islice(stream, 6)]

if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    print(sums(2) == sums(0))
""")
    run = subprocess.run(
        [sys.executable, "-W", "error", script], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (run.stdout, run.stderr) == ("True\n", "")


def test_loaders_end_with_a_killed_program(tmp_path: Path) -> None:
    """Killed by the first loader, before the second one has done anything."""
    script = tmp_path / "script.py"
    script.write_text("""
import os, sys, time
sys.path.insert(0, os.environ["TESTS"])
from multiprocessing.queues import Queue
forked, sent, put = [], [], Queue.put
def slow_put(*args):
    time.sleep(len(sent))
    sent.append(1)
    put(*args)
Queue.put = slow_put  # nothing is sent to the second loader
os.register_at_fork(after_in_parent=lambda: forked.append(1), after_in_child=lambda: time.sleep(2 * len(forked)))
from raydetr.data.loader.loader import load
from test_loader import Numbers
next(load(Numbers(kills_its_parent=True).batches, 2))
""")
    environment = {**ENVIRONMENT, "TESTS": str(Path(__file__).parent)}
    run = subprocess.run(  # returns when no process has its output open
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGKILL, "", "")


def test_memory_is_flat_over_ten_thousand_batches(shards: Shards, tmp_path: Path) -> None:
    """In a small program: a large one would stop sharing its forked pages with the loaders one by one."""
    script = tmp_path / "script.py"
    script.write_text("""
import json, sys
from pathlib import Path
import psutil
from raydetr.config import TransformConfig
from raydetr.data.transforms.transform import Transform
from raydetr.shards.reader import open_shards
from raydetr.data.layout import Layout
from raydetr.data.stream import train_batches

def megabytes():
    \"""Return the memory of all processes: resident, and without pages of files and shared pages counted once.\"""
    resident = own = 0
    for process in (psutil.Process(), *psutil.Process().children()):
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {name: int(size) for name, size, *_ in map(str.split, lines)}
        resident += sizes["Rss:"]
        own += sizes["Pss_Anon:"] + sizes["Pss_Shmem:"]
    return resident / 1024, own / 1024

stream = train_batches(
    open_shards(sys.argv[1]), seed=0, position=0, layout=Layout(1),
    transform=Transform(TransformConfig(short_sides=(24, 32, 40), max_side=64)), num_workers=2,
)
measured = []
for number, batch in enumerate(stream):
    assert batch.position == number
    if number % 1000 == 999:
        measured.append(megabytes())
    if number == 9_999:
        break
stream.close()
print(json.dumps(measured))
""")
    command = [sys.executable, "-W", "error", script, shards.location]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200)
    assert run.returncode == 0, run.stderr
    resident, own = np.array(json.loads(run.stdout)).T
    assert len(resident) == 10
    assert resident.max() - resident[0] < 12, resident
    assert own.max() - own[0] < 3, own
