"""What a person sees in the terminal: status lines, the progress of a run, progress bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


@dataclass(frozen=True)
class Progress:
    """How far a run is. `seconds` counts from the first step of this process."""

    step: int
    total_steps: int
    first_step: int  # the step this attempt began at
    epoch: float
    epochs: int
    seconds: float
    images_per_second: float
    loss: float | None = None
    ap: float | None = None
    corrupt: int = 0  # different samples so far
    phase: str = "training"
    warning: str | None = None  # the latest; said once, on a line of its own

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the speed so far; None before the first step is done."""
        done = self.step - self.first_step
        return self.seconds / done * (self.total_steps - self.step) if done > 0 else None

    def line(self) -> str:
        """One line for people."""
        parts = [
            self.phase,
            f"epoch {self.epoch:.2f}/{self.epochs}",
            f"step {self.step}/{self.total_steps}",
            f"loss {'-' if self.loss is None else f'{self.loss:.3f}'}",
            f"{self.images_per_second:.0f} images/s",
            f"left {duration(self.seconds_left)}",
            f"AP {'-' if self.ap is None else f'{self.ap:.3f}'}",
        ]
        if self.corrupt:
            parts.append(f"damaged {self.corrupt}")
        return "  ".join(parts)


def duration(seconds: float | None) -> str:
    """`1:02:03` or `2:03`, or `-` when unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_status(text: str) -> None:
    """A line for the person at the command line, on standard error."""
    Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False)


class Display:
    """Shows the latest Progress on a stream (standard error by default)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._is_terminal = self._console.is_terminal
        self._last_time = -PLAIN_SECONDS
        self._last: Progress | None = None

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._live.stop()
        if self._last is not None:
            self._print(self._last)

    def show(self, progress: Progress) -> None:
        """Show `progress` if it is news."""
        if progress == self._last:
            return
        news = self._last is None or progress.ap != self._last.ap or progress.phase != self._last.phase
        if progress.warning is not None and (self._last is None or progress.warning != self._last.warning):
            self._say(f"warning: {progress.warning}")
        self._last = progress
        now = time.monotonic()
        if self._is_terminal:
            self._live.update(Text(progress.line()), refresh=True)
        elif news or now - self._last_time >= PLAIN_SECONDS:
            self._last_time = now
            self._print(progress)

    def _print(self, progress: Progress) -> None:
        self._say(progress.line())

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


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
