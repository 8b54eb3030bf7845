"""Decide how long the driver goes on: after failures of the workers, and while the storage is away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from raydetr.console import print_status
from raydetr.runs.ray_cluster import POLL_SECONDS, WAITING_SECONDS, LaunchError
from raydetr.runs.run_folder import Run
from raydetr.runs.signals import StopSignals
from raydetr.tracking.events import EventLog

T = TypeVar("T")

FAILURE_PAUSE, MAX_PAUSE = 5.0, 60.0  # seconds before a start after failures without progress; they double


class StoragePatience:
    """Repeats what needs the storage of a run until it answers, as long as the run waits for its checkpoints."""

    def __init__(self, run: Run, stop: StopSignals, log: EventLog) -> None:
        self._minutes, self._stop, self._log = run.config.storage.max_minutes_without_checkpoint, stop, log

    def call(self, read: Callable[[], T]) -> T | None:
        """Return the result of `read`; None if the run is to stop before there is one.

        Raises:
            OSError: the storage did not answer for `storage.max_minutes_without_checkpoint`.
        """
        began, pause = time.monotonic(), POLL_SECONDS
        while not self._stop.is_set():
            try:
                return read()
            except OSError as error:
                if time.monotonic() - began > 60 * self._minutes:
                    raise
                if pause == POLL_SECONDS:
                    self._log.append("waiting", reason=f"for the storage: {error}")
                    print_status(f"waiting for the storage: {error}")
                self._stop.sleep(pause)
                pause = min(2 * pause, WAITING_SECONDS)
        return None


class Failures:
    """Counts failures since the last progress, and decides whether the workers are started again."""

    def __init__(self, limit: int, log: EventLog) -> None:
        self._limit, self._log = limit, log
        self._since_progress: list[str] = []
        self._reached = -1
        self.number = 0  # of all failures

    @property
    def pause(self) -> float:
        """Seconds before the next start: none after the first failure since the last progress."""
        return min(FAILURE_PAUSE * (2.0 ** (len(self._since_progress) - 1) - 1), MAX_PAUSE)

    def add(self, error: LaunchError, reached: int, position: int) -> None:
        """Log a failure of the workers.

        Args:
            error: why they have failed.
            reached: position that they had reached.
            position: of the checkpoint that they are to go on from; 0: none.

        Raises:
            LaunchError: the workers are not started again.
        """
        if reached > self._reached:
            self._since_progress = []
        self._reached = max(reached, self._reached)
        self._since_progress.append(str(error))
        self.number += 1
        if error.is_fatal:
            raise error
        count = len(self._since_progress)
        if 0 <= self._limit < count:
            listed = "".join(f"\n  {number}. {line}" for number, line in enumerate(self._since_progress, 1))
            raise LaunchError(
                f"the workers failed {count} times without progress in between (cluster.max_failures="
                f"{self._limit}):{listed}"
            )
        self._log.append("restart", reason=str(error), failures_since_progress=count, position=position)
        most = f" of {self._limit}" if self._limit >= 0 else ""
        print_status(
            f"{error}; starting them again from position {position} ({count}{most} without progress)"
        )
