"""What a search shows of its trials while they run."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import pytest

from raydetr.config import ClusterConfig, RunConfig, override
from raydetr.tracking.events import EventLog
from raydetr.tune import display
from raydetr.tune.display import Progress, SearchDisplay, progress_table
from raydetr.tune.trial import SearchContext
from raydetr.tune.trials import Evaluation, Proposal, Trial


def trial(number: int, lr: float, **fields: object) -> Trial:
    made = Trial(f"search-{number:03d}", (Proposal(number, {"optim.lr": lr}),), 4)
    return replace(made, **fields)  # type: ignore[arg-type]


def test_the_table_has_what_runs_and_the_best_of_what_has_ended() -> None:
    evaluation = (Evaluation(96, 96, 2, 0.0, {"AP": 0.25}),)
    ended = [
        trial(
            n, 0.1 * n, status="stopped by ASHA", evaluations=(Evaluation(48, 48, 1, 0.0, {"AP": 0.01 * n}),)
        )
        for n in (3, 4, 5, 6)
    ]
    trials = [trial(1, 0.1, evaluations=evaluation), trial(2, 0.2), *ended, trial(7, 1.0, status="failed")]
    progress = {
        1: Progress(2.25, 1, 125.0),
        2: Progress(0.0, 0, None, "waiting for workers: it needs 2 x 1 CPUs"),
    }
    assert progress_table(trials, progress, 9).splitlines() == [
        "trial  AP     epoch  restarts  left  status               differs",
        "1      0.250  2.2/4  1         2:05  running              optim.lr=0.1",
        "2      -      0.0/4  0         -     waiting for workers  optim.lr=0.2",
        "6      0.060  1/4                    stopped by ASHA      optim.lr=0.6",
        "5      0.050  1/4                    stopped by ASHA      optim.lr=0.5",
        "4      0.040  1/4                    stopped by ASHA      optim.lr=0.4",
        "7 of 9 trials: 2 running, 4 stopped by ASHA, 1 failed",
    ]


def test_progress_comes_from_the_events_and_a_trial_without_workers_says_so(
    tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(display, "TABLE_SECONDS", 0.2)
    monkeypatch.setattr(display, "STARTING_SECONDS", 0.1)
    monkeypatch.setattr(display, "num_free", lambda cluster: 1)
    config = override(tiny_run, {"storage.path": str(tmp_path), "cluster.num_workers": 2})
    context = SearchContext(config, "search")
    trials = {1: trial(1, 0.1), 2: trial(2, 0.2)}
    log = EventLog(context.trial_folder(1))
    log.append("launched")
    log.append("started", position=0, step=0, epochs=4, samples_per_epoch=48, workers=2)
    log.append("restart", reason="a worker died")
    log.append("resumed", position=48, step=6, epochs=4, samples_per_epoch=48, workers=2)
    time.sleep(0.05)
    log.append("step", position=120, step=15, metrics={"loss": 1.0})
    assert log.flush()
    stream = io.StringIO()
    waiting: list[bool] = []
    with SearchDisplay(context, lambda: trials, 2, waiting.append, stream) as shown:
        for each in trials.values():
            shown.on_change(each)
        deadline = time.monotonic() + 20
        while "2 of 2 trials: 2 running" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
        shown.on_change(
            replace(
                trials[2], status="failed", cause="its process was killed because the node ran out of memory"
            )
        )
    assert waiting[-1]  # so that other searches do not begin new trials
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["trial 1  starts  optim.lr=0.1", "trial 2  starts  optim.lr=0.2"]
    assert "trial 2  waiting for workers: it needs 2 x 1 CPUs, and there is room for 1 now" in lines
    assert sum("waiting for workers: it needs" in line for line in lines) == 1  # once, not at every look
    (row,) = [line.split() for line in lines if line.startswith("1 ")][:1]
    assert row[:4] == ["1", "-", "2.5/4", "1"]
    assert row[4] in ("0:00", "0:01")  # 72 of 144 samples in some hundredths of a second
    assert lines[-1] == "trial 2  failed: its process was killed because the node ran out of memory"


def test_a_trial_that_finds_room_is_starting(
    monkeypatch: pytest.MonkeyPatch, tiny_run: RunConfig, tmp_path: Path
) -> None:
    monkeypatch.setattr(display, "num_free", lambda cluster: 2)
    context = SearchContext(override(tiny_run, {"storage.path": str(tmp_path)}), "search")
    reading = display._Reading(context, 1)
    reading.read()
    assert reading.waits_for(ClusterConfig(num_workers=2), 5.0) == ""
    assert reading.waits_for(ClusterConfig(num_workers=2), 60.0) == "starting"
