"""Render a comparison of runs as one HTML page, with curves and with the images on which they disagree most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from raydetr.console import counted
from raydetr.evaluation.bootstrap import CONFIDENCE
from raydetr.evaluation.coco_metrics import NAMES
from raydetr.evaluation.disagreement import Disagreement, disagreements
from raydetr.evaluation.matches import TIDE_ERRORS
from raydetr.evaluation.read_images import from_shards
from raydetr.evaluation.results import Results
from raydetr.runs.compare import RunComparison, interval_text
from raydetr.runs.compared_run import Compared, Detections, Point
from raydetr.shards.images import ReadImage
from raydetr.shards.reader import Shards, open_shards
from raydetr.visualization.boxes import coco_boxes, draw_boxes
from raydetr.visualization.charts import COLORS, Curve, line_chart
from raydetr.visualization.page import jpeg_url, render

NUM_IMAGES = 12  # of all pairs of runs
MIN_IMAGES = 2  # of a pair
IMAGE_SIDE = 420  # pixels of the long side
X_AXES = (("steps", "step"), ("samples", "samples"), ("hours", "hours"), ("worker-hours", "worker_hours"))


@dataclass(frozen=True)
class Cell:
    """A cell of a table: a value, its difference to that of the first run, and how both are shown."""

    value: str
    difference: str = ""
    is_best: bool = False
    is_better: bool | None = None  # than the first, beyond chance; None: not, or not known
    tip: str = ""


@dataclass(frozen=True)
class Picture:
    """An image with the boxes of the truth and of two runs, as data URLs."""

    title: str
    panels: tuple[tuple[str, str], ...]  # (caption, data URL)


@dataclass(frozen=True)
class Pair:
    """The images on which a run and the first disagree most."""

    other: str
    num_images: int  # on which they disagree
    thresholds: tuple[float, float]
    pictures: tuple[Picture, ...]
    problem: str  # why there are none


def to_html(comparison: RunComparison) -> str:
    """Return the page. It loads nothing; its images are read from the shards, where these can be reached."""
    runs = comparison.runs
    return render(
        "raydetr.runs",
        "compare.html",
        comparison=comparison,
        runs=runs,
        colors=[COLORS[number % len(COLORS)] for number in range(len(runs))],
        verdicts=_verdicts(comparison),
        metrics=[
            (name, _row(comparison, name, [run.numbers for run in runs], comparison.interval))
            for name in NAMES
        ],
        classes=[
            (name, _row(comparison, name, [run.classes for run in runs], comparison.class_interval))
            for name in comparison.class_names
        ],
        errors=_error_rows(comparison),
        charts=[
            (title, charts)
            for title, name in (("AP", "AP"), ("loss", "loss"))
            if (charts := _charts(runs, name))
        ],
        confidence=f"{CONFIDENCE:.0%}",
        pairs=_pairs(comparison),
    )


def _verdicts(comparison: RunComparison) -> list[tuple[str, str]]:
    """Return a line, and its kind, for each run but the first."""
    lines = []
    first = comparison.runs[0].name
    for number, run in enumerate(comparison.runs[1:], 1):
        interval = comparison.interval(number, "AP")
        if not comparison.is_comparable(number):
            lines.append(
                (
                    "different",
                    f"{run.name} was evaluated on other validation data than {first}: no comparison",
                )
            )
        elif interval is None:
            lines.append(
                ("unknown", f"{run.name}: whether it differs from {first} beyond chance is not known")
            )
        elif interval.is_significant:
            word = "higher" if interval.difference > 0 else "lower"
            lines.append((word, f"{run.name} has a {word} AP than {first}: {interval_text(interval)}"))
        else:
            lines.append(
                (
                    "unknown",
                    f"{run.name} and {first} do not differ beyond chance in AP: {interval_text(interval)}",
                )
            )
    return lines


def _row(
    comparison: RunComparison, name: str, columns: Sequence[Mapping[str, float]], interval_of: Any
) -> list[Cell]:
    values = [column.get(name) for column in columns]
    best = comparison.best(values)
    cells = []
    for number, value in enumerate(values):
        if value is None:
            cells.append(Cell("-"))
            continue
        first = values[0]
        interval = interval_of(number, name) if number else None
        has_difference = number and first is not None and comparison.is_comparable(number)
        cells.append(
            Cell(
                value=f"{value:.3f}",
                difference=f"{value - first:+.3f}" if has_difference and first is not None else "",
                is_best=value == best,
                is_better=interval.difference > 0
                if interval is not None and interval.is_significant
                else None,
                tip="" if interval is None else interval_text(interval),
            )
        )
    return cells


def _error_rows(comparison: RunComparison) -> list[tuple[str, list[tuple[Cell, float]]]]:
    """Return a row for each kind of error, with the width of its bar in percent."""
    if not any(comparison.errors):
        return []
    highest = max(value for errors in comparison.errors for value in errors.values()) or 1.0
    rows = []
    for words in TIDE_ERRORS.values():
        cells = _row(comparison, words, comparison.errors, lambda number, name: None)
        widths = [100 * errors.get(words, 0.0) / highest for errors in comparison.errors]
        rows.append(
            (words, [(Cell(c.value, c.difference), width) for c, width in zip(cells, widths, strict=True)])
        )
    return rows


def _charts(runs: Sequence[Compared], name: str) -> list[str]:
    """Return a chart of a metric over each of the four axes; none if no run has it."""
    if not any(name in point.values for run in runs for point in run.points):
        return []
    charts = []
    for label, attribute in X_AXES:
        curves = [Curve(run.name, _points(run.points, name, attribute)) for run in runs]
        charts.append(line_chart(curves, label, markers=name == "AP"))
    return charts


def _points(points: Sequence[Point], name: str, attribute: str) -> list[tuple[float, float]]:
    found = [
        (float(getattr(point, attribute)), point.values[name]) for point in points if name in point.values
    ]
    return sorted(found)


# --- Images ---


def _pairs(comparison: RunComparison) -> list[Pair]:
    first = comparison.runs[0]
    others = list(comparison.intervals)
    if first.detections is None or not others:
        return []
    number = max(MIN_IMAGES, NUM_IMAGES // len(others))
    try:
        read_image: ReadImage | None = from_shards(_open(first))
        problem = ""
    except (OSError, ValueError) as error:
        read_image, problem = None, f"the images cannot be read: {error}"
    pairs = []
    for place in others:
        other = comparison.runs[place]
        assert other.detections is not None
        thresholds = comparison.threshold(0), comparison.threshold(place)
        sets = first.detections.results, other.detections.results
        rows = disagreements(first.detections.ground_truth, sets, thresholds)
        pictures = []
        for row in rows[:number]:
            if read_image is None:
                break
            image = read_image(row.image_id)
            if image is None:
                problem = f"image {row.image_id} cannot be read: it is corrupt, or its shard is away"
            else:
                pictures.append(_picture(image, row, (first, other), thresholds))
        pairs.append(Pair(other.name, len(rows), thresholds, tuple(pictures), problem))
    return pairs


def _open(run: Compared) -> Shards:
    """Open the shards that a run was evaluated on.

    Raises:
        ValueError, OSError: they cannot be read, or have changed.
    """
    if run.shards is None:
        raise ValueError("where the validation shards are is not known")
    shards = open_shards(run.shards)
    full = (run.fingerprint or "").partition("[")[0]
    if shards.fingerprint != full:
        raise ValueError(
            f"{run.shards} has other data now (fingerprint {shards.fingerprint} instead of {full})"
        )
    return shards


def _picture(
    image: Image.Image, row: Disagreement, runs: tuple[Compared, Compared], thresholds: tuple[float, float]
) -> Picture:
    assert runs[0].detections is not None
    truth = runs[0].detections.ground_truth
    names = {category["id"]: category["name"] for category in truth["categories"]}
    objects = [a for a in truth["annotations"] if a["image_id"] == row.image_id]
    panel = draw_boxes(image, coco_boxes(objects, names), IMAGE_SIDE)
    panels = [(f"ground truth: {counted(row.num_objects, 'object')}", jpeg_url(panel))]
    for side, (run, threshold) in enumerate(zip(runs, thresholds, strict=True)):
        assert run.detections is not None
        boxes = coco_boxes(_rows(run.detections, row.image_id), names, threshold)
        caption = f"{run.name}: {row.num_found[side]} found, {row.num_false[side]} false"
        panels.append((caption, jpeg_url(draw_boxes(image, boxes, IMAGE_SIDE))))
    file = next(each.get("file_name", "") for each in truth["images"] if each["id"] == row.image_id)
    return Picture(f"image {row.image_id} ({file})", tuple(panels))


def _rows(detections: Detections, image_id: int) -> list[dict[str, Any]]:
    results: Results = detections.results.of_image(image_id)
    columns = zip(
        results.category_ids.tolist(), results.boxes_xywh.tolist(), results.scores.tolist(), strict=True
    )
    return [{"category_id": category, "bbox": box, "score": score} for category, box, score in columns]
