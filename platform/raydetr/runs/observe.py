"""Follow a run from any machine that sees its storage: print its progress and what happens, to its end."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from raydetr.console import Display, RunProgress, duration, print_status
from raydetr.runs.lease import DriverWatch
from raydetr.runs.state import SPACE, Record, RunState, State, is_run, run_state
from raydetr.store.folders import Folder, with_retry_seconds
from raydetr.tracking.events import Event, EventReader

# The same as those of a job that was followed; 2 is that of a wrong option
EXIT_CODES: dict[State, int] = {"finished": 0, "failed": 1, "stopped": 3, "lost": 4}
LEFT = 130

POLL_SECONDS = 1.0
ALIVE_SECONDS = 5.0  # between two looks at the driver's sign of life
RETRY_SECONDS = 5.0  # of an outage of the storage, before a line about it
OUTAGE_SECONDS = 600.0  # of an outage, after which the run is given up
MAX_EARLIER = 12  # lines about what happened before


def observe(run: Folder, stream: TextIO | None = None) -> int:
    """Print the progress of a run until it ends; return the exit code.

    Args:
        run: folder of the run.
        stream: is printed to; standard output by default.

    Raises:
        ValueError: it is a search.
        OSError: the storage cannot be read for OUTAGE_SECONDS.
    """
    if (run / SPACE).exists():
        raise ValueError(
            f"{run}: is a search: `raydetr runs {run}` lists its trials, of which one can be watched"
        )
    try:
        with Display(stream or sys.stdout) as display:
            observer = _Observer(run, display)
            state = observer.follow()
    except KeyboardInterrupt:
        print_status(f"left: {run.name} goes on; `raydetr watch {run}` follows it again")
        return LEFT
    display.note(observer.describe_end(state))
    return EXIT_CODES[state.state]


class _Observer:
    def __init__(self, run: Folder, display: Display) -> None:
        self._run, self._display = run, display
        quick = with_retry_seconds(run, RETRY_SECONDS)
        self._reader, self._driver = EventReader(quick), DriverWatch(quick)
        self._record = Record()
        self._step: Event | None = None  # the last one
        self._best: float | None = None
        self._phase = "waiting for the first event"

    def follow(self) -> RunState:
        """Print what happens until the run has ended; return its state."""
        self._read_earlier()
        looked_at = -ALIVE_SECONDS
        failing_since: float | None = None
        while True:
            try:
                if time.monotonic() - looked_at >= ALIVE_SECONDS:
                    # The driver first: all that it has logged before it goes is seen
                    is_alive = self._driver.is_alive()
                    looked_at = time.monotonic()
                    for line in self._read():
                        self._display.note(line)
                    if not is_alive:
                        return self._end()
                else:
                    for line in self._read():
                        self._display.note(line)
                failing_since = None
            except OSError as error:
                now = time.monotonic()
                if failing_since is None:
                    failing_since = now
                    self._display.note(
                        f"warning: {error}; trying again for {OUTAGE_SECONDS / 60:.0f} minutes"
                    )
                if now - failing_since > OUTAGE_SECONDS:
                    raise
            self._show()
            time.sleep(POLL_SECONDS)

    def _read_earlier(self) -> None:
        lines = self._read()
        where = f"{self._run}: what happened so far" if lines else f"{self._run}: no events yet"
        self._display.note(where)
        if len(lines) > MAX_EARLIER:
            self._display.note(f"({len(lines) - MAX_EARLIER} earlier lines omitted)")
        for line in lines[-MAX_EARLIER:]:
            self._display.note(line)

    def _read(self) -> list[str]:
        lines = []
        for event in self._reader.read():
            self._record.add(event)
            if event["kind"] == "step":
                self._step, self._phase = event, "training"
            text = self._describe(event)
            if text is not None:
                lines.append(f"{time.strftime('%m-%d %H:%M:%S', time.localtime(event['time']))}  {text}")
        return lines

    def _describe(self, event: Event) -> str | None:
        """Return a line about an event; None about those that the progress shows."""
        match event["kind"]:
            case "launched":
                return f"launched: {event['command']}"
            case "started" | "resumed" as kind:
                self._step, self._phase = None, "training"
                verb = "starts" if kind == "started" else f"goes on from {self._at(event)}"
                return f"training {verb}, {_counted(event.get('workers'), 'worker')}"
            case "evaluation":
                return self._describe_evaluation(event)
            case "checkpoint":
                size = event["bytes"] / 1e6
                return f"checkpoint at {self._at(event)}: {size:.0f} MB in {event['seconds']:.1f} s"
            case "checkpoint_failed":
                return f"warning: no checkpoint at {self._at(event)}: {event['error']}"
            case "scoring_failed":
                return f"warning: no AP at {self._at(event)} yet: {event['reason']}"
            case "corrupt":
                return f"warning: corrupt: {event['sample']}"
            case "stack":
                return f"worker {event['worker']} was at: {_last_line(event['stack'])}"
            case "restart":
                return f"restart {self._record.restarts}, from {self._at(event)}: {event['reason']}"
            case "waiting" | "preempted" | "stalled" as kind:
                self._phase = kind
                return f"{kind}: {event['reason']}"
            case "layout":
                return f"goes on with {_counted(event['workers'], 'worker')}: {event['reason']}"
        return None

    def _describe_evaluation(self, event: Event) -> str | None:
        ap = event["metrics"].get("AP")
        if ap is None:
            return f"evaluated at {self._at(event)}: no AP, because the data has no objects"
        is_best = self._best is None or ap > self._best
        self._best = ap if is_best else self._best
        return f"evaluated at {self._at(event)}: AP {ap:.3f}{', the best so far' if is_best else ''}"

    def _at(self, event: Event) -> str:
        samples = None if self._record.start is None else self._record.start.get("samples_per_epoch")
        position = event.get("position")
        return (
            f"position {position}" if not samples or position is None else f"epoch {position / samples:.2f}"
        )

    def _show(self) -> None:
        record = self._record
        epoch, start = record.epoch, record.start
        if epoch is None or start is None:
            return
        aps, step = record.aps, self._step
        metrics: dict[str, Any] = {} if step is None else step["metrics"]
        self._display.show(
            RunProgress(
                step=start["step"] if step is None else step["step"],
                total_steps=start["total_steps"],
                first_step=start["step"],
                epoch=epoch,
                epochs=start["epochs"],
                seconds=0.0 if step is None else step["time"] - start["time"],
                images_per_second=metrics.get("images_per_second") or 0.0,
                loss=metrics.get("loss"),
                ap=aps[-1] if aps else None,
                phase=self._phase,
            )
        )

    def _end(self) -> RunState:
        if not is_run(self._run):
            raise FileNotFoundError(f"{self._run}: the run's folder is gone")
        return run_state(self._run, self._record, is_alive=False)

    def describe_end(self, state: RunState) -> str:
        """Return how the run ended, in one line."""
        record = self._record
        parts: list[str] = [state.state]
        if record.metrics.seconds:
            parts.append(f"trained for {duration(record.metrics.seconds)}")
        if record.restarts:
            parts.append(_counted(record.restarts, "restart"))
        if state.ap_last is not None:
            parts.append(f"AP {state.ap_last:.3f}, best {state.ap_best:.3f}")
        if state.state == "lost":
            parts.append("its driver gives no sign of life")
        parts += [text for text in (state.reason, state.remedy) if text]
        return "; ".join(parts)


def _counted(number: int | None, unit: str) -> str:
    return f"? {unit}s" if number is None else f"{number} {unit}{'' if number == 1 else 's'}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "-"
