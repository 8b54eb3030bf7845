"""Runs on a real Ray cluster of several nodes on this machine: complete, killed, resumed, evaluated, relative paths."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from corrupt_shards import corrupt_sample
from detrs.backbone import build_backbone
from ray_nodes import ray_nodes
from raydetr.config import ClusterConfig, ConfigError, RunConfig, override
from raydetr.runs import run
from raydetr.runs.evaluate import evaluate_checkpoint
from raydetr.runs.ray_cluster import LaunchError, check_resources
from raydetr.shards.reader import open_shards
from raydetr.tracking import mlflow_run
from raydetr.tracking.events import Metrics, read_events
from raydetr.training import checkpoint

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:ray"),
    pytest.mark.timeout(600),  # a minute; much longer on a busy machine
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a head without CPUs and two nodes with two each, and connect this process to it."""
    with ray_nodes(2, cpus=2) as nodes:
        yield nodes


@pytest.fixture
def two_workers(tiny_run: RunConfig) -> RunConfig:
    return override(tiny_run, {"cluster.num_workers": 2, "optim.epochs": 3})


@pytest.fixture
def relative_run(
    two_workers: RunConfig, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RunConfig:
    """Everything that a run reads or writes, below the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("shards").symlink_to(tiny_data)
    torch.save(build_backbone(two_workers.model.backbone).state_dict(), "resnet.pth")
    paths = {
        "data.train": "shards/train",
        "data.val": "shards/val",
        "model.backbone.weights": "resnet.pth",
        "storage.path": "runs",
        "tracking.uri": "sqlite:///tracking/mlflow.db",
    }
    return override(two_workers, paths)


def started_workers(cluster: Cluster) -> list[int]:
    """The process ids of all Ray Train workers that this cluster has started so far, including ended ones."""
    of_training = [("class_name", "=", "RayTrainWorker")]
    return [actor.pid for actor in list_actors(cluster.address, of_training, limit=1000, detail=True)]


def train_workers(cluster: Cluster) -> list[psutil.Process]:
    """The running processes of this cluster that are Ray Train workers."""
    ids = started_workers(cluster)
    running = [process for process in psutil.process_iter(["cmdline"]) if process.pid in ids]
    return [
        each for each in running if " ".join(each.info["cmdline"] or ()).startswith("ray::RayTrainWorker")
    ]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["kind"] == kind]


def states(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "state.pt", weights_only=True)["model"]


def kill_a_worker(cluster: Cluster, folder: Path, killed: list[int]) -> None:
    """Wait until two checkpoints of a run are complete, then kill one worker."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(checkpoint.complete_checkpoints(folder)) >= 2 and (workers := train_workers(cluster)):
            victim = workers[0].pid
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
            return
        time.sleep(0.05)


class DamagedDisk:
    """Once a worker was killed, the newest checkpoint is corrupt when the driver looks for one to go on from."""

    def __init__(self, killed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.corrupt: list[Path] = []
        find = checkpoint.newest_valid

        def look(folder: Path, *arguments: Any) -> Any:
            if killed and not self.corrupt:
                newest = checkpoint.complete_checkpoints(folder)[0]
                assert isinstance(newest, Path)
                content = bytearray((newest / "state.pt").read_bytes())
                content[len(content) // 2] ^= 1
                (newest / "state.pt").write_bytes(content)
                self.corrupt.append(newest)
            return find(folder, *arguments)

        monkeypatch.setattr(checkpoint, "newest_valid", look)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The temporary folders of starts, also those that were removed."""
    made, make = list[Path](), tempfile.mkdtemp

    def remember(*arguments: Any, **keywords: Any) -> str:
        folder = make(*arguments, **keywords)
        if Path(folder).name.startswith("raydetr-ray-"):
            made.append(Path(folder))
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", remember)
    return made


def test_a_run_with_a_killed_worker_ends_in_the_same_bits(
    cluster: Cluster, relative_run: RunConfig, tmp_path: Path, scratch: list[Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Also with loader processes, which only the workers of the killed run have, and from the checkpoint before a
    corrupt one.
    """
    # One evaluation: scoring has the lowest priority, and waits for the other tests
    config = override(
        relative_run, {"optim.epochs": 4, "evaluation.every_epochs": 4, "storage.checkpoint_steps": 2}
    )
    unbroken = run.start(config)
    num_starts = len(scratch)
    assert unbroken.folder.parent == tmp_path / "runs"
    killed: list[int] = []
    folder = tmp_path / "runs" / "hit"
    killer = threading.Thread(target=kill_a_worker, args=(cluster, folder, killed))
    killer.start()
    disk = DamagedDisk(killed, monkeypatch)
    settings = {"data.num_loader_workers": 1, "tracking.upload": True, "evaluation.report": True}
    hit = run.start(override(config, settings), name="hit")
    killer.join()
    assert killed, "the run ended before it could be hit"
    (corrupt,) = disk.corrupt
    assert f"skipped: {corrupt}/state.pt: checksum differs from meta.json" in capsys.readouterr().err
    (restart,) = events(folder, "restart")
    assert re.match(r"the workers failed: worker [01](:| does not answer:) ", restart["reason"])
    assert re.search(
        rf"; worker [01] \(process {killed[0]} on node .*\) was killed or crashed$", restart["reason"]
    )
    (resumed,) = events(folder, "resumed")
    assert restart["position"] == resumed["position"]
    assert "workers restarted 1 time)" in " ".join(hit.to_text().split())
    assert 0 < resumed["position"] < checkpoint.position_of(corrupt)
    assert 1 <= num_starts <= len(scratch) - 2
    assert not any(each.exists() for each in scratch)
    weights, expected = states(hit.checkpoint), states(unbroken.checkpoint)
    assert weights.keys() == expected.keys()
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name
    assert hit.metrics["AP"] == unbroken.metrics["AP"]
    assert (tmp_path / "tracking" / "mlflow.db").is_file()
    tracked = mlflow_run.fetch_run(hit.tracking_uri, hit.mlflow_run_id)
    assert tracked.status == "FINISHED"
    assert set(tracked.artifacts) >= {"predictions.png", "curves.png", "evaluation/ap.json"}
    # A run of two workers, evaluated by one of them, and by this process
    path = Path(os.path.relpath(unbroken.checkpoint))
    assert not path.is_absolute()
    on_ray = evaluate_checkpoint(path, {"cluster.num_workers": 1})
    assert on_ray == evaluate_checkpoint(path, local=True)
    assert on_ray["AP"] == unbroken.metrics["AP"]
    assert not train_workers(cluster)


@pytest.mark.slow
def test_a_run_is_resumed_with_another_number_of_workers(cluster: Cluster, two_workers: RunConfig) -> None:
    """It is the same training: only sums are rounded in another order, by three workers of two images."""
    config = override(
        two_workers, {"optim.epochs": 2, "data.batch_size": 6, "optim.lr": 1e-5, "optim.lr_backbone": 1e-5}
    )
    unbroken = run.start(config)
    broken = Path(config.storage.path) / "broken"
    shutil.copytree(unbroken.folder, broken)
    for later in checkpoint.complete_checkpoints(broken):
        if checkpoint.position_of(later) > 48:
            shutil.rmtree(later)
    before = states(checkpoint.folder_of(broken, 48))
    resumed = run.resume(broken, overrides={"cluster.num_workers": 3})
    started = [event for event in read_events(broken) if event["kind"] in ("started", "resumed")]
    assert [(event["workers"], event["position"]) for event in started] == [(2, 0), (3, 48)]
    assert resumed.metrics["position"] == unbroken.metrics["position"]
    weights, expected = states(resumed.checkpoint), states(unbroken.checkpoint)
    moved = max(float((expected[name] - before[name]).abs().max()) for name in expected)
    apart = max(float((expected[name] - weights[name]).abs().max()) for name in expected)
    assert apart < 0.05 * moved, (apart, moved)


@pytest.mark.slow
def test_a_run_is_resumed_with_changed_settings(
    cluster: Cluster, two_workers: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one process resumes it."""
    first = run.start(override(two_workers, {"optim.epochs": 1}))
    copy = shutil.copytree(str(first.folder), first.folder.with_name("copy"))
    changed = {"optim.epochs": 2, "optim.lr": 1e-4, "optim.lr_backbone": 1e-5, "optim.weight_decay": 0.5}
    capsys.readouterr()
    resumed = run.resume(first.folder, overrides=changed)
    err = capsys.readouterr().err
    assert f"changed for the resumed run: optim.lr from {two_workers.optim.lr} to 0.0001\n" in err
    expected = run.resume(copy, overrides=changed, local=True)
    rates = [
        [(row["position"], row["lr/rest"], row["lr/backbone"]) for row in rows if "loss" in row]
        for rows in (Metrics(read_events(each.folder)).rows for each in (resumed, expected))
    ]
    assert rates[0] == rates[1]
    assert max(rate for position, rate, _ in rates[0] if position > 48) <= 1e-4
    groups = [
        [
            {name: value for name, value in group.items() if name != "params"}
            for group in torch.load(each.checkpoint / "state.pt", weights_only=True)["optimizer"][
                "param_groups"
            ]
        ]
        for each in (resumed, expected)
    ]
    assert groups[0] == groups[1]
    assert {group["base_lr"] for group in groups[0]} >= {1e-4, 1e-5}
    assert {group["weight_decay"] for group in groups[0]} <= {0.5, 0.0}
    tracked = yaml.safe_load((resumed.folder / "config.yaml").read_text())
    assert (tracked["optim"]["lr"], tracked["optim"]["weight_decay"]) == (1e-4, 0.5)


def test_a_failed_run_has_the_message_of_its_worker_and_is_not_retried(
    cluster: Cluster, two_workers: RunConfig
) -> None:
    wild = override(
        two_workers,
        {
            "optim.lr": 1e30,
            "optim.lr_backbone": 1e30,
            "optim.warmup_fraction": 0.0,
            "cluster.max_failures": 3,
        },
    )
    before = len(started_workers(cluster))
    with pytest.raises(LaunchError, match=r"worker \d: .*(finite|nan)"):
        run.start(wild)
    assert len(started_workers(cluster)) - before == 2


@pytest.fixture
def corrupt(two_workers: RunConfig, tmp_path: Path) -> tuple[RunConfig, list[tuple[Path, str]]]:
    """Two workers on shards with three corrupt samples, which no retry can repair; shard and key of each sample."""
    shards = open_shards(shutil.copytree(str(two_workers.data.train), tmp_path / "corrupt"))
    config = override(two_workers, {"data.train": str(tmp_path / "corrupt"), "cluster.max_failures": 3})
    return config, [corrupt_sample(shards, index) for index in (5, 20, 41)]


@pytest.mark.slow
def test_a_corrupt_sample_stops_the_run_at_once(
    cluster: Cluster, corrupt: tuple[RunConfig, list[tuple[Path, str]]]
) -> None:
    config, samples = corrupt
    before = len(started_workers(cluster))
    with pytest.raises(LaunchError) as caught:
        run.start(config)
    assert any(
        re.match(
            rf"the workers failed: worker \d: {shard}: sample {key} at byte \d+ is corrupt", str(caught.value)
        )
        for shard, key in samples
    )
    assert len(started_workers(cluster)) - before == 2
    assert not train_workers(cluster)


@pytest.mark.slow
def test_too_many_corrupt_samples_stop_all_workers_with_a_complete_log(
    cluster: Cluster, corrupt: tuple[RunConfig, list[tuple[Path, str]]]
) -> None:
    config, samples = corrupt
    before = len(started_workers(cluster))
    with pytest.raises(LaunchError, match=r"3 samples are corrupt, and data\.max_corrupt allows 2") as caught:
        run.start(override(config, {"data.on_corrupt": "mask", "data.max_corrupt": 2}), name="masked")
    rows = [
        json.loads(line)
        for line in (Path(config.storage.path) / "masked" / "corrupt_samples.jsonl").read_text().splitlines()
    ]
    assert sorted((row["shard"], row["key"]) for row in rows) == sorted(
        (str(path), key) for path, key in samples
    )
    assert rows == sorted(rows, key=lambda row: row["position"])
    assert all(row["key"] in str(caught.value) for row in rows)
    assert len(started_workers(cluster)) - before == 2


def test_workers_that_a_local_cluster_cannot_hold_are_refused(cluster: Cluster) -> None:
    with pytest.raises(LaunchError, match=r"num_workers=9 .* needs 9 CPUs, and this machine has 4"):
        check_resources(ClusterConfig(num_workers=9), "local")
    check_resources(ClusterConfig(num_workers=9), "ray://elsewhere")  # it may grow


@pytest.mark.slow
def test_a_run_on_ray_with_relative_paths_is_resumed_by_one(
    cluster: Cluster, relative_run: RunConfig
) -> None:
    first = run.start(override(relative_run, {"optim.epochs": 1}))
    folder = Path(os.path.relpath(first.folder))
    assert not folder.is_absolute()
    resumed = run.resume(folder, overrides={"optim.epochs": 2})
    assert (resumed.folder, resumed.metrics["epoch"]) == (first.folder, 2)
    # Two workers give the same digits, too
    two = evaluate_checkpoint(Path(os.path.relpath(resumed.checkpoint)))
    assert two["AP"] == resumed.metrics["AP"]


def test_weights_that_are_not_there_are_found_out_before_anything_starts(relative_run: RunConfig) -> None:
    config = override(relative_run, {"model.backbone.weights": "resnet5.pth"})
    with pytest.raises(ConfigError, match=r"model\.backbone\.weights /.*/resnet5\.pth: no such file"):
        run.start(config)
    assert not Path("runs").exists()
