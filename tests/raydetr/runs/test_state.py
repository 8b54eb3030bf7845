"""What became of a run is told from its folder, on a disk and at a URL: also of one whose driver was killed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import CommandLine
from played_run import PlayedRun, evaluation, started, step, write_run
from raydetr.runs import lease as lease_module
from raydetr.runs.lease import LEASE, DriverWatch, Lease
from raydetr.runs.list import ago_text, to_table
from raydetr.runs.state import find_run, list_runs, state_of
from raydetr.store.folders import Folder, open_folder, write_file
from raydetr.tracking.events import EventLog

CHECKPOINT = ("checkpoint", {"position": 100, "seconds": 0.5, "bytes": 10})


@pytest.fixture
def played(run_folder: Folder) -> Iterator[PlayedRun]:
    run = PlayedRun(run_folder)
    yield run
    run.close()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_goes_on_and_is_then_killed(played: PlayedRun) -> None:
    assert state_of(played.folder).state == "running"
    played.log("started", **started())
    played.log("step", **step(5))
    played.log("evaluation", **evaluation(1, 0.25))
    played.log("step", **step(8))
    state = state_of(played.folder)
    assert (state.state, state.epoch, state.epochs, state.fraction) == ("running", 1.6, 4, 0.4)
    assert (state.ap_best, state.ap_last, state.restarts, state.last_event) == (0.25, 0.25, 0, "step")
    assert state.remedy is None
    played.kill()
    lost = state_of(played.folder)
    assert (lost.state, lost.fraction) == ("lost", 0.4)
    assert lost.remedy == "it has no checkpoint: start it again, with the same --name and --or-resume"
    log = EventLog(played.folder)
    log.append(CHECKPOINT[0], **CHECKPOINT[1])
    assert log.flush()
    assert state_of(played.folder).remedy == f"continue with `raydetr train --resume {played.folder}`"


@pytest.mark.parametrize(
    ("kind", "state"), [("finished", "finished"), ("stopped", "stopped"), ("failed", "failed")]
)
def test_a_run_that_has_ended(tmp_path: Path, kind: str, state: str) -> None:
    run = write_run(tmp_path / "run", ("started", started()), (kind, {"reason": "because"}))
    found = state_of(run)
    assert (found.state, found.reason) == (state, "because")


def test_a_run_that_was_resumed_after_its_end_goes_on_or_is_lost(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ("started", started()), ("stopped", {"reason": "by a signal"}))
    log = EventLog(run)
    log.append("resumed", **started(100))
    assert log.flush()
    assert state_of(run).state == "lost"


def test_the_driver_writes_the_end_to_a_segment_before_that_of_the_last_worker(tmp_path: Path) -> None:
    """Segments are read one after the other, but the events of two processes have the order of their times."""
    folder = tmp_path / "run"
    driver, workers = EventLog(folder), EventLog(folder)
    write_file(folder / "config.yaml", b"recipe: played\n")
    driver.append("restart", reason="a worker died", failures_since_progress=1, position=0)
    assert driver.flush()
    workers.append("resumed", **started())
    assert workers.flush()
    driver.append("finished", position=400, AP=0.5)
    assert driver.flush()
    state = state_of(folder)
    assert (state.state, state.restarts, state.last_event) == ("finished", 1, "finished")


def test_steps_after_the_checkpoint_of_a_resume_do_not_count(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        ("started", started()),
        ("evaluation", evaluation(1, 0.25)),
        ("evaluation", evaluation(2, 0.5)),
        ("restart", {"reason": "a worker died", "failures_since_progress": 1, "position": 100}),
        ("resumed", started(100)),
        ("step", step(6)),
        ("system", {"step": 6, "metrics": {}}),
    )
    state = state_of(run)
    assert (state.ap_best, state.ap_last, state.epoch, state.restarts) == (0.25, 0.25, 1.2, 1)
    assert state.last_event == "step"  # the last one of progress


def test_the_driver_of_another_machine(run_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_machine", lambda: "elsewhere")
    with Lease(run_folder):
        monkeypatch.setattr(lease_module, "_machine", lambda: "here")
        content = next(iter((run_folder / LEASE).glob("*.json"))).read_bytes()
        watch = DriverWatch(run_folder)
        assert watch.is_alive()
    assert not watch.is_alive()  # it has ended, and removed its lease
    assert not DriverWatch(run_folder).is_alive()
    # A killed one leaves it. Its last sign of life is as old as the file
    write_file(run_folder / LEASE / "000001.json", content)
    monkeypatch.setattr(lease_module, "DEAD_SECONDS", 1.5)
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.5)
    monkeypatch.setattr(lease_module, "LOOK_SECONDS", 0.1)
    time.sleep(2.6)  # S3 has whole seconds
    assert not DriverWatch(run_folder).is_alive()


def test_clocks_that_differ_do_not_make_a_driver_look_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_machine", lambda: "elsewhere")
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.3)
    monkeypatch.setattr(lease_module, "LOOK_SECONDS", 0.05)
    with Lease(tmp_path):
        monkeypatch.setattr(lease_module, "_machine", lambda: "here")
        monkeypatch.setattr(
            lease_module, "modified", lambda file: time.time() - 300.0
        )  # of the storage's clock
        assert DriverWatch(tmp_path).is_alive()


def test_a_lease_that_is_days_old_is_not_waited_for(tmp_path: Path) -> None:
    with Lease(tmp_path):
        content = json.loads(next((tmp_path / LEASE).glob("*.json")).read_text())
    file = tmp_path / LEASE / "000001.json"
    file.write_text(json.dumps(content | {"machine": "elsewhere"}))
    os.utime(file, (time.time() - 2 * 86400,) * 2)
    began = time.monotonic()
    assert not DriverWatch(tmp_path).is_alive()
    assert time.monotonic() - began < 1


# --- Searches ---


def write_search(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("recipe: played\n")
    (folder / "space.yaml").write_text("optim.lr: {choice: [1, 2]}\n")
    for number, ap in ((1, 0.25), (2, 0.5)):
        write_run(
            folder / f"{folder.name}-{number:03d}", ("started", started()), ("evaluation", evaluation(1, ap))
        )
    (folder / "tune").mkdir()


def end(folder: Path, kind: str, reason: str) -> None:
    log = EventLog(folder)
    log.append(kind, reason=reason)
    assert log.flush()


def test_a_search_and_its_trials(tmp_path: Path) -> None:
    search = tmp_path / "runs" / "search"
    write_search(search)
    first, second = search / "search-001", search / "search-002"
    assert state_of(search).state == "lost"
    assert state_of(search).remedy == f"continue with `raydetr tune --resume {search}`"
    end(second, "failed", "ShardError: no such image")
    with Lease(search):
        state = state_of(search)
        assert (state.kind, state.state, state.num_trials, state.ap_best) == ("search", "running", 2, 0.5)
        # A trial whose process is gone while its search goes on was stopped by it
        assert (state_of(first).kind, state_of(first).state) == ("trial", "stopped")
        # At its end, the search logs how all trials have ended
        end(first, "stopped", "stopped by ASHA")
        end(second, "failed", "failed")
        end(search, "finished", "")
    assert state_of(search).state == "finished"
    trials = {trial.name: trial for trial in list_runs(search)}
    assert (trials["search-001"].state, trials["search-001"].reason) == ("stopped", "stopped by ASHA")
    assert (trials["search-002"].state, trials["search-002"].reason) == (
        "failed",
        "ShardError: no such image",
    )
    assert find_run("search-002", tmp_path / "runs") == second


# --- The list ---


def test_the_list_is_read_only_and_has_the_newest_events_first(run_folder: Folder) -> None:
    storage = run_folder.parent
    for name in ("first", "second", "third"):
        write_run(storage / name, ("started", started()), (CHECKPOINT))
        time.sleep(0.02)
    write_file(storage / "notes.txt", b"no run")
    write_file(storage / "other" / "notes.txt", b"no run")
    before = files(storage) if isinstance(storage, Path) else None
    states = list_runs(storage)
    assert [state.name for state in states] == ["third", "second", "first"]
    text = to_table(states, str(storage), time.time())
    assert f"third (lost): continue with `raydetr train --resume {storage}/third`" in text
    if isinstance(storage, Path):
        assert files(storage) == before


def test_a_folder_that_was_moved(tmp_path: Path) -> None:
    storage = tmp_path / "old" / "runs"
    write_run(storage / "run", ("started", started()), CHECKPOINT)
    shutil.move(tmp_path / "old", tmp_path / "new")
    (state,) = list_runs(tmp_path / "new" / "runs")
    assert state.remedy == f"continue with `raydetr train --resume {tmp_path}/new/runs/run`"
    assert not (tmp_path / "old").exists()


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = CommandLine(monkeypatch, capsys)
    missing = command("runs")
    assert (missing.code, list(tmp_path.iterdir())) == (1, [])
    assert f"{tmp_path}/runs: there is no such folder" in missing.err
    (tmp_path / "runs").mkdir()
    assert command("runs").out == "runs: no runs\n"
    write_run(tmp_path / "runs" / "a", ("started", started()), ("evaluation", evaluation(2, 0.125)),
              ("failed", {"reason": "LaunchError: the workers failed\nat length"}))  # fmt: skip
    row = command("runs").out.splitlines()
    assert row[1].split()[:8] == ["a", "run", "failed", "2.00/4", "50%", "0.125", "0.125", "0"]
    assert row[2].startswith("a (failed): LaunchError: the workers failed; it has no checkpoint")
    (listed,) = json.loads(command("runs", tmp_path / "runs" / "a", "--json").out)
    assert (listed["name"], listed["fraction"], listed["ap_best"]) == ("a", 0.5, 0.125)
    assert listed["reason"] == "LaunchError: the workers failed\nat length"


def test_how_long_ago() -> None:
    texts = [ago_text(seconds) for seconds in (-5, 59, 3599, 3600, 5400, 47.9 * 3600, 72 * 3600)]
    assert texts == ["0:00", "0:59", "59:59", "1.0 hours", "1.5 hours", "47.9 hours", "3 days"]


def test_a_name_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone: is not the folder or URL of a run .* `raydetr runs "):
        find_run("gone", tmp_path)
    assert find_run(write_run(tmp_path / "a"), tmp_path) == open_folder(tmp_path / "a")
