"""The MLflow run depends on the events alone, whatever happens to MLflow in between."""

from __future__ import annotations

import html
import math
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image

import browser
from logged_run import log_run, upload, write_table
from mlflow_proxy import MlflowProxy
from mlflow_server import MlflowServer
from postgres_server import PASSWORD, PostgresServer, find_programs
from raydetr.locations import sqlite_file
from raydetr.runs.sync import sync_runs
from raydetr.tracking import mlflow_run
from raydetr.tracking.events import EventLog
from raydetr.tracking.metric_names import metric_name
from raydetr.tracking.upload_process import UploadProcess
from raydetr.tracking.upload_state import STATE, page_of, read_run_id
from raydetr.tracking.uploader import CHANGED_TAG, KEY_TAG, Uploader
from raydetr.tracking.uris import TrackingError, default_uri, mask_password, restore_uri, storable_uri

# SQLAlchemy 2.1 deprecates an option that MLflow 3.17 uses
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens
STEPS = [(step, {"loss": 1 / step, "lr/backbone": 1e-5}) for step in range(1, 41)]
DATASET = {"name": "coco", "fingerprint": "0123456789abcdef" * 4, "source": "/data/coco", "context": "training",
           "profile": {"num_images": 80}}  # fmt: skip


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    running = MlflowServer(tmp_path_factory.mktemp("server"))
    running.start()
    yield running
    running.kill()


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[MlflowProxy]:
    running = MlflowProxy(server.uri)
    yield running
    running.stop()


@pytest.fixture
def database(tmp_path: Path) -> str:
    return default_uri(tmp_path / "made" / "by" / "the" / "upload")


def points(uri: str, run_id: str) -> dict[str, list[tuple[int, float, int]]]:
    """All points that MLflow has, also repeated ones, as (step, value, timestamp)."""
    client = MlflowClient(uri)
    return {
        name: sorted(
            (point.step, point.value, point.timestamp) for point in client.get_metric_history(run_id, name)
        )
        for name in client.get_run(run_id).data.metrics
    }


def runs_named(uri: str, name: str) -> list[Any]:
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"attributes.run_name = '{name}'"))


def test_a_run_from_beginning_to_end(database: str, tmp_path: Path) -> None:
    folder = tmp_path / "search" / "trial"
    log_run(folder.parent, database, kind="search")
    params = {"optim.lr": 2e-4, "data.short_sides": [480, 640], "optim.clip_max_norm": None, "long": "x" * 9000,
              **{f"p{number}": number for number in range(250)}}  # fmt: skip
    log = log_run(folder, database, kind="trial", params=params, steps=STEPS,
                  evaluations=[(40, {"AP": 0.5, "AP50": 0.75})], end=None)  # fmt: skip
    log.append("launched", type="trial", datasets=[DATASET], tags={}, params={"optim.lr": 1e-3})
    log.append("environment", json_files={"environment/node-1.json": {"python": "3.11"}})
    log.append("system", step=40, metrics={"system/node-1/cpu_utilization_percentage": 50.0})
    write_table(folder, 40, {"disc": 0.5})
    (folder / "curves.png").write_bytes(b"\x89PNG")
    log.append("files", files=["curves.png", "missing.png"])
    end = log.append("finished")
    assert log.flush()
    run_id = upload(folder)

    run = MlflowClient(database).get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("trial", "FINISHED")
    assert run.info.end_time == int(end["time"] * 1000)
    assert run.data.metrics["AP/AP"] == 0.5
    assert run.data.metrics["system/node-1/cpu_utilization_percentage"] == 50.0
    assert [(step, value) for step, value, _ in points(database, run_id)["loss/loss"]] == [
        (step, 1 / step) for step in range(1, 41)
    ]
    assert run.data.params["optim.lr"] == "0.0002"
    assert run.data.params["data.short_sides"] == "[480, 640]"
    assert run.data.params["optim.clip_max_norm"] == "null"
    assert len(run.data.params) == 254
    assert run.data.params["long"].endswith("config.yaml has the complete value)")
    assert run.data.tags[CHANGED_TAG] == "optim.lr: 0.0002 -> 0.001"
    (logged,) = run.inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("coco", "0123456789abcdef0123456789abcdef0123")
    names = {
        f"{folder}/{file.path}".strip("/")
        for folder in ("", "environment", "evaluation")
        for file in MlflowClient(database).list_artifacts(run_id, folder or None)
        if not file.is_dir
    }
    assert {name.rpartition("/")[2] for name in names} == {"node-1.json", "ap.json", "curves.png"}
    parent = MlflowClient(database).get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == "search"
    experiment = MlflowClient(database).get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    description = run.data.tags["mlflow.note.content"]
    assert "| last | 40 | 0.500 | 0.750 |" in description
    assert "raydetr train quickstart --name trial" in description


@pytest.mark.parametrize("store", ["database", "server"])
def test_sending_everything_again_changes_nothing(
    store: str, server: MlflowServer, database: str, tmp_path: Path
) -> None:
    uri = server.uri if store == "server" else database
    folder = tmp_path / "again"
    steps = [(step, {"loss": 1 / step, "grad_norm": math.nan}) for step in range(1, 400)]
    datasets = [DATASET, {**DATASET, "fingerprint": "f" * 64, "context": "validation"}]
    log_run(folder, uri, steps=steps, evaluations=[(400, {"AP": 0.5})], datasets=datasets)
    run_id = upload(folder)
    before = points(uri, run_id)
    assert len(before["loss/loss"]) == 399
    (folder / STATE).unlink()
    assert upload(folder) == run_id
    assert str(points(uri, run_id)) == str(before)  # as text, because NaN differs from itself
    inputs = MlflowClient(uri).get_run(run_id).inputs.dataset_inputs
    assert sorted((each.dataset.digest, [(tag.key, tag.value) for tag in each.tags]) for each in inputs) == [
        (DATASET["fingerprint"][:36], [("mlflow.data.context", "training")]),
        ("f" * 36, [("mlflow.data.context", "validation")]),
    ]


def test_steps_that_are_trained_again_are_there_once(database: str, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    log_run(folder, database, steps=[(1, {"loss": 4.0}), (2, {"loss": 3.0}), (3, {"loss": 2.0})], end=None)
    run_id = upload(folder)
    again = EventLog(folder)
    again.append("resumed", step=1, position=1, workers=1)
    for step, loss in ((2, 3.25), (3, 2.0), (4, 1.0)):
        again.append("step", step=step, position=step, metrics={"loss": loss})
    assert again.flush()
    upload(folder)
    found = points(database, run_id)["loss/loss"]
    assert [(step, value) for step, value, _ in found] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    (folder / STATE).unlink()
    upload(folder)
    assert points(database, run_id)["loss/loss"] == found


def test_an_evaluation_that_is_scored_late_is_there(database: str, tmp_path: Path) -> None:
    """That of step 10 could be scored only at the end of the run, and an upload was in between."""
    folder = tmp_path / "late"
    log = log_run(folder, database, evaluations=[(20, {"AP": 0.5, "AP50": 0.6})], end=None)
    write_table(folder, 20, {"disc": 0.5})
    write_table(folder, 10, {"disc": 0.25})
    run_id = upload(folder)
    log.append("evaluation", step=10, position=10, metrics={"epoch": 10, "AP": 0.25})
    log.append("finished")
    assert log.flush()
    upload(folder)
    assert [(step, value) for step, value, _ in points(database, run_id)["AP/AP"]] == [(10, 0.25), (20, 0.5)]
    run = MlflowClient(database).get_run(run_id)
    assert run.data.metrics["AP/AP"] == 0.5
    assert "| last | 20 | 0.500 | 0.600 |" in run.data.tags["mlflow.note.content"]
    table = (folder / "evaluations" / "20" / "ap.json").read_bytes()
    assert mlflow_run.fetch_artifact(database, run_id, "evaluation/ap.json") == table
    # The first one again, by a process that starts from an older checkpoint
    log.append("resumed", step=5, position=5, workers=1)
    log.append("evaluation", step=10, position=10, metrics={"epoch": 10, "AP": 0.26})
    assert log.flush()
    upload(folder)
    for _ in range(2):
        assert len(points(database, run_id)["AP/AP"]) == 2
        assert mlflow_run.fetch_artifact(database, run_id, "evaluation/ap.json") == table
        (folder / STATE).unlink()  # everything again, with the same result
        upload(folder)


def test_the_description_has_every_evaluation_while_the_run_goes_on(database: str, tmp_path: Path) -> None:
    folder = tmp_path / "going-on"
    log = log_run(folder, database, end=None)
    uploader = Uploader(folder)
    uploader.sync()
    for epoch, ap in ((1, 0.25), (2, 0.5), (3, 0.375)):
        log.append("evaluation", step=epoch, position=epoch, metrics={"epoch": epoch, "AP": ap})
        assert log.flush()
        uploader.sync()
        run = MlflowClient(database).get_run(uploader.ensure_run())
        assert f"| last | {epoch} | {ap:.3f} |" in run.data.tags["mlflow.note.content"]
        assert run.info.status == "RUNNING"
    assert "| best | 2 | 0.500 |" in run.data.tags["mlflow.note.content"]


def test_two_values_of_one_step_are_there(database: str, tmp_path: Path) -> None:
    """Corrupt samples are counted after a step, and after the evaluation that follows it."""
    folder = tmp_path / "two"
    log_run(folder, database, steps=[(8, {"corrupt_samples": 1}), (8, {"corrupt_samples": 3})])
    found = points(database, upload(folder))["data/corrupt_samples"]
    assert [(step, value) for step, value, _ in found] == [(8, 1.0), (8, 3.0)]


def test_a_storage_that_fails_while_an_evaluation_is_uploaded(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "listed"
    log_run(folder, database, steps=STEPS, evaluations=[(40, {"AP": 0.5})])
    write_table(folder, 40, {"disc": 0.5})
    uploader = Uploader(folder)

    def fail(*_: object) -> None:
        raise OSError("the server of the storage is away")

    with monkeypatch.context() as patched:
        patched.setattr("raydetr.tracking.uploader._files_below", fail)
        with pytest.raises((TrackingError, OSError), match="storage is away"):
            uploader.sync()
        assert uploader.pending is not None
    uploader.sync()
    assert uploader.pending is None
    run_id = uploader.ensure_run()
    assert len(points(database, run_id)["loss/loss"]) == 40
    assert MlflowClient(database).get_run(run_id).info.status == "FINISHED"
    assert MlflowClient(database).list_artifacts(run_id, "evaluation")


def test_a_store_of_artifacts_that_refuses_does_not_leave_a_run_running(
    proxy: MlflowProxy, tmp_path: Path
) -> None:
    folder = tmp_path / "no-artifacts"
    log_run(folder, proxy.uri, evaluations=[(40, {"AP": 0.5})])
    write_table(folder, 40, {"disc": 0.5})
    proxy.fails = lambda path: "artifacts" in path
    with pytest.raises(TrackingError):
        upload(folder)
    run_id = read_run_id(folder)
    assert run_id is not None
    run = MlflowClient(proxy.uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert "0.500" in run.data.tags["mlflow.note.content"]


def test_a_resumed_run_keeps_the_command_that_trains_it(database: str, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    log = log_run(folder, database)
    run_id = upload(folder)
    log.append("launched", type="run", recipe="quickstart", command="raydetr train --resume runs/resumed")
    log.append("finished")
    assert log.flush()
    upload(folder)
    description = MlflowClient(database).get_run(run_id).data.tags["mlflow.note.content"]
    assert "raydetr train quickstart --name resumed" in description
    assert "--resume" not in description


def test_another_place_gets_everything(database: str, tmp_path: Path) -> None:
    folder = tmp_path / "copied"
    log = log_run(folder, database, steps=STEPS, end=None)
    first = upload(folder)
    other = default_uri(tmp_path / "other")
    second = upload(folder, other)
    log.append("finished")
    assert log.flush()
    assert (upload(folder, other), upload(folder)) == (second, first)
    for uri, run_id in ((database, first), (other, second)):
        assert len(points(uri, run_id)["loss/loss"]) == 40
        assert MlflowClient(uri).get_run(run_id).info.status == "FINISHED"
        assert len(runs_named(uri, "copied")) == 1


def test_a_database_that_is_not_here_is_not_created(database: str, tmp_path: Path) -> None:
    """Of a run at a URL, or on a mounted folder, which is looked at from another machine."""
    folder = tmp_path / "far"
    log = log_run(folder, database, end=None)
    upload(folder)
    file = sqlite_file(database)
    assert file is not None
    shutil.rmtree(file.parent)
    log.append("lost")
    assert log.flush()
    with pytest.raises(TrackingError, match=r"not here.*--uri"):
        upload(folder)
    assert not file.parent.exists()


def test_a_run_that_two_processes_created_is_found(database: str, tmp_path: Path) -> None:
    """The run of the one that came later is deleted, and has the same tag until then."""
    folder = tmp_path / "twice"
    log_run(folder, database, steps=STEPS)
    run_id = upload(folder)
    client = MlflowClient(database)
    run = client.get_run(run_id)
    later = client.create_run(run.info.experiment_id, tags={KEY_TAG: run.data.tags[KEY_TAG]})
    client.delete_run(later.info.run_id)
    (folder / STATE).unlink()
    assert upload(folder) == run_id


def test_two_first_uploads_at_the_same_time_create_one_run(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as that of the driver, and `raydetr track sync`: the second one begins while the first one creates."""
    folder = tmp_path / "both"
    log_run(folder, database, steps=STEPS)
    create, others = MlflowClient.create_run, []

    def create_slowly(client: MlflowClient, *arguments: Any, **settings: Any) -> Any:
        others.append(threading.Thread(target=Uploader(folder).sync))
        if len(others) == 1:
            others[0].start()
            others[0].join(1.0)  # if nothing keeps it, it has created one by then
        return create(client, *arguments, **settings)

    monkeypatch.setattr(MlflowClient, "create_run", create_slowly)
    run_id = upload(folder)
    others[0].join(60)
    assert len(others) == 1  # the second one found what the first one created
    assert [run.info.run_id for run in runs_named(database, "both")] == [run_id] == [read_run_id(folder)]
    assert len(points(database, run_id)["loss/loss"]) == 40


def test_the_answer_to_the_creation_is_lost(proxy: MlflowProxy, tmp_path: Path) -> None:
    folder = tmp_path / "created-once"
    log_run(folder, proxy.uri, steps=STEPS)
    proxy.loses = lambda path: path.endswith("runs/create")
    with pytest.raises(TrackingError, match=re.escape(proxy.uri)):
        upload(folder)
    assert read_run_id(folder) is None
    proxy.loses = lambda path: False
    run_id = upload(folder)
    assert [run.info.run_id for run in runs_named(proxy.uri, "created-once")] == [run_id]
    assert len(points(proxy.uri, run_id)["loss/loss"]) == 40


@pytest.mark.parametrize("part", ["log-batch", "artifacts", "runs/update", "set-tag"])
def test_a_server_that_answers_500_to_some_requests(part: str, proxy: MlflowProxy, tmp_path: Path) -> None:
    folder = tmp_path / part.replace("/", "-")
    log_run(folder, proxy.uri, steps=STEPS, params={"optim.lr": 1.0})
    (folder / "evaluations" / "40").mkdir(parents=True)
    log = EventLog(folder)
    write_table(folder, 40, {"disc": 0.5})
    log.append("evaluation", step=40, position=40, metrics={"AP": 0.5})
    assert log.flush()
    proxy.fails = lambda path: part in path
    uploader = Uploader(folder)
    for _ in range(2):
        with pytest.raises(TrackingError):
            uploader.sync()
    assert uploader.pending is not None
    proxy.fails = lambda path: False
    uploader.sync()
    assert uploader.pending is None
    run_id = uploader.ensure_run()
    assert len(points(proxy.uri, run_id)["loss/loss"]) == 40
    assert MlflowClient(proxy.uri).get_run(run_id).info.status == "FINISHED"
    assert MlflowClient(proxy.uri).list_artifacts(run_id, "evaluation")


def test_a_process_uploads_while_the_server_is_frozen_and_killed_in_between(
    server: MlflowServer, tmp_path: Path
) -> None:
    folder = tmp_path / "outages"
    log = log_run(folder, server.uri, end=None)
    problems: list[str] = []
    process = UploadProcess(folder, server.uri, problems.append)

    def log_steps(first: int) -> None:
        began = time.monotonic()
        for step in range(first, first + 50):
            log.append("step", step=step, position=step, metrics={"loss": float(step)})
            time.sleep(0.01)
        assert time.monotonic() - began < 5  # a value that waited for the server would take longer

    wait_for(lambda: read_run_id(folder) is not None)
    server.freeze()
    log_steps(1)
    wait_for(lambda: len(problems) == 1)
    server.thaw()
    log_steps(51)
    server.kill()
    log_steps(101)
    wait_for(lambda: len(problems) == 2)
    server.start()
    log.append("finished")
    assert log.flush()
    assert process.finish() is None
    run_id = read_run_id(folder)
    assert run_id is not None
    found = points(server.uri, run_id)["loss/loss"]
    assert [(step, value) for step, value, _ in found] == [(step, float(step)) for step in range(1, 151)]
    assert MlflowClient(server.uri).get_run(run_id).info.status == "FINISHED"


def test_a_server_that_is_never_there(server: MlflowServer, tmp_path: Path) -> None:
    folder = tmp_path / "absent"
    log_run(folder, NOWHERE, steps=STEPS)
    process = UploadProcess(folder, NOWHERE, lambda problem: None)
    began = time.monotonic()
    pending = process.finish()
    assert time.monotonic() - began < 40
    assert pending is not None
    assert "80 metric values" in pending
    assert NOWHERE in pending
    run_id = upload(folder, server.uri)
    assert len(points(server.uri, run_id)["loss/loss"]) == 40


def test_a_slow_server_is_waited_for_while_it_answers(
    proxy: MlflowProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    folder = tmp_path / "slow"
    log_run(folder, proxy.uri, steps=STEPS)
    proxy.delay = 0.5
    assert UploadProcess(folder, proxy.uri, lambda problem: None).finish() is None
    run_id = read_run_id(folder)
    assert run_id is not None
    assert len(points(proxy.uri, run_id)["loss/loss"]) == 40


def test_every_answer_of_a_server_is_a_sign_of_life(proxy: MlflowProxy, tmp_path: Path) -> None:
    """The driver waits for an upload of any length, as long as there are answers."""
    folder = tmp_path / "many-files"
    log = log_run(folder, proxy.uri, end=None)
    names = [f"{number}.txt" for number in range(12)]
    for name in names:
        (folder / name).write_text(name)
    log.append("files", files=names)
    assert log.flush()
    answered: list[int] = []
    Uploader(folder, on_alive=lambda seconds: answered.append(len(proxy.paths))).sync()
    requests = [0, *answered, len(proxy.paths)]
    assert max(after - before for before, after in pairwise(requests)) <= 8
    assert len(answered) > len(names)


def test_what_others_print_and_the_working_directory_do_not_disturb_the_process(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "noise"
    log_run(folder, database, steps=STEPS)
    here = tmp_path / "here"
    here.mkdir()
    (here / "mlflow.py").write_text("raise RuntimeError('not MLflow')")
    monkeypatch.chdir(here)
    prints = tmp_path / "prints"
    prints.mkdir()
    # As a library in C does while it is loaded
    (prints / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'mlflow':\n"
        "            os.write(1, b'loaded\\n')\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    monkeypatch.syspath_prepend(str(prints))
    assert UploadProcess(folder, database, lambda problem: None).finish() is None


def test_a_token_and_a_password_of_the_driver(
    proxy: MlflowProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "token"
    log_run(folder, proxy.uri, steps=STEPS)
    proxy.token = "secret"
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN", raising=False)
    problems: list[str] = []
    pending = UploadProcess(folder, proxy.uri, problems.append).finish()
    assert pending is not None
    assert "no token" in pending
    assert len(problems) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    assert UploadProcess(folder, proxy.uri, problems.append).finish() is None


def test_the_pages_of_mlflow_show_the_run(server: MlflowServer, tmp_path: Path) -> None:
    program = browser.find_browser()
    if program is None:
        pytest.skip("no Chromium")
    folder = tmp_path / "seen"
    log = log_run(
        folder, server.uri, experiment="pages", steps=STEPS, evaluations=[(40, {"AP": 0.5})], end=None
    )
    Image.new("RGB", (300, 200), "red").save(folder / "curves.png")
    log.append("system", step=40, metrics={"system/node-1/cpu_utilization_percentage": 50.0})
    log.append("files", files=["curves.png"])
    log.append("finished")
    assert log.flush()
    upload(folder)
    page = page_of(folder, server.uri)
    assert page is not None
    document, _ = browser.load_address(program, page, tmp_path / "profile")
    text = re.sub(r"<[^>]+>", " ", document)
    assert "Training runs" not in text  # of the pages for language models
    assert "raydetr train quickstart --name seen" in text
    assert re.search(r"last\s+40\s+0\.500", text)
    assert "System metrics" in text
    (source,) = re.findall(r'<img src="(get-artifact[^"]+curves[^"]+)"', document)
    with urllib.request.urlopen(f"{server.uri}/{html.unescape(source)}", timeout=30) as response:
        assert Image.open(response).size == (300, 200)
    charts, _ = browser.load_address(program, page.replace("?", "/model-metrics?"), tmp_path / "profile")
    text = re.sub(r"<[^>]+>", " ", charts)
    for group in ("AP", "loss", "lr", "time"):
        assert re.search(rf"\b{group}\s*\(\s*1\s*\)", text), group


def test_the_process_ends_with_its_driver(tmp_path: Path) -> None:
    folder = tmp_path / "orphan"
    log_run(folder, NOWHERE, end=None)
    code = (
        "import os, sys; from pathlib import Path; from raydetr.tracking.upload_process import UploadProcess\n"
        f"process = UploadProcess(Path({str(folder)!r}), {NOWHERE!r}, print)\n"
        "print(process._process.pid, flush=True); os._exit(1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    pid = int(done.stdout.split()[0])
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "zombie" in Path(f"/proc/{pid}/status").read_text())


def test_many_processes_create_one_database(database: str, tmp_path: Path) -> None:
    folders = [tmp_path / f"run-{number}" for number in range(4)]
    for folder in folders:
        log_run(folder, database, steps=STEPS)
    processes = [UploadProcess(folder, database, lambda problem: None) for folder in folders]
    assert [process.finish() for process in processes] == [None] * 4
    assert all(len(runs_named(database, folder.name)) == 1 for folder in folders)


@pytest.mark.parametrize("name", ["a b", "a%20b", "a#b", "a?b", "a&b=c", "ä", "a'b", 'a"b'])
def test_the_database_is_where_its_path_says(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name / "run"
    uri = default_uri(folder.parent)
    log_run(folder, storable_uri(uri, folder))
    upload(folder)
    assert {path.name for path in folder.parent.iterdir()} == {"run", "mlflow.db"}
    assert [path.parent for path in tmp_path.rglob("*.db")] == [folder.parent]
    assert mlflow_run.fetch_run(uri, "run").status == "FINISHED"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("postgresql://me@127.0.0.1:1/mlflow", "psycopg"),
        ("oracle://host/db", "oracle"),
        ("sqlite:////proc/forbidden/mlflow.db", "/proc/forbidden"),
    ],
)
def test_databases_that_cannot_be_opened(uri: str, message: str, tmp_path: Path) -> None:
    log_run(tmp_path / "run", uri)
    with pytest.raises((TrackingError, OSError), match=message) as error:
        upload(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_trial_that_cannot_be_uploaded_does_not_stop_the_others(database: str, tmp_path: Path) -> None:
    search = tmp_path / "search"
    log_run(search, database, kind="search", end=None)
    for name in ("a", "b", "c"):
        log_run(search / name, database, kind="trial", steps=STEPS)
    run_id = upload(search / "a")
    MlflowClient(database).delete_run(run_id)
    (search / "a" / STATE).unlink()
    pending = UploadProcess(search, database, lambda problem: None).finish()
    assert pending is not None
    assert f"mlflow runs restore --run-id {run_id}" in pending
    parent = read_run_id(search)
    for name in ("b", "c"):
        (found,) = runs_named(database, name)
        assert (found.info.status, found.data.tags["mlflow.parentRunId"]) == ("FINISHED", parent)


def test_a_search_whose_end_mlflow_has_not_seen_is_sent_later(server: MlflowServer, tmp_path: Path) -> None:
    search = tmp_path / "search"
    outcome = {"trials.txt": "trial  AP", "trials.json": "[]", "best.yaml": "recipe: quickstart\n"}
    log = log_run(search, NOWHERE, kind="search", params={"search.optim.lr": "loguniform"}, end=None)
    for number in (1, 2):
        log_run(
            search / f"trial-{number}", NOWHERE, kind="trial", params={"optim.lr": number / 1000}, steps=STEPS,
            evaluations=[(40, {"AP": number / 4})],
        )  # fmt: skip
    for name, text in outcome.items():
        (search / name).write_text(text)
    log.append("files", files=list(outcome))
    log.append("finished")
    assert log.flush()
    pending = UploadProcess(search, NOWHERE, lambda problem: None).finish()
    assert pending is not None
    assert NOWHERE in pending

    lines = list(sync_runs([str(search)], server.uri))
    assert [line.partition(":")[0] for line in lines] == ["search", "trial-1", "trial-2"]
    client = MlflowClient(server.uri)
    (parent,) = runs_named(server.uri, "search")
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"search.optim.lr": "loguniform"}
    for name, text in outcome.items():
        assert mlflow_run.fetch_artifact(server.uri, parent.info.run_id, name).decode() == text
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], query)
    found = {
        run.info.run_name: (run.info.status, run.data.params, run.data.metrics["AP/AP"]) for run in children
    }
    assert found == {
        "trial-1": ("FINISHED", {"optim.lr": "0.001"}, 0.25),
        "trial-2": ("FINISHED", {"optim.lr": "0.002"}, 0.5),
    }
    assert all(len(points(server.uri, run.info.run_id)["loss/loss"]) == 40 for run in children)
    assert list(sync_runs([str(search)], server.uri)) == [
        f"{name}: complete" for name in ("search", "trial-1", "trial-2")
    ]


def test_postgres(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL")
    database = PostgresServer(tmp_path, programs)
    try:
        folder = tmp_path / "runs" / "run"
        log_run(folder, storable_uri(database.uri, folder), steps=STEPS, evaluations=[(40, {"AP": 0.5})])
        assert PASSWORD not in "".join(path.read_text() for path in (folder / "events").iterdir())
        pending = UploadProcess(folder, mask_password(database.uri), lambda problem: None).finish()
        assert pending is not None
        assert "MLFLOW_TRACKING_URI" in pending
        assert UploadProcess(folder, database.uri, lambda problem: None).finish() is None
        run_id = read_run_id(folder)
        assert run_id is not None
        before = points(database.uri, run_id)
        assert len(before["loss/loss"]) == 40
        # Later, the password is that of the variable
        monkeypatch.setenv("MLFLOW_TRACKING_URI", database.uri)
        (folder / STATE).unlink()
        assert upload(folder) == run_id
        assert points(database.uri, run_id) == before
    finally:
        database.stop()


def test_a_deleted_experiment_and_a_deleted_run(database: str, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    log_run(folder, database)
    run_id = upload(folder)
    client = MlflowClient(database)
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    second = tmp_path / "second"
    log_run(second, database)
    with pytest.raises(
        TrackingError, match=r"mlflow experiments restore --experiment-id \d+.*tracking\.experiment"
    ):
        upload(second)
    client.restore_experiment(client.get_run(run_id).info.experiment_id)
    client.delete_run(run_id)
    (folder / STATE).unlink()
    with pytest.raises(TrackingError, match=f"mlflow runs restore --run-id {run_id}"):
        upload(folder)


def test_names_are_grouped() -> None:
    names = ["loss", "loss_bbox", "loss_bbox_0", "loss_ce_enc", "loss_giou_dn_4", "lr/backbone", "AP", "APs", "AR100",
             "images_per_second", "corrupt_samples", "grad_norm", "system/vm/cpu"]  # fmt: skip
    assert [metric_name(name) for name in names] == [
        "loss/loss", "loss/bbox", "loss_aux/bbox_0", "loss_aux/ce_enc", "loss_aux/giou_dn_4", "lr/backbone", "AP/AP",
        "AP/APs", "AP/AR100", "time/images_per_second", "data/corrupt_samples", "loss/grad_norm", "system/vm/cpu",
    ]  # fmt: skip
    assert metric_name("AP/traffic light [8] @50") == "AP/traffic light _8_ _50"


def test_passwords_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "run"
    for uri in ("http://me:secret@host:5000", "postgresql://me:secret/@host/mlflow", "http://:secret@host",
                "postgresql://host/mlflow?user=me&password=secret", "mysql://host/mlflow?PASSWD=secret&charset=utf8",
                "postgresql://me:secret@host/mlflow?sslpassword=secret/"):  # fmt: skip
        stored = storable_uri(uri, run)
        assert "secret" not in stored
        assert mask_password(uri) == stored
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert restore_uri(stored, run) == uri
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert restore_uri("http://me:***@host:5000", run) == "http://host:5000"
    for uri in ("postgresql://me:***@host/mlflow", "postgresql://host/mlflow?user=me&password=***"):
        with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
            restore_uri(uri, run)
    for uri in (
        "http://host:5000",
        "postgresql://host/mlflow?passfile=/home/me/.pgpass",
        "http://host:5000/a@b",
        "databricks",
        "postgresql://me@host:5432/mlflow",
    ):
        assert storable_uri(uri, run) == uri


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:s3cr3t@host:5000",
        "postgresql://me:s3cr3t@host/mlflow",
        "postgresql://host/mlflow?user=me&password=s3cr3t",
    ],
)
def test_passwords_are_not_in_errors(uri: str) -> None:
    with pytest.raises(TrackingError) as caught, mlflow_run.tracking_errors(uri, "upload"):
        raise OSError(f"API request to {uri}/api failed")  # as MLflow's
    assert "s3cr3t" not in str(caught.value)
    assert str(caught.value).endswith(f"API request to {mask_password(uri)}/api failed")


def test_passwords_are_not_in_messages_about_names(server: MlflowServer, tmp_path: Path) -> None:
    for name in ("one", "two"):
        log_run(tmp_path / name / "same-name", server.uri)
        upload(tmp_path / name / "same-name")
    uri = server.uri.replace("http://", "http://me:s3cr3t@")
    for name in ("missing", "same-name"):
        with pytest.raises(ValueError, match=r"http://me:\*\*\*@") as caught:
            mlflow_run.fetch_run(uri, name)
        assert "s3cr3t" not in str(caught.value)


def test_a_database_near_the_run_moves_with_it(tmp_path: Path) -> None:
    stored = storable_uri(default_uri(tmp_path / "runs"), tmp_path / "runs" / "run")
    assert restore_uri(stored, tmp_path / "moved" / "run") == default_uri(tmp_path / "moved")
    far = "sqlite:////elsewhere/mlflow.db"
    assert restore_uri(storable_uri(far, tmp_path / "runs" / "run"), tmp_path / "moved" / "run") == far


def wait_for(is_true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
