"""The device of runs and evaluations in one process."""

from __future__ import annotations

import os
import time

import pytest
import torch

from raydetr.config import ClusterConfig, ConfigError, RunConfig, override
from raydetr.runs import overfit, run
from raydetr.runs.local import local_world
from raydetr.tracking.events import Metrics, read_events


@pytest.fixture(autouse=True)
def same_number_of_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_cpu_is_used_unless_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    world = local_world(ClusterConfig(cpus_per_worker=1))
    assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
    assert torch.get_num_threads() == 1


def test_a_gpu_is_used_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert local_world(ClusterConfig(use_gpu=True, num_workers=8)).device == torch.device("cuda")


def test_a_deterministic_gpu_is_set_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    local_world(ClusterConfig(use_gpu=True))
    assert not torch.are_deterministic_algorithms_enabled()
    local_world(ClusterConfig(use_gpu=True, deterministic=True))
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is removed afterwards


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"cluster\.use_gpu is true, .* no GPU .* cluster\.use_gpu=false"):
        local_world(ClusterConfig(use_gpu=True))


@pytest.mark.parametrize("has_gpu", [True, False])
def test_overfitting_takes_the_device_that_is_there(
    tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    """Also with a recipe for eight GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    many = override(tiny_run, {"cluster.num_workers": 8, "cluster.use_gpu": True})
    config = overfit._few_images(many, None, 4, 10, 64)
    assert (config.cluster.num_workers, config.cluster.use_gpu) == (1, has_gpu)


def test_evaluations_have_the_cpu_seconds_of_training_so_far(tiny_run: RunConfig) -> None:
    """In one process, the clock of the process is the upper bound; a resumed run goes on counting."""
    config, began = override(tiny_run, {"optim.epochs": 2}), time.process_time()
    result = run.start(config, local=True)
    between = time.process_time()
    run.resume(result.folder, overrides={"optim.epochs": 3}, local=True)
    ended = time.process_time()
    rows = [row for row in Metrics(read_events(result.folder)).rows if "AP" in row]
    first, second, third = (row["cpu_seconds"] for row in rows)
    assert 0 < first < second < between - began
    assert 0 < third - second < ended - between
