"""When checkpoints are written, and how long it takes until it is tried again; the clock is made."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raydetr.config import StorageConfig
from raydetr.data.order import ORDER_VERSION
from raydetr.training import checkpoint, checkpoint_writer
from raydetr.training.checkpoint_writer import CheckpointWriter, Written

WAIT_SECONDS = 60.0  # far longer than anything takes here


def capture(training: Any, shards: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stands for the copy of the state of a training, of which there is only the position."""
    meta = {"config": {}, "categories": [], "fingerprint": "", "epoch": 0, "order": ORDER_VERSION}
    return {"model": {}}, {**meta, "position": training.position}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CheckpointWriter]:
    """A function that makes a writer with settings of `storage`, and a function to report to."""
    monkeypatch.setattr(checkpoint, "capture", capture)

    def make_writer(
        report: Callable[[Written], None] = lambda written: None, **settings: object
    ) -> CheckpointWriter:
        return CheckpointWriter(
            tmp_path, StorageConfig.model_validate(settings), report, prepare=lambda: None
        )

    return make_writer


def save(writer: CheckpointWriter, position: int) -> None:
    writer.save(SimpleNamespace(position=position), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("settings", "minutes"), [({}, 10.0), ({"checkpoint_minutes": 0.5}, 0.5)])
def test_a_checkpoint_is_due_so_many_minutes_after_the_one_before(
    settings: dict[str, float],
    minutes: float,
    make: Callable[..., CheckpointWriter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(checkpoint_writer, "time", SimpleNamespace(monotonic=lambda: now))
    writer = make(**settings)
    began = now
    for _ in range(2):
        assert not writer.is_due(1)
        now = began + 60 * minutes - 0.1
        assert not writer.is_due(2)
        now = began + 60 * minutes
        assert writer.is_due(3)
        now += 7.0
        assert writer.is_due(4)
        save(writer, 8)  # the minutes begin again, now
        began = now
    writer.close()


def test_a_checkpoint_is_due_by_steps_only_without_minutes(
    make: Callable[..., CheckpointWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(checkpoint_writer, "time", SimpleNamespace(monotonic=lambda: now))
    writer = make(checkpoint_minutes=None, checkpoint_steps=3)
    now = 1e9
    assert [step for step in range(1, 10) if writer.is_due(step)] == [3, 6, 9]
    writer.close()


class FullDisk:
    """Writing of checkpoints fails `num_left` times."""

    def __init__(self, num_left: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_left, write = num_left, checkpoint.write

        def try_to_write(folder: Path, *content: Any) -> int:
            if self.num_left > 0:
                self.num_left -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(folder, *content)

        monkeypatch.setattr(checkpoint, "write", try_to_write)


def test_the_pauses_between_tries_double_up_to_a_minute_and_begin_again(
    make: Callable[..., CheckpointWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    class Condition(threading.Condition):
        """Notes for how long it is to wait at most, and does not wait for so long."""

        def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
            if timeout is None:
                return super().wait_for(predicate)
            pauses.append(timeout)
            return super().wait_for(predicate, 0.0)

    monkeypatch.setattr(
        checkpoint_writer, "threading", SimpleNamespace(Condition=Condition, Thread=threading.Thread)
    )
    is_written, failed = threading.Event(), list[str]()

    def report(written: Written) -> None:
        if written.error is None:
            is_written.set()
        else:
            failed.append(written.error)

    disk = FullDisk(9, monkeypatch)
    writer = make(report)
    save(writer, 8)
    assert is_written.wait(WAIT_SECONDS)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert failed == ["OSError: [Errno 28] No space left on device"] * 9
    is_written.clear()
    disk.num_left = 2
    save(writer, 16)
    assert is_written.wait(WAIT_SECONDS)
    assert pauses[9:] == [1, 2]
    writer.close()
