"""The same command again: a run that exists goes on, or says that it is finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from command_line import CommandLine
from raydetr.config import ConfigError, RunConfig, from_yaml, override, to_yaml
from raydetr.runs import run
from raydetr.runs.resolve import resolve
from raydetr.tracking.events import read_events
from raydetr.training import checkpoint
from raydetr.training.loop import Training

EPOCH = 48  # samples


@pytest.fixture
def by_steps(tiny_run: RunConfig) -> RunConfig:
    """Two epochs of 6 steps, with a checkpoint every two steps."""
    return override(tiny_run, {"optim.epochs": 2, "storage.checkpoint_steps": 2, "tracking.upload": True})


def again(config: RunConfig) -> run.RunResult:
    return run.start(config, local=True, name="again", or_resume=True)


def die_at(step: int, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start the run, which dies at a step; return its folder."""
    train_step = Training.train_step

    def dying(self: Training, *batches: Any) -> Any:
        if self.step >= step:
            raise KeyboardInterrupt
        return train_step(self, *batches)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "train_step", dying)
        with pytest.raises(KeyboardInterrupt):
            again(config)
    return Path(config.storage.path) / "again"


def kinds(folder: Path) -> list[str]:
    return [event["kind"] for event in read_events(folder)]


def mlflow_runs(config: RunConfig) -> list[Any]:
    client = MlflowClient(f"sqlite:///{config.storage.path}/mlflow.db")
    experiment = client.get_experiment_by_name("raydetr")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_a_run_goes_on_to_the_result_of_an_undisturbed_one_and_then_is_finished(
    by_steps: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken = run.start(by_steps, local=True, name="unbroken", or_resume=True)
    folder = die_at(8, by_steps, monkeypatch)
    result = again(by_steps)
    (position,) = [event["position"] for event in read_events(folder) if event["kind"] == "resumed"]
    assert EPOCH <= position < 2 * EPOCH
    crc = [checkpoint.read_description(each.checkpoint).state_crc32 for each in (result, unbroken)]
    assert crc[0] == crc[1]
    assert len(mlflow_runs(by_steps)) == 2
    # Once more: nothing is trained
    events, files = read_events(folder), sorted(folder.rglob("*"))
    capsys.readouterr()
    finished = again(by_steps)
    assert f"{folder}: this run is finished" in " ".join(capsys.readouterr().err.split())
    assert (finished.metrics, finished.checkpoint) == (result.metrics, result.checkpoint)
    assert finished.mlflow_run_id == result.mlflow_run_id
    assert str(finished.checkpoint) in finished.to_text()
    assert read_events(folder) == events
    assert sorted(folder.rglob("*")) == files


def test_a_driver_that_was_killed_after_the_last_checkpoint_has_its_end_recorded(by_steps: RunConfig) -> None:
    result = again(by_steps)
    (last,) = (path for path in (result.folder / "events").iterdir() if '"finished"' in path.read_text())
    last.write_text("".join(line for line in last.read_text().splitlines(True) if '"finished"' not in line))
    client = MlflowClient(result.tracking_uri)
    client.update_run(result.mlflow_run_id, status="RUNNING")
    assert again(by_steps).metrics == result.metrics
    assert "finished" in kinds(result.folder)
    assert client.get_run(result.mlflow_run_id).info.status == "FINISHED"


def test_a_run_that_died_before_its_first_checkpoint_starts_again_in_its_folder_and_its_mlflow_run(
    by_steps: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = die_at(1, by_steps, monkeypatch)
    assert checkpoint.complete_checkpoints(folder) == []
    (before,) = mlflow_runs(by_steps)
    assert before.info.status == "KILLED"
    result = again(override(by_steps, {"optim.lr": 1e-4}))
    (after,) = mlflow_runs(by_steps)
    assert (after.info.run_id, after.info.status) == (before.info.run_id, "FINISHED")
    assert result.mlflow_run_id == before.info.run_id
    assert from_yaml(folder / "config.yaml").optim.lr == 1e-4


@pytest.mark.parametrize(
    "left",
    [
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["config.yaml"], marks=pytest.mark.slow),
        ["config.yaml", "mlflow.json"],
    ],
)
def test_a_driver_that_died_while_it_made_the_folder(by_steps: RunConfig, left: list[str]) -> None:
    """Of the files that a start writes, any may be there."""
    config = override(by_steps, {"optim.epochs": 1})
    folder = Path(config.storage.path) / "again"
    other = run.start(config, local=True, name="other")
    folder.mkdir()
    for name in left:
        (folder / name).write_text((other.folder / name).read_text())
    assert again(config).metrics["AP"] == other.metrics["AP"]


def test_other_settings_are_refused_and_named(
    by_steps: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_steps = override(by_steps, {"tracking.upload": False})
    folder = die_at(8, by_steps, monkeypatch)
    before = (folder / "config.yaml").read_text()
    changed = override(by_steps, {"optim.lr": 1e-4, "optim.epochs": 3, "storage.checkpoint_steps": None})
    with pytest.raises(ConfigError, match="is a run with other settings") as refused:
        again(changed)
    message = str(refused.value)
    assert "optim.lr is 0.004 there, and 0.0001 here" in message
    assert "optim.epochs is 2 there, and 3 here" in message
    assert message.count(" there, and ") == 3
    changes = "optim.epochs=3 optim.lr=0.0001 storage.checkpoint_steps=null"
    assert all(change in message for change in changes.split())
    assert f"`--resume {folder} " in message
    assert (folder / "config.yaml").read_text() == before
    # What the message says works
    arguments = message.partition("`--resume ")[2].partition("`")[0].split()
    done = CommandLine(monkeypatch, capsys, "train")("--local", "--resume", *arguments)
    assert done.code == 0, done.err
    assert "finished" in kinds(folder)
    assert from_yaml(folder / "config.yaml").optim.epochs == 3


def test_what_a_start_decides_is_no_difference(by_steps: RunConfig, tmp_path: Path) -> None:
    """Such as the number of classes, absolute paths, and the place of a database."""
    stored, _ = resolve(by_steps)
    given, _ = resolve(override(by_steps, {"tracking.uri": "sqlite:///elsewhere.db"}))
    assert run.differences(stored, given) == {}
    given, _ = resolve(override(by_steps, {"tracking.uri": "http://127.0.0.1:9"}))
    assert list(run.differences(stored, given)) == ["tracking.uri"]
    (tmp_path / "copy.yaml").write_text(to_yaml(stored))
    assert run.differences(from_yaml(tmp_path / "copy.yaml"), stored) == {}
