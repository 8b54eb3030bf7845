"""Compare runs side by side: AP by size and class, its significance, kinds of errors, curves, settings, images.

`compare` reads and computes; the result is printed as tables here, and as a page by `compare_page`. Nothing is written.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raydetr.evaluation import bootstrap
from raydetr.evaluation.bootstrap import CONFIDENCE, Interval
from raydetr.evaluation.coco_metrics import NAMES
from raydetr.evaluation.matches import TIDE_ERRORS
from raydetr.evaluation.report import Report, analyze
from raydetr.runs import compared
from raydetr.runs.compared_run import Compared

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class RunComparison:
    """What is compared, and the results; the first run is what the others are compared with."""

    runs: tuple[Compared, ...]
    # By the number of a run: its differences to the first, with intervals
    intervals: Mapping[int, bootstrap.Comparison]
    reports: tuple[Report | None, ...]  # of each run; None without detections
    notes: tuple[str, ...]  # why something is missing, or must not be compared

    @property
    def is_same_data(self) -> bool:
        """Whether no two runs were evaluated on different validation data."""
        return len({run.fingerprint for run in self.runs if run.fingerprint is not None}) <= 1

    def is_comparable(self, number: int) -> bool:
        """Return whether a run is not known to have other validation data than the first."""
        first, other = self.runs[0].fingerprint, self.runs[number].fingerprint
        return first is None or other is None or first == other

    def best(self, values: Sequence[float | None]) -> float | None:
        """Return the best of a value of each run; None if all are equal, or on different validation data."""
        known = [value for value in values if value is not None]
        return max(known) if len(set(known)) > 1 and self.is_same_data else None

    def interval(self, number: int, name: str) -> Interval | None:
        """Return the difference of a run's AP, AP50 or AP75 to that of the first; None: not computed."""
        found = self.intervals.get(number)
        return None if found is None else found.numbers.get(name)

    def class_interval(self, number: int, name: str) -> Interval | None:
        """Return the difference of a run's AP of a class to that of the first; None: not computed."""
        found, table = self.intervals.get(number), self.runs[0].table
        if found is None or table is None:
            return None
        ids = {one.name: one.category_id for one in table.classes}
        return found.classes.get(ids[name]) if name in ids else None

    def threshold(self, number: int) -> float:
        """Return the score from which the detections of a run have the highest F1 at IoU 0.5."""
        report = self.reports[number]
        return 0.0 if report is None else report.min_score

    @property
    def errors(self) -> list[Numbers]:
        """The AP50 that each kind of error costs, for each run; empty without detections."""
        tides = [None if report is None else report.tide for report in self.reports]
        return [{} if tide is None else tide.delta_ap for tide in tides]

    @property
    def class_names(self) -> list[str]:
        """Names of the classes of all runs."""
        return list(dict.fromkeys(name for run in self.runs for name in run.classes))

    @property
    def differing_settings(self) -> dict[str, list[str]]:
        """The settings in which runs differ, by path; "-" where a run has none."""
        known = [run.settings for run in self.runs if run.settings]  # a file of results has none
        paths = sorted({path for settings in known for path in settings})
        return {
            path: [run.settings.get(path, "-") for run in self.runs]
            for path in paths
            if len({settings.get(path, "-") for settings in known}) > 1
        }

    def to_text(self, *, plain: bool) -> str:
        """Return tables with a column for each run.

        Args:
            plain: without colors and lines, and as wide as needed; otherwise as wide as the terminal.
        """
        return _render([table for table in _tables(self) if table.row_count], self.notes, plain)


def compare(
    names: Sequence[str],
    uri: str | None = None,
    *,
    query: str | None = None,
    storage: str = "runs",
    data: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunComparison:
    """Compare runs with the first of them.

    Args:
        names, uri, query, storage, data: see `compared.load`.
        progress: is called with (done, total) draws of the bootstrap.

    Raises:
        ValueError, TrackingError, OSError: see `compared.load`.
    """
    runs = compared.load(names, uri=uri, query=query, storage=storage, data=data)
    first = runs[0]
    notes = _data_notes(runs)
    intervals: dict[int, bootstrap.Comparison] = {}
    numbers = [
        number
        for number, run in enumerate(runs)
        if number and run.detections is not None and run.fingerprint == first.fingerprint
    ]
    if first.detections is not None and numbers:
        results = [first.detections.results]
        results += [one.results for number in numbers if (one := runs[number].detections) is not None]
        found = bootstrap.compare(first.detections.ground_truth, results, progress=progress)
        intervals = dict(zip(numbers, found, strict=True))
    notes += [
        f"{run.name}: without its detections, there are no intervals, errors and images: {run.no_detections}"
        for run in runs
        if run.detections is None
    ]
    return RunComparison(tuple(runs), intervals, tuple(map(_analyze, runs)), tuple(notes))


def _data_notes(runs: Sequence[Compared]) -> list[str]:
    known: dict[str, list[str]] = {}
    for run in runs:
        if run.fingerprint is not None:
            known.setdefault(run.fingerprint, []).append(run.name)
    notes = []
    if len(known) > 1:
        listed = "; ".join(f"{', '.join(names)}: {fingerprint}" for fingerprint, names in known.items())
        notes.append(
            "DIFFERENT VALIDATION DATA: the AP of these runs must not be compared, and no run is the best "
            f"(fingerprints: {listed}). Evaluate both on the same shards: raydetr evaluate RUN --data SHARDS"
        )
    unknown = [run.name for run in runs if run.fingerprint is None and run.table is not None]
    if unknown and len(runs) > 1:
        notes.append(
            f"the validation data of {', '.join(unknown)} is not known: it may differ from that of the others"
        )
    return notes


def _analyze(run: Compared) -> Report | None:
    return None if run.detections is None else analyze(run.detections.ground_truth, run.detections.results)


# --- Tables ---


def _tables(comparison: RunComparison) -> list[Table]:
    runs = comparison.runs
    return [
        _table("runs", runs, _about(runs)),
        _table(
            "average precision",
            runs,
            [_scores(comparison, name, [r.numbers for r in runs]) for name in NAMES],
        ),
        _table(
            f"difference to {runs[0].name}, with {CONFIDENCE:.0%} interval", runs, _interval_rows(comparison)
        ),
        _table(
            "AP by class",
            runs,
            [_scores(comparison, n, [r.classes for r in runs]) for n in comparison.class_names],
        ),
        _table(
            "AP50 that errors cost (TIDE)",
            runs,
            [
                _scores(comparison, words, comparison.errors, has_best=False)
                for words in TIDE_ERRORS.values()
                if any(comparison.errors)
            ],
        ),
        _table(
            "configuration, where it differs",
            runs,
            [[Text(path), *map(Text, values)] for path, values in comparison.differing_settings.items()],
        ),
    ]


def _about(runs: Sequence[Compared]) -> list[list[Text]]:
    rows = {
        "state": [run.state for run in runs],
        "evaluation": [run.evaluation for run in runs],
        "validation data": [run.fingerprint or "unknown" for run in runs],
    }
    return [[Text(name), *map(Text, values)] for name, values in rows.items()]


def _scores(
    comparison: RunComparison, name: str, columns: Sequence[Numbers], *, has_best: bool = True
) -> list[Text]:
    """Return a row of scores with their differences to the first; with `has_best`, the best one is marked."""
    values = [column.get(name) for column in columns]
    highest = comparison.best(values) if has_best else None
    cells = []
    for number, value in enumerate(values):
        cell = Text("-" if value is None else f"{value:.3f}")
        if highest is not None and value == highest:
            cell.append("*").stylize("bold green")
        first = values[0]
        if number and value is not None and first is not None and comparison.is_comparable(number):
            cell.append(f" {value - first:+.3f}", style="dim")
        cells.append(cell)
    return [Text(name), *cells]


def _interval_rows(comparison: RunComparison) -> list[list[Text]]:
    if not comparison.intervals:
        return []
    rows = []
    for name in ("AP", "AP50", "AP75"):
        cells = [Text("")]
        for number in range(1, len(comparison.runs)):
            interval = comparison.interval(number, name)
            cells.append(Text("-" if interval is None else interval_text(interval)))
        rows.append([Text(name), *cells])
    return rows


def interval_text(interval: Interval) -> str:
    """Return a difference with its interval, and what it says."""
    verdict = "significant" if interval.is_significant else "within chance"
    return f"{interval.difference:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}] {verdict}"


def _table(title: str, runs: Sequence[Compared], rows: Sequence[Sequence[Text]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for run in runs:
        table.add_column(Text(run.name), overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _render(tables: Sequence[Table], notes: Sequence[str], plain: bool) -> str:
    buffer = io.StringIO()
    width = 10_000 if plain else shutil.get_terminal_size((120, 24)).columns
    console = Console(file=buffer, width=width, force_terminal=not plain, no_color=plain)
    for table in tables:
        if plain:
            table.box = None
            table.title_style = table.header_style = ""
        console.print(table)
        console.print()
    for note in notes:
        console.print(Text(f"note: {note}"), soft_wrap=plain)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).rstrip() + "\n"
