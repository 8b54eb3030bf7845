"""The numbers of a split: for the summary, the JSON and the page.

The result of an examination, as text and as JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raydetr.doctor.box_checks import SMALL, TINY, small_by_class, smaller_sides
from raydetr.doctor.class_checks import class_counts
from raydetr.doctor.findings import LEVELS, Example, Finding, Target, counted, may_start
from raydetr.doctor.scan import ScannedSplit
from raydetr.shards.manifest import MAX_LABEL

PERCENTILES = (50, 90, 99)
SIDE_EDGES = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # pixels
COUNT_EDGES = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200)  # objects in an image
ASPECT_EDGES = (0.0, 0.33, 0.5, 0.67, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)  # width by height


@dataclass(frozen=True)
class Histogram:
    """How many values lie between one edge and the next; the last bin has no upper edge."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(values: npt.NDArray[Any], edges: tuple[float, ...]) -> Histogram:
        """Count values [n], none of which is below the first edge."""
        bins = np.searchsorted(edges, values, side="right") - 1
        return Histogram(edges, tuple(np.bincount(bins, minlength=len(edges)).tolist()))


@dataclass(frozen=True)
class ClassRow:
    """One category."""

    id: int
    name: str
    images: int
    objects: int
    small: int  # objects with a side below SMALL pixels after the resize


@dataclass(frozen=True)
class SplitStatistics:
    """The numbers of one split. "Objects" are those that training uses, if not said otherwise."""

    name: str
    location: str
    fingerprint: str
    images: int
    unusable_images: int  # damaged
    empty_images: int  # without an object
    objects: int
    crowds: int  # annotations of crowds
    unusable_boxes: int  # annotations that are neither: no box, without area in the image, of no category
    objects_per_image: dict[str, int]  # percentiles and the maximum
    classes: dict[str, int | None]  # with each label map; None: not possible
    tiny_share: float | None  # of the objects, with a side below TINY pixels after the resize
    small_share: float | None  # ... below SMALL pixels
    widths: dict[str, int]  # smallest, median, largest, in pixels
    heights: dict[str, int]
    categories: tuple[ClassRow, ...]
    histograms: dict[str, Histogram]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def split_statistics(scanned: ScannedSplit, target: Target) -> SplitStatistics:
    """All numbers of a split."""
    shards, scan = scanned.split.shards, scanned.scan
    per_image, usable = scanned.objects_per_image, scanned.is_usable
    crowds = int(scan.objects["is_crowd"].sum())
    sides = smaller_sides(scanned, target)
    categories = shards.manifest.categories
    highest = max(category["id"] for category in categories)
    rows = zip(categories, *class_counts(scanned), small_by_class(scanned, target), strict=True)
    return SplitStatistics(
        name=scanned.name,
        location=shards.location,
        fingerprint=shards.fingerprint,
        images=shards.num_samples,
        unusable_images=len(scan.corrupt),
        empty_images=int((per_image == 0).sum()),
        objects=int(usable.sum()),
        crowds=crowds,
        unusable_boxes=int((~usable & ~scan.objects["is_crowd"]).sum()),
        objects_per_image={f"p{p}": _percentile(per_image, p) for p in PERCENTILES}
        | {"max": int(per_image.max())},
        classes={
            "contiguous": len(categories),
            "category_id": highest + 1 if highest <= MAX_LABEL else None,
        },
        tiny_share=round(float((sides < TINY).mean()), 6) if len(sides) else None,
        small_share=round(float((sides < SMALL).mean()), 6) if len(sides) else None,
        widths=_spread(scanned.split.widths),
        heights=_spread(scanned.split.heights),
        categories=tuple(ClassRow(c["id"], c["name"], *map(int, counts)) for c, *counts in rows),
        histograms={
            "objects_per_image": Histogram.of(per_image, COUNT_EDGES),
            "smaller_side": Histogram.of(sides, SIDE_EDGES),
            "aspect": Histogram.of(scanned.split.widths / scanned.split.heights, ASPECT_EDGES),
        },
    )


def _percentile(values: npt.NDArray[Any], percent: int) -> int:
    return int(np.percentile(values, percent, method="nearest"))


def _spread(values: npt.NDArray[np.float64]) -> dict[str, int]:
    return {"min": int(values.min()), "median": _percentile(values, 50), "max": int(values.max())}


FORMAT_VERSION = 1
EXAMPLES_IN_TEXT = 3
WIDTH = 110  # characters


@dataclass(frozen=True)
class Report:
    """What was found in the data, the gravest first."""

    target: Target
    scanned: tuple[ScannedSplit, ...]
    statistics: tuple[SplitStatistics, ...]  # of each
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def may_start(self) -> bool:
        """Whether training may start."""
        return may_start(self.findings)

    def verdict(self) -> str:
        """The result in one line."""
        if not self.findings:
            return "training may start: nothing was found"
        counts = [(level, sum(found.level == level for found in self.findings)) for level in LEVELS]
        listing = ", ".join(counted(count, level) for level, count in counts if count)
        return f"training {'may' if self.may_start else 'must not'} start: {listing}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; docs/data.md tells the fields."""
        return {
            "format_version": FORMAT_VERSION,
            "may_start": self.may_start,
            "seconds": round(self.seconds, 3),
            "target": self.target.to_dict(),
            "splits": [statistics.to_dict() for statistics in self.statistics],
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def to_text(self) -> str:
        """A table of numbers, the findings, the verdict."""
        parts = [table(summary_rows(self))] if self.statistics else []
        parts += [_finding_text(finding) for finding in self.findings]
        return "\n\n".join([*parts, self.verdict()])


def summary_rows(report: Report) -> list[list[str]]:
    """The numbers of the splits, a column for each; the first column says what they are."""
    columns = [_column(statistics) for statistics in report.statistics]
    heads = ["", *(statistics.name for statistics in report.statistics)]
    return [heads, *([name, *(column[name] for column in columns)] for name in columns[0])]


def table(rows: list[list[str]]) -> str:
    """Rows as lines, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _column(numbers: SplitStatistics) -> dict[str, str]:
    per_image, classes = numbers.objects_per_image, numbers.classes
    return {
        "images": f"{numbers.images:,}",
        "  without objects": f"{numbers.empty_images:,}",
        "  that cannot be used": f"{numbers.unusable_images:,}",
        "  width": _spread_text(numbers.widths),
        "  height": _spread_text(numbers.heights),
        "objects": f"{numbers.objects:,}",
        "  in an image": f"{per_image['p50']}, 90% {per_image['p90']}, max {per_image['max']}",
        f"  with a side under {TINY} pixels": _percent(numbers.tiny_share),
        f"  with a side under {SMALL} pixels": _percent(numbers.small_share),
        "crowds": f"{numbers.crowds:,}",
        "boxes that are not used": f"{numbers.unusable_boxes:,}",
        "classes": f"{classes['contiguous']}",
        "  with label_map=category_id": "-"
        if classes["category_id"] is None
        else f"{classes['category_id']}",
    }


def _spread_text(values: dict[str, int]) -> str:
    if values["min"] == values["max"]:
        return str(values["min"])
    return f"{values['min']} to {values['max']}, median {values['median']}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _finding_text(finding: Finding) -> str:
    lines = [f"{finding.level:8} {', '.join(finding.splits)}: {finding.text}"]
    lines += [_shortened(example) for example in finding.examples[:EXAMPLES_IN_TEXT]]
    lines.append(f"do: {finding.remedy}")
    return ("\n" + 9 * " ").join(lines) + f"  [{finding.code}]"


def _shortened(example: Example) -> str:
    text = str(example)
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
