"""Compare runs side by side: AP by size and class, and the settings in which they differ."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raydetr.evaluation.coco_metrics import AP_FILE, NAMES
from raydetr.runs.session import read_config
from raydetr.store.folders import open_folder
from raydetr.tracking import mlflow_run
from raydetr.tracking.uris import default_uri, tracking_uri

Row = dict[str, float]  # class name -> AP


@dataclass(frozen=True)
class _Run:
    heading: str
    numbers: Mapping[str, float]
    classes: Row
    params: Mapping[str, str]


def compare(runs: Sequence[str], uri: str | None = None, *, plain: bool = False) -> str:
    """Return tables with one column per run; an asterisk marks the best value of each row.

    Args:
        runs: folders of runs, names of runs, or MLflow run ids.
        uri: the tracking URI; None: that of the run's folder, and for a name or id the database in `runs/`.
        plain: without colors and lines, and as wide as needed; otherwise as wide as the terminal.

    Raises:
        ValueError: a name is unknown, or several runs have it.
        TrackingError: MLflow cannot be reached.
    """
    columns = _columns([_fetch(name, uri) for name in runs])
    headings = [column.heading for column in columns]
    tables = [
        _table(
            "average precision", headings, [_scores(name, [c.numbers for c in columns]) for name in NAMES]
        ),
        _table(
            "AP by class", headings, [_scores(n, [c.classes for c in columns]) for n in _classes(columns)]
        ),
        _table("configuration, where it differs", headings, _differences(columns)),
    ]
    return _render([table for table in tables if table.row_count], plain)


def _fetch(name: str, uri: str | None) -> tuple[str, mlflow_run.TrackedRun]:
    """Return the tracking URI of a run, and the run; both are taken from its folder, unless `uri` is given."""
    folder = open_folder(name)
    if (folder / "mlflow_run_id").exists() and (folder / "config.yaml").exists():
        uri = uri or tracking_uri(read_config(folder))
        name = (folder / "mlflow_run_id").read_text().strip()
    elif "/" in name:
        raise ValueError(f"{name}: not the folder of a run: mlflow_run_id or config.yaml is missing")
    uri = uri or default_uri("runs")
    return uri, mlflow_run.fetch_run(uri, name)


def _columns(runs: Sequence[tuple[str, mlflow_run.TrackedRun]]) -> list[_Run]:
    names = [run.name or run.run_id for _, run in runs]
    return [
        # Runs with the same name, such as trials of two searches, are distinguished by the start of their ids
        _Run(
            heading=name if names.count(name) == 1 else f"{name} ({run.run_id[:8]})",
            numbers={key: value for key, value in run.metrics.items() if value >= 0},  # -1: undefined
            classes=_class_ap(uri, run),
            params=run.params,
        )
        for name, (uri, run) in zip(names, runs, strict=True)
    ]


def _class_ap(uri: str, run: mlflow_run.TrackedRun) -> Row:
    if AP_FILE not in run.artifacts:
        return {}
    table = json.loads(mlflow_run.fetch_artifact(uri, run.run_id, AP_FILE))
    return {row["name"]: row["AP"] for row in table["classes"] if row["AP"] >= 0}


def _classes(columns: Sequence[_Run]) -> list[str]:
    return list(dict.fromkeys(name for column in columns for name in column.classes))


def _scores(name: str, columns: Sequence[Mapping[str, float]]) -> list[Text]:
    """Return a row of scores; the best value is marked, unless all are equal."""
    values = [column.get(name) for column in columns]
    known = [value for value in values if value is not None]
    best = max(known) if len(set(known)) > 1 else None
    cells = [Text("-") if value is None else Text(f"{value:.3f}") for value in values]
    for cell, value in zip(cells, values, strict=True):
        if best is not None and value == best:
            cell.append("*").stylize("bold green")
    return [Text(name), *cells]


def _differences(columns: Sequence[_Run]) -> list[list[Text]]:
    paths = sorted({path for column in columns for path in column.params})
    rows = ((path, [column.params.get(path, "-") for column in columns]) for path in paths)
    return [[Text(path), *map(Text, values)] for path, values in rows if len(set(values)) > 1]


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[Text]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in headings:
        table.add_column(Text(heading), overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _render(tables: Sequence[Table], plain: bool) -> str:
    buffer = io.StringIO()
    width = 10_000 if plain else shutil.get_terminal_size((120, 24)).columns
    console = Console(file=buffer, width=width, force_terminal=not plain, no_color=plain)
    for table in tables:
        if plain:
            table.box = None
            table.title_style = table.header_style = ""
        console.print(table)
        console.print()
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).rstrip() + "\n"
