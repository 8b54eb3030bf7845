"""Define `raydetr tune`, which searches hyperparameters, and `raydetr space`, which prints a space to begin with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

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
from raydetr.cli.track import exit_if_incomplete
from raydetr.config import ConfigError, parse_assignments


def tune(
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
        str | None, typer.Option(help="Name of the search, and of its folder; default: a new one.")
    ] = None,
    or_resume: Annotated[
        bool, typer.Option("--or-resume", help="Resume the search --name if it exists.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Resume the search in this folder; overrides of cluster may follow.")
    ] = None,
) -> None:
    """Search hyperparameters: trials are Ray Train runs, children of one MLflow run."""
    from raydetr.tune import search  # Ray takes seconds to import

    if resume is not None:
        fixed = {"--space": space, "--algorithm": algorithm, "--grace-epochs": grace_epochs, "--keep": keep,
                 "--reduction-factor": reduction_factor, "--interval": interval, "--objective": objective,
                 "--config": config, "--name": name}  # fmt: skip
        _refuse(fixed)
        overrides = parse_assignments(arguments or [])
        outcome = search.resume(resume, overrides=overrides, num_trials=trials, max_concurrent=concurrent)
    else:
        options = search_options(
            algorithm=algorithm, trials=trials, concurrent=concurrent, grace_epochs=grace_epochs,
            reduction_factor=reduction_factor, interval=interval, objective=objective, keep=keep,
        )  # fmt: skip
        chosen = read_config(arguments or [], config)
        outcome = search.search(
            chosen, _given(space), options, name=_named(name, or_resume), or_resume=or_resume
        )
    typer.echo(outcome.to_text())
    exit_if_incomplete(outcome.pending_upload)


def space(arguments: RecipeAndOverrides = None, config: ConfigFile = None) -> None:
    """Print a search space for a recipe, to begin with; `raydetr tune --space FILE` reads it."""
    from raydetr.tune.default_space import default_space

    typer.echo(default_space(read_config(arguments or [], config)), nl=False)


def _refuse(fixed: Mapping[str, object]) -> None:
    """Check that no option is given that has no effect on a search that is resumed.

    Raises:
        ConfigError: one is.
    """
    for option, value in fixed.items():
        if value is not None:
            raise ConfigError(f"--resume continues a search with its own options: omit {option}")


def _given(space: Path | None) -> Path:
    """Return the file of the space.

    Raises:
        ConfigError: it is not given.
    """
    if space is None:
        raise ConfigError("--space FILE is missing: `raydetr space RECIPE` prints one to begin with")
    return space


def _named(name: str | None, or_resume: bool) -> str | None:
    """Return the name of the search.

    Raises:
        ConfigError: it is missing, and a search with this name is to go on.
    """
    if or_resume and name is None:
        raise ConfigError("--or-resume needs the name of the search: add --name NAME")
    return name
