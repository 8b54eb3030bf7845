"""Runs are compared by the folder that `train` prints; comparing writes nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from raydetr.config import RunConfig, override
from raydetr.runs import run
from raydetr.runs.compare import compare
from raydetr.tracking.mlflow_run import TrackingError


def test_folders_of_runs_in_different_places(tiny_run: RunConfig, tmp_path: Path) -> None:
    """Each folder knows where its run is tracked."""
    results = [
        run.start(
            override(tiny_run, {"optim.epochs": 1, "optim.lr": lr, "storage.path": str(tmp_path / place)}),
            local=True,
        )
        for lr, place in ((4e-3, "here"), (1e-3, "there"))
    ]
    text = compare([str(result.folder) for result in results], plain=True)
    row = re.search(r"^ *AR100 +(0\.\d{3})\*? +(0\.\d{3})", text, re.MULTILINE)
    assert row is not None
    assert list(row.groups()) == [f"{result.metrics['AR100']:.3f}" for result in results]
    assert re.search(r"^ *optim\.lr +0\.004 +0\.001$", text, re.MULTILINE)
    # The commands that the first one printed find it
    hints = results[0].to_text()
    assert f"raydetr compare {results[0].folder} OTHER_RUN" in hints
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/here/mlflow.db" in hints
    # A folder that was moved with its database
    (tmp_path / "here").rename(tmp_path / "moved")
    moved = str(tmp_path / "moved" / results[0].folder.name)
    with pytest.raises(TrackingError, match=r"here/mlflow\.db: no such MLflow database"):
        compare([moved])
    assert row[1] in compare([moved], f"sqlite:///{tmp_path}/moved/mlflow.db", plain=True)


def test_nothing_is_made_where_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrackingError, match=r"runs/mlflow\.db: no such MLflow database"):
        compare(["a", "b"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"not the folder of a run: mlflow_run_id or config\.yaml is missing"
    ):
        compare([str(tmp_path)])
    with pytest.raises(ValueError, match=r"none/there: not the folder of a run"):
        compare(["none/there"])


def test_mlflow_says_nothing_about_its_tables(tmp_path: Path) -> None:
    """In a process of its own, as its loggers are set up once."""
    program = (
        "from pathlib import Path\n"
        "from raydetr.tracking import mlflow_run\n"
        f"mlflow_run.create_run('sqlite:///{tmp_path}/mlflow.db', 'experiment', 'run')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "mlflow.db").is_file()
