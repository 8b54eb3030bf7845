"""`raydetr profile`: its rows add up, the time of a part is in its row, and the training is the real one."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detrs import criterion, zoo
from raydetr.config import ConfigError, RunConfig, override
from raydetr.data.layout import Layout
from raydetr.data.splits import open_splits
from raydetr.runs import profile as profiles
from raydetr.training import loop
from raydetr.training.loop import Training, training_batches
from raydetr.training.step_timer import StepTimer, WallClock
from raydetr.training.world import World


@pytest.fixture
def config(tiny_run: RunConfig) -> RunConfig:
    return override(tiny_run, {"data.num_loader_workers": 0})


@pytest.fixture(autouse=True)
def same_number_of_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def measure(config: RunConfig, out: Path, steps: int = 2) -> profiles.Profile:
    return profiles.profile(config, num_steps=steps, out=out, progress=lambda done, total: None)


def test_the_rows_add_up_to_the_step_and_are_in_the_trace(config: RunConfig, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    found = profiles.profile(
        config, num_steps=3, out=tmp_path, progress=lambda done, total: calls.append((done, total))
    )
    rows = re.findall(r"^(\S.*?) +([\d.]+) ms +([\d.]+)%$", found.to_text(), re.MULTILINE)
    names, milliseconds, shares = zip(*rows, strict=True)
    assert names[-1] == "step"
    assert set(names) == {*profiles.PARTS.values(), "step"}
    assert sum(map(float, milliseconds[:-1])) == pytest.approx(float(milliseconds[-1]), abs=0.05 * len(rows))
    assert sum(map(float, shares[:-1])) == pytest.approx(100, abs=0.05 * len(rows))
    assert (found.num_steps, found.images, found.host_syncs, found.skipped_steps) == (3, 8, None, 0)
    assert calls == [(number, 8) for number in range(1, 9)]
    stored = json.loads((tmp_path / "profile.json").read_text())
    assert stored["parts"] == pytest.approx(dict(found.parts))
    assert sum(stored["parts"].values()) == pytest.approx(stored["step_seconds"])
    # The trace has the parts by their names
    assert str(tmp_path / "trace.json.gz") in found.to_text()
    with gzip.open(tmp_path / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    named = {event.get("name") for event in events}
    assert set(profiles.PARTS) - {"other"} <= named
    assert "aten::mm" in named


def slowed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments, **keywords)

    return call


def test_a_part_that_is_slow_is_seen_in_its_row_alone(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sleeps of different lengths, in places that nest: each row has at least its own."""
    planted = {"transfer": 0.11, "matcher": 0.13, "backward": 0.17, "clipping": 0.19, "optimizer": 0.23}
    monkeypatch.setattr(loop, "to_model", slowed(loop.to_model, planted["transfer"]))
    monkeypatch.setattr(criterion, "match", slowed(criterion.match, planted["matcher"]))
    monkeypatch.setattr(torch.autograd, "backward", slowed(torch.autograd.backward, planted["backward"]))
    monkeypatch.setattr(Training, "_clip", slowed(Training._clip, planted["clipping"]))
    monkeypatch.setattr(Training, "_update", slowed(Training._update, planted["optimizer"]))
    found = measure(config, tmp_path)
    for name, seconds in planted.items():
        assert found.parts[name] >= seconds
    others = sum(seconds for name, seconds in found.parts.items() if name not in planted)
    assert found.step_seconds - others == pytest.approx(sum(found.parts[name] for name in planted))


def test_slow_data_is_named_as_the_reason(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_batches(*arguments: Any, **keywords: Any) -> Any:
        for batch in training_batches(*arguments, **keywords):
            time.sleep(0.5)
            yield batch

    monkeypatch.setattr(profiles, "training_batches", slow_batches)
    found = measure(config, tmp_path, steps=1)
    assert found.parts["data"] >= 0.5
    assert "raise data.num_loader_workers" in found.to_text()


def test_a_measured_training_is_the_same_training(tiny_run: RunConfig) -> None:
    shards, _ = open_splits(tiny_run.data)
    config = override(tiny_run, {"model.num_classes": shards.label_map.num_classes})

    def weights(*, is_measured: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        training = Training(config, zoo.build(config.model), shards.num_samples, World.single_process())
        training.detector.train()
        if is_measured:
            profiles._measure_parts(training, StepTimer(WallClock()))
        batches = training_batches(config, shards, Layout(8), rank=0, position=0)
        for _ in range(2):
            training.train_step(next(batches))
        return training.detector.state_dict()

    plain, measured = weights(is_measured=False), weights(is_measured=True)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)


def test_it_is_the_share_of_one_worker(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = override(tiny_run, {"cluster.num_workers": 3, "data.micro_batch_size": 1})
    found = measure(config, tmp_path, steps=1)
    assert found.images == len(range(0, 8 // 3))
    assert "one of 3 workers" in found.to_text()


def test_a_gpu_that_is_not_there_is_an_error(
    tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"cluster\.use_gpu is true, .* no GPU"):
        measure(override(tiny_run, {"cluster.use_gpu": True}), tmp_path)
