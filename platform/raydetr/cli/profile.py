"""Define `raydetr profile`. The docstring is the help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raydetr.cli.arguments import ConfigFile, RecipeAndOverrides, read_config, refuse
from raydetr.console import progress_bar


def profile(
    arguments: RecipeAndOverrides = None,
    config: ConfigFile = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Number of training steps to measure, after a warm-up.")
    ] = 10,
    out: Annotated[Path, typer.Option(help="Folder for profile.json and the trace.")] = Path("build/profile"),
) -> None:
    """Show where the time of a training step goes, in one process: data, parts of the model, losses, optimizer."""
    from raydetr.runs.profile import PROFILE_IGNORES
    from raydetr.runs.profile import profile as run_profile

    refuse(arguments or [], PROFILE_IGNORES, "on a profile")
    chosen = read_config(arguments or [], config)
    with progress_bar("steps") as progress:
        found = run_profile(chosen, num_steps=steps, out=out, progress=progress)
    typer.echo(found.to_text())
