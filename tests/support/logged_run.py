"""Write the events of a run without training."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydetr.tracking.events import EventLog
from raydetr.tracking.uploader import Uploader

END = ("finished", "stopped", "failed")


def log_run(
    folder: Path,
    uri: str,
    *,
    kind: str = "run",
    experiment: str = "experiment",
    params: Mapping[str, Any] | None = None,
    steps: Sequence[tuple[int, Mapping[str, float]]] = (),
    evaluations: Sequence[tuple[int, Mapping[str, float]]] = (),
    datasets: Sequence[Mapping[str, Any]] = (),
    end: str | None = "finished",
    **fields: Any,
) -> EventLog:
    """Log a run from its launch to its end; every evaluation is that of its step, with a batch of one image."""
    log = EventLog(folder)
    log.append(
        "launched", type=kind, key=uuid.uuid4().hex, name=folder.name, recipe="quickstart", uri=uri,
        experiment=experiment, command=f"raydetr train quickstart --name {folder.name}", tags={"raydetr.kind": kind},
        params=dict(params or {}), datasets=datasets, files=[], **fields,
    )  # fmt: skip
    log.append("started", step=0, position=0, workers=1, samples_per_epoch=1, epochs=100)
    for step, metrics in steps:
        log.append("step", step=step, position=step, metrics=dict(metrics))
    for step, metrics in evaluations:
        log.append("evaluation", step=step, position=step, metrics={"epoch": step, **metrics})
    if end is not None:
        log.append(end)
    assert log.flush()
    return log


def write_table(folder: Path, position: int, classes: Mapping[str, float]) -> None:
    """Write the table of an evaluation with AP by class."""
    file = folder / "evaluations" / str(position) / "ap.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"name": name, "AP": value, "AP50": value, "category_id": number, "num_objects": 1}
            for number, (name, value) in enumerate(classes.items(), 1)]  # fmt: skip
    file.write_text(json.dumps({"classes": rows}))


def upload(folder: Path, uri: str | None = None) -> str:
    """Upload a run; return the id of its MLflow run."""
    uploader = Uploader(folder, uri)
    uploader.sync()
    return uploader.ensure_run()
