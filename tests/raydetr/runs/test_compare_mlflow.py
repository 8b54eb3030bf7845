"""Runs are compared by MLflow's ids, names and filters, from their folders where these can be reached."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from evaluated_run import make_detections, write_evaluated_run
from logged_run import log_run, upload, write_table
from mlflow_server import MlflowServer
from printed_tables import cells
from raydetr.runs.compare import compare
from raydetr.shards.reader import Shards, open_shards
from raydetr.tracking.mlflow_run import connect
from raydetr.tracking.uris import TrackingError, default_uri

# SQLAlchemy 2.1 deprecates an option that MLflow 3.17 uses
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")


@pytest.fixture(scope="module", params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URI of an MLflow database, or of a server, with three runs, whose folders are gone."""
    if request.param == "sqlite":
        uri = default_uri(tmp_path_factory.mktemp("runs"))
        _upload_three(uri, tmp_path_factory)
        yield uri
        return
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    try:
        _upload_three(server.uri, tmp_path_factory)
        yield server.uri
    finally:
        server.kill()


def _upload_three(uri: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name, ap, classes, params in (
        ("base", 0.5, {"disc": 0.25, "ring [8]": 0.75}, {"optim.lr": 1e-4, "seed": 0}),
        ("better", 0.625, {"disc": 0.5, "ring [8]": 0.75}, {"optim.lr": 2e-4, "seed": 0, "new": None}),
    ):
        _upload(tmp_path_factory.mktemp("folders") / name, uri, ap, classes, params)
    folder = tmp_path_factory.mktemp("folders") / "empty"
    log_run(folder, uri, experiment="other", end=None)
    upload(folder)


def _upload(folder: Path, uri: str, ap: float, classes: dict[str, float], params: dict[str, object]) -> str:
    evaluations = [(10, {"AP": 0.001}), (20, {"AP": ap, "AR1": 0.125})]
    write_table(folder, 20, classes)
    log_run(folder, uri, params=params, evaluations=evaluations, steps=[(1, {"loss": 1.0})])
    run_id = upload(folder)
    shutil.rmtree(folder)
    return run_id


def test_without_a_folder_mlflow_has_the_last_scores(uri: str) -> None:
    comparison = compare(["base", "better", "empty"], uri)
    rows = cells(comparison.to_text(plain=True))
    assert rows["base"] == ["better", "empty"]
    assert rows["AP"] == ["0.500", "0.625* +0.125", "-"]
    assert rows["AR1"] == ["0.125", "0.125 +0.000", "-"]
    assert rows["APs"] == ["-", "-", "-"]
    assert rows["disc"] == ["0.250", "0.500* +0.250", "-"]
    assert rows["ring [8]"] == ["0.750", "0.750 +0.000", "-"]
    assert rows["optim.lr"][:2] == ["0.0001", "0.0002"]
    assert rows["new"][:2] == ["-", "null"]
    assert any("only MLflow has it" in note for note in comparison.notes)


def test_runs_with_the_same_name_have_different_headings(uri: str, tmp_path: Path) -> None:
    ids = [_upload(tmp_path / str(number) / "twin", uri, ap, {}, {}) for number, ap in enumerate((0.25, 0.5))]
    names = [run.name for run in compare(ids, uri).runs]
    assert names == [f"twin ({run_id[:8]})" for run_id in ids]
    with pytest.raises(ValueError, match=f"2 runs in .* are named 'twin'; give the id of one: .*{ids[0]}"):
        compare(["twin"], uri)


@pytest.mark.parametrize("name", ['it\'s "so"', "100%_sure", "back\\slash", "plain's"])
def test_names_with_quotes_and_wildcards(uri: str, tmp_path: Path, name: str) -> None:
    similar = name.replace("'", "x").replace("%", "y").replace("\\", "z")
    for number, one in enumerate({name, similar}):
        folder = tmp_path / str(number)
        log_run(folder, uri, evaluations=[(1, {"AP": 0.5})])
        run_id = upload(folder)
        connect(uri).update_run(run_id, name=one)
        shutil.rmtree(folder)
    assert [run.name for run in compare([name], uri).runs] == [name]


def test_filters(uri: str) -> None:
    comparison = compare([], uri, query="params.optim.lr = '0.0002'")
    assert [run.name for run in comparison.runs] == ["better"]
    both = compare(["base"], uri, query="params.`optim.lr` = '0.0002' and metrics.AP/AP > 0.6")
    assert [run.name for run in both.runs] == ["base", "better"]
    again = compare(["better"], uri, query="params.optim.lr = '0.0002'")
    assert [run.name for run in again.runs] == ["better"]
    with pytest.raises(ValueError, match=r"no run in .* matches the filter params"):
        compare([], uri, query="params.optim.lr = '7'")
    with pytest.raises(TrackingError, match="could not search for nonsense"):
        compare([], uri, query="nonsense")


def test_an_id_leads_to_the_folder_that_can_be_reached(tmp_path: Path, tiny_data: Path) -> None:
    """And so to curves, intervals and errors, also where MLflow has less."""
    val: Shards = open_shards(str(tiny_data / "val"))
    uri = default_uri(tmp_path)
    for number, noise in enumerate((1.0, 4.0)):
        write_evaluated_run(
            tmp_path / str(number), val, make_detections(val, noise=noise), uri=uri, params={"noise": noise}
        )
    ids = [upload(tmp_path / str(number)) for number in range(2)]
    comparison = compare(ids, uri)
    assert [run.source for run in comparison.runs] == [str(tmp_path / str(number)) for number in range(2)]
    assert set(comparison.intervals) == {1}
    assert all(run.points for run in comparison.runs)
    # The folder is away: MLflow knows the validation data by its fingerprint
    (tmp_path / "1").rename(tmp_path / "away")
    comparison = compare(ids, uri)
    assert comparison.runs[1].source == f"MLflow run {ids[1]}"
    assert comparison.runs[1].fingerprint == val.fingerprint
    assert comparison.is_same_data
    assert comparison.runs[1].numbers["AP"] == pytest.approx(
        compare([str(tmp_path / "away")]).runs[0].numbers["AP"]
    )


def test_unknown_run(uri: str) -> None:
    with pytest.raises(ValueError, match="'gone'"):
        compare(["base", "gone"], uri)


# --- Nothing is written ---


def contents(folder: Path) -> dict[str, tuple[bytes, int] | None]:
    """Content and time of all files; None for folders."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def test_lookups_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the database, nor the artifacts, nor the working folder, nor that of temporary files."""
    uri = default_uri(tmp_path / "runs")
    ids = [
        _upload(tmp_path / "runs" / name, uri, ap, {"disc": ap}, {"seed": 0})
        for name, ap in (("base", 0.5), ("better", 0.625))
    ]
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = contents(tmp_path)
    assert "runs/mlflow.db" in before
    assert any(name.endswith("evaluation/ap.json") for name in before)
    assert [run.name for run in compare(["base", ids[1]], uri).runs] == ["base", "better"]
    assert len(compare([], uri, query="params.seed = '0'").runs) == 2
    with pytest.raises(ValueError, match="'gone'"):
        compare(["gone"], uri)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["empty", "of another program", "no database"])
def test_a_file_that_is_no_database_of_mlflow_is_not_made_one(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "other.db"
    file.touch()
    if kind == "of another program":
        with closing(sqlite3.connect(file)) as database:
            database.execute("CREATE TABLE metrics (value REAL)")
    elif kind == "no database":
        file.write_text("text " * 200)
    before = contents(tmp_path)
    with pytest.raises(TrackingError, match=r"other\.db.*(is not a database|has no table)"):
        compare(["base"], f"sqlite:///{file}")
    assert contents(tmp_path) == before
