"""Runs whose folder is on an S3-compatible server: killed, resumed, read by other commands, without an answer."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from faulty_proxy import Fault, FaultyProxy
from ray_nodes import ray_nodes
from raydetr.config import ConfigError, RunConfig, override, to_yaml
from raydetr.inference.predict import predict
from raydetr.runs import run
from raydetr.runs.evaluate import evaluate_checkpoint
from raydetr.store.folders import Folder, local_file, open_folder
from raydetr.tracking.events import Metrics, read_events
from raydetr.training import checkpoint, checkpoint_writer
from tiny_runs import tiny_config

EPOCH = 48  # samples
BY_STEPS = {"optim.epochs": 2, "storage.checkpoint_steps": 2}  # epochs of 6 steps


@pytest.fixture
def at_url(tiny_run: RunConfig, s3_url: str, tmp_path: Path) -> RunConfig:
    """On a server."""
    changes = {"storage.path": s3_url, "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    return override(tiny_run, BY_STEPS | changes)


@pytest.fixture(scope="module")
def on_disk(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> run.RunResult:
    """The same run, which no test may change."""
    config = override(tiny_config(tiny_data, tmp_path_factory.mktemp("runs")), BY_STEPS)
    return run.start(config, local=True)


def state(folder: Folder) -> list[object]:
    content = torch.load(local_file(folder / "state.pt"), weights_only=True)
    return torch.utils._pytree.tree_leaves(content)


def assert_same_state(first: Folder, second: Folder) -> None:
    for left, right in zip(state(first), state(second), strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_at_a_url_is_the_run_on_a_disk(
    at_url: RunConfig, on_disk: run.RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = override(at_url, {"storage.keep_checkpoints": 1})
    result = run.start(config, local=True, name="first")
    assert str(result.folder) == f"{at_url.storage.path}/first"
    assert_same_state(result.checkpoint, on_disk.checkpoint)
    assert result.metrics["AP"] == on_disk.metrics["AP"]
    assert f"{result.folder}/best" in result.to_text()
    # The newest and the best are kept
    kept = checkpoint.complete_checkpoints(result.folder)
    assert {checkpoint.best(result.folder), result.checkpoint} == set(kept)
    rows = [
        [row for row in Metrics(read_events(each.folder)).rows if "AP" in row] for each in (result, on_disk)
    ]
    for name in ("cpu_seconds", "worker_hours", "latency_ms", "evaluation_images_per_second"):
        assert all(row.pop(name) > 0 for each in rows for row in each)
    assert rows[0] == rows[1]
    assert (result.folder / "predictions.png").exists()
    assert (result.folder / "curves.png").exists()
    assert not list((result.folder / "lease").glob("*"))
    # Other commands take the URL
    table = evaluate_checkpoint(f"{result.folder}/last", local=True)
    assert table.numbers["AP"] == result.metrics["AP"]
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    predict(str(result.folder), [tmp_path / "image.png"], tmp_path / "predicted")
    assert (tmp_path / "predicted" / "results.json").exists()
    start = override(config, {"init.checkpoint": str(result.folder), "optim.epochs": 1})
    run.start(start, local=True, name="second")
    assert f"starting from {checkpoint.best(result.folder)}" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match="this run is finished"):
        run.start(config, local=True, name="first")


@pytest.mark.timeout(300)
def test_a_killed_run_at_a_url_goes_on_in_the_same_bits(
    at_url: RunConfig, on_disk: run.RunResult, tmp_path: Path
) -> None:
    file, folder = tmp_path / "run.yaml", open_folder(at_url.storage.path) / "hit"
    file.write_text(to_yaml(at_url))
    code = (
        "import sys, time\n"
        "from raydetr.training.loop import Training\n"
        "step = Training.train_step\n"
        "Training.train_step = lambda self, *batches: (time.sleep(0.2), step(self, *batches))[1]\n"
        "from raydetr.cli.main import main\n"
        f"sys.argv = ['raydetr', 'train', '--config', {str(file)!r}, '--name', 'hit', '--local']\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: [p for p in checkpoint.complete_checkpoints(folder) if int(p.name) > EPOCH])
    finally:
        process.kill()
        process.wait()
    resumed = run.resume(str(folder), local=True)
    assert_same_state(resumed.checkpoint, on_disk.checkpoint)
    steps = [row["step"] for row in Metrics(read_events(folder)).rows if "loss" in row]
    assert steps == [row["step"] for row in Metrics(read_events(on_disk.folder)).rows if "loss" in row]


def test_a_server_without_an_answer_does_not_stop_training(
    at_url: RunConfig, on_disk: run.RunResult, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """From the middle of the first epoch, the server is busy for some seconds: nothing is lost."""
    monkeypatch.setattr(checkpoint_writer, "RETRY_SECONDS", 0.3)
    monkeypatch.setattr(checkpoint_writer, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr("raydetr.runs.session.EVALUATION_WAITS", 0.5)
    monkeypatch.setattr("raydetr.runs.session.QUICK_SECONDS", 0.2)
    folder = open_folder(at_url.storage.path) / "busy"
    fault: list[Fault] = []
    s3_proxy.faults = lambda request: fault[0] if fault else None

    def outage() -> None:
        wait_until(lambda: checkpoint.complete_checkpoints(folder))
        fault.append(Fault("busy"))
        time.sleep(12)
        fault.clear()

    thread = threading.Thread(target=outage)
    thread.start()
    result = run.start(at_url, local=True, name="busy")
    thread.join()
    assert_same_state(result.checkpoint, on_disk.checkpoint)
    events = read_events(result.folder)
    assert [event for event in events if event["kind"] == "checkpoint_failed"]
    rows = [
        [row for row in Metrics(each).rows if "loss" in row] for each in (events, read_events(on_disk.folder))
    ]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    err = " ".join(capsys.readouterr().err.split())
    assert "no answer for" in err
    assert "HTTP 503" in err
    assert "training goes on, and it is tried again" in err


def test_a_corrupt_newest_checkpoint_at_a_url_is_passed_over(at_url: RunConfig) -> None:
    result = run.start(at_url, local=True)
    newest, before = checkpoint.complete_checkpoints(result.folder)[:2]
    content = bytearray((newest / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "state.pt").write_bytes(bytes(content))
    messages = list[str]()
    assert checkpoint.newest_valid(result.folder, messages.append) == before
    assert messages == [f"{newest}/state.pt: checksum differs from meta.json: the file is corrupt"]
    assert json.loads((before / "meta.json").read_text())["position"] == int(before.name)
    assert checkpoint.find(f"{result.folder}/last") == before


def test_a_search_needs_a_folder(at_url: RunConfig, tmp_path: Path) -> None:
    from raydetr.tune.record import SearchOptions
    from raydetr.tune.search import search

    (tmp_path / "space.yaml").write_text("optim.lr: {uniform: [0.0001, 0.001]}\n")
    with pytest.raises(ConfigError, match="a search needs a folder that all nodes mount"):
        search(at_url, tmp_path / "space.yaml", SearchOptions(num_trials=1))


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:ray")
@pytest.mark.timeout(400)
def test_workers_on_ray_go_on_from_a_url_after_a_kill_and_an_outage(
    at_url: RunConfig, s3_proxy: FaultyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    """The nodes share no folder: state, record and lease are on the server only."""
    config = override(at_url, {"cluster.num_workers": 2, "optim.epochs": 4})
    folder = open_folder(config.storage.path) / "hit"
    is_away = threading.Event()
    s3_proxy.faults = lambda request: Fault("busy") if is_away.is_set() else None

    def disturb() -> None:
        wait_until(lambda: checkpoint.complete_checkpoints(folder))
        workers = [each for each in psutil.process_iter() if each.name().startswith("ray::RayTrainWor")]
        workers[0].kill()
        is_away.set()
        time.sleep(5)
        is_away.clear()

    with ray_nodes(2, cpus=1):  # after the environment was set
        unbroken = run.start(config)
        thread = threading.Thread(target=disturb)
        thread.start()
        result = run.start(config, name="hit")
        thread.join()
    assert [event["kind"] for event in read_events(result.folder)].count("restart") == 1
    assert_same_state(result.checkpoint, unbroken.checkpoint)
    assert result.metrics["AP"] == unbroken.metrics["AP"]
    assert not list((folder / "lease").glob("*"))
