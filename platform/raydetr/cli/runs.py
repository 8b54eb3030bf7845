"""Define the commands about the runs of a storage path; their docstrings are the help texts."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

Storage = Annotated[str, typer.Option(metavar="PATH", help="Folder or URL of the runs, for a name.")]


def list_runs(
    storage: Annotated[
        str, typer.Argument(metavar="STORAGE_PATH", help="Folder or URL of the runs, or of one search.")
    ] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the runs and searches in a storage path, those with the newest events first.

    A run is lost if it has not ended and its driver gives no sign of life.
    """
    from raydetr.runs import state
    from raydetr.runs.list import to_table
    from raydetr.store.folders import open_folder

    states = state.list_runs(open_folder(storage))
    if as_json:
        typer.echo(json.dumps([one.to_dict() for one in states], indent=1, allow_nan=False))
    else:
        typer.echo(to_table(states, storage, time.time()))


def watch(
    run: Annotated[str, typer.Argument(help="A run: its folder, its URL, or its name in --storage.")],
    storage: Storage = "runs",
) -> None:
    """Follow a run to its end, from any machine that reaches its storage; Ctrl-C leaves it, and it goes on.

    Exit code: 0 finished, 1 failed, 3 stopped, 4 lost, 130 left.
    """
    from raydetr.runs.observe import observe
    from raydetr.runs.state import find_run

    raise typer.Exit(observe(find_run(run, storage)))
