"""Runs on a real Ray cluster of several nodes, of which parts are killed, stopped, lost and replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from ray_nodes import ray_nodes
from raydetr.config import ClusterConfig, RunConfig, override, to_yaml
from raydetr.runs import lease, patience, ray_cluster, ray_train, run, watch
from raydetr.runs.lease import LeaseError
from raydetr.runs.ray_cluster import LaunchError
from raydetr.runs.run_folder import Run
from raydetr.runs.signals import StopSignals
from raydetr.store.folders import Folder, local_file
from raydetr.tracking.events import EventLog, read_events
from raydetr.training import checkpoint

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:ray"),
    pytest.mark.timeout(400),
]
EPOCH = 48  # samples


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes with room for one worker each."""
    with ray_nodes(2, cpus=1) as nodes:
        yield nodes


@pytest.fixture
def two_workers(tiny_run: RunConfig) -> RunConfig:
    """Eight epochs of 6 steps, with a checkpoint after each."""
    changes = {"cluster.num_workers": 2, "optim.epochs": 8, "storage.checkpoint_steps": 3}
    return override(tiny_run, changes)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["kind"] == kind]


def processes(cluster: Cluster, class_name: str) -> list[psutil.Process]:
    """The running processes of this cluster's actors of a class."""
    actors = list_actors(cluster.address, [("class_name", "=", class_name)], limit=1000, detail=True)
    ids = {actor.pid for actor in actors if actor.state == "ALIVE"}
    return [process for process in psutil.process_iter() if process.pid in ids]


class Meanwhile:
    """Does something in a thread once a run has a checkpoint at a position or a later one."""

    def __init__(self, folder: Path, position: int, act: Callable[[], object]) -> None:
        self.done = False
        self._folder, self._position, self._act = folder, position, act
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until it is done."""
        self._thread.join()

    def _wait(self) -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            if any(
                int(path.name) >= self._position for path in checkpoint.complete_checkpoints(self._folder)
            ):
                self._act()
                self.done = True
                return
            time.sleep(0.02)


def assert_same_state(first: Folder, second: Folder) -> None:
    """Bit for bit: weights, EMA, optimizer, position."""
    one, other = (
        torch.utils._pytree.tree_leaves(torch.load(local_file(folder / "state.pt"), weights_only=True))
        for folder in (first, second)
    )
    for left, right in zip(one, other, strict=True):
        same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
        assert same, (left, right)


@pytest.mark.slow
def test_a_lost_node_is_replaced_by_fewer_workers_until_one_joins(
    cluster: Cluster,
    two_workers: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 1.0)
    config = override(
        two_workers,
        {
            "cluster.min_workers": 1,
            "cluster.wait_minutes": 0.05,
            "optim.epochs": 80,
            "evaluation.every_epochs": 20,
            "storage.checkpoint_steps": 6,
        },
    )
    folder = Path(config.storage.path) / "lost"
    results: list[run.RunResult] = []
    # Nodes can be added in the main thread only
    thread = threading.Thread(target=lambda: results.append(run.start(config, name="lost")), daemon=True)
    thread.start()
    Meanwhile(folder, EPOCH, lambda: None).join()
    cluster.remove_node(cluster.workers[-1], allow_graceful=False)
    while not events(folder, "layout"):  # it goes on with one worker
        assert thread.is_alive()
        time.sleep(0.1)
    cluster.add_node(num_cpus=1)
    thread.join(200)
    (result,) = results
    assert checkpoint.is_complete(result.checkpoint, config)
    assert [event["workers"] for event in events(folder, "layout")] == [1, 2]
    resumed = [(event["workers"], event["position"]) for event in events(folder, "resumed")]
    assert [workers for workers, _ in resumed] == [1, 2]
    assert [event["workers"] for event in events(folder, "started")] == [2]
    (restart,) = events(folder, "restart")
    assert restart["failures_since_progress"] == 1
    err = " ".join(capsys.readouterr().err.split())
    assert f"starting them again from position {restart['position']} (1 of 3 without progress)" in err
    assert restart["position"] == resumed[0][1] > 0
    assert "waiting for 2 workers" in err
    assert "going on with 1 of 2 workers" in err
    assert "going on with 2 workers" in err
    # Every sample exactly once, whatever the number of workers
    steps = [event["position"] for event in events(folder, "step")]
    assert steps[-1] == 80 * EPOCH


@pytest.mark.slow
def test_a_node_that_will_be_taken_away_is_left_with_a_checkpoint(
    cluster: Cluster, two_workers: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preemption notice, as an autoscaler gives it; a third node is there already."""
    spare = cluster.add_node(num_cpus=1)
    config = override(
        two_workers, {"optim.epochs": 40, "evaluation.every_epochs": 20, "storage.checkpoint_steps": 200}
    )
    unbroken = run.start(config, name="unbroken")
    folder = Path(config.storage.path) / "moved"
    left: list[str] = []

    def give_notice() -> None:
        while not [event for event in events(folder, "step") if event["position"] >= EPOCH]:
            time.sleep(0.05)
        workers = list_actors(
            cluster.address, [("class_name", "=", "RayTrainWorker")], limit=1000, detail=True
        )
        left.append(next(worker.node_id for worker in workers if worker.state == "ALIVE"))
        subprocess.run(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={cluster.address}"),
                *("--node-id", left[0], "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
                *("--reason-message", "spot", "--deadline-remaining-seconds", "120"),
            ],
            check=True, capture_output=True,
        )  # fmt: skip

    thread = threading.Thread(target=give_notice, daemon=True)
    thread.start()
    result = run.start(config, name="moved")
    thread.join()
    assert [event["reason"][:17] for event in events(folder, "preempted")] == [f"node {left[0][:12]}"]
    assert events(folder, "restart") == []  # nothing has failed
    assert len(events(folder, "resumed")) == 1
    # Not one step was trained twice: the checkpoint is that of the last step
    positions = [event["position"] for event in events(folder, "step")]
    assert positions == sorted(set(positions))
    assert "a checkpoint after this step, and on with other nodes" in " ".join(
        capsys.readouterr().err.split()
    )
    assert_same_state(result.checkpoint, unbroken.checkpoint)
    assert spare


@pytest.mark.slow
def test_a_node_without_an_answer_is_silent(cluster: Cluster) -> None:
    """Ray notices after seconds that a node was killed; its port is closed at once."""
    assert ray_cluster.silent_nodes() == []
    cluster.remove_node(cluster.workers[-1], allow_graceful=False)
    began, found = time.monotonic(), list[str]()
    while not found and time.monotonic() - began < 1:
        found = ray_cluster.silent_nodes()
    assert len(found) <= 1
    config = ClusterConfig(num_workers=1, wait_minutes=0.0)
    with StopSignals() as stop:
        assert ray_cluster.Room(config, EventLog(Path("unused"))).wait(stop) == 1
    assert ray_cluster.silent_nodes() == []
    assert ray_cluster.num_fitting(config) == 1


@pytest.mark.slow
def test_workers_that_make_no_progress_are_started_again_and_leave_their_stacks(
    cluster: Cluster, two_workers: RunConfig
) -> None:
    unbroken = run.start(two_workers, name="unbroken")
    config = override(two_workers, {"cluster.stall_minutes": 0.15})
    folder = Path(config.storage.path) / "stalled"
    stopped: list[int] = []

    def stop_one() -> None:
        victim = processes(cluster, "RayTrainWorker")[0]
        stopped.append(victim.pid)
        os.kill(victim.pid, signal.SIGSTOP)

    stalled = Meanwhile(folder, EPOCH, stop_one)
    result = run.start(config, name="stalled")
    assert stalled.done
    (event,) = events(folder, "stalled")
    assert "no progress for 0.15 minutes (cluster.stall_minutes)" in event["reason"]
    (restart,) = events(folder, "restart")
    assert "no progress" in restart["reason"]
    stacks = "".join(event["stack"] for event in events(folder, "stack"))
    assert "raydetr/training/loop.py" in stacks  # where the other worker waits
    assert not psutil.pid_exists(stopped[0]) or psutil.Process(stopped[0]).status() == psutil.STATUS_ZOMBIE
    assert_same_state(result.checkpoint, unbroken.checkpoint)


@pytest.mark.slow
def test_the_stacks_of_all_workers_that_make_no_progress_are_kept(
    cluster: Cluster, two_workers: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sleep in Python, as in a read that hangs. The one before has a worker that cannot say where it is."""

    def train_and_hang(job: Run, actor: Any) -> None:
        from raydetr.runs import ray_train
        from raydetr.training.loop import Training

        train_step = Training.train_step

        def hang(self: Training, *batches: Any) -> Any:
            if self.step == 8:
                time.sleep(3600)
            return train_step(self, *batches)

        if job.resume_from is None:
            Training.train_step = hang  # type: ignore[method-assign]
        ray_train._train(job, actor)

    monkeypatch.setattr(ray_train, "_train", train_and_hang)
    config = override(two_workers, {"cluster.stall_minutes": 0.15})
    result = run.start(config, name="stalled")
    assert checkpoint.is_complete(result.checkpoint, config)
    assert len(events(result.folder, "stalled")) == 1
    stacks = {event["worker"]: event["stack"] for event in events(result.folder, "stack")}
    assert sorted(stacks) == ["rank-0", "rank-1"]
    for stack in stacks.values():
        assert "test_supervisor.py" in stack
        assert "in hang" in stack
    (resumed,) = events(result.folder, "resumed")
    assert 0 < resumed["position"] <= 8 * 8


@pytest.mark.slow
def test_a_killed_controller_is_replaced(cluster: Cluster, two_workers: RunConfig) -> None:
    """It and our actor are where the driver is, and not on a node that may be lost."""
    unbroken = run.start(two_workers, name="unbroken")
    folder, nodes = Path(two_workers.storage.path) / "hit", defaultdict[str, set[str]](set)

    def look_and_kill() -> None:
        for actor in list_actors(cluster.address, limit=1000, detail=True):
            if actor.state == "ALIVE":
                nodes[actor.class_name.split(".")[-1]].add(actor.node_id)
        processes(cluster, "TrainController")[0].kill()

    killed = Meanwhile(folder, EPOCH, look_and_kill)
    result = run.start(two_workers, name="hit")
    assert killed.done
    assert len(events(folder, "restart")) == 1
    assert_same_state(result.checkpoint, unbroken.checkpoint)
    assert not processes(cluster, "RayTrainWorker")
    here = ray.get_runtime_context().get_node_id()
    assert nodes["RunActor"] == nodes["TrainController"] == {here}
    assert here not in nodes["RayTrainWorker"]
    assert len(nodes["RayTrainWorker"]) == 2


@pytest.mark.slow
def test_failures_without_progress_end_the_run_and_are_listed(
    cluster: Cluster, two_workers: RunConfig
) -> None:
    config = override(two_workers, {"cluster.max_failures": 1, "optim.epochs": 100})
    done = threading.Event()

    def kill_all() -> None:
        while not done.wait(0.2):
            for worker in processes(cluster, "RayTrainWorker"):
                worker.kill()

    killer = threading.Thread(target=kill_all, daemon=True)
    killer.start()
    try:
        with pytest.raises(LaunchError, match=r"failed 2 times without progress .*\n  1\. .*\n  2\. "):
            run.start(config, name="hopeless")
    finally:
        done.set()
        killer.join()


def test_failures_are_counted_since_the_last_progress(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    failures = patience.Failures(2, log)
    for position in (-1, -1, 48, 48, 96, 144, 144):
        failures.add(LaunchError(f"at {position}"), position, max(position, 0))
    assert log.flush()
    with pytest.raises(LaunchError, match="failed 3 times without progress"):
        failures.add(LaunchError("at 144"), 144, 144)
    assert [event["failures_since_progress"] for event in read_events(tmp_path)] == [1, 2, 1, 2, 1, 1, 2]
    with pytest.raises(LaunchError, match="a data fault"):
        patience.Failures(5, EventLog(tmp_path)).add(LaunchError("a data fault", is_fatal=True), 0, 0)


# --- The driver ---


@pytest.mark.slow
def test_the_workers_of_a_driver_whose_run_was_taken_over_end_at_once(
    cluster: Cluster, two_workers: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a last checkpoint, which would be beside those of the other driver."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.2)
    config = override(two_workers, {"optim.epochs": 400, "storage.checkpoint_steps": 6})
    folder = Path(config.storage.path) / "taken"
    taken = folder / lease.LEASE / "000002.json"
    taking = Meanwhile(folder, EPOCH, lambda: taken.write_text("{}"))
    with pytest.raises(LeaseError, match="taken: another process has taken this run over"):
        run.start(config, name="taken")
    assert taking.done
    kinds = {event["kind"] for event in read_events(folder)}
    assert not kinds & {"failed", "stopped", "finished", "restart"}
    positions = [int(path.name) for path in checkpoint.complete_checkpoints(folder)]
    assert positions[0] < 400 * EPOCH
    assert all(position % EPOCH == 0 for position in positions)
    assert list(taken.parent.iterdir()) == [taken]


def driver(config: RunConfig, name: str, tmp_path: Path, address: str) -> subprocess.Popen[str]:
    file = tmp_path / f"{name}.yaml"
    file.write_text(to_yaml(override(config, {"cluster.address": address})))
    arguments = ["train", "--config", str(file), "--name", name]
    # The tests may run in the background of a shell, where SIGINT is ignored
    reset = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{reset}; import sys; sys.argv = ['raydetr', *{arguments!r}]; from raydetr.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow  # more than a minute
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_stopped_or_killed_driver_leaves_a_run_that_goes_on(
    number: signal.Signals, code: int, cluster: Cluster, two_workers: RunConfig, tmp_path: Path
) -> None:
    config = override(two_workers, {"optim.epochs": 16})
    folder = Path(config.storage.path) / "hit"
    process = driver(config, "hit", tmp_path, cluster.address)
    signalled = Meanwhile(folder, EPOCH, lambda: process.send_signal(number))
    _, err = process.communicate(timeout=200)
    assert signalled.done
    assert process.returncode == code, err
    if number != signal.SIGKILL:
        assert "Traceback" not in err
        assert f"hit was stopped by {number.name} at position" in " ".join(err.split())
    deadline = time.monotonic() + 60
    while processes(cluster, "RayTrainWorker"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    last = checkpoint.newest_valid(folder, pytest.fail)
    assert last is not None
    assert not checkpoint.is_complete(last, config)
    resumed = run.resume(folder)
    unbroken = run.start(config, name="unbroken")
    assert_same_state(resumed.checkpoint, unbroken.checkpoint)
    assert resumed.metrics["AP"] == unbroken.metrics["AP"]


@pytest.mark.slow
def test_a_second_driver_on_the_cluster_is_refused_and_the_first_goes_on(
    cluster: Cluster, two_workers: RunConfig, tmp_path: Path
) -> None:
    config = override(two_workers, {"optim.epochs": 16, "cluster.address": cluster.address})
    folder = Path(config.storage.path) / "busy"
    process = driver(config, "busy", tmp_path, cluster.address)
    try:
        Meanwhile(folder, EPOCH, lambda: None).join()
        before = (folder / "config.yaml").read_text()
        message = f"process {process.pid} on .* is driving this run"
        with pytest.raises(LeaseError, match=message):
            run.resume(folder, overrides={"optim.lr": 0.5})
        with pytest.raises(LeaseError, match=message):
            run.start(config, name="busy", or_resume=True)
        assert process.poll() is None
        assert (folder / "config.yaml").read_text() == before
        _, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, err
    kinds = [event["kind"] for event in read_events(folder)]
    assert (kinds.count("started"), kinds.count("finished")) == (1, 1)
    assert not {"resumed", "restart", "failed", "stopped"} & set(kinds)
    last = checkpoint.newest_valid(folder, pytest.fail)
    assert last is not None
    assert_same_state(last, run.start(config, name="unbroken").checkpoint)
