"""Start and resume a run, in the driver: check, create its folder and its MLflow run, train, summarize."""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raydetr.config import (
    ConfigError,
    RunConfig,
    absolute_paths,
    flatten,
    override,
    to_dict,
    to_yaml,
)
from raydetr.config.paths import base_folder, is_remote, sqlite_file
from raydetr.console import print_status
from raydetr.data.splits import open_splits, write_missing_synthetic
from raydetr.doctor import examine
from raydetr.doctor.findings import TrainingTarget
from raydetr.runs.lease import Lease, LeaseError
from raydetr.runs.local import train_locally
from raydetr.runs.result import RunResult
from raydetr.runs.run_tracking import (
    create_mlflow_run,
    describe_mlflow_run,
    finish_mlflow_run,
    reopen_mlflow_run,
    tracking_warnings,
)
from raydetr.runs.session import Run, read_config
from raydetr.runs.signals import RunStopped, StopSignals
from raydetr.shards.reader import Shards
from raydetr.store.folders import Folder, open_folder, write_file
from raydetr.tracking import mlflow_run
from raydetr.tracking.events import EventLog, read_events
from raydetr.training import checkpoint, init_weights

# Settings of a run that a resume cannot change
_FIXED = ("recipe", "init.", "model.backbone.weights", "storage.path", "tracking.")


def start(
    config: RunConfig,
    *,
    local: bool = False,
    name: str | None = None,
    or_resume: bool = False,
    parent_run_id: str | None = None,
    callbacks: Sequence[Any] = (),
    warn: bool = True,
) -> RunResult:
    """Train a new run, on Ray, or in this process with `local`.

    Args:
        config: what to train.
        local: train in this process, without Ray.
        name: of the run; None: a new one. A search names its trials.
        or_resume: a run with this name goes on, or has its result returned if it is finished.
        parent_run_id: of the search's MLflow run.
        callbacks: of the search, for Ray Train.
        warn: print warnings about the data.

    Raises:
        ConfigError: the configuration contradicts itself or the data, the name is taken, or the run that is to go on
            has another configuration.
        CheckpointError: `init.checkpoint` cannot be used.
        OSError, ValueError: the shards cannot be used.
        TrackingError: MLflow cannot be reached before the first step.
        LaunchError: the run failed on Ray; with `local`, the errors of `run_session` instead.
        LeaseError: another process drives the run that is to go on.
        RunStopped: a signal stopped the run.
    """
    if name is not None:
        check_name(name)
    given_uri = config.tracking.uri
    config, (train, val) = resolve(config)
    name = new_name(config.recipe) if name is None else name
    folder = open_folder(config.storage.path) / name
    _check_new(folder, config, or_resume)
    last = checkpoint.newest_valid(folder, lambda message: None) if or_resume else None
    if last is not None:
        return _go_on(last, folder, config, given_uri, local)
    if warn:
        print_warnings(config, train, val)
    for line in init_weights.summarize(config, train.label_map):
        print_status(line)
    with Lease(folder) as lease:
        config, run_id = reopen_mlflow_run(folder, config) or create_mlflow_run(
            config, name, parent_run_id=parent_run_id
        )
        write_file(folder / "config.yaml", to_yaml(config).encode())
        write_file(folder / "mlflow_run_id", run_id.encode())
        with tracking_warnings():
            describe_mlflow_run(mlflow_run.tracking_uri(config), run_id, config, (train, val))
        return _execute(Run(config, folder, run_id), lease, local, callbacks)


def resume(
    location: str | Path, *, overrides: Mapping[str, Any] | None = None, local: bool = False
) -> RunResult:
    """Continue the run in a folder, or at a URL, from its newest complete checkpoint, in the same MLflow run.

    Raises:
        ConfigError: there is no run, the run has trained all its epochs, an override has no effect on a resumed
            run, or the configuration contradicts itself or the data.
        CheckpointError: the run has no complete checkpoint, or the overrides do not fit it.
        OSError, ValueError: the shards cannot be used.
        TrackingError: MLflow cannot be reached before the first step.
        LaunchError: the run failed on Ray; with `local`, the errors of `run_session` instead.
        LeaseError: another process drives the run.
        RunStopped: a signal stopped the run.
    """
    folder = open_folder(location)
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder}: not the folder of a run, storage.path/NAME (config.yaml is missing)")
    for path in overrides or {}:
        if path.startswith(_FIXED):
            raise ConfigError(f"{path} has no effect on a run that is resumed: omit it, or start a new run")
    config, (train, _) = resolve(override(read_config(folder), overrides or {}))
    with Lease(folder) as lease:  # before anything of the run is changed
        last = checkpoint.newest_valid(folder, lambda message: print_status(f"skipped: {message}"))
        if last is None:
            raise checkpoint.CheckpointError(
                f"{folder}: no complete checkpoint to resume from; start a new run"
            )
        checkpoint.check_compatible(last, config, train)
        if checkpoint.is_complete(last, config):
            raise ConfigError(
                f"{folder}: has already trained all {config.optim.epochs} epochs; set optim.epochs higher to continue, "
                "or start a new run"
            )
        run_id = (folder / "mlflow_run_id").read_text()
        uri = mlflow_run.tracking_uri(config)
        with tracking_warnings():
            mlflow_run.reopen_run(uri, run_id)
            for path, (old, new) in mlflow_run.log_params(uri, run_id, flatten(to_dict(config))).items():
                print_status(f"changed for the resumed run: {path} from {old} to {new}")
        write_file(folder / "config.yaml", to_yaml(config).encode())
        return _execute(Run(config, folder, run_id, last), lease, local)


def _go_on(last: Folder, folder: Folder, config: RunConfig, given_uri: str | None, local: bool) -> RunResult:
    """Continue a run from its last checkpoint, or return the result of a finished one.

    Raises:
        ConfigError: the run has another configuration.
    """
    stored = read_config(folder)
    differing = _differences(stored, config, given_uri)
    if differing:
        listed = "; ".join(f"{path} is {old} there, and {new} here" for path, (old, new) in differing.items())
        remedy = "Give another --name"
        if not any(path.startswith(_FIXED) for path in differing):
            changes = shlex.join(
                f"{path}={'null' if new is None else new}" for path, (_, new) in differing.items()
            )
            remedy = f"Continue it with `--resume {shlex.quote(str(folder))} {changes}` instead, or give another --name"
        raise ConfigError(f"{folder} is a run with other settings: {listed}. {remedy}")
    if not checkpoint.is_complete(last, stored):
        return resume(str(folder), local=local)
    print_status(f"{folder}: this run is finished")
    uri, run_id = mlflow_run.tracking_uri(stored), (folder / "mlflow_run_id").read_text()
    metrics, events = checkpoint.read_metrics(last), read_events(folder)
    if not any(event["kind"] == "finished" for event in events):  # its driver was killed just before
        log = EventLog(folder)
        log.append("finished", position=checkpoint.position_of(last), AP=metrics.get("AP"))
        _flush(log)
        finish_mlflow_run(uri, run_id, "FINISHED", last)
    seconds = events[-1]["time"] - events[0]["time"]
    return RunResult(folder.name, folder, run_id, uri, last, metrics, seconds)


def _differences(stored: RunConfig, given: RunConfig, given_uri: str | None) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which resolved configurations differ, {path: (stored, given)}, but for those that a start
    decides: the database in place of an MLflow server that failed, the best checkpoint of a run to start from.
    """
    old, new = flatten(to_dict(stored)), flatten(to_dict(given))
    is_own = stored.tracking.uri is None or sqlite_file(stored.tracking.uri) is not None
    # A database that stands in for a server, or for a setting that was not given: its path depends on the machine
    decided = {"tracking.uri"} if is_own and (given_uri is None or sqlite_file(given_uri) is None) else set()
    before, now = stored.init.checkpoint, given.init.checkpoint
    if before is not None and now is not None and open_folder(before).parent == open_folder(now).parent:
        decided.add("init.checkpoint")
    return {
        path: (old.get(path), new.get(path))
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path) and path not in decided
    }


def check_name(name: str) -> None:
    """Check the name of a run, which is also that of a folder, a part of a URL, and of a job.

    Raises:
        ConfigError: it cannot be.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ConfigError(
            f"the name {name!r} is not the name of a folder: use letters, digits, '-', '_' and '.'"
        )


def _check_new(folder: Folder, config: RunConfig, or_resume: bool) -> None:
    """Check that there is no run with this name, unless it may go on.

    Raises:
        ConfigError: there is one.
    """
    if or_resume or not folder.exists():
        return
    last = checkpoint.newest_valid(folder, lambda message: None)
    if last is None:
        raise ConfigError(f"{folder} exists and has no checkpoint: remove it, or give another --name")
    if checkpoint.is_complete(last, config):
        raise ConfigError(
            f"{folder}: this run is finished; give another --name, or `raydetr evaluate {folder}`"
        )
    raise ConfigError(
        f"{folder} exists: continue it with `raydetr train --resume {folder}`, or give another --name"
    )


def print_warnings(config: RunConfig, train: Shards, val: Shards) -> None:
    """Print the warnings of the quick part of `raydetr doctor` about the data of a resolved configuration."""
    for line in examine.quick_warnings(train, val, TrainingTarget.from_config(config)):
        print_status(f"warning: {line}")


def new_name(prefix: str) -> str:
    """Return a name that no other run has: `prefix`, time (UTC) and four random digits."""
    return f"{prefix}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


def resolve(config: RunConfig) -> tuple[RunConfig, tuple[Shards, Shards]]:
    """Make paths absolute, set the number of classes if it is not given, and check for contradictions.

    Returns:
        the resolved configuration, and the training and validation shards, which the driver opens only here.

    Raises:
        ConfigError: the classes differ between the splits or from `model.num_classes`, the batch cannot be divided
            among the workers, or the device does not support the precision.
        OSError, ValueError: the shards cannot be used.
    """
    config = absolute_paths(config, base_folder())
    if config.tracking.uri is None and is_remote(config.storage.path):
        config = override(config, {"tracking.uri": mlflow_run.default_uri(base_folder() / "runs")})
    if (
        config.init.checkpoint is not None
    ):  # a run in place of a checkpoint; its best one may change until it is read
        config = override(config, {"init.checkpoint": str(checkpoint.find(config.init.checkpoint))})
    write_missing_synthetic(config.data)
    train, val = open_splits(config.data)
    examine.check_may_train(train, val)
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
    _check_layout(config)
    return config, (train, val)


def _check_layout(config: RunConfig) -> None:
    """Check that the global batch can be divided among the workers.

    Raises:
        ConfigError: a worker without images cannot take part.
    """
    workers, batch = config.cluster.num_workers, config.data.batch_size
    if workers <= batch:
        return
    idle = (
        f"data.batch_size={batch} leaves {workers - batch} of cluster.num_workers={workers} without an image"
    )
    if config.model.backbone.norm == "batch":
        raise ConfigError(
            f"{idle}, and batch norm (model.backbone.norm=batch) needs one on every worker: use 1 to {batch} workers, "
            "or a larger batch"
        )
    print_status(f"warning: {idle}: they only wait for the others; use at most {batch} workers")


def _execute(run: Run, lease: Lease, local: bool, callbacks: Sequence[Any] = ()) -> RunResult:
    began = time.perf_counter()
    uri, run_id = mlflow_run.tracking_uri(run.config), run.mlflow_run_id
    log = EventLog(run.folder)
    try:
        with StopSignals(lease.is_lost) as stop:
            if local:
                train_locally(run, stop.is_set)
            else:
                from raydetr.runs.ray_train import train_on_ray  # Ray takes seconds to import

                train_on_ray(run, callbacks, stop, log)
            last = checkpoint.newest_valid(run.folder, lambda message: print_status(f"skipped: {message}"))
            if lease.is_lost():
                raise LeaseError(
                    f"{run.folder}: another process has taken this run over, because this one gave no sign for a minute"
                )
            if stop.signal is not None and (last is None or not checkpoint.is_complete(last, run.config)):
                raise _stopped(run, last, stop.signal)
        if last is None:
            raise checkpoint.CheckpointError(f"{run.folder}: the run has ended, and has no valid checkpoint")
    except LeaseError:  # the run is that of another process now
        raise
    except (KeyboardInterrupt, RunStopped) as error:
        log.append("stopped", reason=str(error) or "interrupted")
        _flush(log)
        finish_mlflow_run(uri, run_id, "KILLED")
        raise
    except BaseException as error:
        log.append("failed", reason=f"{type(error).__name__}: {error}")
        _flush(log)
        finish_mlflow_run(uri, run_id, "FAILED")
        raise
    metrics = checkpoint.read_metrics(last)
    log.append("finished", position=checkpoint.position_of(last), AP=metrics.get("AP"))
    _flush(log)
    finish_mlflow_run(uri, run_id, "FINISHED", last)
    seconds = time.perf_counter() - began
    return RunResult(run.folder.name, run.folder, run_id, uri, last, metrics, seconds)


def _flush(log: EventLog) -> None:
    """Wait until the events are written; print a warning if they cannot be."""
    if not log.flush():
        print_status(f"warning: the last events of the run are lost: {log.problem}")


def _stopped(run: Run, last: Folder | None, number: signal.Signals) -> RunStopped:
    """Return what tells the user that a run was stopped, and how to go on."""
    if last is None:
        where = "before its first checkpoint: start it again"
    else:
        where = (
            f"at position {checkpoint.position_of(last)}: continue with `raydetr train --resume "
            f"{shlex.quote(str(run.folder))}`"
        )
    return RunStopped(f"{run.folder.name} was stopped by {number.name} {where}", 128 + number)
