"""Define arguments that several commands have, and read the configuration that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raydetr import config as configuration
from raydetr import recipes
from raydetr.config import ConfigError, RunConfig

RecipeAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE [PATH=VALUE]...",
        help="Recipe (see `raydetr recipes`), then overrides such as optim.lr=2e-4.",
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Configuration file, instead of a recipe.")]
SpaceFile = Annotated[Path, typer.Option(help="YAML file of the search space: a distribution per setting.")]

NumTrials = Annotated[int, typer.Option(min=1, help="Number of configurations to try.")]
NumConcurrent = Annotated[
    int, typer.Option(min=1, help="Maximum number of trials that run at the same time.")
]


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
