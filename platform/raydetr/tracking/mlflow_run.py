"""Create, describe, finish and read MLflow runs. These functions wait for MLflow; they are for the driver.

The driver creates the run (`create_run`), describes it (`log_params`, `log_dataset`) and finishes it (`finish_run`).
Rank 0 logs its metrics through a `Tracker` (tracker.py), which does not wait. No other module imports mlflow.
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

# Defaults, which variables in the environment override. MLflow's own defaults (7 retries of 120 s, with pauses) would
# block a caller for minutes, and its telemetry sends data about the user. Set before the import of mlflow.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, Run, ViewType  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

from raydetr.config import RunConfig  # noqa: E402
from raydetr.config.paths import SQLITE, is_remote, local_folder, sqlite_file  # noqa: E402

# Hide its messages about creating tables; warnings are still shown
for _logger in ("mlflow.store.db.utils", "alembic"):
    logging.getLogger(_logger).setLevel(logging.WARNING)

Status = Literal["FINISHED", "FAILED", "KILLED"]

CHANGED_TAG = "raydetr.changed_on_resume"

# MLflow's limits
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 6000
_DIGEST_LENGTH = 36
_TAG_LENGTH = 8000

_TRUNCATED = "... (truncated; config.yaml has the complete value)"


class TrackingError(RuntimeError):
    """MLflow could not be reached, or refused a request; the message names the URI."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as stored in MLflow: params as text, the last value of each metric, the paths of the artifacts."""

    run_id: str
    name: str
    status: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    artifacts: tuple[str, ...]


# --- Writing ---


def default_uri(storage_path: str | Path, run: str = "") -> str:
    """Return the URI of the SQLite database in the folder of the runs, or in that of one run.

    If the runs are at a URL, the folder is `runs`.
    """
    folder = Path("runs") if is_remote(str(storage_path)) else local_folder(storage_path)
    return f"{SQLITE}{folder.absolute() / run / 'mlflow.db'}"


def tracking_uri(config: RunConfig) -> str:
    """Return the tracking URI of a run with this (resolved) configuration."""
    return config.tracking.uri or default_uri(config.storage.path)


def create_run(
    uri: str,
    experiment: str,
    run_name: str,
    *,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Create a run, and the database and the experiment if they are missing; return the id of the run.

    Call it in the driver only: two processes that create the same database at the same time can fail.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
    with _tracking_errors(uri, f"create the run {run_name}"):
        client = connect(uri)
        experiment_id = _experiment_id(client, uri, experiment)
        run = client.create_run(experiment_id, tags={**(tags or {}), **parent}, run_name=run_name)
    return str(run.info.run_id)


def reopen_run(uri: str, run_id: str) -> None:
    """Set a run back to RUNNING: a resumed training continues in the same MLflow run.

    Raises:
        TrackingError: MLflow cannot be reached, or has no such run.
    """
    with _tracking_errors(uri, f"reopen the run {run_id}"):
        connect(uri).update_run(run_id, status="RUNNING")


def finish_run(uri: str, run_id: str, status: Status) -> None:
    """Set the final status and the end time.

    Raises:
        TrackingError: MLflow cannot be reached, or has no such run.
    """
    with _tracking_errors(uri, f"finish the run {run_id}"):
        connect(uri).set_terminated(run_id, status=status)


def log_params(uri: str, run_id: str, params: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Log settings by dotted path, in the notation of the command line; return the changed ones: {path: (old, new)}.

    MLflow does not allow a param to change. If a resumed run has other values, the first ones stay, and the tag
    `raydetr.changed_on_resume` lists the changes.

    Raises:
        TrackingError: MLflow cannot be reached, or has no such run.
    """
    texts = {path: _param_text(value) for path, value in params.items()}
    with _tracking_errors(uri, f"log the params of run {run_id}"):
        client = connect(uri)
        known = client.get_run(run_id).data.params
        added = [Param(path, text) for path, text in texts.items() if path not in known]
        for start in range(0, len(added), _PARAMS_PER_BATCH):
            client.log_batch(run_id, params=added[start : start + _PARAMS_PER_BATCH])
        changed = {path: (known[path], text) for path, text in texts.items() if known.get(path, text) != text}
        if changed:
            text = "; ".join(f"{path}: {old} -> {new}" for path, (old, new) in changed.items())
            client.set_tag(run_id, CHANGED_TAG, text[:_TAG_LENGTH])
    return changed


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run; existing tags are replaced.

    Raises:
        TrackingError: MLflow cannot be reached, or has no such run.
    """
    with _tracking_errors(uri, f"set tags of run {run_id}"):
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
        fingerprint: of the data; its first characters are the digest that MLflow shows.
        source: folder or URL of the shards.
        context: "training" or "validation".
        profile: numbers that describe the dataset, such as num_images.

    Raises:
        TrackingError: MLflow cannot be reached, or has no such run.
    """
    dataset = Dataset(
        name=name,
        digest=fingerprint[:_DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"uri": source}),
        profile=json.dumps({"fingerprint": fingerprint, **profile}, allow_nan=False),
    )
    with _tracking_errors(uri, f"log the dataset {name} of run {run_id}"):
        tags = [InputTag("mlflow.data.context", context)]
        connect(uri).log_inputs(run_id, [DatasetInput(dataset, tags)])


def log_text(uri: str, run_id: str, text: str, file: str) -> None:
    """Store a text as the artifact `file`, a path within the run's artifacts.

    Raises:
        TrackingError: MLflow cannot be reached, or has no such run.
    """
    with _tracking_errors(uri, f"store {file} of run {run_id}"):
        store_file(connect(uri), run_id, file, text.encode())


# --- Reading ---


def fetch_run(uri: str, run_id_or_name: str) -> TrackedRun:
    """Read a run.

    Raises:
        ValueError: no run has this id or name, or several runs have this name.
        TrackingError: MLflow cannot be reached.
    """
    with _tracking_errors(uri, f"read the run {run_id_or_name}"):
        client = _connect_to_read(uri)
        found = _find_runs(client, run_id_or_name)
        latest = [] if found else _latest_runs(client)
    run = _only(found, latest, uri, run_id_or_name)
    with _tracking_errors(uri, f"read the run {run_id_or_name}"):
        return TrackedRun(
            run_id=run.info.run_id,
            name=run.info.run_name or "",
            status=run.info.status,
            params=dict(run.data.params),
            metrics={name: _restore_infinity(value) for name, value in run.data.metrics.items()},
            artifacts=tuple(sorted(_walk(client, run.info.run_id, None))),
        )


def fetch_artifact(uri: str, run_id: str, file: str) -> bytes:
    """Read the content of an artifact.

    Raises:
        TrackingError: there is no such artifact, or MLflow cannot be reached.
    """
    with (
        _tracking_errors(uri, f"read {file} of run {run_id}"),
        tempfile.TemporaryDirectory(prefix="raydetr-") as folder,
    ):
        return Path(_connect_to_read(uri).download_artifacts(run_id, file, folder)).read_bytes()


# --- Helpers ---


def connect(uri: str) -> MlflowClient:
    """Return a client that writes; create the folder of a SQLite database (MLflow creates the database).

    Raises:
        OSError: the folder cannot be created.
        MlflowException: the URI is not valid.
    """
    file = sqlite_file(uri)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _connect_to_read(uri: str) -> MlflowClient:
    """Return a client that only reads: it does not create a missing SQLite database.

    Raises:
        TrackingError: there is no such database.
    """
    file = sqlite_file(uri)
    if file and not file.is_file():
        raise TrackingError(f"{file}: no such MLflow database; a run creates one in its storage.path")
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def _tracking_errors(uri: str, action: str) -> Iterator[None]:
    """Raise errors of MLflow as TrackingError, with the action that failed.

    MLflow lets the errors of its libraries through: of the database, of a client of the artifact store that is missing
    or has no credentials.
    """
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(f"could not {action} in MLflow at {uri}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _experiment_id(client: MlflowClient, uri: str, experiment: str) -> str:
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        return str(found.experiment_id)
    file = sqlite_file(uri)
    # By default, MLflow would put the artifacts into the current working directory
    artifacts = (file.absolute().parent / "mlflow-artifacts").as_uri() if file else None
    try:
        return str(client.create_experiment(experiment, artifact_location=artifacts))
    except MlflowException as error:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise error
        return str(found.experiment_id)  # another driver created it at the same time


def _param_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _PARAM_LENGTH else text[: _PARAM_LENGTH - len(_TRUNCATED)] + _TRUNCATED


def metric_name(name: str) -> str:
    """Replace the characters that MLflow does not allow in the name of a metric."""
    return re.sub(r"[^\w.\- :/]", "_", name)


def store_file(client: MlflowClient, run_id: str, file: str, content: bytes) -> None:
    """Store bytes as the artifact `file`, a path within the run's artifacts.

    Raises:
        OSError, MlflowException: MLflow cannot be reached, or refuses.
    """
    path = PurePosixPath(file)
    folder = str(path.parent) if path.parent.name else None
    with tempfile.TemporaryDirectory(prefix="raydetr-") as temporary:
        local = Path(temporary) / path.name
        local.write_bytes(content)
        client.log_artifact(run_id, str(local), folder)


def _find_runs(client: MlflowClient, run_id_or_name: str) -> list[Run]:
    if re.fullmatch("[0-9a-f]{32}", run_id_or_name):
        return [client.get_run(run_id_or_name)]
    quote = '"' if "'" in run_id_or_name else "'"  # whichever is not in the name
    named = f"attributes.run_name = {quote}{run_id_or_name}{quote}"
    return list(client.search_runs(_experiments(client), named, ViewType.ACTIVE_ONLY))


def _latest_runs(client: MlflowClient) -> list[Run]:
    return list(
        client.search_runs(_experiments(client), max_results=5, order_by=["attributes.start_time DESC"])
    )


def _experiments(client: MlflowClient) -> list[str]:
    return [experiment.experiment_id for experiment in client.search_experiments()]


def _only(found: list[Run], latest: list[Run], uri: str, run_id_or_name: str) -> Run:
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(run.info.run_id for run in found)
        raise ValueError(
            f"{len(found)} runs in {uri} are named {run_id_or_name!r}; give the id of one: {ids}"
        )
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


def _restore_infinity(value: float) -> float:
    # MLflow's database stores infinity as the largest finite number
    return math.copysign(math.inf, value) if abs(value) >= 1.79e308 else value
