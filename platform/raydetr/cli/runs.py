"""Define the commands about the runs of a storage path; their docstrings are the help texts."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from raydetr.console import progress_bar
from raydetr.store.output_folder import check_out_file

Storage = Annotated[str, typer.Option(metavar="PATH", help="Folder or URL of the runs, for a name.")]


def list_runs(
    storage: Annotated[
        str, typer.Argument(metavar="STORAGE_PATH", help="Folder or URL of the runs, or of one search.")
    ] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the runs and searches in a storage path, those with the newest events first.

    A run is lost if it has not ended and its driver gives no sign of life. That is logged in its events, and in MLflow.
    """
    from raydetr.runs import state
    from raydetr.runs.list import to_table
    from raydetr.runs.lost import mark_lost
    from raydetr.store.folders import open_folder

    states = state.list_runs(open_folder(storage))
    mark_lost(states)
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


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Folders, URLs and names of runs, searches, MLflow's run ids, and files of COCO results (.json).",
        ),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(
            "--filter", help="Compare also the MLflow runs of this filter: \"params.optim.lr = '1e-4'\"."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with curves and images, too.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Validation shards, for files of results; default: those of the first run."),
    ] = None,
    storage: Storage = "runs",
    uri: Annotated[
        str | None,
        typer.Option(
            help="MLflow tracking URI, for ids and filters; default: the variable, or the database in --storage."
        ),
    ] = None,
) -> None:
    """Compare runs with the first one: AP with its significance, kinds of errors, settings, curves and images."""
    from raydetr.runs.compare import compare as compare_runs
    from raydetr.runs.compare_page import to_html

    if html is not None:
        check_out_file(html)
    with progress_bar("draws of images") as progress:
        comparison = compare_runs(runs or [], uri, query=query, storage=storage, data=data, progress=progress)
    typer.echo(comparison.to_text(plain=not sys.stdout.isatty()))
    if html is not None:
        html.write_text(to_html(comparison))
        typer.echo(f"wrote {html}")
