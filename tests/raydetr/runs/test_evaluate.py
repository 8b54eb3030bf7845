"""Evaluation of checkpoints: what can be overridden, and what has no effect."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydetr.config import ClusterConfig, ConfigError, RunConfig, override
from raydetr.runs import ray_cluster, ray_train, run
from raydetr.runs.evaluate import SETTINGS, evaluate_checkpoint
from raydetr.runs.run import RunResult
from raydetr.shards.reader import open_shards
from raydetr.training.world import World
from tiny_runs import tiny_config

pytestmark = pytest.mark.xdist_group("evaluate")  # one checkpoint


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    config = tiny_config(tiny_data, tmp_path_factory.mktemp("runs"))
    return run.start(override(config, {"optim.epochs": 1}), local=True)


def test_other_shards_and_batch_sizes(trained: RunResult, tiny_data: Path) -> None:
    table = evaluate_checkpoint(trained.checkpoint, {"data.eval_batch_size": 3}, local=True)
    assert table["AP"] == pytest.approx(trained.metrics["AP"], abs=1e-6)
    other = evaluate_checkpoint(trained.checkpoint, {"data.val": str(tiny_data / "train")}, local=True)
    objects = sum(row.num_objects for row in other.classes)
    assert objects == open_shards(tiny_data / "train").manifest.num_annotations


def test_relative_paths(trained: RunResult, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.checkpoint.parent)
    before = evaluate_checkpoint(trained.checkpoint, local=True)
    monkeypatch.chdir(tiny_data)
    here = evaluate_checkpoint(trained.checkpoint, {"data.val": "val"}, local=True)
    assert here == before


@pytest.mark.parametrize(
    "path",
    ["optim.lr", "data.train", "data.batch_size", "model.num_queries", "cluster.max_failures", "data.vall"],
)
def test_an_override_without_effect_is_refused(trained: RunResult, path: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{path} has no effect on an evaluation.*data\.val.*cluster\.num_workers"
    ):
        evaluate_checkpoint(trained.checkpoint, {path: 1}, local=True)


def test_a_misspelt_setting_names_the_nearest(trained: RunResult) -> None:
    with pytest.raises(ConfigError, match=r"did you mean data\.val_transform\.short_sides"):
        evaluate_checkpoint(trained.checkpoint, {"data.val_transform.short_side": [64]}, local=True)


def test_a_run_of_a_larger_cluster_is_evaluated_on_this_machine(
    tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run.start(override(tiny_run, {"optim.epochs": 1}), local=True)
    meta = result.checkpoint / "meta.json"
    content = json.loads(meta.read_text())
    large = {"address": "10.0.0.1:6379", "num_workers": 8, "use_gpu": True, "cpus_per_worker": 64, "min_workers": 4,
             "bf16_gradients": True}  # fmt: skip
    content["config"]["cluster"] |= large
    meta.write_text(json.dumps(content))
    seen: list[ClusterConfig] = []

    def run_on_workers(work: Callable[[World], Any], cluster: ClusterConfig) -> list[Any]:
        seen.append(cluster)
        return [work(World.single_process())]

    monkeypatch.setattr(ray_train, "run_on_workers", run_on_workers)
    monkeypatch.setattr(ray_cluster, "has_cluster", lambda cluster: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert evaluate_checkpoint(result.checkpoint)["AP"] == result.metrics["AP"]
    (cluster,) = seen
    assert (cluster.address, cluster.num_workers, cluster.use_gpu, cluster.cpus_per_worker) == (
        None,
        1,
        False,
        4,
    )
    told = "on this machine: cluster.use_gpu=False (the run: True), cluster.cpus_per_worker=4 (the run: 64)"
    assert told in " ".join(capsys.readouterr().err.split())
    # What is overridden stays
    evaluate_checkpoint(result.checkpoint, {"cluster.cpus_per_worker": 1, "cluster.num_workers": 3})
    assert (seen[1].num_workers, seen[1].cpus_per_worker) == (3, 1)
    assert evaluate_checkpoint(result.checkpoint, local=True)["AP"] == result.metrics["AP"]


def test_a_checkpoint_that_cannot_be_written_to(trained: RunResult, tmp_path: Path) -> None:
    copied = shutil.copytree(trained.checkpoint, tmp_path / "checkpoint")
    for path in (*copied.iterdir(), copied):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(copied.iterdir())
    assert evaluate_checkpoint(copied, local=True)["AP"] == pytest.approx(trained.metrics["AP"], abs=1e-6)
    assert sorted(copied.iterdir()) == before


def test_what_can_be_overridden_exists(tiny_run: RunConfig) -> None:
    from raydetr.config import known_paths

    known = known_paths(type(tiny_run))
    for name in SETTINGS:
        assert any(path == name or (name.endswith(".") and path.startswith(name)) for path in known), name
