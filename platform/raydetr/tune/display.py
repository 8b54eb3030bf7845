"""Show how the trials of a search go on, from their events: a table in a terminal, lines in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TextIO

from ray.exceptions import RayError
from rich.console import Console
from rich.live import Live
from rich.text import Text

from raydetr.config import ClusterConfig
from raydetr.console import duration, table
from raydetr.runs.ray_cluster import num_free
from raydetr.runs.state import Record
from raydetr.tracking.events import EventReader
from raydetr.tune.trial import SearchContext
from raydetr.tune.trials import Trial, rank_trials

LOOK_SECONDS = 2.0  # between two looks at the events
TABLE_SECONDS = 60.0  # between two tables where there is no terminal
STARTING_SECONDS = 20.0  # until a trial without workers is said to wait
WAITING = "waiting for workers"
NUM_BEST = 3  # trials that have ended which a table has, beside those that run


@dataclass(frozen=True)
class Progress:
    """Progress of a trial that runs."""

    epoch: float
    restarts: int
    seconds_left: float | None
    note: str = ""  # what it waits for

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for workers."""
        return self.note.startswith(WAITING)


class SearchDisplay:
    """Shows trials while the block runs; a thread reads their events.

    Args:
        context: of the search.
        trials: returns its trials.
        num_trials: how many it will have.
        on_waiting: is called at each look, with whether a trial waits for workers.
        stream: default: standard error.
    """

    def __init__(
        self,
        context: SearchContext,
        trials: Callable[[], Mapping[int, Trial]],
        num_trials: int,
        on_waiting: Callable[[bool], None],
        stream: TextIO | None = None,
    ) -> None:
        self._context, self._trials, self._num_trials = context, trials, num_trials
        self._on_waiting = on_waiting
        self._console = Console(file=stream or sys.stderr)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._records: dict[int, _Reading] = {}
        self._shown: str | None = None
        self._shown_at = time.monotonic()
        self._began: dict[int, float] = {}
        self._told_waiting: dict[int, str] = {}
        self._problem: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="search display", daemon=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(LOOK_SECONDS)
        if self._console.is_terminal:
            with suppress(OSError):
                self._live.stop()

    def on_change(self, trial: Trial) -> None:
        """Print a line about a trial that begins, was evaluated or has ended."""
        if trial.status == "running" and trial.number not in self._began:
            self._began[trial.number] = time.monotonic()
            over = trial.proposals[-1].takes_over
            verb = "goes on" if trial.evaluations else "starts"
            text = verb if over is None else f"takes over the weights of trial {over}"
            self.note(f"trial {trial.number}  {text}  {describe_overrides(trial)}")
        elif trial.status == "running":
            self.note(f"trial {trial.number}  {_numbers(trial)}  {describe_overrides(trial)}")
        else:
            self._began.pop(trial.number, None)
            self._records.pop(trial.number, None)
            self.note(f"trial {trial.number}  {trial.status}" + (f": {trial.cause}" if trial.cause else ""))

    def note(self, line: str) -> None:
        """Print a line that stays, above the table."""
        with suppress(OSError, ValueError):  # a terminal or a pipe that is gone must not end the search
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _work(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            try:
                running = [trial for trial in dict(self._trials()).values() if trial.status == "running"]
                progress = {trial.number: self._look(trial) for trial in running}
                self._show(progress)
                self._on_waiting(any(each.is_waiting for each in progress.values()))
            except Exception as error:  # of any type: what is shown must not be the last one silently
                problem = f"warning: the trials cannot be shown: {type(error).__name__}: {error}"
                if problem != self._problem:
                    self._problem = problem
                    self.note(problem)

    def _show(self, progress: Mapping[int, Progress]) -> None:
        for number, each in progress.items():
            if each.note and each.note != self._told_waiting.get(number):
                self.note(f"trial {number}  {each.note}")
            self._told_waiting[number] = each.note
        text = progress_table(list(dict(self._trials()).values()), progress, self._num_trials)
        if self._console.is_terminal:
            self._live.update(Text(text), refresh=True)
        elif text != self._shown and time.monotonic() - self._shown_at > TABLE_SECONDS:
            self._shown, self._shown_at = text, time.monotonic()
            self.note(text)

    def _look(self, trial: Trial) -> Progress:
        reading = self._records.get(trial.number)
        if reading is None:
            reading = self._records[trial.number] = _Reading(self._context, trial.number)
        problem = reading.read()
        began = self._began.get(trial.number)
        waited = 0.0 if began is None else time.monotonic() - began
        note = problem or reading.waits_for(self._context.config.cluster, waited)
        record = reading.record
        return Progress(record.epoch or 0.0, record.restarts, reading.seconds_left(), note)


class _Reading:
    """What is read of the events of a trial."""

    def __init__(self, context: SearchContext, number: int) -> None:
        self._reader = EventReader(context.trial_folder(number), all_steps=False)
        self.record = Record()
        self._begin: tuple[float, int] | None = None  # time and position of the last start

    def read(self) -> str:
        """Read what is new; return the problem, or an empty text."""
        try:
            events = self._reader.read()
        except OSError as error:
            return f"its events cannot be read: {error}"
        for event in events:
            self.record.add(event)
            if event["kind"] in ("started", "resumed"):
                self._begin = event["time"], event["position"]
        return ""

    def seconds_left(self) -> float | None:
        record = self.record
        if self._begin is None or record.last is None or record.start is None or record.epochs is None:
            return None
        began, position = self._begin
        seconds, done = record.last["time"] - began, record.position - position
        total = record.start["samples_per_epoch"] * record.epochs
        return seconds / done * (total - record.position) if done > 0 else None

    def waits_for(self, cluster: ClusterConfig, seconds: float) -> str:
        """Return what a trial whose process began `seconds` ago waits for; an empty text if it does not wait."""
        record = self.record
        if record.last is not None and record.last["kind"] == "waiting":
            return f"{WAITING}: {record.last['reason']}"
        is_training = (
            record.launch is not None
            and record.start is not None
            and record.start["time"] >= record.launch["time"]
        )
        if is_training or seconds < STARTING_SECONDS:
            return ""
        need = f"{cluster.num_workers} x {cluster.cpus_per_worker} CPUs" + " and a GPU" * cluster.use_gpu
        try:
            free = num_free(cluster)
        except RayError as error:
            return f"starting; the cluster does not answer: {str(error).splitlines()[0]}"
        if free >= cluster.num_workers:
            return "starting"
        return f"{WAITING}: it needs {need}, and there is room for {free} now"


def progress_table(trials: Sequence[Trial], progress: Mapping[int, Progress], num_trials: int) -> str:
    """Format the trials that run, and the best of those that have ended, as an aligned table with a line of totals."""
    running = [trial for trial in trials if trial.number in progress]
    ended = [trial for trial in rank_trials(trials) if trial.status not in ("running", "interrupted")]
    rows = [["trial", "AP", "epoch", "restarts", "left", "status", "differs"]]
    for trial in running:
        each = progress[trial.number]
        rows.append(
            [str(trial.number), fraction(trial.AP), f"{each.epoch:.1f}/{trial.epochs}", str(each.restarts),
             duration(each.seconds_left), each.note.partition(":")[0] or "running", describe_overrides(trial)]
        )  # fmt: skip
    for trial in ended[:NUM_BEST]:
        rows.append(
            [str(trial.number), fraction(trial.AP), f"{trial.epoch}/{trial.epochs}", "", "", trial.status,
             describe_overrides(trial)]
        )  # fmt: skip
    counts = [f"{sum(trial.status == status for trial in ended)} {status}"
              for status in dict.fromkeys(trial.status for trial in ended)]  # fmt: skip
    totals = ", ".join([f"{len(running)} running", *counts])
    return f"{table(rows)}\n{len(trials)} of {num_trials} trials: {totals}"


def describe_overrides(trial: Trial) -> str:
    """Return what differs in a trial, in one line."""
    return " ".join(f"{path}={short(value)}" for path, value in trial.overrides.items())


def short(value: Any) -> str:
    """Return the text of a value with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def fraction(value: float | None) -> str:
    """Return the text of an AP."""
    return "-" if value is None else f"{value:.3f}"


def _numbers(trial: Trial) -> str:
    return f"epoch {trial.epoch}/{trial.epochs}  AP {fraction(trial.AP)}  AP50 {fraction(trial.AP50)}"
