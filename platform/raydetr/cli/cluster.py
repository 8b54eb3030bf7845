"""Define the commands of `raydetr cluster`: check cluster files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raydetr import config as configuration
from raydetr import recipes
from raydetr.config import ConfigError, RunConfig

cluster_app = typer.Typer(help="Check files that describe a cluster.", no_args_is_help=True)


@cluster_app.callback()
def cluster() -> None:
    """Check files that describe a cluster."""


@cluster_app.command("check")
def cluster_check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Cluster file for `ray up`, or KubeRay manifest.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="PATH=VALUE", help="Overrides of the recipe.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe that is to be trained on the cluster.")] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration file, instead of a recipe.")] = None,
) -> None:
    """List all problems of a cluster file; exit code 1 if there is one.

    With a recipe or a configuration, check that its workers fit on the nodes, that its storage is on all of them, and
    that its tracking works with several.
    """
    from raydetr.clusters.check import check_file

    report = check_file(file, _read_config(recipe, config, overrides or []))
    typer.echo(report.to_text())
    raise typer.Exit(1 if report.problems else 0)


def _read_config(recipe: str | None, config: Path | None, overrides: list[str]) -> RunConfig | None:
    if recipe is not None and config is not None:
        raise ConfigError(f"--recipe {recipe} and --config {config} are given: keep one")
    if recipe is None and config is None:
        if overrides:
            raise ConfigError(f"{overrides[0]} has no effect without --recipe RECIPE or --config FILE")
        return None
    chosen = recipes.find(recipe) if recipe is not None else configuration.from_yaml(Path(str(config)))
    return configuration.override(chosen, configuration.parse_assignments(overrides))
