from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from raydetr.tracking.tracker import Tracker

from raydetr.evaluation.coco_metrics import AP_FILE, NAMES, ApTable, ClassAp
from raydetr.runs.compare import compare
from raydetr.tracking import mlflow_run

# SQLAlchemy 2.1 deprecates an option that MLflow 3.17 uses
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = mlflow_run.default_uri(tmp_path_factory.mktemp("runs"))
    _run(uri, "base", 0.5, {"disc": 0.25, "ring [8]": 0.75}, {"optim.lr": 1e-4, "seed": 0})
    _run(
        uri,
        "better",
        0.625,
        {"disc": 0.5, "ring [8]": 0.75},
        {"optim.lr": 2e-4, "seed": 0, "new": None},
    )
    mlflow_run.create_run(uri, "other experiment", "empty")
    return uri


def _run(uri: str, name: str, ap: float, classes: Mapping[str, float], params: Mapping[str, Any]) -> str:
    run_id = mlflow_run.create_run(uri, "detectors", name)
    mlflow_run.log_params(uri, run_id, params)
    tracker = Tracker(uri, run_id)
    numbers = dict.fromkeys(NAMES, ap) | {"APs": -1.0, "AR1": 0.125}
    tracker.log_metrics(10, dict.fromkeys(NAMES, 0.001))  # an earlier evaluation
    tracker.log_metrics(20, numbers)
    rows = tuple(ClassAp(i, name, 5, value, value) for i, (name, value) in enumerate(classes.items()))
    tracker.log_text(json.dumps(ApTable(numbers, rows).to_dict()), AP_FILE)
    tracker.close()
    mlflow_run.finish_run(uri, run_id, "FINISHED")
    return run_id


def cells(text: str) -> dict[str, list[str]]:
    """First cell of each line -> the other cells."""
    rows = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip())
    return {row[0]: row[1:] for row in rows}


def test_best_values_are_marked_and_equal_ones_are_not(uri: str) -> None:
    rows = cells(compare(["base", "better"], uri, plain=True))
    assert rows["base"] == ["better"]
    assert rows["AP"] == ["0.500", "0.625*"]
    assert rows["AR1"] == ["0.125", "0.125"]
    assert rows["APs"] == ["-", "-"]
    assert rows["disc"] == ["0.250", "0.500*"]
    assert rows["ring [8]"] == ["0.750", "0.750"]


def test_only_differing_settings_are_shown(uri: str) -> None:
    rows = cells(compare(["better", "base"], uri, plain=True))
    assert rows["optim.lr"] == ["0.0002", "0.0001"]
    assert rows["new"] == ["null", "-"]
    assert "seed" not in rows


def test_a_run_that_was_never_evaluated(uri: str) -> None:
    rows = cells(compare(["empty", "base", "better"], uri, plain=True))
    assert rows["AP"] == ["-", "0.500", "0.625*"]
    assert rows["disc"] == ["-", "0.250", "0.500*"]


def test_one_run_has_no_best_and_no_differences(uri: str) -> None:
    text = compare(["base"], uri, plain=True)
    assert "*" not in text
    assert "differs" not in text
    assert cells(text)["AP"] == ["0.500"]


def test_runs_with_the_same_name_have_different_headings(uri: str) -> None:
    ids = [_run(uri, "twin", ap, {}, {}) for ap in (0.25, 0.5)]
    heading = compare(ids, uri, plain=True).splitlines()[1].split("  ")
    assert [name.strip() for name in heading if name.strip()] == [f"twin ({run_id[:8]})" for run_id in ids]


def test_the_terminal_gets_color_and_its_width(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = compare(["base", "better"], uri)
    assert "\x1b[1;32m0.625*" in text
    assert "\x1b" not in compare(["base", "better"], uri, plain=True)
    assert max(len(re.sub("\x1b[^m]*m", "", line)) for line in text.splitlines()) <= 60


def test_unknown_run(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'gone'"):
        compare(["base", "gone"], uri)
