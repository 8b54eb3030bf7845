"""Log what MLflow has of a run to its events, in the driver, and start the process that uploads them."""

from __future__ import annotations

import getpass
import os
import shlex
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from raydetr.config import RunConfig, flatten, override, to_dict
from raydetr.console import print_status
from raydetr.environment import own_git_state
from raydetr.locations import in_ray_job
from raydetr.shards.reader import Shards
from raydetr.store.folders import Folder
from raydetr.tracking.events import EventLog, read_events
from raydetr.tracking.upload_process import UploadProcess
from raydetr.tracking.uris import mask_password, storable_uri, tracking_uri

DEFAULT_EXPERIMENT = "raydetr"

Kind = Literal["run", "trial", "search"]


def experiment_of(config: RunConfig) -> str:
    """Return the MLflow experiment of a run: the setting, or MLflow's variable, or the default."""
    return config.tracking.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT


def log_launch(
    log: EventLog, folder: Folder, config: RunConfig, splits: Sequence[Shards], kind: Kind, **fields: Any
) -> None:
    """Log that a driver starts or resumes the run in a folder, with all that MLflow has of it from the beginning.

    Args:
        log: of the run.
        folder: of the run.
        config: its resolved configuration.
        splits: the training and the validation shards.
        kind: of the run.
        fields: more fields, such as the files to upload.
    """
    earlier = [event for event in read_events(folder) if event["kind"] == "launched"]
    # As in MLflow's own runs; a run that is resumed keeps the name of who started it
    git = own_git_state()
    tags = {
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "JOB" if in_ray_job() else "LOCAL",
        "raydetr.kind": kind,
        "raydetr.folder": str(folder),
    } | ({"mlflow.source.git.commit": git["revision"]} if git else {})
    with suppress(KeyError, OSError):  # a container's user need not have a name
        tags["mlflow.user"] = getpass.getuser()
    log.append(
        "launched",
        type=kind,
        key=earlier[0]["key"] if earlier else uuid.uuid4().hex,
        name=folder.name,
        recipe=config.recipe,
        uri=storable_uri(tracking_uri(config), folder),
        experiment=experiment_of(config),
        command=_command(),
        upload=config.tracking.upload,
        model=config.recipe if kind == "run" and config.tracking.register_model else None,
        tags=tags,
        **{"params": flatten(to_dict(config)), "datasets": _datasets(splits), "files": ["config.yaml"]}
        | fields,
    )


def _command() -> str:
    """Return the command line of this program, without passwords, as it can be pasted into the folder where it ran."""
    program = sys.argv[0]
    words = ["python", program] if program.endswith(".py") else [Path(program).name]
    return shlex.join([*words, *map(_mask_argument, sys.argv[1:])])


def without_password(config: RunConfig) -> RunConfig:
    """Return the configuration with *** in place of the password in `tracking.uri`, as it may be stored and printed."""
    uri = config.tracking.uri
    return config if uri is None else override(config, {"tracking.uri": mask_password(uri)})


def _mask_argument(argument: str) -> str:
    """Hide the password in an argument such as tracking.uri=http://user:password@host."""
    path, equals, value = argument.partition("=")
    return f"{path}{equals}{mask_password(value)}"


def _datasets(splits: Sequence[Shards]) -> list[dict[str, Any]]:
    return [
        {
            "name": "/".join(shards.location.split("/")[-2:]),
            "fingerprint": shards.fingerprint,
            "source": shards.location,
            "context": context,
            "profile": {
                "num_images": shards.num_samples,
                "num_annotations": int(shards.samples["num_annotations"].sum()),
            },
        }
        for context, shards in zip(("training", "validation"), splits, strict=False)
    ]


class Uploads:
    """What MLflow lacks after the end of a run; None if nothing, or if the run is a trial, which its search uploads."""

    pending: str | None = None


@contextmanager
def uploading(folder: Folder, config: RunConfig, uri: str, kind: Kind) -> Iterator[Uploads]:
    """Upload the events of the run in a folder during the block, and wait for the last ones at its end.

    Args:
        folder: of the run.
        config: its configuration.
        uri: the complete tracking URI.
        kind: of the run.
    """
    uploads = Uploads()
    if kind == "trial" or not config.tracking.upload:
        if kind != "trial":
            print_status(f"MLflow: nothing is sent before `raydetr track sync {shlex.quote(str(folder))}`")
        yield uploads
        return
    print_status(f"MLflow {mask_password(uri)}, experiment {experiment_of(config)}")
    process = UploadProcess(
        folder, uri, lambda problem: print_status(f"warning: {problem}; it is tried again")
    )
    try:
        yield uploads
    finally:
        uploads.pending = process.finish()
        if uploads.pending is not None:
            print_status(f"warning: {unsent(uploads.pending, folder)}")


def unsent(pending: str, folder: Folder) -> str:
    """Return what tells the user that MLflow lacks something, and how to send it."""
    return f"MLflow lacks {pending}. Send it with `raydetr track sync {shlex.quote(str(folder))}`"
