"""Record the events of a run in its folder: `events/NNNNNN.jsonl`, one segment per process that writes.

The log is the record of the run: progress, curves, comparison and MLflow are made from it. Segments are only appended
to. A line that was cut off, because its process was killed, is ignored.

Kinds of events: `started`, `resumed` (a process trains from `position` on), `step` (metrics of a step), `evaluation`,
`checkpoint`, `checkpoint_failed`, `corrupt`, `restart` (the workers are started again: why, and from where),
`waiting` (for resources), `layout` (another number of workers), `stalled` (no progress), `stack` (of a stalled worker),
`finished`, `stopped`, `failed`.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

EVENTS = "events"

Event = dict[str, Any]  # "time" (seconds since 1970), "kind", and fields of the kind


class EventLog:
    """Appends to a segment of its own, which it creates with the first event. For all threads of a process.

    If the disk is full, or the storage does not answer, events are kept in memory and written later, in order: logging
    never ends a run. `problem` is the reason, until everything is written.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / EVENTS
        self._path: Path | None = None
        self._pending: list[str] = []
        self._lock = threading.Lock()
        self.problem: str | None = None

    def append(self, kind: str, **fields: Any) -> Event:
        """Add an event; return it. Numbers that are not finite become None, which JSON can hold."""
        event = {"time": time.time(), "kind": kind, **fields}
        with self._lock:
            self._pending.append(json.dumps(_finite(event), allow_nan=False) + "\n")
            self._flush()
        return event

    def _flush(self) -> None:
        try:
            path = self._path or self._create()
            with path.open("a") as file:
                # A write that failed halfway leaves a part of a line: end it, so that it does not swallow the next one
                file.write(("\n" if self.problem else "") + "".join(self._pending))
        except OSError as error:
            self.problem = (
                f"{self._folder}: {error.strerror or error}; events are kept in memory until it works"
            )
            return
        self._pending, self.problem = [], None

    def _create(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.stem) for path in _segments(self._folder)), default=0)
        while True:  # several processes may want the same number
            path = self._folder / f"{number:06d}.jsonl"
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                number += 1
            else:
                self._path = path
                return path


def read_events(run: Path) -> list[Event]:
    """Return the events of a run, segment after segment."""
    lines = [line for path in _segments(run / EVENTS) for line in path.read_text().splitlines()]
    return [event for line in lines if (event := _parse(line)) is not None]


class Metrics:
    """The metrics of a run so far: rows {"step", "position", metric: value, ...} in chronological order.

    A process that was killed may have logged steps after the checkpoint from which the run was resumed. The run trains
    them again, and the first rows of these steps do not count.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0  # of all processes of rank 0, without the time between them
        first = last = 0.0
        for event in events:
            if event["kind"] in ("started", "resumed"):
                self.seconds += last - first
                first = last = event["time"]
            elif event["kind"] in ("step", "evaluation", "checkpoint"):
                last = event["time"]
            self.add(event)
        self.seconds += last - first

    def add(self, event: Event) -> None:
        """Take an event into account."""
        if event["kind"] in ("started", "resumed"):
            self.rows = [row for row in self.rows if row["position"] <= event["position"]]
        elif event["kind"] in ("step", "evaluation"):
            names = {"step": event["step"], "position": event["position"]}
            self.rows.append({**names, **event["metrics"]})

    def last_ap(self) -> float | None:
        """Return the AP of the last evaluation; None before the first."""
        values = [row["AP"] for row in self.rows if "AP" in row]
        return values[-1] if values else None

    def curves(self, prefix: str, over: str) -> dict[str, list[tuple[float, float]]]:
        """Return the metrics whose names start with `prefix`, as points (value of `over`, value)."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            for name, value in row.items():
                if name.startswith(prefix) and over in row and value is not None:
                    curves.setdefault(name, []).append((row[over], value))
        return curves


def _segments(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.jsonl") if path.stem.isdecimal())


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(child) for name, child in value.items()}
    return [_finite(child) for child in value] if isinstance(value, list | tuple) else value


def _parse(line: str) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None
