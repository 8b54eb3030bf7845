"""Tracking: one MLflow run, fed by a thread, so that training never waits for a server.

The driver makes the run (`create_run`), describes it (`log_params`, `log_dataset`) and ends it
(`finish_run`); the worker of rank 0 feeds it through a `Tracker`. This is the only module that
imports mlflow.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import tempfile
import threading
import time
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

from matplotlib.figure import Figure  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import (  # noqa: E402
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    Run,
    ViewType,
)
from mlflow.exceptions import MlflowException  # noqa: E402
from PIL import Image  # noqa: E402

log = logging.getLogger(__name__)

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
    """The embedded database beside the runs."""
    return f"sqlite:///{storage_path.absolute() / 'mlflow.db'}"


def resolve_uri(uri: str | None, storage_path: Path) -> str:
    """The tracking URI as every process can use it: workers run in a folder of their own."""
    if uri is None:
        return default_uri(storage_path)
    file = _sqlite_file(uri)
    return f"sqlite:///{file.absolute()}" if file else uri


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
        client = _client(uri)
        experiment_id = _experiment_id(client, uri, experiment)
        run = client.create_run(experiment_id, tags={**(tags or {}), **parent}, run_name=run_name)
    return str(run.info.run_id)


def reopen_run(uri: str, run_id: str) -> None:
    """Set a run back to RUNNING: a resumed training goes on in the same run."""
    with _explained(uri, f"reopen the run {run_id}"):
        _client(uri).update_run(run_id, status="RUNNING")


def finish_run(uri: str, run_id: str, status: Status) -> None:
    """Write the final status and the end time."""
    with _explained(uri, f"finish the run {run_id}"):
        _client(uri).set_terminated(run_id, status=status)


def log_params(uri: str, run_id: str, params: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Log dotted paths and their values, in the notation that the command line reads back.

    MLflow never changes a param. Where a resumed run has other values, the first ones stay, and the tag
    `raydetr.changed_on_resume` says what changed; the return value does too: {path: (old, new)}.
    """
    texts = {path: _param_text(value) for path, value in params.items()}
    with _explained(uri, f"log the params of run {run_id}"):
        client = _client(uri)
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
            _client(uri).set_tag(run_id, name, value[:_TAG_LENGTH])


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
        _client(uri).log_inputs(run_id, [DatasetInput(dataset, tags)])


def log_text(uri: str, run_id: str, text: str, file: str) -> None:
    """Keep a text as the artifact `file` (a path within the run's artifacts); waits until it is stored."""
    with _explained(uri, f"store {file} of run {run_id}"):
        _store_file(_client(uri), run_id, file, text.encode())


# --- the worker's side ---


class Tracker:
    """Feeds one run from a training process. No call waits for MLflow, except `flush` and `close`.

    Values and files go into a buffer in memory; a thread sends it every few seconds. What could not be sent
    stays in the buffer and is tried again; sending a value twice is harmless, since it carries its timestamp.
    """

    def __init__(self, uri: str, run_id: str, *, interval_s: float = 3.0) -> None:
        self.uri = uri
        self.run_id = run_id
        self._interval_s = interval_s
        self._metrics: list[Metric] = []
        self._files: list[tuple[str, bytes]] = []
        self._changed = threading.Condition()
        self._hurry = False
        self._closed = False
        self._num_failures = 0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-tracker", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step. Values that are not finite are kept as they are."""
        now = int(time.time() * 1000)
        rows = [Metric(_metric_name(name), float(value), now, step) for name, value in values.items()]
        with self._changed:
            assert not self._closed, "the tracker is closed"
            self._metrics += rows

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a (small) file as it is now."""
        self.content(path.read_bytes(), str(PurePosixPath(folder) / path.name))

    def text(self, text: str, file: str) -> None:
        """Keep a text as the artifact `file`."""
        self.content(text.encode(), file)

    def figure(self, figure: Figure, file: str) -> None:
        """Keep a matplotlib figure as the artifact `file` (PNG)."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        self.content(buffer.getvalue(), file)

    def image(self, image: Image.Image, file: str) -> None:
        """Keep a picture as the artifact `file` (PNG)."""
        buffer = io.BytesIO()
        image.save(buffer, format="png")
        self.content(buffer.getvalue(), file)

    def content(self, content: bytes, file: str) -> None:
        """Keep bytes as the artifact `file`, a path within the run's artifacts; a later one replaces it."""
        with self._changed:
            assert not self._closed, "the tracker is closed"
            # an older one of the same name that has not been sent yet would only be overwritten
            self._files = [entry for entry in self._files if entry[0] != file] + [(file, content)]

    def flush(self, timeout_s: float = 60.0) -> None:
        """Wait until everything recorded so far is stored.

        Raises:
            TrackingError: sending failed, or did not end in time; what is unsent stays in the buffer.
        """
        with self._changed:
            failures = self._num_failures
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_empty() or self._num_failures > failures, timeout_s)
            if not self._is_empty():
                raise TrackingError(self._complaint(timeout_s)) from self._error

    def close(self, timeout_s: float = 60.0) -> None:
        """Flush, then end the thread.

        Raises:
            TrackingError: as `flush`; the thread ends all the same.
        """
        try:
            self.flush(timeout_s)
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            # a request in flight is not waited for: the thread is a daemon and cannot hold the process
            self._thread.join(timeout=1.0)

    def _is_empty(self) -> bool:
        return not self._metrics and not self._files

    def _complaint(self, timeout_s: float) -> str:
        why = _first_line(self._error) if self._error else f"no answer within {timeout_s:g} s"
        unsent = f"{len(self._metrics)} metric values and {len(self._files)} files"
        return f"{unsent} of run {self.run_id} did not reach MLflow at {self.uri}: {why}"

    def _run(self) -> None:
        client = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._hurry or self._closed, self._interval_s)
                if self._closed:
                    return
                self._hurry = False
            try:
                client = client or _client(self.uri)
                self._send_metrics(client)
                self._send_files(client)
                self._report(None)
            except Exception as error:  # whatever it is, it must not end the thread: `flush` raises it
                self._report(error)

    def _send_metrics(self, client: MlflowClient) -> None:
        while batch := self._metrics[:_METRICS_PER_BATCH]:
            client.log_batch(self.run_id, metrics=batch)
            with self._changed:
                del self._metrics[: len(batch)]

    def _send_files(self, client: MlflowClient) -> None:
        while self._files:
            entry = self._files[0]
            _store_file(client, self.run_id, *entry)
            with self._changed:
                self._files = [other for other in self._files if other is not entry]

    def _report(self, error: Exception | None) -> None:
        with self._changed:
            if error and not self._error:
                log.warning("MLflow at %s: %s; will be tried again", self.uri, _first_line(error))
            self._error = error
            self._num_failures += error is not None
            self._changed.notify_all()


# --- the reading side ---


def fetch_run(uri: str, run_id_or_name: str) -> TrackedRun:
    """What MLflow holds of a run.

    Raises:
        ValueError: no run has this id or name, or several have this name.
        TrackingError: MLflow cannot be reached.
    """
    with _explained(uri, f"read the run {run_id_or_name}"):
        client = _client(uri)
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
        client = _client(uri)
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
        return Path(_client(uri).download_artifacts(run_id, file, folder)).read_bytes()


# --- helpers ---


def _client(uri: str) -> MlflowClient:
    file = _sqlite_file(uri)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@contextmanager
def _explained(uri: str, what: str) -> Iterator[None]:
    try:
        yield
    except (MlflowException, OSError) as error:
        raise TrackingError(f"could not {what} in MLflow at {uri}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _experiment_id(client: MlflowClient, uri: str, experiment: str) -> str:
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        return str(found.experiment_id)
    file = _sqlite_file(uri)
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


def _metric_name(name: str) -> str:
    return re.sub(r"[^\w.\- :/]", "_", name)  # MLflow refuses other characters


def _store_file(client: MlflowClient, run_id: str, file: str, content: bytes) -> None:
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
