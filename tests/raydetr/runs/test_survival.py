"""Runs in one process that are killed, stopped, cannot write, or are driven twice."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raydetr.config import ConfigError, RunConfig, override, to_yaml
from raydetr.runs import lease as lease_module
from raydetr.runs import run, session
from raydetr.runs.fatal_errors import FatalError, StopAtFatalErrors
from raydetr.runs.lease import LeaseError
from raydetr.runs.signals import RunStopped, StopSignals
from raydetr.shards.reader import ShardError, open_shards
from raydetr.tracking.events import EventLog, Metrics, read_events
from raydetr.training import checkpoint, checkpoint_writer, loop
from raydetr.training.checkpoint_writer import StorageError
from tiny_runs import tiny_config

EPOCH = 48  # samples
BY_STEPS = {"optim.epochs": 2, "storage.checkpoint_steps": 2}  # epochs of 6 steps


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["kind"] == kind]


def assert_same_state(first: Path, second: Path) -> None:
    """Bit for bit: weights, EMA, optimizer, position."""
    a, b = (
        torch.utils._pytree.tree_flatten(torch.load(folder / "state.pt", weights_only=True))
        for folder in (first, second)
    )
    assert a[1] == b[1]
    for left, right in zip(a[0], b[0], strict=True):
        same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
        assert same, (left, right)


def command(config: RunConfig, name: str, tmp_path: Path) -> list[str]:
    """A command that trains in one process; a step of it takes at least 0.1 s."""
    file = tmp_path / f"{name}.yaml"
    file.write_text(to_yaml(config))
    code = (
        "import signal, sys, time\n"
        # The tests may run in the background of a shell, or with nohup, where these are ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from raydetr.training.loop import Training\n"
        "step = Training.train_step\n"
        "Training.train_step = lambda self, *batches: (time.sleep(0.1), step(self, *batches))[1]\n"
        "from raydetr.cli.main import main\n"
        f"sys.argv = ['raydetr', 'train', '--config', {str(file)!r}, '--name', {name!r}, '--local']\n"
        "main()\n"
    )
    return [sys.executable, "-c", code]


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def by_steps(tiny_run: RunConfig) -> RunConfig:
    return override(tiny_run, BY_STEPS)


@pytest.fixture(scope="module")
def unbroken(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> run.RunResult:
    """A run of `by_steps`, which no test may change."""
    config = override(tiny_config(tiny_data, tmp_path_factory.mktemp("runs")), BY_STEPS)
    return run.start(config, local=True, name="unbroken")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -9),
        (signal.SIGTERM, 143),
        # Handled as SIGTERM
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_killed_or_stopped_process_goes_on_in_the_middle_of_an_epoch(
    number: signal.Signals, code: int, by_steps: RunConfig, unbroken: run.RunResult, tmp_path: Path
) -> None:
    folder = Path(by_steps.storage.path) / "hit"
    process = subprocess.Popen(
        command(by_steps, "hit", tmp_path), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    # In the middle of the second epoch
    wait_until(lambda: [p for p in checkpoint.complete_checkpoints(folder) if int(p.name) > EPOCH], process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    last = checkpoint.newest_valid(folder, pytest.fail)
    assert last is not None
    assert EPOCH < int(last.name) < 2 * EPOCH
    if number != signal.SIGKILL:
        assert f"{number.name}: stopping after this step, with a checkpoint" in err
        assert f"hit was stopped by {number.name} at position {int(last.name)}: continue with" in err
        assert f"raydetr train --resume {folder}" in " ".join(err.split())
        assert "Traceback" not in err
        assert [event["reason"] for event in events(folder, "stopped")]
        assert not list((folder / lease_module.LEASE).iterdir())
    with pytest.raises(ConfigError, match=r"hit exists: continue it with `raydetr train --resume"):
        run.start(by_steps, local=True, name="hit")
    resumed = run.resume(folder, local=True)
    assert_same_state(resumed.checkpoint, unbroken.checkpoint)
    assert resumed.metrics["AP"] == unbroken.metrics["AP"]
    steps = [row["step"] for row in Metrics(read_events(folder)).rows if "loss" in row]
    assert steps == [row["step"] for row in Metrics(read_events(unbroken.folder)).rows if "loss" in row]
    assert [event["position"] for event in events(folder, "resumed")] == [int(last.name)]
    with pytest.raises(ConfigError, match="this run is finished"):
        run.start(by_steps, local=True, name="hit")


def test_a_run_that_was_killed_while_it_evaluated_evaluates_again(
    by_steps: RunConfig, unbroken: run.RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "evaluation_batches", die)
        with pytest.raises(KeyboardInterrupt):
            run.start(override(by_steps, {"storage.checkpoint_steps": None}), local=True, name="hit")
    folder = Path(by_steps.storage.path) / "hit"
    assert [int(path.name) for path in checkpoint.complete_checkpoints(folder)] == [
        EPOCH
    ]  # before the evaluation
    resumed = run.resume(folder, local=True)
    assert_same_state(resumed.checkpoint, unbroken.checkpoint)
    scores = [event["metrics"]["AP"] for event in events(folder, "evaluation")]
    assert scores == [event["metrics"]["AP"] for event in events(unbroken.folder, "evaluation")]


def test_a_signal_breaks_off_an_evaluation_that_the_resumed_run_makes_again(
    by_steps: RunConfig, unbroken: run.RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation_batches = loop.evaluation_batches

    def signalled(*arguments: Any, **settings: Any) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluation_batches(*arguments, **settings)

    folder = Path(by_steps.storage.path) / "hit"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "evaluation_batches", signalled)
        with pytest.raises(
            RunStopped, match=f"hit was stopped by SIGTERM at position {EPOCH}: continue with"
        ):
            run.start(by_steps, local=True, name="hit")
        assert events(folder, "evaluation") == []
        with pytest.raises(RunStopped, match=f"at position {EPOCH}: continue with"):
            run.resume(folder, local=True)  # it begins with the evaluation
    assert [event["step"] for event in events(folder, "step")][-1] == 6
    resumed = run.resume(folder, local=True)
    assert_same_state(resumed.checkpoint, unbroken.checkpoint)
    assert resumed.metrics["AP"] == unbroken.metrics["AP"]
    assert [event["position"] for event in events(folder, "evaluation")] == [EPOCH, 2 * EPOCH]
    assert "resumed 2 times" in " ".join(resumed.to_text().split())


def test_a_signal_at_the_end_does_not_wait_for_scores(
    by_steps: RunConfig, unbroken: run.RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = session._Session._show_now_and_then

    def signalled(self: Any, phase: str) -> None:
        if phase == "scoring":
            os.kill(os.getpid(), signal.SIGTERM)
        show(self, phase)

    folder = Path(by_steps.storage.path) / "hit"
    with monkeypatch.context() as patched:
        patched.setattr(session._Session, "_show_now_and_then", signalled)
        patched.setattr(session._Session, "_take_scores", lambda self, seconds=0.0: {})  # they take long
        with pytest.raises(RunStopped, match=f"stopped by SIGTERM at position {2 * EPOCH}: continue with"):
            run.start(by_steps, local=True, name="hit")
    resumed = run.resume(folder, local=True)
    assert resumed.metrics["AP"] == unbroken.metrics["AP"]
    assert events(folder, "resumed")[0]["position"] == 2 * EPOCH
    assert len(events(folder, "step")) == len(events(unbroken.folder, "step"))


def test_a_changed_learning_rate_and_weight_decay_take_effect_on_a_resumed_run(
    tiny_run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run.start(override(tiny_run, {"optim.epochs": 1}), local=True)
    before = tiny_run.optim
    changed = {"optim.epochs": 2, "optim.lr": 1e-4, "optim.lr_backbone": 1e-5, "optim.weight_decay": 0.5}
    capsys.readouterr()
    resumed = run.resume(first.folder, overrides=changed, local=True)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("changed for")]
    assert sorted(said) == [
        "changed for the resumed run: optim.epochs from 1 to 2",
        f"changed for the resumed run: optim.lr from {before.lr} to 0.0001",
        f"changed for the resumed run: optim.lr_backbone from {before.lr_backbone} to 1e-05",
        f"changed for the resumed run: optim.weight_decay from {before.weight_decay} to 0.5",
    ]
    groups = torch.load(resumed.checkpoint / "state.pt", weights_only=True)["optimizer"]["param_groups"]
    assert {(group["name"], group["base_lr"]) for group in groups} == {
        ("backbone", 1e-5), ("rest", 1e-4), ("sampling", tiny_run.optim.lr_sampling),
    }  # fmt: skip
    assert {group["weight_decay"] for group in groups} <= {0.5, 0.0}
    rates = [
        row["lr/rest"] for row in Metrics(read_events(first.folder)).rows if row["step"] > 6 and "loss" in row
    ]
    assert rates
    assert max(rates) <= 1e-4


def test_what_groups_the_parameters_in_another_way_is_refused(tiny_run: RunConfig) -> None:
    first = run.start(override(tiny_run, {"optim.epochs": 1}), local=True)
    other = not tiny_run.optim.decay_norms_and_biases
    with pytest.raises(checkpoint.CheckpointError, match=r"optim\.decay_norms_and_biases .* cannot change"):
        run.resume(
            first.folder, overrides={"optim.epochs": 2, "optim.decay_norms_and_biases": other}, local=True
        )


def test_signals_that_the_shell_ignores_stay_ignored() -> None:
    """`nohup raydetr train ...` goes on when the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class InterruptedStream:
    """Stands for a stream while it is being written to."""

    def write(self, text: str) -> int:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    flush = write


def test_a_signal_during_a_write_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopSignals() as stop, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", InterruptedStream())
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert capfd.readouterr().err.startswith("SIGTERM: stopping after this step")


def test_a_signal_after_standard_error_is_closed() -> None:
    """SIGHUP comes when the terminal has gone."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # not that of nohup, which ignores it
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(2)
    os.dup2(writer, 2)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
        os.dup2(kept, 2)
        os.close(kept)
        os.close(writer)


# --- Storage that fails ---


class FullDisk:
    """Writing of checkpoints fails with ENOSPC until `num_left` tries are done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_left: int) -> None:
        self.num_left, write = num_left, checkpoint.write

        def try_to_write(folder: Path, *content: Any) -> None:
            if self.num_left > 0:
                self.num_left -= 1
                raise OSError(errno.ENOSPC, f"No space left on device: {folder}")
            write(folder, *content)

        monkeypatch.setattr(checkpoint, "write", try_to_write)
        monkeypatch.setattr(checkpoint_writer, "FIRST_PAUSE", 0.05)


def test_a_full_disk_does_not_end_a_run(
    by_steps: RunConfig,
    unbroken: run.RunResult,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    FullDisk(monkeypatch, 3)
    result = run.start(by_steps, local=True, name="full")
    assert_same_state(result.checkpoint, unbroken.checkpoint)
    failed = events(result.folder, "checkpoint_failed")
    assert len(failed) == 3
    assert all("No space left on device" in event["error"] for event in failed)
    err = " ".join(capsys.readouterr().err.split())
    assert "cannot be written (OSError: [Errno 28] No space left on device" in err
    assert "training goes on, and it is tried again" in err


def test_a_run_without_checkpoints_stops_at_its_limit(
    by_steps: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch, 10**6)
    monkeypatch.setattr("raydetr.runs.session.EVALUATION_WAITS", 0.1)
    limited = override(by_steps, {"storage.max_minutes_without_checkpoint": 0.02})
    with pytest.raises(
        StorageError, match=r"no checkpoint could be written for 0\.02 minutes .*No space left"
    ):
        run.start(limited, local=True, name="full")
    assert len(events(Path(by_steps.storage.path) / "full", "failed")) == 1
    with pytest.raises(FatalError, match="worker 0: full"):  # no restart of the workers
        StopAtFatalErrors().after_exception(None, {0: StorageError("full")})


def test_a_storage_that_does_not_answer_stops_a_run_at_its_limit(
    by_steps: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    monkeypatch.setattr(checkpoint, "write", lambda *arguments: answer.wait())
    monkeypatch.setattr("raydetr.runs.session.EVALUATION_WAITS", 0.1)
    limited = override(by_steps, {"storage.max_minutes_without_checkpoint": 0.02})
    try:
        with pytest.raises(
            StorageError, match=r"no checkpoint could be written for 0\.02 .* does not answer"
        ):
            run.start(limited, local=True, name="hanging")
    finally:
        answer.set()


def test_training_goes_on_while_a_mounted_folder_does_not_answer(
    by_steps: RunConfig,
    unbroken: run.RunResult,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It answers again once steps were trained after the evaluation whose files it did not take."""
    answers, write_file, train_step = threading.Event(), session.write_file, loop.Training.train_step
    waited: list[bool] = []

    def hang(path: Path, content: bytes) -> None:
        if "detections" in str(path) and by_steps.storage.path in str(path):
            waited.append(answers.wait(60))
        write_file(path, content)

    def step(self: loop.Training, *batches: Any) -> Any:
        outcome = train_step(self, *batches)
        if self.position > EPOCH + 8:
            answers.set()
        return outcome

    monkeypatch.setattr(session, "write_file", hang)
    monkeypatch.setattr(session, "WRITE_WAITS", 0.2)
    monkeypatch.setattr(loop.Training, "train_step", step)
    result = run.start(by_steps, local=True, name="hanging")
    assert waited == [True, True]
    assert_same_state(result.checkpoint, unbroken.checkpoint)
    scores = [event["metrics"]["AP"] for event in events(result.folder, "evaluation")]
    assert scores == [event["metrics"]["AP"] for event in events(unbroken.folder, "evaluation")]
    assert "hanging does not answer" in " ".join(capsys.readouterr().err.split())


def test_a_disk_that_changes_what_it_stores_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_crc32", lambda path: 1)
    with pytest.raises(OSError, match=r"state\.pt: differs from what was written"):
        checkpoint.write(
            tmp_path, {"model": {}},
            {"config": {}, "categories": [], "fingerprint": "", "epoch": 0, "position": 0},
        )  # fmt: skip
    assert not (tmp_path / "meta.json").exists()


def test_training_waits_for_the_copy_of_the_state_only(
    tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storage that takes a second per checkpoint does not delay the steps, and the last checkpoint is waited for."""
    write = checkpoint.write

    def slow(folder: Path, *content: Any) -> None:
        time.sleep(1.0)
        write(folder, *content)

    monkeypatch.setattr(checkpoint, "write", slow)
    result = run.start(
        override(tiny_run, {"optim.epochs": 1, "storage.checkpoint_steps": 1, "data.batch_size": 2}),
        local=True,
    )
    assert checkpoint.is_complete(
        result.checkpoint,
        tiny_run.model_copy(update={"optim": tiny_run.optim.model_copy(update={"epochs": 1})}),
    )
    assert len(events(result.folder, "checkpoint")) < 24  # newer ones replaced those that were waiting
    kinds = [event["kind"] for event in read_events(result.folder)]
    assert kinds[: kinds.index("checkpoint")].count("step") >= 2  # steps went on while the first was written


# --- Two drivers ---


@pytest.mark.timeout(200)
def test_resuming_a_run_that_is_going_on_is_refused(by_steps: RunConfig, tmp_path: Path) -> None:
    folder = Path(by_steps.storage.path) / "busy"
    process = subprocess.Popen(
        command(override(by_steps, {"optim.epochs": 50}), "busy", tmp_path),
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: checkpoint.complete_checkpoints(folder), process)
        before = (folder / "config.yaml").read_text()
        with pytest.raises(LeaseError, match=f"process {process.pid} on"):
            run.resume(folder, overrides={"optim.lr": 0.5}, local=True)
        assert (folder / "config.yaml").read_text() == before
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_suspended_driver_whose_run_was_taken_over_stops(
    by_steps: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves it to the other one to say how the run ends."""
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.1)
    folder = Path(by_steps.storage.path) / "taken"
    taken, train_step = folder / lease_module.LEASE / "000002.json", loop.Training.train_step

    def be_suspended(self: loop.Training, *batches: Any) -> Any:
        if self.step == 2:
            taken.write_text("{}")
            time.sleep(1.0)
        return train_step(self, *batches)

    monkeypatch.setattr(loop.Training, "train_step", be_suspended)
    with pytest.raises(LeaseError, match="taken: another process has taken this run over"):
        run.start(by_steps, local=True, name="taken")
    kinds = {event["kind"] for event in read_events(folder)}
    assert "started" in kinds
    assert not kinds & {"failed", "stopped", "finished"}
    assert max(event["position"] for event in events(folder, "step")) < EPOCH
    # Nothing is written beside what the other one writes
    assert [int(path.name) for path in checkpoint.complete_checkpoints(folder)] == [16]
    assert list(taken.parent.iterdir()) == [taken]


def test_a_folder_without_a_checkpoint_says_what_to_do(tiny_run: RunConfig) -> None:
    folder = Path(tiny_run.storage.path) / "left"
    folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match="left exists, and is not a run: remove it"):
        run.start(tiny_run, local=True, name="left")
    log = EventLog(folder)
    log.append("launched", key="0" * 32)
    log.append("started", position=0)
    assert log.flush()
    with pytest.raises(
        ConfigError, match="left exists and has no checkpoint: start it again with --or-resume"
    ):
        run.start(tiny_run, local=True, name="left")
    with (
        lease_module.Lease(folder),  # in its first minutes
        pytest.raises(ConfigError, match="left: another process drives this run: give another --name"),
    ):
        run.start(tiny_run, local=True, name="left")
    assert run.start(override(tiny_run, {"optim.epochs": 1}), local=True, name="left", or_resume=True)


def test_names_that_are_not_those_of_a_folder_are_refused(tiny_run: RunConfig) -> None:
    for name in ("a/b", "..", "../x", ".hidden", "", "exp#2", "a?b", "a b"):
        with pytest.raises(ConfigError, match="is not the name of a folder"):
            run.start(tiny_run, local=True, name=name)
    assert issubclass(RunStopped, Exception)


# --- Storage and evaluation that take long ---


def test_an_evaluation_shows_that_it_makes_progress(
    tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise a long one would be taken for a stall (cluster.stall_minutes)."""
    monkeypatch.setattr("raydetr.runs.session.SHOW_SECONDS", 0.0)
    run.start(override(tiny_run, {"optim.epochs": 1}), local=True)
    assert "evaluating" in capsys.readouterr().err


def test_a_file_server_that_went_away_is_not_a_corrupt_sample(
    tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart can help, whatever data.on_corrupt is; for a disk that fails to read, it is worth a try."""
    shards = open_shards(tiny_run.data.train)
    error = OSError(errno.ESTALE, "Stale file handle")

    def read(*span: int) -> bytes:
        raise error

    monkeypatch.setattr(type(shards.files), "read", lambda self, *span: read(*span))
    with pytest.raises(OSError, match="Stale file handle") as caught:
        shards.read(0)
    StopAtFatalErrors().after_exception(None, {0: caught.value})
    error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(ShardError, match="Input/output error") as corrupt:
        shards.read(0)
    copied = pickle.loads(pickle.dumps(corrupt.value))  # as it reaches the controller
    StopAtFatalErrors().after_exception(None, {0: copied})
    error = OSError(errno.EISDIR, "Is a directory")
    with pytest.raises(ShardError) as final:
        shards.read(0)
    with pytest.raises(FatalError, match=r"worker 0: .*Is a directory"):
        StopAtFatalErrors().after_exception(None, {0: final.value})


# --- What a checkpoint writer must not lose ---


def test_metrics_that_cannot_be_written_at_once_are_written_later(
    by_steps: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a newer checkpoint is saved in the meantime: the best one is found by them."""
    monkeypatch.setattr(checkpoint_writer, "FIRST_PAUSE", 0.5)
    failures, write = [], checkpoint_writer.write_file

    def fail_once(path: Path, content: bytes) -> None:
        if path.name == checkpoint.METRICS and not failures:
            failures.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoint_writer, "write_file", fail_once)
    result = run.start(override(by_steps, {"storage.keep_checkpoints": 9}), local=True)
    assert failures
    assert checkpoint.read_metrics(failures[0].parent)["AP"] >= 0
    assert result.metrics["AP"] >= 0


def test_a_run_whose_last_metrics_cannot_be_written_stops_at_its_limit(
    by_steps: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_file", fail)
    monkeypatch.setattr(checkpoint_writer, "FIRST_PAUSE", 0.05)
    limited = override(by_steps, {"storage.max_minutes_without_checkpoint": 0.03})
    with pytest.raises(
        StorageError, match=r"no checkpoint could be written for 0\.03 minutes .*No space left"
    ):
        run.start(limited, local=True)


def test_only_old_checkpoints_of_the_run_are_removed_and_a_failure_is_told(
    by_steps: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(by_steps.storage.path) / "kept"
    remove = checkpoint_writer.remove_folder

    def refuse_one(path: Path) -> None:
        if not (folder / "checkpoints" / "good").exists():
            (folder / "checkpoints" / "good").mkdir()
            (folder / "checkpoints" / "note.txt").write_text("of a user")
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(path)

    monkeypatch.setattr(checkpoint_writer, "remove_folder", refuse_one)
    result = run.start(override(by_steps, {"storage.keep_checkpoints": 1}), local=True, name="kept")
    assert events(folder, "checkpoint_failed") == []
    assert (folder / "checkpoints" / "good").is_dir()
    assert (folder / "checkpoints" / "note.txt").exists()
    own = {path for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()}
    assert own == {result.checkpoint, checkpoint.best(folder)}  # removed at the next try
    assert "cannot be removed: [Errno 39] Directory not empty" in " ".join(capsys.readouterr().err.split())


def test_a_storage_that_cannot_be_reached_is_not_one_without_checkpoints(
    by_steps: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a restart would begin anew, or from an older checkpoint."""
    result = run.start(override(by_steps, {"optim.epochs": 1}), local=True)
    newest, before = checkpoint.complete_checkpoints(result.folder)[:2]
    read, crc32 = checkpoint.read_file, checkpoint._crc32

    def fail(number: int) -> Callable[..., Any]:
        def raise_for_newest(path: Path) -> Any:
            if path.parent == newest:
                raise OSError(number, os.strerror(number))
            return crc32(path) if path.name == "state.pt" else read(path)

        return raise_for_newest

    monkeypatch.setattr(checkpoint, "read_file", fail(errno.ESTALE))
    with pytest.raises(OSError, match="Stale file handle"):
        checkpoint.newest_valid(result.folder, pytest.fail)
    monkeypatch.setattr(checkpoint, "read_file", read)
    # A bad sector is a fault of this checkpoint
    monkeypatch.setattr(checkpoint, "_crc32", fail(errno.EIO))
    messages: list[str] = []
    assert checkpoint.newest_valid(result.folder, messages.append) == before
    assert messages == [f"{newest}/state.pt: cannot be read (Input/output error)"]
    (result.folder / "checkpoints").rename(result.folder / "away")
    (result.folder / "checkpoints").touch()
    with pytest.raises(NotADirectoryError):
        checkpoint.complete_checkpoints(result.folder)
