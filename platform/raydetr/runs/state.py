"""Tell from a folder what became of a run, a trial or a search. Nothing is written, and only the folder is read."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from raydetr.runs.lease import DriverWatch
from raydetr.store.folders import Folder, open_folder, with_retry_seconds
from raydetr.tracking.events import EVENTS, Event, EventReader, Metrics

Kind = Literal["run", "search", "trial"]
State = Literal["running", "finished", "stopped", "failed", "lost"]

CONFIG = "config.yaml"
SPACE = "space.yaml"  # only a search has one
SEARCH = "search.json"  # its options
ENDS: dict[str, State] = {"finished": "finished", "stopped": "stopped", "failed": "failed"}
NO_PROGRESS = ("system", "environment", "files", "lost")  # events that also a run has that makes no progress
NUM_THREADS = 16  # runs that are read at once
RETRY_SECONDS = 30.0  # of an outage of the storage


@dataclass(frozen=True)
class RunState:
    """State of a run, a trial or a search; None: unknown."""

    folder: Folder
    kind: Kind
    state: State  # lost: it has not ended, and its driver gives no sign of life
    epoch: float | None = None
    epochs: int | None = None
    fraction: float | None = None  # of the training, or of the trials that have ended
    num_trials: int | None = None  # of a search, so far
    ap_best: float | None = None
    ap_last: float | None = None
    restarts: int = 0
    last_event: str | None = None  # its kind
    last_time: float | None = None  # of that event, in seconds since 1970
    reason: str | None = None  # of the end
    has_checkpoint: bool = False

    @property
    def name(self) -> str:
        """Name of the run: that of its folder."""
        return self.folder.name

    @property
    def remedy(self) -> str | None:
        """What to do about a run that has ended before its end; None: nothing."""
        if self.state in ("running", "finished"):
            return None
        folder = shlex.quote(str(self.folder))
        if self.kind == "search":
            return f"continue with `raydetr tune --resume {folder}`"
        if self.kind == "trial":
            return None  # its search goes on with it
        if self.has_checkpoint:
            return f"continue with `raydetr train --resume {folder}`"
        return "it has no checkpoint: start it again, with the same --name and --or-resume"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        names = ("kind", "state", "epoch", "epochs", "fraction", "num_trials", "ap_best", "ap_last",
                 "restarts", "last_event", "last_time", "reason", "remedy")  # fmt: skip
        return {"name": self.name, "folder": str(self.folder)} | {name: getattr(self, name) for name in names}


class Record:
    """What the events of a run so far say."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.launch: Event | None = None  # the last one
        self.start: Event | None = None  # the last one: `started` or `resumed`
        self.end: Event | None = None  # the last one: `finished`, `stopped` or `failed`
        self.last: Event | None = None
        self.position = 0
        self.restarts = 0
        self.checkpoint: int | None = None  # position of the newest
        self._start_time = 0.0

    def add(self, event: Event) -> None:
        """Take an event into account. The events of a process come in order, those of two processes need not."""
        kind = event["kind"]
        if kind not in NO_PROGRESS and (self.last is None or event["time"] >= self.last["time"]):
            self.last = event
        if kind in ("launched", "started", "resumed"):
            self._start_time = max(self._start_time, event["time"])
        if kind == "launched":
            self.launch = event
        elif kind in ("started", "resumed"):
            self.start, self.position = event, event["position"]
        elif kind in ("step", "evaluation"):
            self.position = max(self.position, event["position"])
        elif kind == "checkpoint":
            self.checkpoint = event["position"]
        elif kind == "restart":
            self.restarts += 1
        elif kind in ENDS:
            self._add_end(event)
        self.metrics.add(event)

    def _add_end(self, event: Event) -> None:
        end = self.end
        # A search repeats how a trial has ended, without the reason
        is_repeated = end is not None and self.has_ended and end["kind"] == event["kind"]
        if not is_repeated and (end is None or event["time"] >= end["time"]):
            self.end = event

    @property
    def has_ended(self) -> bool:
        """Whether a driver has ended, and no training began after it."""
        return self.end is not None and self.end["time"] >= self._start_time

    @property
    def aps(self) -> list[float]:
        """AP of the evaluations so far."""
        return [row["AP"] for row in self.metrics.rows if row.get("AP") is not None]

    @property
    def epochs(self) -> int | None:
        """Number of epochs of the run."""
        return None if self.start is None else self.start.get("epochs")

    @property
    def epoch(self) -> float | None:
        """Epochs that were trained so far."""
        samples = None if self.start is None else self.start.get("samples_per_epoch")
        if samples is None or self.epochs is None:  # before its first event
            return None
        return min(float(self.position / samples), float(self.epochs))


def is_run(folder: Folder) -> bool:
    """Return whether a folder is that of a run, a trial or a search."""
    # A trial whose configuration contradicts itself has events only
    return (folder / CONFIG).exists() or (folder / EVENTS).exists()


def find_run(name: str | Path, storage: str | Path = "runs") -> Folder:
    """Return the folder of a run, a trial or a search that a user names.

    Args:
        name: its folder or URL, or its name in `storage`; of a trial, also its name there alone.
        storage: folder or URL of the runs.

    Raises:
        ValueError: there is none.
        OSError: the storage cannot be read.
    """
    found = find_folder(str(name), storage)
    if found is None:
        raise ValueError(
            f"{name}: is not the folder or URL of a run ({CONFIG} is missing there), and {storage} has no run of this "
            f"name: `raydetr runs {shlex.quote(str(storage))}` lists those that it has"
        )
    return found


def find_folder(name: str, storage: str | Path) -> Folder | None:
    """Return the folder that `find_run` returns; None if there is none."""
    places = [open_folder(name)]
    if "/" not in name:
        places.append(open_folder(storage) / name)
        trial = re.fullmatch(r"(.+)-\d+", name)
        if trial:
            places.append(open_folder(storage) / trial[1] / name)
    return next((place for place in places if is_run(place)), None)


def trials_of(search: Folder) -> list[Folder]:
    """Return the folders of a search's trials, in the order of their numbers.

    Raises:
        OSError: the storage cannot be read.
    """
    return sorted(folder for folder in search.iterdir() if is_run(folder))


def list_runs(storage: Folder) -> list[RunState]:
    """Return what lies in a storage path, the newest first: runs and searches; in the folder of a search, its trials.

    The folder of a run is a list of that run.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: the storage cannot be read.
    """
    if not storage.exists():
        raise FileNotFoundError(f"{storage}: there is no such folder")
    storage = with_retry_seconds(storage, RETRY_SECONDS)
    if is_run(storage) and not (storage / SPACE).exists():
        return [state_of(storage)]
    states = _states(_folders(storage))
    return sorted(states, key=lambda state: (state.last_time or 0.0, state.name), reverse=True)


def _folders(storage: Folder) -> list[Folder]:
    found: list[Folder] = list(storage.iterdir())
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [folder for folder, one in zip(found, pool.map(is_run, found), strict=True) if one]


def _states(folders: Iterable[Folder]) -> list[RunState]:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(state_of, folders))


def state_of(folder: Folder) -> RunState:
    """Return the state of the run, the trial or the search in a folder.

    A driver of another machine whose last sign of life seems to be old is watched for up to 20 s.

    Raises:
        OSError: the storage cannot be read.
    """
    if (folder / SPACE).exists():
        return _search_state(folder)
    return run_state(folder, *_read(folder))


def run_state(folder: Folder, record: Record, is_alive: bool) -> RunState:
    """Return the state of a run or trial from its events, and from whether its driver gives a sign of life.

    Raises:
        OSError: the storage cannot be read.
    """
    search = folder.parent
    kind: Kind = "trial" if (search / SPACE).exists() else "run"
    state: State = "lost"
    reason = None
    if is_alive:
        state = "running"
    elif record.has_ended:
        assert record.end is not None
        state, reason = ENDS[record.end["kind"]], record.end.get("reason")
    elif kind == "trial" and DriverWatch(search).is_alive():
        state, reason = (
            "stopped",
            "by the search",
        )  # which kills the trials that it stops, and logs that at its end
    epoch, epochs, aps, last = record.epoch, record.epochs, record.aps, record.last
    return RunState(
        folder=folder,
        kind=kind,
        state=state,
        epoch=epoch,
        epochs=epochs,
        fraction=None if epoch is None or epochs is None else epoch / epochs,
        ap_best=max(aps, default=None),
        ap_last=aps[-1] if aps else None,
        restarts=record.restarts,
        last_event=None if last is None else last["kind"],
        last_time=None if last is None else last["time"],
        reason=reason,
        has_checkpoint=record.checkpoint is not None,
    )


def _search_state(folder: Folder) -> RunState:
    own = run_state(folder, *_read(folder))
    trials = _states(trials_of(folder))
    newest = max((own, *trials), key=lambda state: state.last_time or 0.0)
    ended = sum(trial.state != "running" for trial in trials)
    # A search of an earlier version has no options
    options = folder / SEARCH
    wanted = json.loads(options.read_text())["num_trials"] if options.exists() else len(trials)
    return replace(
        own,
        kind="search",
        fraction=ended / wanted if trials else None,
        num_trials=len(trials),
        ap_best=max((trial.ap_best for trial in trials if trial.ap_best is not None), default=None),
        restarts=sum(trial.restarts for trial in trials),
        last_event=newest.last_event,
        last_time=newest.last_time,
    )


def _read(folder: Folder) -> tuple[Record, bool]:
    """Return what the events of a run or a search say, and whether its driver gives a sign of life."""
    is_alive = DriverWatch(folder).is_alive()
    record = Record()  # read after that: what a driver logs before it goes is seen
    for event in EventReader(folder, all_steps=False).read():
        record.add(event)
    return record, is_alive
