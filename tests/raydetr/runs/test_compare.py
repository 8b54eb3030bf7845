"""Runs are compared from their folders, and nothing is written there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine
from evaluated_run import EPOCHS, SAMPLES, Rows, make_detections, write_evaluated_run
from played_run import PlayedRun, started, step
from printed_tables import cells
from raydetr.evaluation.coco_metrics import coco_ap
from raydetr.runs.compare import compare
from raydetr.runs.compared_run import points_of
from raydetr.shards.reader import Shards, open_shards
from raydetr.store.folders import open_folder
from raydetr.tracking.uris import TrackingError


@pytest.fixture(scope="module")
def val(tiny_data: Path) -> Shards:
    return open_shards(str(tiny_data / "val"))


@pytest.fixture(scope="module")
def other_val(tiny_data: Path) -> Shards:
    """The same shards, without some images: other validation data."""
    return open_shards(str(tiny_data / "train"))


@pytest.fixture(scope="module")
def good(val: Shards) -> Rows:
    return make_detections(val, noise=1.0, missed=0.05, false=0.2)


@pytest.fixture(scope="module")
def bad(val: Shards) -> Rows:
    return make_detections(val, noise=4.0, missed=0.4, false=2.0)


@pytest.fixture
def runs(tmp_path: Path, val: Shards, good: Rows, bad: Rows) -> Path:
    """Write the runs `base` and `better`."""
    write_evaluated_run(tmp_path / "runs" / "base", val, bad, settings={"optim": {"lr": 1e-4, "epochs": 2}})
    write_evaluated_run(
        tmp_path / "runs" / "better", val, good, settings={"optim": {"lr": 2e-4, "epochs": 2}}
    )
    return tmp_path / "runs"


def locations(runs: Path, *names: str) -> list[str]:
    return [str(runs / name) for name in names]


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_scores_differences_and_intervals(runs: Path, val: Shards, good: Rows, bad: Rows) -> None:
    comparison = compare(locations(runs, "base", "better"))
    rows = cells(comparison.to_text(plain=True))
    first, second = (coco_ap(val.coco(), one)["AP"] for one in (bad, good))
    assert rows["base"] == ["better"]
    interval = comparison.interval(1, "AP")
    assert interval is not None
    assert interval.is_significant
    assert interval.difference == pytest.approx(second - first, abs=1e-4)  # boxes are stored in float32
    # Three tables have a row of this name; the last one is that of the intervals
    assert rows["AP"][-1].endswith("] significant")
    text = comparison.to_text(plain=True)
    assert re.search(rf"^ *AP +{first:.3f} +{second:.3f}\* \{second - first:+.3f}$", text, re.MULTILINE)
    assert rows["optim.lr"] == ["0.0001", "0.0002"]
    assert "optim.epochs" not in rows
    assert rows["validation data"] == [val.fingerprint] * 2
    assert rows["state"] == ["finished", "finished"]
    assert rows["evaluation"] == [f"epoch {EPOCHS}"] * 2


def test_kinds_of_errors_are_those_that_were_made(tmp_path: Path, val: Shards) -> None:
    """Detections that only miss objects lose AP by that alone; others only by false ones."""
    misses = make_detections(val, noise=0.0, missed=0.5, false=0.0)
    false = make_detections(val, noise=0.0, missed=0.0, false=3.0)
    for row in false:
        row["score"] = 1.0 - row["score"]  # false ones rank first
    write_evaluated_run(tmp_path / "misses", val, misses)
    write_evaluated_run(tmp_path / "false", val, false)
    first, second = compare(locations(tmp_path, "misses", "false")).errors
    assert first["missed"] > 0.3
    assert all(value < 0.01 for name, value in first.items() if name != "missed")
    assert second["missed"] < 0.01
    assert max(second.values()) > 0.05


def test_equal_runs_have_no_best_and_no_difference(tmp_path: Path, val: Shards, good: Rows) -> None:
    for name in ("a", "b"):
        write_evaluated_run(tmp_path / name, val, good)
    text = compare(locations(tmp_path, "a", "b")).to_text(plain=True)
    assert "*" not in text
    assert "differs" not in text
    assert "+0.000 [+0.000, +0.000] within chance" in text


def test_one_run(runs: Path) -> None:
    text = compare(locations(runs, "base")).to_text(plain=True)
    assert "*" not in text
    assert "significant" not in text
    assert "differs" not in text


def test_different_validation_data_has_no_winner(runs: Path, other_val: Shards, good: Rows) -> None:
    write_evaluated_run(runs / "elsewhere", other_val, make_detections(other_val, noise=0.5))
    comparison = compare(locations(runs, "base", "elsewhere", "better"))
    text = comparison.to_text(plain=True)
    assert "*" not in text
    assert "DIFFERENT VALIDATION DATA" in text
    assert other_val.fingerprint in text
    assert list(comparison.intervals) == [2]  # better has the data of base
    rows = cells(comparison.to_text(plain=True))
    assert re.fullmatch(r"0\.\d{3}", rows["AR100"][1])  # without a difference
    assert re.fullmatch(r"0\.\d{3} [+-]0\.\d{3}", rows["AR100"][2])


def test_a_run_that_goes_on_and_one_that_was_never_evaluated(runs: Path) -> None:
    played = PlayedRun(runs / "going")
    played.log("started", **started())
    played.log("step", **step(5))
    comparison = compare(locations(runs, "base", "going"))
    rows = cells(comparison.to_text(plain=True))
    assert rows["state"] == ["finished", "running at epoch 1.00 of 4"]
    assert rows["AR100"][1] == "-"
    assert any(
        "going: without its detections" in note and "not evaluated yet" in note for note in comparison.notes
    )
    played.close()


def test_a_run_whose_arrays_were_removed_keeps_its_numbers(runs: Path) -> None:
    shutil.rmtree(runs / "better" / "evaluations" / str(SAMPLES * EPOCHS) / "detections")
    comparison = compare(locations(runs, "base", "better"))
    assert comparison.intervals == {}
    assert cells(comparison.to_text(plain=True))["AR100"][1].startswith("0.")
    assert any("removed with its checkpoint" in note for note in comparison.notes)


# --- What can be compared ---


def test_names_searches_and_urls(tmp_path: Path, val: Shards, good: Rows, bad: Rows, s3_url: str) -> None:
    search = tmp_path / "runs" / "tune"
    for number, rows in ((1, good), (2, bad)):
        write_evaluated_run(search / f"tune-00{number}", val, rows)
    (search / "config.yaml").write_text("recipe: quickstart\n")
    (search / "space.yaml").write_text("")
    write_evaluated_run(tmp_path / "runs" / "single", val, bad)
    remote = open_folder(f"{s3_url}/remote")
    write_evaluated_run(remote, val, good)
    comparison = compare(["single", "tune", str(remote), "tune-002"], storage=str(tmp_path / "runs"))
    names = [run.name for run in comparison.runs]
    assert [re.sub(" #.*", "", name) for name in names] == [
        "single",
        "tune-001",
        "tune-002 (tune)",
        "remote",
        "tune-002 (tune)",
    ]
    assert len(set(names)) == 5
    assert set(comparison.intervals) == {1, 2, 3, 4}
    remote_interval, local_interval = comparison.interval(3, "AP"), comparison.interval(1, "AP")
    assert remote_interval == local_interval  # the same draws


def test_results_of_another_tool(runs: Path, tmp_path: Path, val: Shards, good: Rows) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(good))
    comparison = compare([*locations(runs, "base"), str(file)])
    assert comparison.runs[1].numbers["AP"] == pytest.approx(coco_ap(val.coco(), good)["AP"])
    assert set(comparison.intervals) == {1}
    assert comparison.differing_settings == {}  # the file has none
    with pytest.raises(ValueError, match=r"results\.json: what are these results .* --data"):
        compare([str(file)])
    alone = compare([str(file)], data=val.location)
    assert alone.runs[0].numbers == comparison.runs[1].numbers
    with pytest.raises(ValueError, match=r"--data .* has no effect without a file"):
        compare(locations(runs, "base"), data=val.location)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: {"annotations": rows}, r"results\.json: holds a dataset with annotations"),
        (lambda rows: [{"image_id": 1}], r"\[0\]: category_id, bbox, score are missing"),
        (
            lambda rows: [{**row, "image_id": 987654} for row in rows],
            "image_id 987654 is not in the ground truth",
        ),
        (
            lambda rows: [{**row, "category_id": 987} for row in rows],
            "category_id 987 is not in the ground truth",
        ),
    ],
)
def test_results_that_cannot_be_evaluated(
    tmp_path: Path, val: Shards, good: Rows, change: Callable[[Rows], Any], message: str
) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(change(good)))
    with pytest.raises(ValueError, match=message):
        compare([str(file)], data=val.location)


def test_a_location_that_is_neither_is_named(tmp_path: Path) -> None:
    for name in (str(tmp_path), "none/there", "gone.json"):
        with pytest.raises(ValueError, match="is not the folder or URL of a run or a search"):
            compare([name])


def test_a_tracking_uri_without_effect_is_refused(runs: Path) -> None:
    with pytest.raises(ValueError, match="--uri http://nowhere has no effect"):
        compare(locations(runs, "base"), "http://nowhere")


# --- Nothing is written ---


def test_nothing_is_written_and_a_moved_folder_works(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compare(locations(runs, "base", "better")).to_text(plain=True)
    moved = runs.parent / "moved"
    runs.rename(moved)
    monkeypatch.chdir(moved.parent)
    content = files(moved)
    assert compare(["moved/base", "moved/better"]).to_text(plain=True) == before  # AP by class, too
    assert files(moved) == content
    assert [path.name for path in moved.parent.iterdir()] == ["moved"]


def test_nothing_is_made_where_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match=r"runs/mlflow\.db: no such MLflow database"):
        compare(["a", "b"])
    assert list(tmp_path.iterdir()) == []


# --- Curves ---


def test_costs_count_all_processes_and_values_those_that_lasted() -> None:
    """2 workers train 10 s, fail, are 60 s away, and train the last step again with 4 workers."""
    metrics = {"loss": 1.0}
    events = [
        {"time": 1000.0, "kind": "launched"},
        {"time": 1010.0, "kind": "started", "position": 0, "workers": 2},
        {"time": 1015.0, "kind": "step", "step": 1, "position": 8, "metrics": metrics},
        {"time": 1020.0, "kind": "step", "step": 2, "position": 16, "metrics": metrics},
        {"time": 1080.0, "kind": "resumed", "position": 8, "workers": 4},
        {"time": 1090.0, "kind": "step", "step": 2, "position": 16, "metrics": metrics | {"other": 3.0}},
        {
            "time": 1100.0,
            "kind": "evaluation",
            "step": 2,
            "position": 16,
            "metrics": {"AP": 0.5, "AP50": 0.7},
        },
    ]
    found = [
        (point.step, point.samples, point.hours * 3600, point.worker_hours * 3600, dict(point.values))
        for point in points_of(events)
    ]
    assert found == [
        (1, 8, pytest.approx(15), pytest.approx(2 * 5), {"loss": 1.0}),
        (2, 16, pytest.approx(90), pytest.approx(2 * 10 + 4 * 10), {"loss": 1.0}),
        (2, 16, pytest.approx(100), pytest.approx(2 * 10 + 4 * 20), {"AP": 0.5}),
    ]


# --- The terminal ---


def test_the_terminal_gets_color_and_its_width(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    comparison = compare(locations(runs, "base", "better"))
    text = comparison.to_text(plain=False)
    assert re.search(r"\x1b\[1;32m0\.\d{3}\*", text)
    assert "\x1b" not in comparison.to_text(plain=True)
    assert max(len(re.sub("\x1b[^m]*m", "", line)) for line in text.splitlines()) <= 60


def test_the_command(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = CommandLine(monkeypatch, capsys, "compare")
    done = command("base", "better", "--html", "page.html")
    assert done.code == 0
    assert "AP by class" in done.out
    assert "wrote page.html" in done.out
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "runs"]
    assert "what is to be compared?" in command().err
    assert command("base", "gone.json").err.startswith("error: gone.json: is not the folder or URL of a run")


def test_mlflow_says_nothing_about_its_tables(tmp_path: Path) -> None:
    """In a process of its own, as its loggers are set up once."""
    program = (
        "from raydetr.tracking.mlflow_run import connect\n"
        f"connect('sqlite:///{tmp_path}/mlflow.db').create_experiment('experiment')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "mlflow.db").is_file()
