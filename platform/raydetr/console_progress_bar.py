"""The progress bar of commands that take a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console


class progress_bar:
    """A progress bar as the callback (done, total) that the library's long functions take."""

    def __init__(self, unit: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._unit = unit
        self._progress = Progress(
            TextColumn(unit),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def __enter__(self) -> Callable[[int, int], None]:
        return self._update

    def _update(self, done: int, total: int) -> None:
        if self._task is None:  # not before there is something to show: an error stands alone
            self._progress.start()
            self._task = self._progress.add_task(self._unit, total=total)
        self._progress.update(self._task, completed=done)

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._progress.stop()
