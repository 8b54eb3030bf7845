"""Train the models of the five papers with one budget on the quickstart's data, and compare them.

    make race                                       # five runs, one after the other
    make race ARGS="--epochs 1 --images 200"        # a try of the whole command

The runs have two Ray Train workers each and are in runs/, in the MLflow experiment "race". One that is finished is not
repeated: remove its folder to train it again. Prints a table and what `raydetr compare` says; writes build/race.json
{model: [[samples, AP, AP50, CPU seconds], ...]}, build/race.png and build/race.html.

CPU seconds are the CPU time of both workers in their training steps, with loading and without evaluations and start-up.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from raydetr import recipes
from raydetr.config import ConfigError, RunConfig, override
from raydetr.console import progress_bar, table
from raydetr.runs import run
from raydetr.runs.compare import RunComparison, compare
from raydetr.runs.compare_page import to_html
from raydetr.store.folders import Folder
from raydetr.tracking.events import Metrics, read_events
from raydetr.visualization.charts import COLORS

OUT = Path("build")
DOCS = Path("docs")
STORAGE = "runs"
EXPERIMENT = "race"
RECIPES = {
    "DETR": "small_detr",
    "Conditional DETR": "small_conditional_detr",
    "DAB-DETR": "small_dab_detr",
    "Deformable DETR": "small_deformable_detr",
    "DINO": "small_dino",
}
Point = tuple[int, float, float, float]  # samples, AP, AP50, CPU seconds


@dataclass(frozen=True)
class Budget:
    """What every run gets; None: what the recipes say."""

    epochs: int | None
    images: int | None  # of each split
    storage: str

    def changes(self) -> dict[str, Any]:
        """Return the settings of a run with this budget, which names what differs from the recipe."""
        changes: dict[str, Any] = {
            "storage.path": self.storage,
            "tracking.experiment": EXPERIMENT,
            "tracking.register_model": False,
        }
        if self.epochs is not None:
            changes["optim.epochs"] = self.epochs
        if self.images is not None:
            changes["data.limit_images"] = self.images
        return changes

    @property
    def suffix(self) -> str:
        """What tells the names of runs with this budget from others."""
        epochs = "" if self.epochs is None else f"-{self.epochs}ep"
        return epochs + ("" if self.images is None else f"-{self.images}images")


def main() -> None:
    """Train, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    arguments = parser.parse_args()
    budget = Budget(arguments.epochs, arguments.images, arguments.storage)
    began = time.monotonic()
    folders = []
    for number, (model, recipe) in enumerate(RECIPES.items(), 1):
        print(f"{number} of {len(RECIPES)}: {model}", flush=True)
        folders.append(
            train(override(recipes.find(recipe), budget.changes()), f"race-{short(recipe)}{budget.suffix}")
        )
    curves = {model: read_curve(folder) for model, folder in zip(RECIPES, folders, strict=True)}
    with progress_bar("draws of images") as progress:
        comparison = compare(list(map(str, folders)), progress=progress)
    print(comparison.to_text(plain=not sys.stdout.isatty()))
    print(f"\n{table(rows_of(curves), right=True)}\n\n{order(curves)}")
    write(arguments.out, curves, comparison)
    print(
        f"wrote {arguments.out}/race.json, race.png, race.html; {(time.monotonic() - began) / 60:.1f} minutes"
    )
    if arguments.docs:
        (DOCS / "race.png").write_bytes((arguments.out / "race.png").read_bytes())
        put_into_docs("race", f"{markdown(rows_of(curves))}\n\n{order(curves)}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that the race and the ablations have in common."""
    parser.add_argument("--epochs", type=int, help="of every run; default: those of the recipes")
    parser.add_argument("--images", type=int, help="use only the first of each split")
    parser.add_argument("--storage", default=STORAGE, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results")
    parser.add_argument("--docs", action="store_true", help="put the results into docs/race.md, too")


def train(config: RunConfig, name: str) -> Folder:
    """Train a run, or continue it, unless it is finished; return its folder. Exit if another run has its name."""
    try:
        return run.start(config, name=name, or_resume=True, warn=False).folder
    except ConfigError as error:
        sys.exit(f"{error}\nOr remove the folder of that run, to train it again")


def short(recipe: str) -> str:
    """Return the part of a recipe's name that names the model."""
    return recipe.removeprefix("small_")


def read_curve(folder: Folder) -> list[Point]:
    """Return the evaluations of a run, in order."""
    rows = [row for row in Metrics(read_events(folder)).rows if "AP" in row]
    return [(row["position"], row["AP"], row["AP50"], round(row["cpu_seconds"], 1)) for row in rows]


def rows_of(curves: Mapping[str, Sequence[Point]]) -> list[list[str]]:
    """Return the rows of the table: AP and AP50 by samples, and the CPU seconds of each model."""
    samples = [point[0] for point in next(iter(curves.values()))]
    rows = [["AP / AP50 after", *(f"{number:,} samples" for number in samples), "CPU seconds"]]
    for model, points in curves.items():
        cells = [f"{ap:.3f} / {ap50:.3f}" for _, ap, ap50, _ in points]
        rows.append([model, *cells, f"{points[-1][3]:.0f}"])
    return rows


def order(curves: Mapping[str, Sequence[Point]]) -> str:
    """Return whether the order of the papers shows, in a sentence."""
    last = {model: points[-1][1] for model, points in curves.items()}
    ranked = sorted(last, key=last.__getitem__)
    is_kept = ranked == list(curves)
    return f"The order of the papers {'shows' if is_kept else 'does not show'}: {' < '.join(ranked)}."


def write(out: Path, curves: Mapping[str, Sequence[Point]], comparison: RunComparison) -> None:
    """Write the curves, their picture and the page that compares the runs."""
    out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f" {json.dumps(model)}: {json.dumps(points)}" for model, points in curves.items())
    (out / "race.json").write_text(f"{{\n{lines}\n}}\n")
    draw(curves).savefig(out / "race.png")
    (out / "race.html").write_text(to_html(comparison))


def draw(curves: Mapping[str, Sequence[Point]]) -> Figure:
    """Plot AP over samples and over CPU seconds."""
    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, column, label in zip(panels, (0, 3), ("samples", "CPU seconds of training"), strict=True):
        for (model, points), color in zip(curves.items(), COLORS, strict=False):
            x = [point[column] for point in points]
            panel.plot(x, [ap for _, ap, _, _ in points], color=color, marker="o", markersize=4, label=model)
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("AP")
    panels[0].legend(reverse=True, frameon=False)
    return figure


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table for a page of the documentation."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def put_into_docs(name: str, text: str, page: Path = DOCS / "race.md") -> None:
    """Replace what is between `<!-- NAME: begin -->` and `<!-- NAME: end -->` in a page."""
    before, begin, rest = page.read_text().partition(f"<!-- {name}: begin -->\n")
    _, end, after = rest.partition(f"<!-- {name}: end -->")
    assert begin, f"{page} has no place for {name}"
    assert end, f"{page} has no end of {name}"
    page.write_text(f"{before}{begin}{text}\n{end}{after}")


if __name__ == "__main__":
    main()
