"""Submit jobs, list, stop and resume them."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from ray.job_submission import JobDetails

from raydetr.config import ConfigError
from raydetr.console import duration, print_status, table
from raydetr.environment import GIT_VARIABLE, git_state
from raydetr.runs.run import check_name
from raydetr.submission.cluster import Cluster, ClusterError
from raydetr.submission.upload import CHECKOUT, find_upload

# Ray kills a driver so long after the signal to stop, and reads it in a process with the environment of the job; its
# default of 3 s is too short for a step and a checkpoint
STOP_SECONDS = 120
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_POLL_SECONDS = 0.5
SAID = re.compile(
    r"was stopped by \w+ (at position (\d+)|before its first checkpoint)"
)  # the driver's last line

# Keys of a job's metadata
RUN, STORAGE, SOURCE, FILES = "raydetr.run", "raydetr.storage", "raydetr.source", "raydetr.files"


@dataclass(frozen=True)
class Submission:
    """A command to run as a job.

    Args:
        command: of `raydetr`: "train" or "tune".
        arguments: of the command, in which `files` are named by their options.
        files: option and file, such as ("--config", Path("config.yaml")).
        run: name of the run or search.
        storage: `storage.path`, for information.
    """

    command: Literal["train", "tune"]
    arguments: Sequence[str]
    files: Sequence[tuple[str, Path]]
    run: str
    storage: str


def submit(cluster: Cluster, submission: Submission, folder: Path) -> str:
    """Submit a command; return the id of the job.

    If `folder` is a checkout of the project, it is uploaded and runs. Otherwise only the files are uploaded, and the
    `raydetr` that is installed on the cluster runs.

    Raises:
        ConfigError: the name cannot be that of a job, a file is not in the upload, or the run is going on in another
            job.
        UploadError: the checkout is too large.
        ClusterError: the cluster does not answer, or refuses the job.
    """
    check_name(submission.run)
    metadata = {RUN: submission.run, STORAGE: submission.storage}
    options: list[str] = []
    if (folder / CHECKOUT).is_file():
        upload = find_upload(folder)
        upload.check_size()
        for option, file in submission.files:
            options += [option, str(upload.check_contains(file))]
        words = ["python", f"jobs/{submission.command}_detector.py", *submission.arguments, *options]
        return _send(cluster, shlex.join(words), metadata | {SOURCE: "checkout"}, folder)
    texts: dict[str, str] = {}
    for option, file in submission.files:
        name = f"{option.strip('-')}.yaml"
        texts[name] = file.read_text()
        options += [option, name]
    words = ["raydetr", submission.command, *submission.arguments, *options]
    metadata |= {SOURCE: "installed", FILES: json.dumps(texts)}
    return _send_installed(cluster, shlex.join(words), metadata)


def resume(cluster: Cluster, name: str, folder: Path) -> str:
    """Submit a job again, under a new id; its run goes on. Return the id.

    Raises:
        ConfigError: the job has not ended, is no job of `raydetr submit`, or needs its checkout as `folder`.
        UploadError: the checkout is too large.
        ClusterError: there is no such job, or the cluster does not answer.
    """
    job = cluster.job(name)
    metadata = dict(job.metadata or {})
    if not _can_resume(job):
        raise ConfigError(f"{name}: is not a job of `raydetr submit`: submit its command again")
    if metadata[SOURCE] == "installed":
        return _send_installed(cluster, job.entrypoint, metadata)
    if not (folder / CHECKOUT).is_file():
        raise ConfigError(
            f"{name}: was submitted from a checkout, which is uploaded again: change to its folder "
            f"({folder / CHECKOUT} does not exist)"
        )
    find_upload(folder).check_size()
    return _send(cluster, job.entrypoint, metadata, folder)


def stop(cluster: Cluster, name: str) -> str:
    """Stop a job, and wait until it has ended; return what happened.

    Raises:
        ConfigError: it has already ended.
        ClusterError: there is no such job, it does not end, or the cluster does not answer.
    """
    job = cluster.job(name)
    if job.status.is_terminal():
        raise ConfigError(f"{name}: has already ended ({job.status.lower()})")
    wait = int(((job.runtime_env or {}).get("env_vars") or {}).get(STOP_WAIT, 3))
    print_status(f"stopping {name}: it has {wait} s for its last step and checkpoint")
    began = time.monotonic()
    while not (job := cluster.job(name)).status.is_terminal():
        if time.monotonic() - began > wait + 60:
            raise ClusterError(
                f"{name}: is still {job.status.lower()} {wait + 60} s after it was told to stop"
            )
        with cluster.errors():  # again and again: a job that is being started cannot be stopped yet
            cluster.client.stop_job(name)
        time.sleep(STOP_POLL_SECONDS)
    seconds = time.monotonic() - began
    if job.status != "STOPPED":
        return f"{name} had {job.status.lower()} before it was stopped"
    with cluster.errors():
        said = SAID.search(" ".join(cluster.client.get_job_logs(name).split()))
    if said is None:
        what = (
            f"was killed after {seconds:.0f} s without a last checkpoint: its run goes on from the newest one"
        )
    elif said[2] is None:
        what = f"was stopped after {seconds:.0f} s, before its first checkpoint"
    else:
        what = f"was stopped after {seconds:.0f} s; its last checkpoint is at position {said[2]}"
    return f"{name} {what}\n{resume_command(cluster, job)}"


def to_table(jobs: Sequence[JobDetails], now: float) -> str:
    """Format jobs as a table; `now` is in seconds since 1970."""
    rows = [["job", "run", "status", "since", "duration", "command"]]
    for job in jobs:
        start = (job.start_time or 0) / 1000
        end = job.end_time / 1000 if job.end_time else now
        rows.append(
            [
                str(job.submission_id),
                (job.metadata or {}).get(RUN, "-"),
                job.status.lower(),
                f"{datetime.fromtimestamp(start):%Y-%m-%d %H:%M}",
                duration(end - start),
                job.entrypoint,
            ]
        )
    return table(rows)


def resume_command(cluster: Cluster, job: JobDetails) -> str:
    """Return the line that says how a job that has ended goes on."""
    if _can_resume(job):
        return f"go on with: raydetr jobs resume {job.submission_id} --address {cluster.address}"
    return "submit its command again: a run or a search with a --name goes on"


def _can_resume(job: JobDetails) -> bool:
    """Return whether it is a run or a search of `raydetr submit`."""
    return SOURCE in (job.metadata or {}) and "--or-resume" in shlex.split(job.entrypoint)


def _send_installed(cluster: Cluster, entrypoint: str, metadata: dict[str, str]) -> str:
    texts: dict[str, str] = json.loads(metadata[FILES])
    with tempfile.TemporaryDirectory(prefix="raydetr-") as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_text(text)
        return _send(cluster, entrypoint, metadata, Path(folder) if texts else None)


def _send(cluster: Cluster, entrypoint: str, metadata: dict[str, str], folder: Path | None) -> str:
    """Submit under the first id that is free: that of the run, or the run's with a number."""
    run = metadata[RUN]
    jobs = cluster.jobs()
    for job in jobs:
        if (job.metadata or {}).get(RUN) == run and not job.status.is_terminal():
            raise ConfigError(
                f"{run}: the job {job.submission_id} is {job.status.lower()} with this run: follow it with `raydetr "
                f"jobs logs {job.submission_id}`, or stop it first"
            )
    taken = {job.submission_id for job in jobs}
    number = 1
    while (name := run if number == 1 else f"{run}-{number}") in taken:
        number += 1
    environment: dict[str, Any] = {"env_vars": {STOP_WAIT: str(STOP_SECONDS)}}
    if folder is not None:
        environment["working_dir"] = str(folder)
        git = git_state(folder / CHECKOUT.parent)  # Ray does not upload .git
        if git is not None:
            environment["env_vars"][GIT_VARIABLE] = json.dumps(git)
    with cluster.errors():
        cluster.client.submit_job(
            entrypoint=entrypoint, submission_id=name, runtime_env=environment, metadata=metadata
        )
    return name
