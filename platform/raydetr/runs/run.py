"""Start and resume a run, in the driver: check, create its folder and its MLflow run, train, summarize."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raydetr.config import ConfigError, RunConfig, flatten, override, to_dict
from raydetr.console import print_status
from raydetr.doctor import examine
from raydetr.doctor.findings import TrainingTarget
from raydetr.locations import sqlite_file
from raydetr.runs.lease import DriverWatch, Lease, LeaseError
from raydetr.runs.local import train_locally
from raydetr.runs.resolve import resolve
from raydetr.runs.result import Effort, RunResult
from raydetr.runs.run_folder import Run, read_config, write_config
from raydetr.runs.run_tracking import Kind, log_launch, uploading, without_password
from raydetr.runs.signals import RunStopped, StopSignals
from raydetr.runs.state import is_run
from raydetr.shards.reader import Shards
from raydetr.store.folders import Folder, open_folder
from raydetr.tracking.events import EventLog, EventReader, read_events
from raydetr.tracking.upload_state import is_uploaded
from raydetr.tracking.uris import mask_password, tracking_uri
from raydetr.training import checkpoint, init_weights

# Settings of a run that a resume cannot change
_FIXED = ("recipe", "init.", "model.backbone.weights", "storage.path", "tracking.")


def start(
    config: RunConfig,
    *,
    local: bool = False,
    name: str | None = None,
    or_resume: bool = False,
    kind: Kind = "run",
    callbacks: Sequence[Any] = (),
    warn: bool = True,
    until_epoch: int | None = None,
) -> RunResult:
    """Train a new run, on Ray, or in this process with `local`.

    Args:
        config: what to train.
        local: train in this process, without Ray.
        name: of the run; None: a new one. A search names its trials.
        or_resume: a run with this name goes on, or has its result returned if it is finished.
        kind: "trial" in the folder of a search, which uploads it to MLflow.
        callbacks: of the search, for Ray Train.
        warn: print warnings about the data.
        until_epoch: end after this epoch, and its evaluation, for now; `resume` goes on. None: train to the end.

    Raises:
        ConfigError: the configuration contradicts itself or the data, the name is taken, or the run that is to go on
            has another configuration.
        CheckpointError: `init.checkpoint` cannot be used.
        OSError, ValueError: the shards cannot be used.
        LaunchError: the run failed on Ray; with `local`, the errors of `run_session` instead.
        LeaseError: another process drives the run that is to go on.
        RunStopped: a signal stopped the run.
    """
    if name is not None:
        check_name(name)
    is_uri_given = config.tracking.uri is not None
    config, splits = resolve(config)
    uri, config = tracking_uri(config), without_password(config)
    train, val = splits
    name = new_name(config.recipe) if name is None else name
    folder = open_folder(config.storage.path) / name
    check_new(folder, config, or_resume)
    last = checkpoint.newest_valid(folder, lambda message: None) if or_resume else None
    if last is not None:
        return _go_on(last, folder, config, uri if is_uri_given else None, local)
    if warn:
        print_warnings(config, train, val)
    for line in init_weights.summarize(config, train.label_map):
        print_status(line)
    with Lease(folder) as lease:
        run = Run(config, folder, None, bool(callbacks), until_epoch)
        return _execute(run, lease, splits, uri, kind, local, callbacks)


def resume(
    location: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    local: bool = False,
    uri: str | None = None,
    kind: Kind = "run",
    callbacks: Sequence[Any] = (),
    until_epoch: int | None = None,
) -> RunResult:
    """Continue the run in a folder, or at a URL, from its newest complete checkpoint, in the same MLflow run.

    Args:
        location: folder or URL of the run.
        overrides: of its configuration.
        local: train in this process, without Ray.
        uri: its tracking URI with the password, which is not stored; None: the environment has the password, if any.
        kind, callbacks, until_epoch: see `start`.

    Raises:
        ConfigError: there is no run, the run has trained all its epochs, an override has no effect on a resumed
            run, or the configuration contradicts itself or the data.
        CheckpointError: the run has no complete checkpoint, or the overrides do not fit it.
        OSError, ValueError: the shards cannot be used.
        LaunchError: the run failed on Ray; with `local`, the errors of `run_session` instead.
        LeaseError: another process drives the run.
        RunStopped: a signal stopped the run.
    """
    folder = _run_at(location)
    for path in overrides or {}:
        if path.startswith(_FIXED):
            raise ConfigError(f"{path} has no effect on a run that is resumed: omit it, or start a new run")
    stored = read_config(folder)
    config, splits = resolve(override(stored, overrides or {}))
    if stored.tracking.uri is None:  # it stays in its database: MLFLOW_TRACKING_URI is for new runs
        config = override(config, {"tracking.uri": None})
    stored_uri, config = tracking_uri(config), without_password(config)
    with Lease(folder) as lease:  # before anything of the run is changed
        last = checkpoint.newest_valid(folder)
        if last is None:
            raise checkpoint.CheckpointError(
                f"{folder}: no complete checkpoint to resume from; start a new run"
            )
        checkpoint.check_compatible(last, config, splits[0])
        if checkpoint.is_complete(last, config):
            raise ConfigError(
                f"{folder}: has already trained all {config.optim.epochs} epochs; set optim.epochs higher to continue, "
                "or start a new run"
            )
        for path, (old, new) in _changes(stored, config).items():
            print_status(f"changed for the resumed run: {path} from {old} to {new}")
        run = Run(config, folder, last, bool(callbacks), until_epoch)
        return _execute(run, lease, splits, uri or stored_uri, kind, local, callbacks)


def _run_at(location: str | Path) -> Folder:
    """Return the folder of a run that a user names: RUN, or RUN/last.

    Raises:
        ConfigError: it is none, or the user names another checkpoint than the newest.
    """
    folder = open_folder(location)
    if folder.name == checkpoint.LAST and (folder.parent / "config.yaml").exists():
        return folder.parent
    if (folder / "config.yaml").exists():
        return folder
    is_checkpoint = (folder / "meta.json").exists()
    run = folder.parent.parent if is_checkpoint else folder.parent
    if (is_checkpoint or folder.name == checkpoint.BEST) and (run / "config.yaml").exists():
        raise ConfigError(
            f"{folder}: a run goes on from its newest checkpoint: give {run}; to start a new run from the weights of "
            f"this one, set init.checkpoint={folder}"
        )
    raise ConfigError(f"{folder}: not the folder of a run, storage.path/NAME (config.yaml is missing)")


def _go_on(last: Folder, folder: Folder, config: RunConfig, uri: str | None, local: bool) -> RunResult:
    """Continue a run from its last checkpoint, or return the result of a finished one.

    Args:
        last: its last checkpoint.
        folder: of the run.
        config: what is to be trained.
        uri: the tracking URI that the user gives, with its password; None: that of the run.
        local: train in this process, without Ray.

    Raises:
        ConfigError: the run has another configuration.
    """
    stored = read_config(folder)
    if uri is None:  # MLFLOW_TRACKING_URI is for new runs
        config = override(config, {"tracking.uri": stored.tracking.uri})
    elif mask_password(uri) != tracking_uri(stored):  # a database whose path depends on the machine
        uri = None
    differing = differences(stored, config)
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
        return resume(str(folder), local=local, uri=uri)
    print_status(f"{folder}: this run is finished")
    metrics, events, pending = checkpoint.read_metrics(last), read_events(folder), None
    if not any(event["kind"] == "finished" for event in events):  # its driver was killed just before
        _log_finished(EventLog(folder), last, metrics)
    if not is_uploaded(folder):
        with uploading(folder, stored, uri or tracking_uri(stored), "run") as uploads:
            pass  # it sends what an earlier driver could not
        pending = uploads.pending
    return RunResult(folder, tracking_uri(stored), last, metrics, Effort.of(events), pending)


def differences(stored: RunConfig, given: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which resolved configurations differ, {path: (stored, given)}, but for those that a start
    decides: a database whose path depends on the machine, the best checkpoint of a run to start from.
    """
    decided = set()
    if all(uri is None or sqlite_file(uri) is not None for uri in (stored.tracking.uri, given.tracking.uri)):
        decided.add("tracking.uri")
    before, now = stored.init.checkpoint, given.init.checkpoint
    if before is not None and now is not None and open_folder(before).parent == open_folder(now).parent:
        decided.add("init.checkpoint")
    return {path: values for path, values in _changes(stored, given).items() if path not in decided}


def _changes(stored: RunConfig, given: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which configurations differ, {path: (stored, given)}."""
    old, new = flatten(to_dict(stored)), flatten(to_dict(given))
    return {
        path: (old.get(path), new.get(path))
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path)
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


def check_new(folder: Folder, config: RunConfig, or_resume: bool) -> None:
    """Check that there is no run with this name, unless it may go on.

    Raises:
        ConfigError: there is one.
    """
    if or_resume or not folder.exists():
        return
    last = checkpoint.newest_valid(folder, lambda message: None)
    if last is None:
        kinds = {event["kind"] for event in read_events(folder)}
        if "launched" in kinds and "started" not in kinds:  # a start that failed before its first step
            return
        if not is_run(folder):
            raise ConfigError(f"{folder} exists, and is not a run: remove it, or give another --name")
        if DriverWatch(folder).is_alive():
            raise ConfigError(f"{folder}: another process drives this run: give another --name")
        raise ConfigError(
            f"{folder} exists and has no checkpoint: start it again with --or-resume, or give another --name"
        )
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


def _execute(
    run: Run,
    lease: Lease,
    splits: tuple[Shards, Shards],
    uri: str,
    kind: Kind,
    local: bool,
    callbacks: Sequence[Any] = (),
) -> RunResult:
    write_config(run.folder, run.config)
    log = EventLog(run.folder)
    log_launch(log, run.folder, run.config, splits, kind)
    with uploading(run.folder, run.config, uri, kind) as uploads:
        last = _train(run, lease, log, local, callbacks)
        metrics = checkpoint.read_metrics(last)
        if checkpoint.is_complete(last, run.config):
            _log_finished(log, last, metrics)
        else:
            log.append("stopped", reason=f"after epoch {run.last_epoch}, to go on")
            _flush(log)
    effort = Effort.of(EventReader(run.folder, all_steps=False).read())
    return RunResult(run.folder, mask_password(uri), last, metrics, effort, uploads.pending)


def _train(run: Run, lease: Lease, log: EventLog, local: bool, callbacks: Sequence[Any]) -> Folder:
    """Train to the end, or until a signal; log any other end. Return the last checkpoint."""
    try:
        with StopSignals(lease.is_lost) as stop:
            if local:

                def should_stop() -> bool:
                    if lease.is_lost():  # at once, and without a last checkpoint
                        raise _lost(run)
                    return stop.is_set()

                train_locally(run, should_stop)
            else:
                from raydetr.runs.ray_train import train_on_ray  # Ray takes seconds to import

                train_on_ray(run, callbacks, stop, log)
            last = checkpoint.newest_valid(run.folder)
            if lease.is_lost():
                raise _lost(run)
            if stop.signal is not None and (last is None or not checkpoint.has_reached(last, run.last_epoch)):
                raise _stopped(run, last, stop.signal)
        if last is None:
            raise checkpoint.CheckpointError(f"{run.folder}: the run has ended, and has no valid checkpoint")
    except LeaseError:  # the run is that of another process now
        raise
    except (KeyboardInterrupt, RunStopped) as error:
        log.append("stopped", reason=str(error) or "interrupted")
        _flush(log)
        raise
    except BaseException as error:
        log.append("failed", reason=f"{type(error).__name__}: {error}")
        _flush(log)
        raise
    return last


def _lost(run: Run) -> LeaseError:
    return LeaseError(
        f"{run.folder}: another process has taken this run over, because this one gave no sign for a minute"
    )


def _log_finished(log: EventLog, last: Folder, metrics: Mapping[str, Any]) -> None:
    meta = dataclasses.asdict(checkpoint.read_description(last))
    fields = ("epoch", "position", "fingerprint", "state_crc32")
    reference = {"path": str(last)} | {name: meta[name] for name in fields}
    log.append(
        "finished",
        position=checkpoint.position_of(last),
        AP=metrics.get("AP"),
        json_files={"checkpoint.json": reference},
    )
    _flush(log)


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
