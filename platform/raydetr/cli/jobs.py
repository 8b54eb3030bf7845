"""Define the commands of `raydetr submit` and `raydetr jobs`: runs and searches as jobs on a Ray cluster."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydetr.cli.arguments import (
    AlgorithmName,
    ConfigFile,
    GraceEpochs,
    Interval,
    KeepName,
    NumConcurrent,
    NumTrials,
    ObjectiveName,
    RecipeAndOverrides,
    ReductionFactor,
    SpaceFile,
    read_config,
    search_options,
)
from raydetr.config import ConfigError
from raydetr.console import print_status

if TYPE_CHECKING:
    from raydetr.submission.cluster import Cluster
    from raydetr.submission.jobs import Submission

submit_app = typer.Typer(help="Submit a run or a search as a job on a Ray cluster.", no_args_is_help=True)
jobs_app = typer.Typer(help="List, follow, stop and resume jobs on a Ray cluster.", no_args_is_help=True)

Address = Annotated[
    str | None,
    typer.Option(
        help="URL of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265."
    ),
]
Detach = Annotated[bool, typer.Option("--detach", help="Return after the submission; do not follow the log.")]
Job = Annotated[str, typer.Argument(help="Id of the job, see `raydetr jobs list`.")]
NoFollow = Annotated[bool, typer.Option("--no-follow", help="Print the log so far, and return.")]


@submit_app.command("train")
def submit_train(
    arguments: RecipeAndOverrides = None,
    config: ConfigFile = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; an existing one goes on. Default: a new one.")
    ] = None,
    address: Address = None,
    detach: Detach = False,
) -> None:
    """Submit `raydetr train`, and follow its log; Ctrl-C detaches.

    Exit code: 0 succeeded, 1 failed, 3 stopped, 4 no answer, 130 detached.
    """
    from raydetr.runs.run import new_name
    from raydetr.submission.jobs import Submission

    chosen = read_config(arguments or [], config)
    run = name or new_name(chosen.recipe)
    files = [] if config is None else [("--config", config)]
    words = [*(arguments or []), "--name", run, "--or-resume"]
    _submit(Submission("train", words, files, run, chosen.storage.path), address, detach)


@submit_app.command("tune")
def submit_tune(
    arguments: RecipeAndOverrides = None,
    space: SpaceFile = None,
    algorithm: AlgorithmName = None,
    trials: NumTrials = None,
    concurrent: NumConcurrent = None,
    grace_epochs: GraceEpochs = None,
    reduction_factor: ReductionFactor = None,
    interval: Interval = None,
    objective: ObjectiveName = None,
    keep: KeepName = None,
    config: ConfigFile = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the search; an existing one goes on. Default: a new one.")
    ] = None,
    address: Address = None,
    detach: Detach = False,
) -> None:
    """Submit `raydetr tune`, and follow its log; Ctrl-C detaches.

    Exit code: 0 succeeded, 1 failed, 3 stopped, 4 no answer, 130 detached.
    """
    from raydetr.runs.run import new_name
    from raydetr.submission.jobs import Submission
    from raydetr.tune.space import read_space

    chosen = read_config(arguments or [], config)
    if space is None:
        raise ConfigError("--space FILE is missing: `raydetr space RECIPE` prints one to begin with")
    read_space(space, chosen)
    given = {
        "algorithm": algorithm, "trials": trials, "concurrent": concurrent, "grace_epochs": grace_epochs,
        "reduction_factor": reduction_factor, "interval": interval, "objective": objective, "keep": keep,
    }  # fmt: skip
    search_options(**given)  # type: ignore[arg-type]
    job = name or new_name(f"tune-{chosen.recipe}")
    files = [("--space", space), *([] if config is None else [("--config", config)])]
    words = [*(arguments or [])]
    for option, value in given.items():
        words += [] if value is None else [f"--{option.replace('_', '-')}", str(value)]
    words += ["--name", job, "--or-resume"]
    _submit(Submission("tune", words, files, job, chosen.storage.path), address, detach)


@jobs_app.command("list")
def list_jobs(address: Address = None) -> None:
    """List the jobs of the cluster, the newest first."""
    from raydetr.submission.cluster import Cluster
    from raydetr.submission.jobs import to_table

    typer.echo(to_table(Cluster(address).jobs(), time.time()))


@jobs_app.command("logs")
def logs(job: Job, address: Address = None, no_follow: NoFollow = False) -> None:
    """Print the log of a job and follow it to its end; Ctrl-C detaches.

    Exit code: 0 succeeded, 1 failed, 3 stopped, 4 no answer, 130 detached.
    """
    from raydetr.submission.cluster import Cluster
    from raydetr.submission.follow import follow

    cluster = Cluster(address)
    if no_follow:
        cluster.job(job)
        with cluster.errors():
            typer.echo(cluster.client.get_job_logs(job), nl=False)
        return
    raise typer.Exit(follow(cluster, job))


@jobs_app.command("stop")
def stop(job: Job, address: Address = None) -> None:
    """Stop a job; its run writes a last checkpoint."""
    from raydetr.submission import jobs
    from raydetr.submission.cluster import Cluster

    print_status(jobs.stop(Cluster(address), job))


@jobs_app.command("resume")
def resume(job: Job, address: Address = None, detach: Detach = False) -> None:
    """Submit a job that has ended again: its run goes on from the newest checkpoint.

    Exit code: 0 succeeded, 1 failed, 3 stopped, 4 no answer, 130 detached.
    """
    from raydetr.submission import jobs
    from raydetr.submission.cluster import Cluster

    cluster = Cluster(address)
    _follow(cluster, jobs.resume(cluster, job, Path.cwd()), detach)


def _submit(submission: Submission, address: str | None, detach: bool) -> None:
    from raydetr.submission import jobs
    from raydetr.submission.cluster import Cluster

    cluster = Cluster(address)
    _follow(cluster, jobs.submit(cluster, submission, Path.cwd()), detach)


def _follow(cluster: Cluster, job: str, detach: bool) -> None:
    from raydetr.submission.follow import follow, how_to_come_back

    print_status(f"submitted {job}\n{how_to_come_back(cluster, job)}")
    if not detach:
        print_status("Ctrl-C detaches from the log; the job goes on")
        raise typer.Exit(follow(cluster, job))
