"""Record the events of a run in its folder: `events/NNNNNN.jsonl`, one segment per process that writes.

The log is the record of the run: progress, curves, comparison and MLflow are made from it. Segments are only appended
to; at a URL, where files cannot grow, they are replaced by longer ones. A line that was cut off, because its process
was killed, is ignored.

Kinds of events: `launched` (a driver starts or resumes the run: its name, settings, data, tags), `started`, `resumed`
(a process trains from `position` on), `environment` and `system` (of a node: versions; metrics of processor, memory and
GPUs), `step` (metrics of a step), `evaluation`, `checkpoint`, `checkpoint_failed`, `scoring_failed` (a try to score an
evaluation), `corrupt`, `restart` (the workers are started again: why, and from which position), `waiting` (for
resources), `preempted` (a node will be taken away), `layout` (another number of workers), `stalled` (no progress),
`stack` (of a stalled worker), `files` (of the run, which are new), `finished`, `stopped`, `failed`, `lost` (its driver
died; another command found that out). A search has `trial` (what is trained next) and `trial_ended`; a trial that
continues the checkpoint of another has `taken_over`.
"""

from __future__ import annotations

import json
import math
import threading
import time
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raydetr.store.folders import Folder, create_file, file_sizes, read_part, with_retry_seconds

EVENTS = "events"
FIRST_PAUSE, MAX_PAUSE = 0.2, 30.0  # seconds between two tries to write; the pause doubles
RETRY_SECONDS = 5.0  # of one try, at a URL
FLUSH_SECONDS = 30.0
REMOTE_SECONDS = 2.0  # between two writes to a URL
SEGMENT_BYTES = 256 * 1024  # after which a process begins the next segment at a URL

Event = dict[str, Any]  # "time" (seconds since 1970), "kind", and fields of the kind


class EventLog:
    """Appends to a segment of its own, in a thread, which begins with the first event. For all threads of a process.

    Logging neither waits for the storage nor ends a run: if the disk is full, or a server does not answer, events are
    kept in memory and written later, in order. `problem` is the reason, until everything is written.
    """

    def __init__(self, run: Folder) -> None:
        self._run = run
        self._segment = _Segment(with_retry_seconds(run, RETRY_SECONDS) / EVENTS)
        self._pending: list[str] = []
        self._num_pending = 0  # with those that are being written
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_urgent = False
        self.problem: str | None = None

    def append(self, kind: str, **fields: Any) -> Event:
        """Add an event; return it. Numbers that are not finite become None, which JSON can hold."""
        event = {"time": time.time(), "kind": kind, **fields}
        with self._changed:
            self._pending.append(json.dumps(_finite(event), allow_nan=False) + "\n")
            self._num_pending += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="events", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return event

    def flush(self, seconds: float = FLUSH_SECONDS) -> bool:
        """Wait until every event is written, at most `seconds`; return whether it is."""
        with self._changed:
            self._is_urgent = True
            self._changed.notify_all()
            is_written = self._changed.wait_for(lambda: self._num_pending == 0, seconds)
            self._is_urgent = False
            return is_written

    def _work(self) -> None:
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending)
                lines, self._pending = self._pending, []
            try:
                self._segment.write(lines)
            except Exception as error:  # of any type: what is not written must not be lost
                self.problem = f"{self._run / EVENTS}: {error}; events are kept in memory until it works"
                with self._changed:
                    self._pending = lines + self._pending
                    self._changed.wait_for(lambda: self._is_urgent, pause)
                pause = min(2 * pause, MAX_PAUSE)
                if self._is_urgent:
                    time.sleep(FIRST_PAUSE)
                continue
            pause, self.problem = FIRST_PAUSE, None
            with self._changed:
                self._num_pending -= len(lines)
                self._changed.notify_all()
                # At a URL, each write replaces the segment: some events at a time
                self._changed.wait_for(lambda: self._is_urgent, self._segment.pause)


class _Segment:
    """The file that a process appends to; at a URL, where files are only replaced, a series of files."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._path: Folder | None = None
        self._content = ""  # at a URL
        self._has_failed = False
        self.pause = 0.0 if isinstance(folder, Path) else REMOTE_SECONDS  # between two writes

    def write(self, lines: Sequence[str]) -> None:
        """Append lines.

        Raises:
            OSError: they cannot be written, or only in part; they are to be written again.
        """
        text = "".join(lines)
        if self._path is None or len(self._content) > SEGMENT_BYTES:
            self._path, self._content = self._create(text), text
            return
        if isinstance(self._path, Path):
            # A write that failed halfway leaves a part of a line: end it, so that it does not swallow the next one
            text = "\n" + text if self._has_failed else text
            self._has_failed = True
            with self._path.open("a") as file:
                file.write(text)
            self._has_failed = False
        else:
            self._path.write_bytes((self._content + text).encode())
            self._content += text

    def _create(self, text: str) -> Folder:
        number = 1 + max((int(name.partition(".")[0]) for name in _sizes(self._folder)), default=0)
        # Several processes may want the same number
        while not create_file(self._folder / f"{number:06d}.jsonl", text.encode()):
            number += 1
        return self._folder / f"{number:06d}.jsonl"


def read_events(run: Folder) -> list[Event]:
    """Return the events of a run, segment after segment.

    Raises:
        OSError: they cannot be read.
    """
    return EventReader(run).read()


class EventReader:
    """Reads the events of a run piece by piece: every call of `read` returns the new ones, and reads only those.

    Args:
        run: its folder.
        done: the bytes of each segment that are not read again, the `done` of an earlier reader.
        all_steps: otherwise, of the steps that are new in a segment only the last; most events are steps.
    """

    def __init__(self, run: Folder, done: Mapping[str, int] | None = None, *, all_steps: bool = True) -> None:
        self._folder, self._all_steps = run / EVENTS, all_steps
        self.done = dict(done or {})
        self._hashes: set[int] = set()  # of the lines

    def read(self) -> list[Event]:
        """Return the events since the last call, segment after segment.

        Raises:
            OSError: they cannot be read; the next call returns them.
        """
        lines: list[bytes] = []
        done = {}
        for name, size in sorted(_sizes(self._folder).items()):
            start = self.done.get(name, 0)
            if size > start:
                content = read_part(self._folder / name, start, size)
                complete = content[: content.rfind(b"\n") + 1]  # the last line may still be written
                done[name] = start + len(complete)
                lines += _wanted(complete.splitlines(), self._all_steps)
        self.done |= done
        events = []
        for line in lines:
            # A write that failed halfway was repeated: the same line, with the same time
            if hash(line) not in self._hashes and (event := _parse(line)) is not None:
                self._hashes.add(hash(line))
                events.append(event)
        return events


class Metrics:
    """The metrics of a run so far: rows {"step", "position", metric: value, ...} in the order of their positions.

    A process that was killed may have logged steps after the checkpoint from which the run was resumed. The run trains
    them again, and the first rows of these steps do not count.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.rows: list[dict[str, Any]] = []
        self._earlier_seconds = self._first = self._last = 0.0
        for event in events:
            self.add(event)

    @property
    def seconds(self) -> float:
        """Time of all processes of rank 0, without the time between them."""
        return self._earlier_seconds + self._last - self._first

    def add(self, event: Event) -> None:
        """Take an event into account."""
        if event["kind"] in ("started", "resumed"):
            self._earlier_seconds = self.seconds
            self._first = event["time"]
        if event["kind"] in ("started", "resumed", "step", "evaluation", "checkpoint"):
            self._last = event["time"]
        if event["kind"] in ("started", "resumed"):
            self.rows = [row for row in self.rows if row["position"] <= event["position"]]
        elif event["kind"] in ("step", "evaluation"):
            names = {"step": event["step"], "position": event["position"]}
            # An evaluation is logged when it is scored, after later steps, and perhaps after a later evaluation
            insort(self.rows, {**names, **event["metrics"]}, key=lambda row: int(row["position"]))

    def last(self, name: str) -> float | None:
        """Return the last value of a metric; None before the first."""
        values = [row[name] for row in self.rows if name in row]
        return values[-1] if values else None

    def curves(self, prefix: str, over: str) -> dict[str, list[tuple[float, float]]]:
        """Return the metrics whose names start with `prefix`, as points (value of `over`, value)."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            for name, value in row.items():
                if name.startswith(prefix) and over in row and value is not None:
                    curves.setdefault(name, []).append((row[over], value))
        return curves


def _sizes(folder: Folder) -> dict[str, int]:
    """Return the names of the segments, and their sizes in bytes."""
    sizes = file_sizes(folder)
    return {name: size for name, size in sizes.items() if name.removesuffix(".jsonl").isdecimal()}


def _wanted(lines: list[bytes], all_steps: bool) -> list[bytes]:
    if all_steps:
        return lines
    # The kind is at the beginning of a line, and so needs no parsing
    steps = [number for number, line in enumerate(lines) if b'"kind": "step"' in line[:60]]
    omitted = set(steps[:-1])
    return [line for number, line in enumerate(lines) if number not in omitted]


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(child) for name, child in value.items()}
    return [_finite(child) for child in value] if isinstance(value, list | tuple) else value


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None
