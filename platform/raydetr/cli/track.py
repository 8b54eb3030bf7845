"""Define `raydetr track`: upload runs to MLflow later."""

from __future__ import annotations

from typing import Annotated

import typer

from raydetr.locations import in_ray_job

track_app = typer.Typer(help="Send to MLflow what it lacks of runs.", no_args_is_help=True)

# Exit code of a command whose run is complete in its folder, but not in MLflow
INCOMPLETE = 5


def exit_if_incomplete(pending_upload: str | None) -> None:
    """End with INCOMPLETE if MLflow lacks something of a run or a search; its warning says what.

    A Ray job ends with 0, because with any other code it has failed, and what repeats failed jobs would start it again.

    Raises:
        typer.Exit: so it is.
    """
    if pending_upload is not None and not in_ray_job():
        raise typer.Exit(INCOMPLETE)


@track_app.command()
def sync(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Folders or URLs of runs or searches.")],
    uri: Annotated[
        str | None, typer.Option(help="Tracking URI; default: that of the run. MLflow's variables count too.")
    ] = None,
) -> None:
    """Upload the events of runs and searches, with their trials; what MLflow has is not sent again."""
    from raydetr.runs.sync import sync_runs

    for line in sync_runs(runs, uri):
        typer.echo(line)
