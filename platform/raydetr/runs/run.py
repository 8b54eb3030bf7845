"""A run from the driver's side: check, make its folder and its MLflow run, train, say what came out."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from raydetr.config import ConfigError, RunConfig, flatten, from_yaml, override, to_dict, to_yaml
from raydetr.config.paths import absolute
from raydetr.console import Display, Progress, say
from raydetr.data.splits import open_splits, write_missing_sample
from raydetr.doctor import examine as quick
from raydetr.doctor.findings import Target
from raydetr.environment import describe_environment
from raydetr.runs.session import Assignment, run_session
from raydetr.tracking import mlflow_run
from raydetr.training import checkpoint, init_weights
from raydetr.training.world import World


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    name: str
    folder: Path
    mlflow_run_id: str
    tracking_uri: str
    checkpoint: Path
    metrics: Mapping[str, Any]  # AP, AP50, ..., per_class, peak_rss_mb, train_seconds
    seconds: float


def start(
    config: RunConfig,
    *,
    local: bool = False,
    name: str | None = None,
    parent_run_id: str | None = None,
    callbacks: Sequence[Any] = (),
    warn: bool = True,
) -> RunResult:
    """Train a new run of `config`, on Ray, or in this process with `local`.

    A search gives its trials a name, an MLflow parent, and callbacks for Ray Train. Without `warn`, nothing is
    said of what is odd in the data: it is meant, or was said before.

    Raises:
        ConfigError: the configuration contradicts itself or the data.
        FileNotFoundError, ValueError: the shards cannot be used.
        LaunchError: the cluster could not carry it out.
    """
    config = resolve(config)
    if warn:
        say_warnings(config)
    for line in init_weights.describe(config):
        say(line)
    name = name or new_name(config.recipe)
    folder = config.storage.path / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    uri = mlflow_run.resolve_uri(config.tracking.uri, config.storage.path)
    run_id = mlflow_run.create_run(uri, config.tracking.experiment, name, parent_run_id=parent_run_id)
    (folder / "mlflow_run_id").write_text(run_id)
    _describe(uri, run_id, config)
    return _execute(config, folder, uri, run_id, None, local, callbacks)


def resume(folder: Path, *, overrides: Mapping[str, Any] | None = None, local: bool = False) -> RunResult:
    """Go on with the run in `folder` from its newest whole checkpoint, in the same MLflow run.

    Raises:
        ConfigError: `folder` is no run.
        CheckpointError: the run has no whole checkpoint, or the overrides do not fit it.
    """
    if not (folder / "config.yaml").exists():
        raise ConfigError(
            f"{folder}: no run there (config.yaml is missing); runs are folders below storage.path"
        )
    config = override(from_yaml(folder / "config.yaml"), overrides or {})
    config = resolve(config)
    last, faults = checkpoint.newest(path.parent for path in folder.glob("*/*/meta.json"))
    for fault in faults:
        say(f"passed over: {fault}")
    if last is None:
        raise checkpoint.CheckpointError(f"{folder}: no whole checkpoint to resume from; start a new run")
    train_shards, _ = open_splits(config.data, sizes_known=True)
    epochs = config.optim.epochs
    if checkpoint.check_fits(last, config, train_shards).position >= epochs * train_shards.num_samples:
        raise ConfigError(
            f"{folder}: has trained all {epochs} epochs already; set optim.epochs higher to go on, "
            "or start a new run"
        )
    run_id = (folder / "mlflow_run_id").read_text()
    uri = mlflow_run.resolve_uri(config.tracking.uri, config.storage.path)
    mlflow_run.reopen_run(uri, run_id)
    for path, (old, new) in mlflow_run.log_params(uri, run_id, flatten(to_dict(config))).items():
        say(f"changed for the resumed run: {path} from {old} to {new}")
    (folder / "config.yaml").write_text(to_yaml(config))
    return _execute(config, folder, uri, run_id, last, local)


def say_warnings(config: RunConfig) -> None:
    """What the quick part of `raydetr doctor` finds odd in the data of a resolved configuration, a line each."""
    for line in quick.warnings(*open_splits(config.data, sizes_known=True), Target.of(config)):
        say(f"warning: {line}")


def new_name(prefix: str) -> str:
    """A name that no other run has."""
    return f"{prefix}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


def resolve(config: RunConfig) -> RunConfig:
    """Make paths absolute and fill in what the data decides; check what contradicts.

    Raises:
        ConfigError: the classes differ between the splits or from `model.num_classes`, the batch
            cannot be divided among the workers, or the precision does not go with the device.
    """
    config = _with_absolute_paths(config)
    write_missing_sample(config.data)
    train, val = open_splits(config.data)
    quick.check_may_train(train, val)
    num_classes = train.label_map.num_classes
    given = config.model.num_classes
    if given is None:
        config = override(config, {"model.num_classes": num_classes})
    elif given < num_classes or (given > num_classes and config.data.label_map == "contiguous"):
        raise ConfigError(
            f"model.num_classes is {given}, but {config.data.train} has {num_classes} classes with "
            f"data.label_map={config.data.label_map}: leave model.num_classes unset, or set it to {num_classes}"
        )
    if config.optim.precision == "fp16" and not config.cluster.use_gpu:
        raise ConfigError(
            "optim.precision=fp16 is for GPUs: set cluster.use_gpu=true, or optim.precision=bf16 for a CPU"
        )
    workers, batch = config.cluster.num_workers, config.data.batch_size
    if batch % workers:
        raise ConfigError(
            f"data.batch_size={batch} is the batch of all workers and cannot be divided among "
            f"cluster.num_workers={workers}: use a multiple of {workers}"
        )
    return config


def _execute(
    config: RunConfig,
    folder: Path,
    uri: str,
    run_id: str,
    resume_from: Path | None,
    local: bool,
    callbacks: Sequence[Any] = (),
) -> RunResult:
    began = time.perf_counter()
    assignment = Assignment(
        config=to_dict(config),
        run_name=folder.name,
        folder=str(folder),
        tracking_uri=uri,
        mlflow_run_id=run_id,
        resume_from=None if resume_from is None else str(resume_from),
    )
    attempt = f"attempt-{1 + sum(1 for _ in folder.glob('attempt-*')):02d}"
    try:
        if local:
            metrics = _run_locally(assignment, config, attempt)
        else:
            metrics = _run_on_ray(assignment, config, attempt, callbacks)
    except KeyboardInterrupt:
        _finish(uri, run_id, "KILLED")
        raise
    except BaseException:
        _finish(uri, run_id, "FAILED")
        raise
    _finish(uri, run_id, "FINISHED", Path(metrics["checkpoint"]))
    return RunResult(
        name=folder.name,
        folder=folder,
        mlflow_run_id=run_id,
        tracking_uri=uri,
        checkpoint=Path(metrics["checkpoint"]),
        metrics=metrics,
        seconds=time.perf_counter() - began,
    )


def _finish(uri: str, run_id: str, status: mlflow_run.Status, last: Path | None = None) -> None:
    """End the MLflow run; a server that is down then must not take the result of the training with it."""
    try:
        if last is not None:
            meta = checkpoint.read_meta(last)
            reference = {"path": str(last), "epoch": meta.epoch, "position": meta.position,
                         "fingerprint": meta.fingerprint, "state_crc32": meta.state_crc32}  # fmt: skip
            mlflow_run.log_text(uri, run_id, json.dumps(reference, indent=1), "checkpoint.json")
        mlflow_run.finish_run(uri, run_id, status)
    except mlflow_run.TrackingError as error:
        say(f"warning: {error}; the run's folder holds its checkpoints and metrics")


def _run_on_ray(
    assignment: Assignment, config: RunConfig, attempt: str, callbacks: Sequence[Any]
) -> dict[str, Any]:
    from raydetr.runs.ray_train import launch

    return launch(assignment, config.cluster, attempt, config.storage.keep_checkpoints, callbacks)


def _run_locally(assignment: Assignment, config: RunConfig, attempt: str) -> dict[str, Any]:
    torch.set_num_threads(config.cluster.cpus_per_worker)
    device = torch.device("cuda" if config.cluster.use_gpu else "cpu")
    with Display() as display:
        folder = Path(assignment.folder) / attempt
        host = LocalHost(folder, config.storage.keep_checkpoints, display)
        run_session(assignment, World.alone(device), host)
    assert host.last is not None
    return host.last


class LocalHost:
    """Keeps checkpoints in a folder of the run and shows progress at once."""

    def __init__(self, folder: Path, keep_checkpoints: int, display: Display) -> None:
        self._folder, self._keep, self._display = folder, keep_checkpoints, display
        self.last: dict[str, Any] | None = None

    def publish(self, name: str, metrics: Mapping[str, Any], write: checkpoint.Writer | None) -> None:
        """Write the checkpoint where it stays, and drop the oldest beyond those that are kept."""
        assert write is not None
        write(self._folder / name)
        for old in sorted(self._folder.iterdir())[: -self._keep]:
            shutil.rmtree(old)
        self.last = {**metrics, "checkpoint": str(self._folder / name)}

    def show(self, progress: Progress) -> None:
        """Show at once."""
        self._display.show(progress)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Workers run elsewhere. In a Ray job the working directory is a copy that is deleted afterwards."""
    base = Path.home() / "raydetr" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else Path.cwd()
    paths = {
        "storage.path": config.storage.path,
        "init.checkpoint": config.init.checkpoint,
        "data.cache": config.data.cache,
    }
    locations = {"data.train": config.data.train, "data.val": config.data.val}
    return override(
        config,
        {key: str(base / path.expanduser()) for key, path in paths.items() if path}
        | {key: absolute(location, base) for key, location in locations.items()},
    )


def _describe(uri: str, run_id: str, config: RunConfig) -> None:
    """What is known before the first step: settings, data, environment."""
    mlflow_run.log_params(uri, run_id, flatten(to_dict(config)))
    splits = open_splits(config.data, sizes_known=True)
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
    mlflow_run.log_text(uri, run_id, json.dumps(describe_environment(), indent=1), "environment.json")
