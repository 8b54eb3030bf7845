"""Write the MLflow run of a run from its events.

The events are the record. What is uploaded depends on them alone, and repeating it changes nothing: MLflow ignores a
point that it has (same key, step, timestamp and value), and the run is found again by a tag. `RUN/mlflow.json` has the
id of the MLflow run, and how far the upload got.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException

from raydetr.evaluation import stored
from raydetr.locations import sqlite_file
from raydetr.store.folders import Folder
from raydetr.tracking.description import describe
from raydetr.tracking.events import Event, EventReader
from raydetr.tracking.metric_names import metric_name
from raydetr.tracking.mlflow_run import (
    connect,
    locked,
    param_text,
    store_file,
    tracking_errors,
)
from raydetr.tracking.moved_database import artifacts_of, follow_move
from raydetr.tracking.upload_state import STATE, UploadState
from raydetr.tracking.uris import TrackingError, mask_password, restore_uri, storable_uri

KEY_TAG = "raydetr.run"  # identifies the MLflow run, also if MLflow's answer to its creation was lost
CHANGED_TAG = "raydetr.changed_on_resume"
METRICS_PER_BATCH = 1000  # MLflow's limits
PARAMS_PER_BATCH = 100
TAG_LENGTH = 8000
DIGEST_LENGTH = 36
LONG_UPLOAD_SECONDS = 3600.0  # for a model, whose requests have limits of their own

# MLflow's status, by kind of event
STATUS = {
    "launched": "RUNNING",
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "lost": "FAILED",
}


class Uploader:
    """Uploads the events of the run, or of the search, in a folder; every call of `sync` continues.

    Args:
        run: its folder.
        uri: the tracking URI; None: that of the events. It may have a password, which is never stored.
        on_alive: is called after every answer of MLflow with 0, and before an upload of many megabytes with the seconds
            that it may take.
    """

    def __init__(
        self, run: Folder, uri: str | None = None, on_alive: Callable[[float], None] = lambda seconds: None
    ) -> None:
        self._run, self._given_uri, self._on_alive = run, uri, on_alive
        self._launch: Event | None = None  # the first one
        self._state = UploadState.read(run)
        if self._state.uri not in (None, self._place()):
            self._state = UploadState()  # that of an upload to another place
        self._reader = EventReader(run, self._state.done)
        # Of what was collected, see `UploadState`
        self._last_steps, self._steps_before = dict(self._state.last_steps), dict(self._state.steps_before)
        self._evaluated_steps = set(self._state.evaluated_steps)
        self._metrics: list[Metric] = []  # to be sent
        self._files: dict[str, Folder | bytes] = {}  # to be sent, by artifact path
        self._events: list[Event] = []  # whose params, tags, inputs and status, or new AP, are to be sent
        self._evaluated: int | None = None  # position of the newest evaluation, if its files are to be sent
        self._is_checked = False  # the database, by this uploader

    def _place(self) -> str:
        return storable_uri(self._given_uri or self._first_launch()["uri"], self._run)

    @property
    def pending(self) -> str | None:
        """What MLflow lacks, as far as it was read; None if nothing."""
        if not (self._metrics or self._files or self._events or self._evaluated is not None):
            return None
        of_evaluation = "" if self._evaluated is None else ", and those of an evaluation"
        return f"{len(self._metrics)} metric values and {len(self._files)} files{of_evaluation}"

    def collect(self) -> None:
        """Read new events.

        Raises:
            OSError: they cannot be read.
        """
        for event in self._reader.read():
            self._collect(event)

    def sync(self) -> bool:
        """Upload what is new; return whether there was anything.

        Raises:
            OSError: the events or files of the run cannot be read.
            TrackingError: MLflow cannot be reached, or refuses; what was not sent is sent by the next call.
        """
        self.collect()
        if self.pending is None:
            return False
        launch = self._first_launch()
        uri = restore_uri(self._given_uri or launch["uri"], self._run)
        with tracking_errors(uri, f"upload {self._run.name}"):
            file = sqlite_file(uri)
            if file is not None and not self._is_checked:
                self._check_database(file)
                follow_move(file)
                self._is_checked = True
            client = connect(uri)
            if self._state.run_id is None:
                self._find_or_create(client, uri, launch)
            for event in self._events:
                self._send_details(client, event)
            self._send_metrics(client)
            try:
                self._send_files(client)
                self._register_model(client, uri)
            finally:  # a run that has ended does not stay RUNNING because the store of artifacts refuses
                self._send_status(client)
        self._events.clear()
        self._state.done, self._state.last_steps = dict(self._reader.done), dict(self._last_steps)
        self._state.steps_before, self._state.evaluated_steps = (
            self._steps_before,
            sorted(self._evaluated_steps),
        )
        self._state.write(self._run)
        return True

    @property
    def _run_id(self) -> str:
        assert self._state.run_id is not None
        return self._state.run_id

    def _first_launch(self) -> Event:
        if self._launch is None:
            # Not among the new events if the run was resumed
            events = EventReader(self._run, all_steps=False).read()
            self._launch = next((event for event in events if event["kind"] == "launched"), None)
        if self._launch is None:
            raise TrackingError(f"{self._run}: its events do not have the start of a run: nothing to upload")
        return self._launch

    # --- Collect what is to be sent ---

    def _collect(self, event: Event) -> None:
        kind = event["kind"]
        if kind in ("started", "resumed"):
            self._steps_before = dict(self._last_steps)
        metrics = {metric_name(name): value for name, value in (event.get("metrics") or {}).items()}
        for name in self._new_ones(event, metrics):
            value = float("nan") if metrics[name] is None else float(metrics[name])
            self._metrics.append(Metric(name, value, int(event["time"] * 1000), int(event["step"])))
        for name in event.get("files", ()):
            self._files[name] = self._run / name
        for name, value in event.get("json_files", {}).items():
            self._files[name] = json.dumps(value, indent=1, allow_nan=False).encode()
        # The files of an evaluation that is scored late do not replace those of a newer one
        if kind == "evaluation" and int(event["step"]) >= max(self._evaluated_steps, default=0):
            self._evaluated = event["position"]
        if kind in (*STATUS, "evaluation") or any(name in event for name in ("params", "tags", "datasets")):
            self._events.append(event)

    def _new_ones(self, event: Event, names: Collection[str]) -> list[str]:
        """Return the metrics of an event that were not collected before.

        A process that was killed may have logged steps and evaluations that the run then makes again: the first values
        count. Evaluations need not be scored in the order of their steps.
        """
        if event["kind"] == "system" or not names:
            return list(names)
        step = int(event["step"])
        if event["kind"] == "evaluation":
            if step in self._evaluated_steps:
                return []
            self._evaluated_steps.add(step)
            return list(names)
        # A process may log two values of one step: the corrupt samples of a step and of the evaluation after it
        new = [
            name
            for name in names
            if step >= self._last_steps.get(name, 0) and step != self._steps_before.get(name)
        ]
        self._last_steps |= dict.fromkeys(new, step)
        return new

    # --- Send it ---

    def _check_database(self, file: Path) -> None:
        """Check that the database is there if it has the run: an empty one in its place would help nobody."""
        if self._state.run_id is not None and not file.exists():
            raise TrackingError(
                f"{file}: the MLflow database that has this run is not here: go to the machine that has it, send the "
                f"run to another place (--uri), or remove {self._run / STATE} to send it to a new database"
            )

    def _find_or_create(self, client: MlflowClient, uri: str, launch: Event) -> None:
        """Find the MLflow run by its tag, or create it; keep its id."""
        experiment = _experiment_id(client, uri, launch["experiment"])
        self._on_alive(0.0)
        parent = None
        if launch["type"] == "trial":
            parent = Uploader(self._run.parent, self._given_uri, self._on_alive).ensure_run()
        query = f"tags.`{KEY_TAG}` = '{launch['key']}'"

        def find() -> list[str]:
            found = client.search_runs([experiment], query, ViewType.ALL, order_by=["attributes.start_time"])
            active = [run.info.run_id for run in found if run.info.lifecycle_stage != "deleted"]
            deleted = [run.info.run_id for run in found if run.info.lifecycle_stage == "deleted"]
            if deleted and not active:
                raise TrackingError(
                    f"the MLflow run of {self._run.name} is deleted: restore it with "
                    f"`mlflow runs restore --run-id {deleted[0]}`, with MLFLOW_TRACKING_URI={mask_password(uri)}"
                )
            return sorted(active)

        self._state.experiment_id = experiment
        # The driver and `raydetr track sync` may both be the first one
        with locked(_absolute(self._run)):
            if existing := find():
                return self._keep(existing[0])
            tags = {KEY_TAG: launch["key"]} | ({"mlflow.parentRunId": parent} if parent else {})
            created = client.create_run(
                experiment, start_time=int(launch["time"] * 1000), tags=tags, run_name=launch["name"]
            ).info.run_id
            first = find()[0]  # a process on another machine may have created one at the same time
            if first != created:
                client.delete_tag(created, KEY_TAG)  # so that nobody finds it, and asks to restore it
                client.delete_run(created)
            self._keep(first)

    def _keep(self, run_id: str) -> None:
        self._state.run_id, self._state.uri = run_id, self._place()
        self._state.write(self._run)

    def ensure_run(self) -> str:
        """Create the MLflow run, unless there is one; return its id.

        Raises:
            TrackingError: MLflow cannot be reached, or refuses.
        """
        if self._state.run_id is None:
            launch = self._first_launch()
            uri = restore_uri(self._given_uri or launch["uri"], self._run)
            with tracking_errors(uri, f"create the run {launch['name']}"):
                self._find_or_create(connect(uri), uri, launch)
        return self._run_id

    def _send_details(self, client: MlflowClient, event: Event) -> None:
        if "params" in event:
            self._send_params(client, event["params"])
        tags = [RunTag(name, str(value)[:TAG_LENGTH]) for name, value in event.get("tags", {}).items()]
        if tags:
            client.log_batch(self._run_id, tags=tags)
        for dataset in event.get("datasets", ()):
            client.log_inputs(self._run_id, [_dataset_input(dataset)])
        self._on_alive(0.0)

    def _send_params(self, client: MlflowClient, params: Mapping[str, Any]) -> None:
        """Send settings in the notation of the command line.

        MLflow does not allow a param to change. If a resumed run has other values, the first ones stay, and a tag lists
        the changes.
        """
        texts = {path: param_text(value) for path, value in params.items()}
        known = client.get_run(self._run_id).data.params
        added = [Param(path, text) for path, text in texts.items() if path not in known]
        for batch in _batches(added, PARAMS_PER_BATCH):
            client.log_batch(self._run_id, params=batch)
        changed = [
            f"{path}: {known[path]} -> {text}"
            for path, text in texts.items()
            if known.get(path, text) != text
        ]
        if changed:
            client.set_tag(self._run_id, CHANGED_TAG, "; ".join(changed)[:TAG_LENGTH])

    def _send_metrics(self, client: MlflowClient) -> None:
        while self._metrics:
            client.log_batch(self._run_id, metrics=self._metrics[:METRICS_PER_BATCH])
            del self._metrics[:METRICS_PER_BATCH]
            self._on_alive(0.0)

    def _send_files(self, client: MlflowClient) -> None:
        if self._evaluated is not None:
            # They replace those of an older evaluation in MLflow
            for name, path in _files_below(stored.folder_of(self._run, self._evaluated)):
                if not name.startswith(f"{stored.DETECTIONS}/"):
                    self._files[f"evaluation/{name}"] = path
            self._evaluated = None
        for name, source in list(self._files.items()):
            try:
                content = source if isinstance(source, bytes) else source.read_bytes()
            except (
                FileNotFoundError
            ):  # a picture that could not be drawn, or was of an evaluation that is replaced
                del self._files[name]
                continue
            store_file(client, self._run_id, name, content)
            del self._files[name]
            self._on_alive(0.0)

    def _last_status(self) -> Event | None:
        """Return the last start or end among the events to be sent."""
        return next((event for event in reversed(self._events) if event["kind"] in STATUS), None)

    def _register_model(self, client: MlflowClient, uri: str) -> None:
        """Register the best checkpoint of a finished run."""
        last, name = self._last_status(), self._first_launch().get("model")
        if last is not None and last["kind"] == "finished" and name is not None:
            from raydetr.tracking.model_registry import register_best  # imports torch

            self._on_alive(LONG_UPLOAD_SECONDS)
            register_best(client, uri, self._run, self._run_id, name)

    def _send_status(self, client: MlflowClient) -> None:
        """Describe the run for people after a start, an evaluation or an end; set the status of a start or end."""
        last = self._last_status()
        if last is None and not any(event["kind"] == "evaluation" for event in self._events):
            return
        text = describe(self._run, self._first_launch(), self._run_id)
        client.set_tag(self._run_id, "mlflow.note.content", text[:TAG_LENGTH])
        if last is None:
            return
        status = STATUS[last["kind"]]
        if status == "RUNNING":
            client.update_run(self._run_id, status=status)
        else:
            client.set_terminated(self._run_id, status=status, end_time=int(last["time"] * 1000))


def _absolute(run: Folder) -> str:
    return str(run.absolute() if isinstance(run, Path) else run)


def _experiment_id(client: MlflowClient, uri: str, experiment: str) -> str:
    """Return the id of an experiment; create it, for the view of training runs, if it is missing."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        _create_experiment(client, uri, experiment)
        found = client.get_experiment_by_name(experiment)
    assert found is not None
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the experiment {experiment} is deleted: restore it with `mlflow experiments restore --experiment-id "
            f"{found.experiment_id}`, with MLFLOW_TRACKING_URI={mask_password(uri)}, or set tracking.experiment to "
            "another one"
        )
    return str(found.experiment_id)


def _create_experiment(client: MlflowClient, uri: str, experiment: str) -> None:
    file = sqlite_file(uri)
    artifacts = None if file is None else artifacts_of(file)
    # Without this tag, MLflow shows the page for language models
    tags = {"mlflow.experimentKind": "custom_model_development"}
    try:
        client.create_experiment(experiment, artifact_location=artifacts, tags=tags)
    except MlflowException:  # another process may have created it at the same time
        if client.get_experiment_by_name(experiment) is None:
            raise


def _dataset_input(values: Mapping[str, Any]) -> DatasetInput:
    dataset = Dataset(
        name=values["name"],
        digest=values["fingerprint"][:DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"uri": values["source"]}),
        profile=json.dumps({"fingerprint": values["fingerprint"], **values["profile"]}, allow_nan=False),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", values["context"])])


def _files_below(folder: Folder) -> Iterator[tuple[str, Folder]]:
    """Yield the relative path of each file below a folder, and the file."""
    if isinstance(folder, Path):
        for root, _, names in os.walk(folder):
            for name in sorted(names):
                path = Path(root) / name
                yield path.relative_to(folder).as_posix(), path
    else:
        for name in sorted(folder.store.list(folder.key)):
            yield name, folder / name


def _batches(values: Sequence[Param], size: int) -> Iterator[Sequence[Param]]:
    return (values[start : start + size] for start in range(0, len(values), size))
