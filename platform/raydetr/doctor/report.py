"""Report an examination: statistics of each split and findings, as text, as JSON and as a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from raydetr.console import counted, print_status, table
from raydetr.doctor.checks import SMALL, TINY, small_per_class
from raydetr.doctor.findings import LEVELS, Finding, Place, TrainingTarget
from raydetr.doctor.scan import ScannedSplit, is_valid_box, read_unchecked
from raydetr.shards.images import ImageError, decode_image
from raydetr.shards.manifest import MAX_LABEL
from raydetr.visualization.boxes import coco_boxes, draw_boxes
from raydetr.visualization.page import jpeg_url, render

# --- Statistics of a split ---

SIDE_EDGES = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # Pixels
COUNT_EDGES = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200)  # Objects per image
ASPECT_EDGES = (0.0, 0.33, 0.5, 0.67, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)  # Width by height

Statistics = dict[str, Any]


def split_statistics(scanned: ScannedSplit) -> Statistics:
    """Compute the statistics of a split, plain values for JSON; "objects" are those that training uses."""
    shards, per_image, sides = scanned.split.shards, scanned.objects_per_image, scanned.shorter_sides
    is_crowd, usable = scanned.scan.objects["is_crowd"], scanned.is_usable
    widths, heights = scanned.split.image_sizes.T
    num_classes, highest = len(scanned.category_ids), int(scanned.category_ids[-1])
    samples = scanned.scan.objects["sample"][usable].astype(np.int64)
    in_images = np.unique(samples * num_classes + scanned.classes) % num_classes
    columns = {
        "id": scanned.category_ids.tolist(),
        "name": scanned.split.category_names,
        "images": np.bincount(in_images, minlength=num_classes).tolist(),
        "objects": scanned.objects_per_class.tolist(),
        "small": small_per_class(scanned).tolist(),  # With a side below SMALL pixels after the resize
    }
    return {
        "name": scanned.name,
        "location": shards.location,
        "fingerprint": shards.fingerprint,
        "images": shards.num_samples,
        "unusable_images": len(scanned.scan.corrupt),
        "empty_images": int((per_image == 0).sum()),  # Without an object
        "objects": int(usable.sum()),
        "crowds": int(is_crowd.sum()),  # Annotations of crowds
        # No box, without area in the image, of no category
        "unusable_boxes": int((~usable & ~is_crowd).sum()),
        "objects_per_image": percentiles(per_image, {"p50": 50, "p90": 90, "p99": 99, "max": 100}),
        # With each label map; None: not possible
        "classes": {"contiguous": num_classes, "category_id": highest + 1 if highest <= MAX_LABEL else None},
        # Of the objects, with a side below TINY and below SMALL pixels after the resize; None: there are no objects
        "tiny_fraction": round(float((sides < TINY).mean()), 6) if len(sides) else None,
        "small_fraction": round(float((sides < SMALL).mean()), 6) if len(sides) else None,
        "widths": percentiles(widths, {"min": 0, "median": 50, "max": 100}),  # In pixels
        "heights": percentiles(heights, {"min": 0, "median": 50, "max": 100}),
        "categories": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        "histograms": {
            "objects_per_image": histogram(per_image, COUNT_EDGES),
            "shorter_side": histogram(sides, SIDE_EDGES),
            "aspect": histogram(widths / heights, ASPECT_EDGES),
        },
    }


def percentiles(values: npt.NDArray[Any], percents: dict[str, int]) -> dict[str, int]:
    """Return the percentiles of values, which are among the values, under the names of `percents`."""
    return {name: int(np.percentile(values, at, method="nearest")) for name, at in percents.items()}


def histogram(values: npt.NDArray[Any], edges: Sequence[float]) -> dict[str, list[float]]:
    """Count values between each edge and the next; the last bin has no upper edge."""
    return {"edges": list(edges), "counts": np.histogram(values, [*edges, np.inf])[0].tolist()}


# --- The report ---

FORMAT_VERSION = 1
EXAMPLES_IN_TEXT = 3
WIDTH = 110  # Characters


@dataclass(frozen=True)
class Report:
    """Result of an examination; findings are sorted by level, errors first."""

    target: TrainingTarget
    scanned: tuple[ScannedSplit, ...]
    findings: tuple[Finding, ...]
    seconds: float

    @cached_property
    def statistics(self) -> list[Statistics]:
        """Statistics of each split."""
        return list(map(split_statistics, self.scanned))

    @property
    def may_start(self) -> bool:
        """Whether training may start: no finding is an error."""
        return all(finding.level != "error" for finding in self.findings)

    def verdict(self) -> str:
        """Return the result in one line."""
        if not self.findings:
            return "training may start: nothing was found"
        counts = [(level, sum(found.level == level for found in self.findings)) for level in LEVELS]
        listing = ", ".join(counted(count, level) for level, count in counts if count)
        return f"training {'may' if self.may_start else 'must not'} start: {listing}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; docs/data/doctor.md describes the fields."""
        return {
            "format_version": FORMAT_VERSION,
            "may_start": self.may_start,
            "seconds": round(self.seconds, 3),
            "target": asdict(self.target),
            "splits": self.statistics,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def to_text(self) -> str:
        """Format a table of statistics, the findings and the verdict."""
        parts = [table(self.summary(), right=True)] if self.statistics else []
        parts += [_finding_text(finding) for finding in self.findings]
        return "\n\n".join([*parts, self.verdict()])

    def to_html(self) -> str:
        """Render a page in one file; its images are read from the shards again."""
        return render(
            "raydetr.doctor",
            "page.html",
            report=self,
            charts=[_chart(self, *chart) for chart in CHARTS] if self.statistics else [],
            class_rows=_class_rows(self),
            gallery=_gallery,
            picture=lambda place, is_pair: _picture(self, place, is_pair),
            log1p=math.log1p,
            colors=COLORS,
            small=SMALL,
        )

    def summary(self) -> list[list[str]]:
        """Return rows of statistics with a column for each split; the first column names the rows."""
        columns = [{"": statistics["name"], **_column(statistics)} for statistics in self.statistics]
        return [[name, *(column[name] for column in columns)] for name in columns[0]]


def _column(statistics: Statistics) -> dict[str, str]:
    per_image, with_ids = statistics["objects_per_image"], statistics["classes"]["category_id"]
    return {
        "images": f"{statistics['images']:,}",
        "  without objects": f"{statistics['empty_images']:,}",
        "  that cannot be used": f"{statistics['unusable_images']:,}",
        "  width": _spread_text(statistics["widths"]),
        "  height": _spread_text(statistics["heights"]),
        "objects": f"{statistics['objects']:,}",
        "  per image": f"{per_image['p50']}, 90% {per_image['p90']}, max {per_image['max']}",
        f"  with a side under {TINY} pixels": _percent(statistics["tiny_fraction"]),
        f"  with a side under {SMALL} pixels": _percent(statistics["small_fraction"]),
        "crowds": f"{statistics['crowds']:,}",
        "boxes that are not used": f"{statistics['unusable_boxes']:,}",
        "classes": f"{statistics['classes']['contiguous']}",
        "  with label_map=category_id": "-" if with_ids is None else f"{with_ids}",
    }


def _spread_text(values: dict[str, int]) -> str:
    if values["min"] == values["max"]:
        return str(values["min"])
    return f"{values['min']} to {values['max']}, median {values['median']}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.1%}"


# --- Text ---


def _finding_text(finding: Finding) -> str:
    examples = [str(example) for example in finding.examples[:EXAMPLES_IN_TEXT]]
    lines = [
        f"{finding.level:8} {', '.join(finding.splits)}: {finding.text}",
        *(text if len(text) <= WIDTH else text[: WIDTH - 1] + "…" for text in examples),
        f"do: {finding.remedy}",
    ]
    return ("\n" + 9 * " ").join(lines) + f"  [{finding.code}]"


# --- The page: what page.html does not compute itself ---

COLORS = ("#3366cc", "#e07b39", "#2a9d6f", "#9b4dca", "#b8a000", "#808080")  # Of the splits
GALLERY_SIZE = 8  # Images of each split
IMAGE_SIDE = 340  # Pixels of the long side
CHARTS = (
    ("objects_per_image", "Objects per image", "objects"),
    ("shorter_side", "Shorter side of an object", "pixels after the resize"),
    ("aspect", "Shape of the images", "width / height"),
)


def _chart(report: Report, key: str, title: str, unit: str) -> dict[str, Any]:
    """Return for each bin its first value, and a bar for each split: the fraction of its values, color and tooltip."""
    edges = report.statistics[0]["histograms"][key]["edges"]
    ends = [*(f"to under {edge:g}" for edge in edges[1:]), "and more"]
    bins: list[tuple[float, list[tuple[float, str, str]]]] = [(edge, []) for edge in edges]
    for number, statistics in enumerate(report.statistics):
        counts, color = statistics["histograms"][key]["counts"], COLORS[number % len(COLORS)]
        for (edge, bars), end, count in zip(bins, ends, counts, strict=True):
            fraction = count / max(1, sum(counts))
            tip = f"{statistics['name']}, {edge:g} {end} {unit}: {count:,} ({fraction:.1%})"
            bars.append((fraction, color, tip))
    highest = max(0.05, *(fraction for _, bars in bins for fraction, _, _ in bars))
    return {"title": title, "unit": unit, "bins": bins, "highest": highest}


def _class_rows(report: Report) -> list[tuple[int, str, list[Statistics | None]]]:
    """Return id and name of each category, with its row in each split; the splits may have different categories."""
    tables = [{(row["id"], row["name"]): row for row in one["categories"]} for one in report.statistics]
    keys = sorted({key for rows in tables for key in rows})
    return [(*key, [rows.get(key) for rows in tables]) for key in keys]


def _gallery(scanned: ScannedSplit) -> Iterator[Place]:
    """Yield some images, spread evenly over the split."""
    numbers = np.linspace(0, scanned.split.shards.num_samples - 1, GALLERY_SIZE).round().astype(int)
    return map(scanned.split.place, np.unique(numbers).tolist())


def _picture(report: Report, place: Place, is_pair: bool) -> str | None:
    """Return the image with the boxes of the place as a data URL; None where it cannot be read or drawn."""
    shards = next(one.split.shards for one in report.scanned if one.name == place.split)
    raw = read_unchecked(shards, place.sample)
    if raw is None:
        return None
    try:
        image = decode_image(raw.image)
    except ImageError:
        return None
    records = raw.annotations
    # Without annotations, the finding is about the image: all boxes show whether they are where they should be
    if place.annotations or is_pair:
        records = [records[number] for number in place.annotations]
    names = {category["id"]: category["name"] for category in shards.manifest.categories}
    boxes = coco_boxes([record for record in records if is_valid_box(record.get("bbox"))], names)
    try:
        return jpeg_url(draw_boxes(image, boxes, IMAGE_SIDE))
    except Exception as error:  # whatever it is: a picture must not take the findings with it
        print_status(
            f"warning: no picture of sample {place.sample} of {place.split}: {type(error).__name__}: {error}"
        )
        return None
