"""Write the checkpoints of a run in the background, and keep the newest ones and the best."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raydetr.config import StorageConfig
from raydetr.evaluation import stored
from raydetr.shards.reader import Shards
from raydetr.store.folders import Folder, remove_folder, with_retry_seconds, write_file
from raydetr.training import checkpoint
from raydetr.training.loop import Training

FIRST_PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds between two tries; the pause doubles
RETRY_SECONDS = 10.0  # of one try, at a URL


class StorageError(RuntimeError):
    """No checkpoint could be written for longer than the run allows; the message has the folder and the reason."""

    is_fatal = True  # the run has waited for the storage already: no retry


@dataclass(frozen=True)
class Written:
    """What became of a checkpoint: it was written in `seconds`, or could not be, because of `error`."""

    position: int
    seconds: float
    num_bytes: int = 0
    error: str | None = None


@dataclass(frozen=True)
class _Waiting:
    """A checkpoint to write. A newer one replaces it, unless it is being written."""

    position: int
    state: Mapping[str, Any]
    meta: Mapping[str, Any]


class CheckpointWriter:
    """Writes checkpoints of one run, in rank 0. Training waits only while the state is copied to the host.

    Writing is tried again until it works. If it does not for `storage.max_minutes_without_checkpoint`, `check` raises.

    Args:
        run: folder of the run.
        storage: when to write, and what to keep.
        report: is called, in a thread, with what became of each checkpoint.
        prepare: is called before a checkpoint is written, in the same thread.
    """

    def __init__(
        self,
        run: Folder,
        storage: StorageConfig,
        report: Callable[[Written], None],
        prepare: Callable[[], object],
    ) -> None:
        # Short, because every failure is to be reported before the next try
        self._run = with_retry_seconds(run, RETRY_SECONDS)
        self._storage, self._report, self._prepare = storage, report, prepare
        self._saved_at = time.monotonic()
        self._pending_since: float | None = None  # the first checkpoint or metrics that are not written yet
        self._problem: str | None = None
        self.cleanup_problem: str | None = None  # why an older checkpoint is still there
        self._changed = threading.Condition()
        self._waiting: _Waiting | None = None
        self._metrics: dict[int, Mapping[str, Any]] = {}  # by position, to write beside its checkpoint
        self._expected: set[int] = set()  # positions whose metrics will come
        self._is_writing = self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is to be written after this step because of its number or the time."""
        minutes, steps = self._storage.checkpoint_minutes, self._storage.checkpoint_steps
        by_time = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return by_time or (steps is not None and step % steps == 0)

    def save(self, training: Training, shards: Shards) -> None:
        """Copy the state of `training`, and write it in the background."""
        state, meta = checkpoint.capture(training, shards)
        self._saved_at = time.monotonic()
        with self._changed:
            self._pending_since = self._pending_since or self._saved_at
            self._waiting = _Waiting(training.position, state, meta)
            self._changed.notify_all()

    def expect(self, position: int) -> None:
        """Keep the checkpoint at a position, and the arrays of its evaluation, until its metrics are recorded."""
        with self._changed:
            self._expected.add(position)

    def record(self, position: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of the evaluation at a position beside its checkpoint, in the background."""
        with self._changed:
            self._pending_since = self._pending_since or time.monotonic()
            self._metrics[position] = metrics
            self._changed.notify_all()

    def wait(self, seconds: float, *, or_failed: bool = False) -> bool:
        """Wait until everything is written, with `or_failed` or until a try has failed; return whether it is written.

        Not longer than `seconds`.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_idle() or (or_failed and self._problem is not None), seconds
            )
            return self._is_idle()

    def check(self) -> None:
        """Raise if no checkpoint could be written for too long, also because the storage does not answer.

        Raises:
            StorageError: so it is.
        """
        limit, since = self._storage.max_minutes_without_checkpoint, self._pending_since
        if since is not None and time.monotonic() - since > 60 * limit:
            raise StorageError(
                f"no checkpoint could be written for {limit:g} minutes (storage.max_minutes_without_checkpoint): "
                f"{self._problem or f'{self._run} does not answer'}"
            )

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            StorageError: it cannot be, see `check`.
        """
        while not self.wait(1.0):
            self.check()

    def close(self) -> None:
        """End the thread, without waiting for it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _is_idle(self) -> bool:
        return self._waiting is None and not self._metrics and not self._is_writing

    def _work(self) -> None:
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._metrics or self._is_closed)
                if self._is_closed:
                    return
                waiting, self._waiting, self._is_writing = self._waiting, None, True
                metrics = dict(self._metrics)
            position = max(metrics) if waiting is None else waiting.position
            began = time.monotonic()
            # Of any type: whatever prevents it, training goes on and it is tried again
            try:
                if waiting is not None:
                    self._write(waiting, began)
                    waiting = None
                self._write_metrics(metrics)
                self._remove_old()
            except Exception as error:
                self._fail(
                    Written(position, time.monotonic() - began, error=f"{type(error).__name__}: {error}")
                )
                self._put_back(waiting, pause)
                pause = min(2 * pause, MAX_PAUSE)
                continue
            pause, self._problem = FIRST_PAUSE, None
            with self._changed:
                self._is_writing = False
                self._pending_since = None if self._is_idle() else time.monotonic()
                self._changed.notify_all()

    def _fail(self, failed: Written) -> None:
        with self._changed:
            self._problem = failed.error
            self._changed.notify_all()
        self._report(failed)

    def _put_back(self, waiting: _Waiting | None, pause: float) -> None:
        """Try again after a pause; if a newer checkpoint is waiting by then, only that one."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, pause)
            self._waiting = self._waiting or waiting
            self._is_writing = False
            self._changed.notify_all()

    def _write(self, waiting: _Waiting, began: float) -> None:
        folder = checkpoint.folder_of(self._run, waiting.position)
        self._prepare()
        (folder / checkpoint.METRICS).unlink(missing_ok=True)
        num_bytes = checkpoint.write(folder, waiting.state, waiting.meta)
        self._report(Written(waiting.position, time.monotonic() - began, num_bytes))

    def _write_metrics(self, metrics: Mapping[int, Mapping[str, Any]]) -> None:
        for position, values in metrics.items():
            folder = checkpoint.folder_of(self._run, position)
            if (folder / "meta.json").exists():  # otherwise a newer checkpoint has taken its place
                text = json.dumps(values, indent=1, allow_nan=False)
                write_file(folder / checkpoint.METRICS, text.encode())
            with self._changed:
                if self._metrics.get(position) is values:
                    del self._metrics[position]
                    self._expected.discard(position)

    def _remove_old(self) -> None:
        with self._changed:
            # What may turn out to be the best stays until its AP is known
            expected = {checkpoint.folder_of(self._run, position) for position in self._expected}
        kept = {
            checkpoint.best(self._run),
            *checkpoint.complete_checkpoints(self._run)[: self._storage.keep_checkpoints],
            *expected,
        }
        # Only those of the run: a user may have put others there
        own = [path for path in (self._run / checkpoint.CHECKPOINTS).iterdir() if path.name.isdecimal()]
        for folder in set(own) - kept:
            try:
                (folder / "meta.json").unlink(missing_ok=True)  # first: from now on it is not a checkpoint
                remove_folder(folder)
            except OSError as error:  # the new checkpoint is there, whatever becomes of older ones
                self.cleanup_problem = f"{folder} cannot be removed: {error}"
        self._remove_old_arrays({checkpoint.position_of(folder) for folder in kept if folder is not None})

    def _remove_old_arrays(self, kept: set[int]) -> None:
        """Remove the arrays of evaluations whose checkpoint is gone; what was computed from them stays."""
        try:
            stored.remove_arrays_except(self._run, kept)
        except OSError as error:
            self.cleanup_problem = f"{self._run / stored.EVALUATIONS} cannot be cleaned up: {error}"
