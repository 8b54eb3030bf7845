"""Connect to MLflow, and read its runs. `Uploader` (uploader.py) writes them. No other package imports mlflow."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

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
from mlflow.entities import Run, ViewType  # noqa: E402
from mlflow.store.db import utils as db_utils  # noqa: E402
from mlflow.store.db.base_sql_model import Base  # noqa: E402

from raydetr.locations import sqlite_file  # noqa: E402
from raydetr.tracking.uris import TrackingError, hide_password, mask_password  # noqa: E402

# Hide its messages about creating tables, and about each of its tries to open a database; the last one is raised
for _logger in ("mlflow.store.db.utils", "alembic"):
    logging.getLogger(_logger).setLevel(logging.ERROR)

DATABASE_TRIES = 3  # to open a database; MLflow's ten take two minutes
MAX_MESSAGE = 200  # characters of an error
_PARAM_LENGTH = 6000  # MLflow's limit
_TRUNCATED = "... (truncated; config.yaml has the complete value)"


@dataclass(frozen=True)
class TrackedRun:
    """A run as stored in MLflow: params as text, the last value of each metric, the paths of the artifacts.

    `fingerprint` is that of the validation data; None: unknown.
    """

    uri: str
    run_id: str
    name: str
    status: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    artifacts: tuple[str, ...]
    tags: Mapping[str, str]
    fingerprint: str | None


# --- Reading ---


def fetch_run(uri: str, run_id_or_name: str) -> TrackedRun:
    """Read a run.

    Raises:
        ValueError: no run has this id or name, or several runs have this name.
        TrackingError: MLflow cannot be reached.
    """
    with tracking_errors(uri, f"read the run {run_id_or_name}"):
        client = _connect_to_read(uri)
        found = _find_runs(client, run_id_or_name)
        latest = [] if found else _latest_runs(client)
    run = _only(found, latest, uri, run_id_or_name)
    with tracking_errors(uri, f"read the run {run_id_or_name}"):
        return _tracked(uri, client, run)


def search_runs(uri: str, query: str) -> list[TrackedRun]:
    """Read the runs of all experiments that an MLflow filter selects, the oldest first.

    Args:
        uri: the tracking URI.
        query: such as "params.`optim.lr` = '0.0001'"; a name with a dot may be without its backquotes.

    Raises:
        ValueError: the filter selects no run.
        TrackingError: MLflow cannot be reached, or does not understand the filter.
    """
    with tracking_errors(uri, f"search for {query}"):
        client = _connect_to_read(uri)
        found = _search(client, _with_backquotes(query))
        runs = [_tracked(uri, client, run) for run in found]
    if not runs:
        raise ValueError(f"no run in {mask_password(uri)} matches the filter {query}")
    return runs


def fetch_artifact(uri: str, run_id: str, file: str) -> bytes:
    """Read the content of an artifact.

    Raises:
        TrackingError: there is no such artifact, or MLflow cannot be reached.
    """
    with (
        tracking_errors(uri, f"read {file} of run {run_id}"),
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
    db_utils.MAX_RETRY_COUNT = DATABASE_TRIES
    file = sqlite_file(uri)
    if file is None:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(str(file.absolute())):  # MLflow's own lock ends before its migrations are complete
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)  # creates the tables, or brings them up to date
    return client


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process of this machine at a time create what has this name, a database or the MLflow run of a folder."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    with Path(tempfile.gettempdir(), f"raydetr-mlflow-{os.getuid()}-{digest}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _connect_to_read(uri: str) -> MlflowClient:
    """Return a client that only reads.

    MLflow's own client would create a SQLite database that is missing, and tables in one that lacks them: it would turn
    any other file into a database of MLflow, and upgrade that of an older MLflow without a backup.

    Raises:
        TrackingError: there is no such database, or it is not one of this version of MLflow.
        sqlite3.Error: the file is no SQLite database.
    """
    file = sqlite_file(uri)
    if file is not None:
        _check_tables(file, uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _check_tables(file: Path, uri: str) -> None:
    if not file.is_file():
        raise TrackingError(f"{file}: no such MLflow database; a run creates one in its storage.path")
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
        found = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    missing = set(Base.metadata.tables) - found
    if missing:
        raise TrackingError(
            f"{file}: is not a database of this version of MLflow: it has no table {min(missing)}. If it is one of an "
            f"older version, copy the file and run `mlflow db upgrade {uri}`"
        )


@contextmanager
def tracking_errors(uri: str, action: str) -> Iterator[None]:
    """Raise errors of MLflow as TrackingError, with the action that failed.

    MLflow lets the errors of its libraries through: of the database, of a client of the artifact store that is missing
    or has no credentials.
    """
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(
            f"could not {action} in MLflow at {mask_password(uri)}: {hide_password(first_line(error), uri)}"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty.

    If it is long, return that of the first error instead, such as "Connection refused".
    """
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    cause = error.__cause__ or error.__context__
    return first_line(cause) if len(text) > MAX_MESSAGE and isinstance(cause, Exception) else text


def param_text(value: Any) -> str:
    """Return a setting as the param of an MLflow run, in the notation of the command line."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _PARAM_LENGTH else text[: _PARAM_LENGTH - len(_TRUNCATED)] + _TRUNCATED


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


def _tracked(uri: str, client: MlflowClient, run: Run) -> TrackedRun:
    digests = [
        each.dataset.digest
        for each in (run.inputs.dataset_inputs if run.inputs else ())
        if any(tag.key == "mlflow.data.context" and tag.value == "validation" for tag in each.tags)
    ]
    return TrackedRun(
        uri=uri,
        run_id=run.info.run_id,
        name=run.info.run_name or "",
        status=run.info.status,
        params=dict(run.data.params),
        metrics={name: _restore_infinity(value) for name, value in run.data.metrics.items()},
        artifacts=tuple(sorted(_walk(client, run.info.run_id, None))),
        tags=dict(run.data.tags),
        fingerprint=digests[-1] if digests else None,
    )


def _find_runs(client: MlflowClient, run_id_or_name: str) -> list[Run]:
    if re.fullmatch("[0-9a-f]{32}", run_id_or_name):
        return [client.get_run(run_id_or_name)]
    # MLflow has no escape for a quote in a filter: `_` stands for any character
    pattern = run_id_or_name.replace("'", "_")
    found = _search(client, f"attributes.run_name LIKE '{pattern}'")
    return [run for run in found if run.info.run_name == run_id_or_name]


def _search(client: MlflowClient, query: str) -> list[Run]:
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            _experiments(client),
            query,
            ViewType.ACTIVE_ONLY,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _with_backquotes(query: str) -> str:
    """Return a filter in which the names of settings and metrics, with their dots and slashes, are quoted."""
    # What is quoted stays as it is
    parts = re.split(r"""('[^']*'|"[^"]*"|`[^`]*`)""", query)
    names = r"\b(params?|metrics?|tags?)\.([A-Za-z_][\w]*(?:[./][\w]+)+)"
    parts[::2] = [re.sub(names, r"\1.`\2`", part) for part in parts[::2]]
    return "".join(parts)


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
            f"{len(found)} runs in {mask_password(uri)} are named {run_id_or_name!r}; give the id of one: {ids}"
        )
    names = ", ".join(run.info.run_name or run.info.run_id for run in latest)
    raise ValueError(
        f"no run in {mask_password(uri)} has the name or id {run_id_or_name!r}; the latest are: {names or 'none'}"
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
