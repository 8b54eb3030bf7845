"""What a user or a cluster can do wrong is told in a line or two, in bounded time, and leaves nothing behind."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from command_line import CommandLine
from raydetr.cli.main import main
from raydetr.tracking.uris import default_uri

JOBS = Path(__file__).parents[3] / "jobs"
CODE = "from raydetr.cli.main import main; main()"
TRAIN = (
    "train",
    "quickstart",
    "data.synthetic=null",
    "data.train=TRAIN",
    "data.val=VAL",
    "storage.path=RUNS",
)
CHEAP = ("evaluation.report=false", "tracking.register_model=false")


def arguments_of(tmp_path: Path, tiny_data: Path, words: Sequence[str]) -> list[str]:
    """Put folders in place of TRAIN, VAL, RUNS and TMP."""
    places = {
        "TRAIN": tiny_data / "train",
        "VAL": tiny_data / "val",
        "RUNS": tmp_path / "runs",
        "TMP": tmp_path,
    }
    arguments = []
    for word in words:
        path, equals, value = word.partition("=")
        arguments.append(f"{path}={places.get(value, value)}" if equals else str(places.get(word, word)))
    return arguments


def call(tmp_path: Path, tiny_data: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Call `raydetr` in an empty folder."""
    (tmp_path / "here").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", CODE, *arguments_of(tmp_path, tiny_data, words)],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path / "here",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*TRAIN[:-1], "storage.path=http://host/runs"), "runs cannot be written to a web server"),
        ((*TRAIN, "init.checkpoint=ftp://host/x"), "ftp://"),
        ((*TRAIN, "tracking.uri=sqlite://x.db"), "write sqlite:///FILE"),
        ((*TRAIN, "tracking.uri=http://"), "write http://HOST:PORT"),
        ((*TRAIN, "cluster.address=127.0.0.1:9"), "no connection"),
        ((*TRAIN, "cluster.address=ray://127.0.0.1:10001"), "Ray Client"),
        ((*TRAIN, "cluster.address=http://127.0.0.1:8265"), "dashboard"),
        ((*TRAIN, "--local", "cluster.use_gpu=true"), "finds no GPU"),
        (("train", "--resume", "TMP"), "not the folder of a run"),
        (("evaluate", "TMP"), "no checkpoint"),
        (("evaluate", "s3:/bucket/run"), "s3"),
        (("compare", 'it\'s "quoted"'), 'it\'s "quoted"'),
        (("watch", "no-such-run"), "no-such-run"),
        (("track", "sync", "TMP"), "not the folder of a run"),
    ],
)
def test_one_line(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = error_of(words, tmp_path, tiny_data, monkeypatch, capsys)
    assert len(error.splitlines()) <= 3
    assert message in " ".join(error.split())


@pytest.mark.parametrize(
    ("space", "settings", "message"),
    [
        ("data.batch_size: {choice: [4, 1]}", ("cluster.num_workers=2",), "data.batch_size=1"),
        ("model.hidden_dim: {choice: [64, 65]}", (), "model.hidden_dim=65"),
        ("optim.precision: {choice: [fp32, fp16]}", ("cluster.use_gpu=false",), "is for GPUs"),
        ("init.checkpoint: {choice: [nowhere, null]}", (), "nowhere"),
        ("tracking.uri: {choice: [a, b]}", (), "tracking.uri"),
        ("optim.lr: {loguniform: [0, 1]}", (), "optim.lr"),
        ("optim.lr: 0.1", (), "optim.lr"),
        ("optim.lr: {choice: [", (), "space.yaml"),
    ],
)
def test_a_space_that_cannot_be_searched(
    space: str,
    settings: tuple[str, ...],
    message: str,
    tmp_path: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(space)
    words = ("tune", *TRAIN[1:], *settings, "--space", str(file), "--trials", "2")
    error = error_of(words, tmp_path, tiny_data, monkeypatch, capsys)
    assert message in " ".join(error.split())
    assert not (tmp_path / "runs").exists()


def error_of(
    words: Sequence[str],
    tmp_path: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Return the error of a command; call it in this process, because the imports of each would take seconds."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", ["raydetr", *arguments_of(tmp_path, tiny_data, words)])
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main()
    assert time.monotonic() - began < 60
    errors = capsys.readouterr().err
    assert ended.value.code == 1, errors
    assert "Traceback" not in errors
    assert list((tmp_path / "here").iterdir()) == []
    return errors[errors.index("error: ") :]


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("train_detector.py", (*TRAIN[1:], "optim.lrr=1"), "did you mean optim.lr?"),
        pytest.param(
            *("train_detector.py", (*TRAIN[1:], "cluster.address=127.0.0.1:9"), "no connection"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("tune_detector.py", (*TRAIN[1:], "--space", "TMP"), "not a regular file"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_job_that_cannot_start(
    script: str, words: tuple[str, ...], message: str, tmp_path: Path, tiny_data: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(JOBS / script), *arguments_of(tmp_path, tiny_data, words)],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert message in done.stderr


@pytest.mark.slow  # it waits for an answer
def test_a_port_of_something_else(tmp_path: Path, tiny_data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = call(tmp_path, tiny_data, *TRAIN, f"cluster.address={address}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "does not answer as the head of a Ray cluster" in done.stderr


@pytest.mark.slow  # tests/raydetr/runs/test_run_tracking.py has a quicker one
@pytest.mark.parametrize("uri", ["oracle://host/db", "postgresql://me@127.0.0.1:1/db", "http://127.0.0.1:9"])
def test_a_run_without_its_tracking(uri: str, tmp_path: Path, tiny_data: Path) -> None:
    settings = ("optim.epochs=1", "data.limit_images=8", "data.batch_size=8", "--local", "--name", "alone")
    done = call(tmp_path, tiny_data, *TRAIN, *settings, f"tracking.uri={uri}")
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "warning: " in line]) <= 2
    assert (tmp_path / "runs" / "alone" / "events").is_dir()
    later = call(tmp_path, tiny_data, "track", "sync", "runs/alone", "--uri", default_uri(tmp_path / "later"))
    assert later.returncode == 1  # relative to the working folder
    sync = ("track", "sync", str(tmp_path / "runs" / "alone"), "--uri", default_uri(tmp_path / "later"))
    assert call(tmp_path, tiny_data, *sync).returncode == 0


def test_a_start_that_fails_can_be_repeated(
    tmp_path: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ("optim.epochs=1", "data.limit_images=8", "data.batch_size=8", "--name", "again")
    words = arguments_of(tmp_path, tiny_data, (*TRAIN, *settings, "tracking.upload=false", *CHEAP))
    raydetr = CommandLine(monkeypatch, capsys)
    assert raydetr(*words, "cluster.address=127.0.0.1:9").code == 1
    done = raydetr(*words, "--local")
    assert done.code == 0, done.err
