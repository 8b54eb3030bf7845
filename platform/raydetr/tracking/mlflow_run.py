"""Tracking: one MLflow run, fed by a thread, so that training never waits for a server.

The driver makes the run (`create_run`), describes it (`log_params`, `log_dataset`) and ends it
(`finish_run`); the worker of rank 0 feeds it through a `Tracker`. This is the only module that
imports mlflow.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

# Read by mlflow at each request; whoever sets them in the environment wins. The defaults (7 retries of 120 s,
# with pauses) would hold a caller for minutes; and a training platform has no business to phone home.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import (  # noqa: E402
    Dataset,
    DatasetInput,
    InputTag,
    Param,
    Run,
    ViewType,
)
from mlflow.exceptions import MlflowException  # noqa: E402

from raydetr.config import RunConfig  # noqa: E402
from raydetr.config.paths import SQLITE, sqlite_file  # noqa: E402

# Its lines about making tables are no news to users; warnings remain
for _logger in ("mlflow.store.db.utils", "alembic"):
    logging.getLogger(_logger).setLevel(logging.WARNING)

Status = Literal["FINISHED", "FAILED", "KILLED"]
Curves = dict[str, list[tuple[int, float]]]

CHANGED_TAG = "raydetr.changed_on_resume"

_METRICS_PER_BATCH = 1000  # MLflow's limit
_PARAMS_PER_BATCH = 100  # MLflow's limit
_PARAM_LENGTH = 6000  # MLflow's limit
_DIGEST_LENGTH = 36  # MLflow's limit
_TAG_LENGTH = 8000  # MLflow's limit
_CUT = "... (cut; config.yaml holds all of it)"


class TrackingError(RuntimeError):
    """MLflow could not be reached or refused; the message names the URI."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as MLflow holds it: params as text, the last value of each metric, the files it kept."""

    run_id: str
    name: str
    status: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    artifacts: tuple[str, ...]


# --- the driver's side ---


def default_uri(storage_path: Path) -> str:
    """Return the URI of the embedded database in the folder of the runs."""
    return f"{SQLITE}{storage_path.absolute() / 'mlflow.db'}"


def tracking_uri(config: RunConfig) -> str:
    """Return where a run with this (resolved) configuration is tracked."""
    return config.tracking.uri or default_uri(config.storage.path)


def create_run(
    uri: str,
    experiment: str,
    run_name: str,
    *,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Make a run (and the database and the experiment, the first time) and return its id.

    Call it in the driver: two processes that create one database at the same time get in each other's way.
    """
    parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
    with _explained(uri, f"create the run {run_name}"):
        client = connect(uri)
        experiment_id = _experiment_id(client, uri, experiment)
        run = client.create_run(experiment_id, tags={**(tags or {}), **parent}, run_name=run_name)
    return str(run.info.run_id)


def reopen_run(uri: str, run_id: str) -> None:
    """Set a run back to RUNNING: a resumed training goes on in the same run."""
    with _explained(uri, f"reopen the run {run_id}"):
        connect(uri).update_run(run_id, status="RUNNING")


def finish_run(uri: str, run_id: str, status: Status) -> None:
    """Write the final status and the end time."""
    with _explained(uri, f"finish the run {run_id}"):
        connect(uri).set_terminated(run_id, status=status)


def log_params(uri: str, run_id: str, params: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Log dotted paths and their values, in the notation that the command line reads back.

    MLflow never changes a param. Where a resumed run has other values, the first ones stay, and the tag
    `raydetr.changed_on_resume` says what changed; the return value does too: {path: (old, new)}.
    """
    texts = {path: _param_text(value) for path, value in params.items()}
    with _explained(uri, f"log the params of run {run_id}"):
        client = connect(uri)
        known = client.get_run(run_id).data.params
        added = [Param(path, text) for path, text in texts.items() if path not in known]
        for start in range(0, len(added), _PARAMS_PER_BATCH):
            client.log_batch(run_id, params=added[start : start + _PARAMS_PER_BATCH])
        changed = {path: (known[path], text) for path, text in texts.items() if known.get(path, text) != text}
        if changed:
            said = "; ".join(f"{path}: {old} -> {new}" for path, (old, new) in changed.items())
            client.set_tag(run_id, CHANGED_TAG, said[:_TAG_LENGTH])
    return changed


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run; a tag that it has is replaced."""
    with _explained(uri, f"set tags of run {run_id}"):
        for name, value in tags.items():
            connect(uri).set_tag(run_id, name, value[:_TAG_LENGTH])


def log_dataset(
    uri: str,
    run_id: str,
    *,
    name: str,
    fingerprint: str,
    source: str,
    context: str,
    profile: Mapping[str, Any],
) -> None:
    """Log a dataset as an input of the run.

    Args:
        fingerprint: of the data; its beginning is the digest that MLflow shows.
        source: where the shards are.
        context: what it is used for: "training" or "validation".
        profile: numbers that describe it, such as num_images.
    """
    dataset = Dataset(
        name=name,
        digest=fingerprint[:_DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"uri": source}),
        profile=json.dumps({"fingerprint": fingerprint, **profile}),
    )
    with _explained(uri, f"log the dataset {name} of run {run_id}"):
        tags = [InputTag("mlflow.data.context", context)]
        connect(uri).log_inputs(run_id, [DatasetInput(dataset, tags)])


def log_text(uri: str, run_id: str, text: str, file: str) -> None:
    """Keep a text as the artifact `file` (a path within the run's artifacts); waits until it is stored."""
    with _explained(uri, f"store {file} of run {run_id}"):
        store_file(connect(uri), run_id, file, text.encode())


# --- the reading side ---


def fetch_run(uri: str, run_id_or_name: str) -> TrackedRun:
    """What MLflow holds of a run.

    Raises:
        ValueError: no run has this id or name, or several have this name.
        TrackingError: MLflow cannot be reached.
    """
    with _explained(uri, f"read the run {run_id_or_name}"):
        client = _connect_to_read(uri)
        run = _find_run(client, uri, run_id_or_name)
        return TrackedRun(
            run_id=run.info.run_id,
            name=run.info.run_name or "",
            status=run.info.status,
            params=dict(run.data.params),
            metrics={name: _restored(value) for name, value in run.data.metrics.items()},
            artifacts=tuple(sorted(_walk(client, run.info.run_id, None))),
        )


def fetch_history(uri: str, run_id: str) -> Curves:
    """All values of all metrics as {name: [(step, value), ...]}, by step.

    Where a resumed run went through a step again, the later value counts.
    """
    with _explained(uri, f"read the metrics of run {run_id}"):
        client = _connect_to_read(uri)
        history: Curves = {}
        for name in client.get_run(run_id).data.metrics:
            points = sorted(client.get_metric_history(run_id, name), key=lambda point: point.timestamp)
            history[name] = sorted({point.step: _restored(point.value) for point in points}.items())
    return history


def fetch_artifact(uri: str, run_id: str, file: str) -> bytes:
    """The content of an artifact.

    Raises:
        TrackingError: there is no such artifact, or MLflow cannot be reached.
    """
    with (
        _explained(uri, f"read {file} of run {run_id}"),
        tempfile.TemporaryDirectory(prefix="raydetr-") as folder,
    ):
        return Path(_connect_to_read(uri).download_artifacts(run_id, file, folder)).read_bytes()


# --- helpers ---


def connect(uri: str) -> MlflowClient:
    """Return a client that writes; makes the folder of an embedded database (MLflow makes the database)."""
    file = sqlite_file(uri)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _connect_to_read(uri: str) -> MlflowClient:
    """Return a client that only reads: a missing database is an error, and is not made.

    Raises:
        TrackingError: there is no such database.
    """
    file = sqlite_file(uri)
    if file and not file.is_file():
        raise TrackingError(f"{file}: no such MLflow database; runs make one in their storage.path")
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def _explained(uri: str, what: str) -> Iterator[None]:
    try:
        yield
    except (MlflowException, OSError) as error:
        raise TrackingError(f"could not {what} in MLflow at {uri}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _experiment_id(client: MlflowClient, uri: str, experiment: str) -> str:
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        return str(found.experiment_id)
    file = sqlite_file(uri)
    beside = (file.absolute().parent / "mlflow-artifacts").as_uri() if file else None
    try:
        return str(client.create_experiment(experiment, artifact_location=beside))
    except MlflowException as error:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise error
        return str(found.experiment_id)  # another driver was faster


def _param_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _PARAM_LENGTH else text[: _PARAM_LENGTH - len(_CUT)] + _CUT


def metric_name(name: str) -> str:
    """Return the name as MLflow accepts it."""
    return re.sub(r"[^\w.\- :/]", "_", name)  # MLflow refuses other characters


def store_file(client: MlflowClient, run_id: str, file: str, content: bytes) -> None:
    """Store bytes as the artifact `file`, a path within the run's artifacts."""
    path = PurePosixPath(file)
    folder = str(path.parent) if path.parent.name else None
    with tempfile.TemporaryDirectory(prefix="raydetr-") as temporary:
        local = Path(temporary) / path.name
        local.write_bytes(content)
        client.log_artifact(run_id, str(local), folder)


def _find_run(client: MlflowClient, uri: str, run_id_or_name: str) -> Run:
    if re.fullmatch("[0-9a-f]{32}", run_id_or_name):
        return client.get_run(run_id_or_name)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    quote = '"' if "'" in run_id_or_name else "'"
    named = f"attributes.run_name = {quote}{run_id_or_name}{quote}"
    found = client.search_runs(experiments, named, ViewType.ACTIVE_ONLY)
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(run.info.run_id for run in found)
        raise ValueError(
            f"{len(found)} runs in {uri} are named {run_id_or_name!r}; name one by its id: {ids}"
        )
    latest = client.search_runs(experiments, max_results=5, order_by=["attributes.start_time DESC"])
    names = ", ".join(run.info.run_name or run.info.run_id for run in latest)
    raise ValueError(
        f"no run in {uri} has the name or id {run_id_or_name!r}; the latest are: {names or 'none'}"
    )


def _walk(client: MlflowClient, run_id: str, folder: str | None) -> Iterator[str]:
    for entry in client.list_artifacts(run_id, folder):
        if entry.is_dir:
            yield from _walk(client, run_id, entry.path)
        else:
            yield entry.path


def _restored(value: float) -> float:
    # MLflow's database keeps an infinity as the largest finite number
    return math.copysign(math.inf, value) if abs(value) >= 1.79e308 else value
