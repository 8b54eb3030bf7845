"""Read a run that is compared from its folder: its events, and the files of its newest evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raydetr.config import flatten
from raydetr.evaluation import stored
from raydetr.evaluation.coco_metrics import NAMES, ApTable
from raydetr.evaluation.ground_truth import ground_truth_file
from raydetr.evaluation.results import Results
from raydetr.runs.lease import DriverWatch
from raydetr.runs.state import CONFIG, Record, RunState, run_state
from raydetr.store.folders import Folder
from raydetr.tracking import mlflow_run
from raydetr.tracking.events import Event, read_events
from raydetr.user_files import parse_yaml


@dataclass(frozen=True)
class Point:
    """A value of a curve, and what had been spent until then. `values` has "loss" or "AP"."""

    step: int
    samples: int
    hours: float  # since the run was started, with all pauses
    worker_hours: float  # of training and evaluation
    values: Mapping[str, float]


@dataclass(frozen=True)
class Detections:
    """The detections of an evaluation, and what they are evaluated against."""

    ground_truth: Mapping[str, Any]  # a COCO dict without segmentations
    results: Results


@dataclass(frozen=True)
class Compared:
    """One of the runs that are compared, or a file of results."""

    name: str
    source: str  # folder, URL, file, or MLflow run
    state: str
    evaluation: str  # which one: that of an epoch
    table: ApTable | None  # None: there is no evaluation
    fingerprint: str | None = None  # of the validation data; None: unknown
    shards: str | None = None  # location of the validation data
    settings: Mapping[str, str] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    detections: Detections | None = None
    no_detections: str = ""  # why there are none

    @property
    def numbers(self) -> dict[str, float]:
        """The metrics that are defined."""
        numbers = {} if self.table is None else self.table.numbers
        return {name: value for name, value in numbers.items() if value >= 0}

    @property
    def classes(self) -> dict[str, float]:
        """AP by the name of the class, where it is defined."""
        return {} if self.table is None else {one.name: one.ap for one in self.table.classes if one.ap >= 0}


def load_run(folder: Folder) -> Compared:
    """Read a run, and its newest evaluation, from its folder.

    Raises:
        OSError: the storage cannot be read.
    """
    is_alive = DriverWatch(folder).is_alive()
    events, record = read_events(folder), Record()
    for event in events:
        record.add(event)
    settings = _settings(folder)
    validation = _validation_data(events)
    run = Compared(
        name=folder.name,
        source=str(folder),
        state=_describe(run_state(folder, record, is_alive)),
        evaluation="-",
        table=None,
        fingerprint=validation.get("fingerprint"),
        shards=validation.get("source") or settings.get("data.val"),
        settings=settings,
        points=tuple(points_of(events)),
        no_detections="it was not evaluated yet",
    )
    evaluated = [row for row in record.metrics.rows if row.get("AP") is not None]
    if not evaluated:
        return run
    row = evaluated[-1]
    content = stored.read_evaluation(stored.folder_of(folder, row["position"]))
    if content is not None:
        return _with_evaluation(run, folder, content)
    numbers = {name: row.get(name, -1.0) for name in NAMES}
    problem = f"{stored.folder_of(folder, row['position']) / stored.EVALUATION} is missing"
    return replace(
        run,
        evaluation=f"epoch {row['epoch']}",
        table=ApTable(numbers, ()),
        no_detections=problem,
    )


def _with_evaluation(run: Compared, folder: Folder, content: Mapping[str, Any]) -> Compared:
    position, fingerprint = content["position"], content["fingerprint"]
    detections, problem = None, ""
    try:
        packed = stored.read_detections(stored.folder_of(folder, position))
        truth = json.loads(ground_truth_file(folder, fingerprint).read_text())
        detections = Detections(truth, packed.results())
    except (FileNotFoundError, ValueError) as error:
        problem = str(error)
    return replace(
        run,
        evaluation=f"epoch {content['epoch']}",
        table=ApTable.from_dict(content["table"]),
        fingerprint=fingerprint,
        detections=detections,
        no_detections=problem,
    )


def _settings(folder: Folder) -> dict[str, str]:
    """Return the settings in the notation of the command line, also those that this version does not know."""
    try:
        values = parse_yaml((folder / CONFIG).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {path: mlflow_run.param_text(value) for path, value in flatten(values or {}).items()}


def _validation_data(events: Iterable[Event]) -> dict[str, Any]:
    launches = [event for event in events if event["kind"] == "launched"]
    found = [each for event in launches for each in event["datasets"] if each["context"] == "validation"]
    return found[-1] if found else {}


def _describe(state: RunState) -> str:
    if state.fraction is None or state.state == "finished":
        return state.state
    return f"{state.state} at epoch {state.epoch:.2f} of {state.epochs}"


def points_of(events: Iterable[Event]) -> list[Point]:
    """Return the values of loss and AP of a run with what had been spent until then.

    Steps that were trained again after a failure count once, but the time of both counts.
    """
    points: list[Point] = []
    first = began = last = spent = 0.0
    workers = 0
    for event in events:
        now = event["time"]
        first = first or now
        if event["kind"] in ("started", "resumed"):
            spent += workers * (last - began)
            began = last = now
            workers = event.get("workers") or 1
            points = [point for point in points if point.samples <= event["position"]]
        elif event["kind"] in ("step", "evaluation"):
            last = max(last, now)
            values = {name: event["metrics"].get(name) for name in ("loss", "AP")}
            known = {name: float(value) for name, value in values.items() if value is not None}
            if known:
                worker_hours = (spent + workers * (last - began)) / 3600
                points.append(
                    Point(event["step"], event["position"], (now - first) / 3600, worker_hours, known)
                )
    return points
