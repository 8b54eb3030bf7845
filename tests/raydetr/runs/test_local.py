"""The device of runs and evaluations in one process."""

from __future__ import annotations

import pytest
import torch

from raydetr.config import ClusterConfig, ConfigError, RunConfig, override
from raydetr.runs import overfit
from raydetr.runs.local import local_world


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
