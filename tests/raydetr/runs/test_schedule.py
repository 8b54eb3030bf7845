"""A run whose settings change at given epochs, against one that is resumed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from raydetr.config import ConfigError, RunConfig, override
from raydetr.runs import run
from raydetr.runs.schedule import SCHEDULE, read_schedule, resume_schedule, train_schedule
from raydetr.runs.state import state_of
from raydetr.tracking.events import read_events
from raydetr.training import checkpoint
from raydetr.training.checkpoint import read_meta


def test_settings_change_at_their_epoch_and_the_run_is_one(tiny_run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "schedule.yaml").write_text(
        "2: {optim.lr: 0.001}\n0: {optim.lr: 0.004}\n3: {optim.weight_decay: 0.01}\n"
    )
    schedule = read_schedule(tmp_path / "schedule.yaml", tiny_run)
    assert list(schedule) == [0, 2, 3]
    result = train_schedule(tiny_run, schedule, local=True, name="scheduled")
    made = {
        read_meta(folder).epoch: read_meta(folder).config["optim"]
        for folder in checkpoint.complete_checkpoints(result.folder)
    }
    assert {epoch: made[epoch]["lr"] for epoch in (1, 2, 3, 4)} == {1: 0.004, 2: 0.004, 3: 0.001, 4: 0.001}
    assert {epoch: made[epoch]["weight_decay"] for epoch in (2, 3, 4)} == {2: 1e-4, 3: 1e-4, 4: 0.01}
    kinds = [event["kind"] for event in read_events(result.folder)]
    assert kinds.count("started") == 1
    assert state_of(result.folder).state == "finished"
    # Each epoch is evaluated once, and nothing is trained twice
    positions = [event["position"] for event in read_events(result.folder) if event["kind"] == "evaluation"]
    assert positions == [48, 96, 144, 192]


@pytest.mark.slow
def test_a_schedule_without_changes_gives_the_same_weights_as_a_run(tiny_run: RunConfig) -> None:
    schedule = {0: {}, 1: {}, 3: {}}
    parts = train_schedule(tiny_run, schedule, local=True, name="parts")
    whole = run.start(tiny_run, local=True, name="whole")
    states = [checkpoint.read_description(result.checkpoint).state_crc32 for result in (parts, whole)]
    assert states[0] == states[1]
    assert parts.metrics["AP"] == whole.metrics["AP"]


def test_an_interrupted_schedule_goes_on_in_the_part_where_it_was(tiny_run: RunConfig) -> None:
    schedule = {0: {"optim.lr": 0.004}, 2: {"optim.lr": 0.001}}
    folder = Path(tiny_run.storage.path) / "cut"
    folder.mkdir(parents=True)
    (folder / SCHEDULE).write_text(yaml.safe_dump(schedule))
    run.start(override(tiny_run, schedule[0]), local=True, name="cut", until_epoch=2, or_resume=True)
    with pytest.raises(ConfigError, match="a run with another schedule"):
        train_schedule(tiny_run, {**schedule, 3: {}}, local=True, name="cut", or_resume=True)
    with pytest.raises(ConfigError, match=r"a run with other settings \(seed\)"):
        train_schedule(override(tiny_run, {"seed": 9}), schedule, local=True, name="cut", or_resume=True)
    result = resume_schedule(folder, local=True)  # `raydetr train --resume`
    assert [event["kind"] for event in read_events(folder)].count("resumed") == 1
    again = train_schedule(tiny_run, schedule, local=True, name="cut", or_resume=True)  # it is finished
    assert again.metrics["AP"] == result.metrics["AP"]
    assert [event["kind"] for event in read_events(folder)].count("resumed") == 1
    whole = train_schedule(tiny_run, schedule, local=True, name="uncut")
    assert whole.metrics["AP"] == result.metrics["AP"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1: {optim.lr: 0.1}", "the first is 0"),
        ("0: {}\n4: {optim.lr: 0.1}", "below optim.epochs=4"),
        (
            "0: {}\n1: {model.num_queries: 5}",
            "epoch 1: model.num_queries cannot change while a run is trained",
        ),
        ("0: {}\n1: {optim.lrr: 0.1}", "epoch 1: optim.lrr: no such setting; did you mean optim.lr"),
        ("0: 3", "takes lines such as"),
        ("- 1", "takes lines such as"),
        ("0: {optim.lr: [", "cannot be read"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(
    tiny_run: RunConfig, tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "schedule.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_schedule(tmp_path / "schedule.yaml", tiny_run)
    with pytest.raises(ConfigError, match="no such file"):
        read_schedule(tmp_path / "none.yaml", tiny_run)
