"""Search on a real cluster: four trials on two CPUs, two at a time, about a minute on an idle machine."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from drawn_shards import write_drawn_shards
from ray_head import RayHead, ray_head
from raydetr.cli.arguments import read_config
from raydetr.config import from_yaml
from raydetr.runs.state import list_runs, state_of
from raydetr.tracking.upload_state import read_run_id
from raydetr.training.checkpoint import read_meta

pytestmark = pytest.mark.xdist_group("ray_head")

ROOT = Path(__file__).parents[3]
# With this seed the drawn values are, in order: (good, 4), (bad, 4), (bad, 7), (bad, 4). The fourth trial starts when
# one of the first two has ended: ASHA then stops it, because the good trial has a higher AP.
SEED = 11
SPACE = """
optim.lr: {choice: [4.0e-3, 1.0e-9]}
model.num_classes: {choice: [4, 7]}
"""
DRAWN = [(4e-3, 4), (1e-9, 4), (1e-9, 7), (1e-9, 4)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_drawn_shards(folder, 64, 16)
    return folder


def search(head: RayHead, shards: Path, space: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the job; its runs are stored in the folder of the space."""
    return subprocess.Popen(
        [
            *(sys.executable, "jobs/tune_detector.py", "quickstart", "--space", str(space), *arguments),
            *(f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", "data.synthetic=null"),
            *("cluster.num_workers=1", "cluster.max_failures=0", "evaluation.every_epochs=1"),
            *(f"seed={SEED}", f"cluster.address={head.address}", f"storage.path={space.parent}"),
        ],
        cwd=ROOT,
        env=head.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def query(database: Path, sql: str, *values: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql, values).fetchall()


def drivers_and_workers(head: RayHead) -> list[str]:
    """The names of all Ray processes except the services of the cluster."""
    names = [process.name() for process in head.processes()]
    return [name for name in names if name.startswith("ray::") and "AutoscalingCoordinator" not in name]


@pytest.mark.timeout(900)  # a minute; much longer on a busy machine
def test_a_search_stops_bad_trials_reports_failed_ones_and_leaks_nothing(
    shards: Path, tmp_path: Path
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    with ray_head(num_cpus=2) as head:
        job = search(head, shards, space, "--trials", "4", "--concurrent", "5", "optim.epochs=2")
        output, errors = job.communicate()
        assert job.returncode == 0, errors
        actors = [actor["class_name"] for actor in head.living("actors")]
        assert [name for name in actors if name != "_AutoscalingCoordinatorActor"] == []
        assert head.living("placement_groups") == []
        assert drivers_and_workers(head) == []
    assert head.processes() == []

    (folder,) = tmp_path.glob("tune-quickstart-*")
    trials = {trial["number"]: trial for trial in json.loads((folder / "trials.json").read_text())}
    drawn = [tuple(trials[number]["overrides"].values()) for number in (1, 2, 3, 4)]
    assert drawn == DRAWN
    assert trials[1]["status"] == "finished"
    assert trials[2]["status"] in ("finished", "stopped by ASHA")  # depends on which of two was faster
    assert trials[3]["status"] == "failed"
    assert "model.num_classes is 7" in trials[3]["cause"]
    assert (trials[4]["status"], trials[4]["epoch"]) == ("stopped by ASHA", 1)
    assert "2 trials fit on the cluster at once, not 5" in errors
    assert re.search(r"trial 1  epoch 2/2  AP 0\.\d{3}  AP50 0\.\d{3}  optim.lr=0.004", errors)

    text = (folder / "trials.txt").read_text().strip()
    assert output.rstrip().endswith(text)  # Ray prints lines before it
    table = text.splitlines()
    assert table[0].split() == ["trial", "AP", "AP50", "epochs", "status", "optim.lr", "model.num_classes"]
    assert table[1].startswith(f"1      {trials[1]['AP']:.3f}")
    assert any(line.startswith("trial 3 failed: model.num_classes is 7") for line in table)
    states = {state.name: (state.kind, state.state) for state in list_runs(folder)}
    expected = {"finished": "finished", "stopped by ASHA": "stopped", "failed": "failed"}
    assert states == {trial["name"]: ("trial", expected[trial["status"]]) for trial in trials.values()}
    assert (state_of(folder).kind, state_of(folder).state) == ("search", "finished")
    check_best_command(table[-1], folder)
    check_mlflow(tmp_path / "mlflow.db", folder, trials)


def check_best_command(line: str, folder: Path) -> None:
    """Check that the command has the configuration of the best trial."""
    words = shlex.split(line.removeprefix("best"))
    assert words[:3] == ["raydetr", "train", "quickstart"]
    pasted = read_config(words[2:], None)
    trained = from_yaml(folder / f"{folder.name}-001" / "config.yaml")
    assert pasted.optim == trained.optim
    assert (pasted.model, pasted.data, pasted.seed) == (trained.model, trained.data, trained.seed)


def check_mlflow(database: Path, folder: Path, trials: dict[int, dict[str, Any]]) -> None:
    """Check that a finished parent has one child run per trial, with its metrics and its status."""
    parent, status = query(database, "select run_uuid, status from runs where name = ?", folder.name)[0]
    assert status == "FINISHED"
    children = dict(
        query(
            database,
            "select name, status from runs join tags using (run_uuid) "
            "where tags.key = 'mlflow.parentRunId' and tags.value = ?",
            parent,
        )
    )
    expected = {"finished": "FINISHED", "stopped by ASHA": "KILLED", "failed": "FAILED"}
    assert children == {trial["name"]: expected[trial["status"]] for trial in trials.values()}
    for trial in trials.values():
        run_id = read_run_id(folder / trial["name"])
        assert run_id is not None
        values = query(
            database,
            "select value from metrics where run_uuid = ? and key = 'AP/AP' order by step desc",
            run_id,
        )
        assert values[:1] == ([] if trial["AP"] is None else [(trial["AP"],)])
        (ended,) = query(
            database,
            "select value from tags where run_uuid = ? and key = 'raydetr.ended'",
            run_id,
        )
        assert ended[0].startswith(trial["status"])
    best = max(trial["AP"] for trial in trials.values() if trial["status"] == "finished")
    assert query(database, "select value from metrics where run_uuid = ? and key = 'AP/AP'", parent) == [
        (best,)
    ]
    params = dict(query(database, "select key, value from params where run_uuid = ?", parent))
    assert (params["best.optim.lr"], params["search.optim.lr"]) == ("0.004", "choice [0.004, 1e-09]")
    artifacts = {path.name for path in (database.parent / "mlflow-artifacts" / parent).rglob("*")}
    assert {"space.yaml", "config.yaml", "trials.txt", "trials.json"} <= artifacts


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_interrupted_search_ends_its_trials_and_reports_their_results(
    shards: Path, tmp_path: Path
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    with ray_head(num_cpus=2) as head:
        job = search(head, shards, space, "--trials", "2", "--concurrent", "2", "optim.epochs=500")
        assert job.stderr is not None
        for line in job.stderr:
            if "epoch 1/" in line:
                break
        job.send_signal(signal.SIGINT)
        _, errors = job.communicate()
        assert job.returncode == 130, errors
        assert "interrupted" in errors
        assert head.living("placement_groups") == []
        assert drivers_and_workers(head) == []
    rows = query(tmp_path / "mlflow.db", "select status from runs")
    assert rows == [("KILLED",)] * 3
    (folder,) = tmp_path.glob("tune-quickstart-*")
    stopped = json.loads((folder / "trials.json").read_text())
    assert {trial["status"] for trial in stopped} == {"interrupted"}
    (newest, *_) = (folder / stopped[0]["name"]).glob("*/*/meta.json")
    assert read_meta(newest.parent).epoch >= 1  # `raydetr train --resume` can continue from it
