"""Define arguments that several commands have, and read the configuration that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydetr import config as configuration
from raydetr import recipes
from raydetr.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from raydetr.tune.record import SearchOptions

RecipeAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE [PATH=VALUE]...",
        help="Recipe (see `raydetr recipes`), then overrides such as optim.lr=2e-4.",
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Configuration file, instead of a recipe.")]

# Settings of a cluster that have no effect in one process
LOCAL_IGNORES = (
    "cluster.num_workers", "cluster.address", "cluster.max_failures", "cluster.min_workers", "cluster.wait_minutes",
    "cluster.stall_minutes", "cluster.bf16_gradients",
)  # fmt: skip

# Options of a search; those that are not given have the defaults of `raydetr.tune.record.SearchOptions`
SpaceFile = Annotated[
    Path | None,
    typer.Option(
        help="YAML file of the search space, such as `raydetr space RECIPE` prints.", show_default=False
    ),
]
AlgorithmName = Annotated[
    str | None, typer.Option("--algorithm", help="random, grid, asha (default), tpe, bohb or pbt.")
]
NumTrials = Annotated[
    int | None, typer.Option("--trials", min=1, help="Number of configurations to try; default: 8.")
]
NumConcurrent = Annotated[
    int | None,
    typer.Option(
        "--concurrent", min=1, help="Maximum number of trials that run at the same time; default: 1."
    ),
]
GraceEpochs = Annotated[
    int | None,
    typer.Option(
        "--grace-epochs", min=1, help="asha, bohb: epochs before a trial can be stopped; default: 1."
    ),
]
ReductionFactor = Annotated[
    int | None,
    typer.Option("--reduction-factor", min=2, help="asha, bohb: one trial in so many continues; default: 3."),
]
Interval = Annotated[
    int | None, typer.Option("--interval", min=1, help="pbt: epochs after which trials are compared.")
]
ObjectiveName = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help="random, grid, tpe: minimized beside AP (Pareto front): latency_ms or worker_hours.",
    ),
]
KeepName = Annotated[
    str | None,
    typer.Option(
        "--keep",
        help="Checkpoints to keep: of all trials, of the finished (not stopped early; default), of the best.",
    ),
]


def search_options(
    *,
    algorithm: str | None = None,
    trials: int | None = None,
    concurrent: int | None = None,
    grace_epochs: int | None = None,
    reduction_factor: int | None = None,
    interval: int | None = None,
    objective: str | None = None,
    keep: str | None = None,
) -> SearchOptions:
    """Return the options of a search that were given on the command line.

    Raises:
        ConfigError: one is unknown, or has no effect with the algorithm.
    """
    from raydetr.tune.record import make_options

    given = {
        "algorithm": algorithm,
        "num_trials": trials,
        "max_concurrent": concurrent,
        "grace_epochs": grace_epochs,
        "reduction_factor": reduction_factor,
        "interval": interval,
        "objective": objective,
        "keep": keep,
    }
    return make_options({name: value for name, value in given.items() if value is not None})


def read_config(arguments: list[str], config_file: Path | None) -> RunConfig:
    """Read the recipe or file that the arguments name, and apply the overrides.

    Raises:
        ConfigError: neither or both are given, or an override does not fit.
    """
    named = [argument for argument in arguments[:1] if "=" not in argument]
    if named and config_file is not None:
        raise ConfigError(f"a recipe ({named[0]}) and --config {config_file} are given: keep one")
    if not named and config_file is None:
        raise ConfigError("name a recipe first (see `raydetr recipes`), or give --config FILE")
    chosen = recipes.find(named[0]) if config_file is None else configuration.from_yaml(config_file)
    return configuration.override(chosen, configuration.parse_assignments(arguments[len(named) :]))


def refuse(arguments: list[str], prefixes: tuple[str, ...], where: str) -> None:
    """Check that no override is of a setting that has no effect.

    Raises:
        ConfigError: the arguments contain one.
    """
    for argument in arguments:
        name = argument.partition("=")[0]
        if "=" in argument and name.startswith(prefixes):
            raise ConfigError(f"{name} has no effect {where}: omit it")
