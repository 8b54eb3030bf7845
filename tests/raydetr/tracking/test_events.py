"""Test the event log of a run: kills, resumes, full disks, several writers."""

from __future__ import annotations

import json
import math
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from faulty_proxy import Fault, FaultyProxy, Kind
from raydetr.store.folders import Folder, open_folder
from raydetr.tracking.events import EventLog, Metrics, read_events


def log_step(log: EventLog, step: int, **metrics: float) -> None:
    log.append("step", step=step, position=16 * step, metrics=metrics)
    assert log.flush()


def test_a_resumed_run_does_not_count_steps_after_its_checkpoint(run_folder: Folder) -> None:
    first = EventLog(run_folder)
    first.append("started", step=0, position=0)
    log_step(first, 10, loss=3.0)
    first.append("evaluation", step=20, position=320, metrics={"AP": 0.25, "epoch": 1})
    log_step(first, 30, loss=1.0)
    segment = run_folder / "events" / "000001.jsonl"
    segment.write_bytes(segment.read_bytes() + b'{"kind": "step", "posi')  # killed within a line
    second = EventLog(run_folder)
    second.append("resumed", step=20, position=320)
    assert second.flush()
    metrics = Metrics(read_events(run_folder))
    assert [row["step"] for row in metrics.rows] == [10, 20]
    assert metrics.last("AP") == 0.25
    log_step(second, 30, loss=2.0)
    metrics = Metrics(read_events(run_folder))
    assert [(row["step"], row.get("loss")) for row in metrics.rows] == [(10, 3.0), (20, None), (30, 2.0)]
    assert metrics.curves("loss", "step") == {"loss": [(10, 3.0), (30, 2.0)]}
    assert sorted(path.name for path in (run_folder / "events").iterdir()) == ["000001.jsonl", "000002.jsonl"]


def test_seconds_of_a_run_are_those_of_all_its_processes(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    events = [
        ("started", 100.0), ("step", 160.0), ("restart", 500.0), ("resumed", 600.0), ("step", 630.0)
    ]  # fmt: skip
    lines = [
        json.dumps({"time": time, "kind": kind, "step": 1, "position": 1, "metrics": {}})
        for kind, time in events
    ]
    (tmp_path / "events" / "000001.jsonl").write_text("\n".join(lines) + "\n")
    assert Metrics(read_events(tmp_path)).seconds == 90.0


def test_a_number_that_is_not_finite_is_none(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log_step(log, 1, loss=math.nan, grad_norm=math.inf, lr=0.5)
    (event,) = read_events(tmp_path)
    assert event["metrics"] == {"loss": None, "grad_norm": None, "lr": 0.5}
    assert Metrics([event]).curves("loss", "step") == {}


def test_what_cannot_be_written_is_kept_and_written_later(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.write_text("in the place of the folder")
    log = EventLog(run)
    for step in (1, 2):
        log.append("step", step=step)
    assert not log.flush(0.5)
    assert log.problem is not None
    assert str(run) in log.problem
    run.unlink()
    log.append("step", step=3)
    assert log.flush()
    assert log.problem is None
    assert [event["step"] for event in read_events(run)] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["busy", "refuse"])
def test_events_wait_for_a_server_that_does_not_answer(
    kind: Kind, s3_proxy: FaultyProxy, s3_url: str
) -> None:
    folder = open_folder(s3_url)
    log = EventLog(folder)
    log_step(log, 1, loss=1.0)
    s3_proxy.faults = lambda request: Fault(kind)
    began = time.perf_counter()
    for step in range(2, 500):
        log.append("step", step=step)
    assert time.perf_counter() - began < 5  # nothing is waited for
    assert not log.flush(2.0)
    assert s3_proxy.injected
    s3_proxy.faults = lambda request: None
    assert log.flush(60)
    assert [event["step"] for event in read_events(folder)] == list(range(1, 500))


def test_events_do_not_wait_for_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, write = threading.Event(), Path.open

    def hang(path: Path, *arguments: Any, **settings: Any) -> Any:
        answer.wait()
        return write(path, *arguments, **settings)

    log = EventLog(tmp_path)
    log_step(log, 1)
    monkeypatch.setattr(Path, "open", hang)
    began = time.perf_counter()
    for step in (2, 3):
        log.append("step", step=step)
    assert not log.flush(0.2)
    assert time.perf_counter() - began < 5
    answer.set()
    assert log.flush()
    assert [event["step"] for event in read_events(tmp_path)] == [1, 2, 3]


def test_a_long_log_at_a_url_has_several_segments(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydetr.tracking.events.SEGMENT_BYTES", 500)
    log = EventLog(open_folder(s3_url))
    for step in range(40):
        log_step(log, step, loss=1.0)
    assert [event["step"] for event in read_events(open_folder(s3_url))] == list(range(40))
    assert 5 < len(list((open_folder(s3_url) / "events").iterdir())) < 40


def write_many(folder: str) -> None:
    log = EventLog(Path(folder))
    for step in range(200):
        log.append("step", step=step)
    assert log.flush()


def test_several_processes_write_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(str(tmp_path),)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    events = read_events(tmp_path)
    assert len(events) == 800
    assert len(list((tmp_path / "events").iterdir())) == 4
    for start in range(0, 800, 200):
        assert [event["step"] for event in events[start : start + 200]] == list(range(200))
