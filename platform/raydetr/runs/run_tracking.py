"""Create, describe and finish the MLflow run of a run, in the driver. What fails in MLflow does not end the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from raydetr.config import ConfigError, RunConfig, flatten, override, to_dict, to_yaml
from raydetr.config.paths import base_folder, is_remote
from raydetr.console import print_status
from raydetr.environment import describe_environment
from raydetr.runs.session import read_config
from raydetr.shards.reader import Shards
from raydetr.store.folders import Folder
from raydetr.tracking import mlflow_run
from raydetr.training import checkpoint


def create_mlflow_run(
    config: RunConfig,
    name: str,
    *,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> tuple[RunConfig, str]:
    """Create an MLflow run where `tracking.uri` says, or in the run's folder with a warning if that fails.

    Returns:
        The configuration, whose `tracking.uri` is where the run is, and the id of the run.

    Raises:
        TrackingError: no run can be created in a database either.
    """
    new = partial(
        mlflow_run.create_run,
        experiment=config.tracking.experiment,
        run_name=name,
        parent_run_id=parent_run_id,
        tags=tags,
    )
    # A database of this run alone: driver and rank 0 write it in turn, also from several machines
    is_url = is_remote(config.storage.path)
    own = mlflow_run.default_uri(base_folder() / "runs" if is_url else config.storage.path, name)
    try:
        return config, new(mlflow_run.tracking_uri(config))
    except mlflow_run.TrackingError as error:
        if mlflow_run.tracking_uri(config) == mlflow_run.default_uri(config.storage.path):
            raise
        print_status(f"warning: {error}; this run is logged in {own}")
    return override(config, {"tracking.uri": own}), new(own)


def reopen_mlflow_run(folder: Folder, config: RunConfig) -> tuple[RunConfig, str] | None:
    """Reopen the MLflow run of a run that ended before its first checkpoint; None if it has none."""
    try:
        run_id = (folder / "mlflow_run_id").read_text()
        config = override(config, {"tracking.uri": read_config(folder).tracking.uri})
    except (FileNotFoundError, ConfigError):
        return None
    with tracking_warnings():
        mlflow_run.reopen_run(mlflow_run.tracking_uri(config), run_id)
    return config, run_id


def describe_mlflow_run(uri: str, run_id: str, config: RunConfig, splits: tuple[Shards, Shards]) -> None:
    """Log settings, data and environment."""
    mlflow_run.log_params(uri, run_id, flatten(to_dict(config)))
    for context, shards in zip(("training", "validation"), splits, strict=True):
        mlflow_run.log_dataset(
            uri,
            run_id,
            name="/".join(shards.location.split("/")[-2:]),
            fingerprint=shards.fingerprint,
            source=shards.location,
            context=context,
            profile={
                "num_images": shards.num_samples,
                "num_annotations": int(shards.samples["num_annotations"].sum()),
            },
        )
    mlflow_run.log_text(uri, run_id, to_yaml(config), "config.yaml")
    environment = json.dumps(describe_environment(), indent=1, allow_nan=False)
    mlflow_run.log_text(uri, run_id, environment, "environment.json")


def finish_mlflow_run(uri: str, run_id: str, status: mlflow_run.Status, last: Folder | None = None) -> None:
    """End the MLflow run. A server that cannot be reached is a warning: the training has its result."""
    with tracking_warnings():
        if last is not None:
            meta = dataclasses.asdict(checkpoint.read_description(last))
            fields = ("epoch", "position", "fingerprint", "state_crc32")
            reference = {"path": str(last)} | {name: meta[name] for name in fields}
            mlflow_run.log_text(
                uri, run_id, json.dumps(reference, indent=1, allow_nan=False), "checkpoint.json"
            )
        mlflow_run.finish_run(uri, run_id, status)


@contextmanager
def tracking_warnings() -> Iterator[None]:
    """Print an error of MLflow as a warning: what only describes a run must not end it."""
    try:
        yield
    except mlflow_run.TrackingError as error:
        print_status(f"warning: {error}; the run's folder has its configuration, metrics and checkpoints")
