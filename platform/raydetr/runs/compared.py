"""Read what is compared: runs by folder, URL, name, MLflow id or filter, searches, COCO results. Nothing is written.

A run is read from its folder: its events, and the files of its newest evaluation. MLflow is only for runs whose folder
cannot be reached.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raydetr.console import print_status
from raydetr.evaluation.coco_metrics import AP_FILE, NAMES, ApTable, coco_ap
from raydetr.evaluation.ground_truth import ground_truth
from raydetr.evaluation.results_file import read_results
from raydetr.runs.compared_run import Compared, Detections, load_run
from raydetr.runs.state import CONFIG, SPACE, find_folder, is_run, trials_of
from raydetr.shards.reader import open_shards
from raydetr.store.folders import Folder, open_folder
from raydetr.tracking import mlflow_run
from raydetr.tracking.mlflow_run import TrackedRun
from raydetr.tracking.uris import TrackingError, default_uri, mask_password

FOLDER_TAG = "raydetr.folder"  # of an MLflow run


def load(
    names: Sequence[str],
    *,
    uri: str | None = None,
    query: str | None = None,
    storage: str = "runs",
    data: str | None = None,
) -> list[Compared]:
    """Read what is compared.

    Args:
        names: folders or URLs of runs and searches, names of those in `storage`, MLflow's ids and names of runs, and
            files of COCO results. A search stands for its trials.
        uri: MLflow's; None: MLFLOW_TRACKING_URI, or the database in `storage`.
        query: a filter of MLflow, which selects more runs.
        storage: folder or URL of the runs.
        data: the validation shards, for files of results; None: those of the first run.

    Raises:
        ValueError: something is not a run and not COCO results, or an option has no effect.
        TrackingError: MLflow cannot be reached.
        OSError: a file cannot be read.
    """
    if not names and query is None:
        raise ValueError("what is to be compared? Give runs, or --filter")
    tracking = uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(storage)
    found: list[Compared | Path] = []
    uses_mlflow = query is not None
    for name in names:
        there = _find(name, storage)
        if there:
            found += there
        else:
            uses_mlflow = True
            found.append(_from_mlflow(_fetch(name, tracking, storage)))
    if query is not None:
        named = {one.source for one in found if isinstance(one, Compared)}
        selected = map(_from_mlflow, mlflow_run.search_runs(tracking, query))
        found += [run for run in selected if run.source not in named]
    if uri is not None and not uses_mlflow:
        raise ValueError(
            f"--uri {mask_password(uri)} has no effect, because all runs are read from their folders: omit it"
        )
    return _with_headings(_evaluate_files(found, data))


def _find(name: str, storage: str) -> list[Compared | Path]:
    """Return the runs, or the file of results, that a user names; nothing: it is perhaps in MLflow.

    Raises:
        ValueError: it is a location, and neither.
    """
    folder = find_folder(name, storage)
    if folder is not None and (folder / SPACE).exists():
        trials = trials_of(folder)
        if not trials:
            raise ValueError(f"{folder}: this search has no trials yet")
        return [load_run(trial) for trial in trials]
    if folder is not None:
        return [load_run(folder)]
    file = open_folder(name)
    if name.endswith(".json") and isinstance(file, Path) and file.exists():
        return [file]
    if "/" in name or name.endswith(".json"):
        raise ValueError(
            f"{name}: is not the folder or URL of a run or a search ({CONFIG} is missing there), and no file of COCO "
            "results (.json)"
        )
    return []


# --- From MLflow ---


def _fetch(name: str, tracking: str, storage: str) -> TrackedRun:
    """Return the MLflow run of this name or id.

    Raises:
        ValueError: there is none.
        TrackingError: MLflow cannot be reached.
    """
    try:
        return mlflow_run.fetch_run(tracking, name)
    except TrackingError as error:
        raise TrackingError(f"{storage} has no run {name}, and perhaps MLflow has it, but: {error}") from None


def _from_mlflow(run: TrackedRun) -> Compared:
    """Return a run from its folder, if that can be reached; otherwise what MLflow has of it."""
    folder = _reachable(run.tags.get(FOLDER_TAG))
    if folder is not None:
        return load_run(folder)
    artifact = AP_FILE in run.artifacts
    content = (
        json.loads(mlflow_run.fetch_artifact(run.uri, run.run_id, AP_FILE)) if artifact else {"classes": []}
    )
    values = {name: run.metrics.get(f"AP/{name}", -1.0) for name in NAMES}
    return Compared(
        name=run.name or run.run_id,
        source=f"MLflow run {run.run_id}",
        state=run.status.lower(),
        evaluation="the last in MLflow",
        table=ApTable.from_dict({**values, **content}) if max(values.values()) >= 0 or artifact else None,
        fingerprint=run.fingerprint,
        settings=run.params,
        no_detections="only MLflow has it: its folder cannot be reached",
    )


def _reachable(location: str | None) -> Folder | None:
    if location is None:
        return None
    try:
        folder = open_folder(location)
        return folder if is_run(folder) else None
    except (OSError, ValueError):  # of another machine
        return None


# --- COCO results ---


def _evaluate_files(found: Sequence[Compared | Path], data: str | None) -> list[Compared]:
    """Evaluate the files of results against the validation data of the first run, or of `data`."""
    files = [one for one in found if isinstance(one, Path)]
    runs = [one for one in found if isinstance(one, Compared)]
    if not files:
        if data is not None:
            raise ValueError(f"--data {data} has no effect without a file of COCO results: omit it")
        return runs
    if data is not None:
        shards = open_shards(data)
        truth: Mapping[str, Any] = ground_truth(shards, "substitute").coco
        fingerprint: str | None = shards.fingerprint
        location: str | None = data
    else:
        first = next((run for run in runs if run.detections is not None), None)
        if first is None or first.detections is None:
            raise ValueError(
                f"{files[0]}: what are these results to be evaluated against? No run with detections is compared: "
                "give the validation shards as --data"
            )
        truth, fingerprint, location = first.detections.ground_truth, first.fingerprint, first.shards
    return [
        one if isinstance(one, Compared) else _evaluate_file(one, truth, fingerprint, location)
        for one in found
    ]


def _evaluate_file(
    file: Path, truth: Mapping[str, Any], fingerprint: str | None, shards: str | None
) -> Compared:
    results, warnings = read_results(file, truth)
    for warning in warnings:
        print_status(f"warning: {warning}")
    return Compared(
        name=file.name,
        source=str(file),
        state="results",
        evaluation="-",
        table=coco_ap(truth, results),
        fingerprint=fingerprint,
        shards=shards,
        detections=Detections(truth, results),
    )


def _with_headings(runs: Sequence[Compared]) -> list[Compared]:
    """Return the runs with different names: those of the same name are told apart by their folder or MLflow id."""
    counts = Counter(run.name for run in runs)
    named = [
        run if counts[run.name] == 1 else replace(run, name=f"{run.name} ({_place(run)})") for run in runs
    ]
    counts = Counter(run.name for run in named)
    return [
        run if counts[run.name] == 1 else replace(run, name=f"{run.name} #{number}")
        for number, run in enumerate(named, 1)
    ]


def _place(run: Compared) -> str:
    if run.source.startswith("MLflow run "):
        return run.source.removeprefix("MLflow run ")[:8]
    return run.source.rpartition("/")[0].rpartition("/")[2]
