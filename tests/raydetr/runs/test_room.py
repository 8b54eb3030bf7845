"""Waiting for room on a cluster, for storage, and for progress: with a made-up cluster, whose clock can be set."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raydetr.config import ClusterConfig, RunConfig
from raydetr.console import RunActor, RunProgress
from raydetr.runs import patience, ray_cluster, watch
from raydetr.runs.ray_cluster import LaunchError, Room
from raydetr.runs.run_folder import Run
from raydetr.runs.signals import StopSignals
from raydetr.runs.watch import Watch
from raydetr.tracking.events import EventLog, read_events


class Clock(StopSignals):
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep, time=clock.monotonic)
    for module in (ray_cluster, patience, watch):
        monkeypatch.setattr(module, "time", fake)
    return clock


class MadeCluster:
    """How many workers fit in all, and beside what runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
        self.fitting: Callable[[float], int] = lambda now: 2
        self.free: Callable[[float], int] = lambda now: 2
        self.silent: Callable[[float], list[str]] = lambda now: []
        self.requested: list[int] = []
        monkeypatch.setattr(ray_cluster, "num_fitting", lambda cluster: self.fitting(clock.now))
        for module in (ray_cluster, watch):
            monkeypatch.setattr(module, "num_free", lambda cluster: self.free(clock.now))
            monkeypatch.setattr(module, "missing_resources", lambda cluster: "waiting for 2 workers")
        monkeypatch.setattr(ray_cluster, "silent_nodes", lambda: self.silent(clock.now))
        request = lambda bundles: self.requested.append(len(bundles))  # noqa: E731
        monkeypatch.setattr(ray_cluster, "request_resources", request)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> MadeCluster:
    return MadeCluster(monkeypatch, clock)


TWO = ClusterConfig(num_workers=2, min_workers=1, wait_minutes=10.0)


def kinds(run: Path) -> list[str]:
    return [event["kind"] for event in read_events(run)]


def test_a_start_is_at_once_if_there_is_room(made: MadeCluster, clock: Clock, tmp_path: Path) -> None:
    assert Room(TWO, EventLog(tmp_path)).wait(clock) == 2
    assert clock.now == 1000.0


def test_a_node_without_an_answer_is_waited_for_until_ray_notices_it(
    made: MadeCluster, clock: Clock, tmp_path: Path
) -> None:
    made.silent = lambda now: ["10.0.0.2:1234"] if now < 1006 else []
    made.fitting = lambda now: 2 if now < 1006 else 1
    log = EventLog(tmp_path)
    assert Room(TWO, log).wait(clock) == 1
    assert clock.now > 1000 + 600  # wait_minutes
    assert log.flush()
    assert kinds(tmp_path)[-1] == "layout"
    assert made.requested[-1] == 0  # an autoscaler is not asked for more than the run needs


def test_a_node_that_never_answers_this_machine_is_taken_for_alive(
    made: MadeCluster, clock: Clock, tmp_path: Path
) -> None:
    """Behind a firewall, for example, from where the driver runs."""
    made.silent = lambda now: ["10.0.0.2:1234"]
    assert Room(TWO, EventLog(tmp_path)).wait(clock) == 2
    assert 1020 <= clock.now < 1025


def test_room_that_others_use_is_none(made: MadeCluster, clock: Clock, tmp_path: Path) -> None:
    """After a start in vain only what is free counts, and the time goes on over several such starts."""
    made.free = lambda now: 1
    log = EventLog(tmp_path)
    room = Room(TWO, log)
    assert room.wait(clock) == 2
    clock.now += 20  # Ray's time for a start
    room.add_start_in_vain()
    assert room.wait(clock) == 1
    assert 1600 <= clock.now < 1625
    assert log.flush()
    assert "waiting" in kinds(tmp_path)
    room.forget()
    assert room.wait(clock) == 2


def test_a_run_with_fewer_workers_grows_only_into_what_is_free(
    made: MadeCluster, clock: Clock, tmp_path: Path
) -> None:
    seen = Watch(TWO.model_copy(update={"num_workers": 1}), EventLog(tmp_path), tmp_path / "stacks")
    made.free = lambda now: 0  # a node has joined, and another job has taken it
    clock.now += 60
    assert not seen.can_grow(1, 2)
    made.free = lambda now: 1
    assert not seen.can_grow(1, 2)  # it does not look all the time
    clock.now += 60
    assert seen.can_grow(1, 2)


class LocalActor:
    """A RunActor in this process."""

    def __init__(self) -> None:
        self.actor = RunActor()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.actor, name))


def progress(step: int) -> RunProgress:
    return RunProgress(
        step=step, total_steps=100, first_step=0, epoch=0.0, epochs=1, seconds=0.0, images_per_second=0.0, loss=None,
        ap=None, corrupt=0, phase="training", warning=None,
    )  # fmt: skip


def test_stalls_are_noticed_before_the_first_step_too(
    made: MadeCluster,
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(watch, "ray", SimpleNamespace(get=lambda value: value))
    killed: list[dict[tuple[str, int], int]] = []
    monkeypatch.setattr(watch, "_kill", killed.append)
    actor, log = LocalActor(), EventLog(tmp_path)
    seen = Watch(TWO.model_copy(update={"stall_minutes": 2.0}), log, tmp_path / "stacks")
    for _ in range(30):  # no worker has started: the cluster has no room, however long it takes
        clock.now += 60
        seen.look(None, actor)
    assert "waiting for 2 workers" in capsys.readouterr().err
    assert actor.actor.wish("node", 7, 0) is None
    clock.now += 1
    seen.look(None, actor)
    clock.now += 9.9 * 60
    seen.look(None, actor)
    assert actor.actor.wish("node", 7, 0) is None
    assert "waiting for" not in capsys.readouterr().err  # the workers have started
    clock.now += 0.2 * 60
    seen.look(None, actor)
    assert actor.actor.wish("node", 7, 0) == "abort"
    clock.now += watch.ABORT_SECONDS + 2 * watch.POLL_SECONDS + 0.1
    seen.look(None, actor)
    seen.look(None, actor)
    assert killed == [{("node", 7): 0}]
    error = seen.explain(LaunchError("worker 1: connection reset"), actor)
    assert str(error) == "no progress for 10 minutes (cluster.stall_minutes), before the first step"
    assert log.flush()
    assert kinds(tmp_path) == ["stalled"]


def test_stalls_after_the_first_step_have_the_limit_of_the_setting(
    made: MadeCluster, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "ray", SimpleNamespace(get=lambda value: value))
    actor = LocalActor()
    seen = Watch(TWO.model_copy(update={"stall_minutes": 2.0}), EventLog(tmp_path), tmp_path / "stacks")
    for step in range(1, 4):
        clock.now += 100
        seen.look(progress(step), actor)
    clock.now += 119
    seen.look(progress(3), actor)
    assert actor.actor.wish("node", 7, 0) is None
    clock.now += 2
    seen.look(progress(3), actor)
    assert actor.actor.wish("node", 7, 0) == "abort"


def test_storage_that_is_away_when_workers_are_started_again_is_waited_for(
    tiny_run: RunConfig, clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def read() -> str:
        if clock.now < 1300:
            raise OSError(errno.ESTALE, "Stale file handle")
        return "found"

    log = EventLog(tmp_path)
    storage = patience.StoragePatience(Run(tiny_run, tmp_path, "id"), clock, log)
    assert storage.call(read) == "found"
    assert 1300 <= clock.now < 1340
    assert capsys.readouterr().err.count("waiting for the storage") == 1
    clock.now = -10_000.0
    with pytest.raises(OSError, match="Stale file handle"):
        storage.call(read)
    assert -10_000 + 3600 <= clock.now < -10_000 + 3700  # storage.max_minutes_without_checkpoint


def test_failures_without_progress_are_followed_by_longer_and_longer_pauses(tmp_path: Path) -> None:
    failures = patience.Failures(-1, EventLog(tmp_path))
    pauses = []
    for position in (0, 0, 0, 0, 0, 0, 8):
        failures.add(LaunchError("lost"), position, position)
        pauses.append(failures.pause)
    assert pauses == [0, 5, 15, 35, 60, 60, 0]
