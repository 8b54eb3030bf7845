"""Print to the terminal: tables, status lines, the progress of a run, progress bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal
BAR_WIDTH = 20  # characters


def table(rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """Format rows as lines with aligned columns; with `right`, all but the first are aligned right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.ljust, *[str.rjust if right else str.ljust] * (len(widths) - 1)]
    lines = (
        "  ".join(pad(cell, width) for pad, cell, width in zip(align, row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def counted(count: int, singular: str, plural: str | None = None) -> str:
    """Format a count with its noun: `1 image`, `1,204 images`."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def print_status(text: str) -> None:
    """Print a line for the user on standard error; standard output is for results."""
    _print_line(Console(stderr=True), text)


def _print_line(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


# --- The progress of a run ---


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run. `seconds` counts from the first step of this process."""

    step: int
    total_steps: int
    first_step: int  # of this process
    epoch: float
    epochs: int
    seconds: float
    images_per_second: float
    loss: float | None = None
    ap: float | None = None
    corrupt: int = 0  # different corrupt samples so far
    phase: str = "training"
    warning: str | None = None  # the latest; printed once, on a line of its own

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the speed so far; None before the first step is done."""
        done = self.step - self.first_step
        return self.seconds / done * (self.total_steps - self.step) if done > 0 else None

    def line(self) -> str:
        """Format the progress as one line."""
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
            parts.append(f"corrupt {self.corrupt}")
        return "  ".join(parts)


def duration(seconds: float | None) -> str:
    """Format a duration as `1:02:03` or `2:03`, or `-` if unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class RunActor:
    """Stands between the driver of a run and its workers. As a Ray actor it has a process of its own.

    It holds the latest value that rank 0 sent, the results of workers, and what the driver wants. That process imports
    this module only, so the module must not load torch.
    """

    def __init__(self) -> None:
        self._latest: Any = None
        self._results: dict[int, bytes] = {}
        self._processes: dict[tuple[str, int], int] = {}
        self._wish: Literal["stop", "abort", "leave"] | None = None

    def update(self, value: Any) -> None:
        """Replace the value."""
        self._latest = value

    def read(self) -> Any:
        """Return the latest value; None before the first."""
        return self._latest

    def put_result(self, rank: int, result: bytes) -> None:
        """Keep the result of a worker."""
        self._results[rank] = result

    def results(self) -> list[bytes]:
        """Return the results of the workers, in the order of their ranks."""
        return [self._results[rank] for rank in sorted(self._results)]

    def request_stop(self) -> None:
        """Ask the workers to stop after a step."""
        self._wish = self._wish or "stop"

    def request_abort(self) -> None:
        """Ask the workers to write down where they are, and to end at once."""
        self._wish = "abort"

    def request_leave(self) -> None:
        """Ask the workers to end at once, because the run is another driver's."""
        self._wish = "leave"

    def wish(self, node: str, pid: int, rank: int) -> str | None:
        """Return "stop", "abort", "leave", or None, to a worker, a process on a node."""
        self._processes[node, pid] = rank
        return self._wish

    def processes(self) -> dict[tuple[str, int], int]:
        """Return the rank of each worker, by its node and process id."""
        return self._processes


class Display:
    """Shows the latest RunProgress on a stream (standard error by default)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._is_terminal = self._console.is_terminal
        self._last_time = -PLAIN_SECONDS
        self._last: RunProgress | None = None
        self._printed: RunProgress | None = None

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._live.stop()
        if self._last is not None and self._last != self._printed:
            _print_line(self._console, self._last.line())

    def note(self, line: str) -> None:
        """Print a line that stays, above the progress."""
        _print_line(self._console, line)

    def show(self, progress: RunProgress) -> None:
        """Show the progress if it has changed; without a terminal, print a line every `PLAIN_SECONDS`."""
        last = self._last
        if progress == last and (self._is_terminal or progress == self._printed):
            return
        is_new = last is None or progress.ap != last.ap or progress.phase != last.phase
        if progress.warning is not None and (last is None or progress.warning != last.warning):
            _print_line(self._console, f"warning: {progress.warning}")
        self._last = progress
        now = time.monotonic()
        if self._is_terminal:
            done = round(BAR_WIDTH * progress.step / max(1, progress.total_steps))
            bar = "━" * done + "╌" * (BAR_WIDTH - done)
            self._live.update(Text(f"{bar}  {progress.line()}"), refresh=True)
        elif is_new or now - self._last_time >= PLAIN_SECONDS:
            self._last_time, self._printed = now, progress
            _print_line(self._console, progress.line())


# --- Progress bars ---


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on standard error; yield the callback (done, total) that updates it."""
    bar = Progress(
        TextColumn(unit),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )

    def update(done: int, total: int) -> None:
        if not bar.tasks:  # started by the first call, so that an error before it is printed without a bar
            bar.start()
            bar.add_task(unit, total=total)
        bar.update(bar.tasks[0].id, completed=done)

    try:
        yield update
    finally:
        if bar.tasks:
            bar.stop()
