"""Report an examination: statistics of each split and findings, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raydetr.doctor.box_checks import SMALL, TINY, shorter_sides, small_by_class
from raydetr.doctor.class_checks import class_counts
from raydetr.doctor.findings import LEVELS, Example, Finding, Floats, TrainingTarget, counted
from raydetr.doctor.scan import ScannedSplit
from raydetr.shards.manifest import MAX_LABEL

# --- Statistics of a split ---

PERCENTILES = (50, 90, 99)
SIDE_EDGES = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # Pixels
COUNT_EDGES = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200)  # Objects per image
ASPECT_EDGES = (0.0, 0.33, 0.5, 0.67, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)  # Width by height


@dataclass(frozen=True)
class Histogram:
    """Counts of values between each edge and the next; the last bin has no upper edge."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(values: npt.NDArray[Any], edges: tuple[float, ...]) -> Histogram:
        """Count values [n], none of which is below the first edge."""
        bins = np.searchsorted(edges, values, side="right") - 1
        return Histogram(edges, tuple(np.bincount(bins, minlength=len(edges)).tolist()))


@dataclass(frozen=True)
class ClassRow:
    """Counts of one category."""

    id: int
    name: str
    images: int
    objects: int
    small: int  # Objects with a side below SMALL pixels after the resize


@dataclass(frozen=True)
class SplitStatistics:
    """Statistics of one split. "Objects" are those that training uses, unless noted otherwise."""

    name: str
    location: str
    fingerprint: str
    images: int
    unusable_images: int  # Corrupt samples
    empty_images: int  # Without an object
    objects: int
    crowds: int  # Annotations of crowds
    unusable_boxes: int  # Other annotations: no box, without area in the image, of no category
    objects_per_image: dict[str, int]  # Percentiles and the maximum
    classes: dict[str, int | None]  # With each label map; None: not possible
    tiny_fraction: float | None  # Of the objects, with a side below TINY pixels after the resize
    small_fraction: float | None  # Below SMALL pixels
    widths: dict[str, int]  # Minimum, median, maximum, in pixels
    heights: dict[str, int]
    categories: tuple[ClassRow, ...]
    histograms: dict[str, Histogram]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def split_statistics(scanned: ScannedSplit, target: TrainingTarget) -> SplitStatistics:
    """Compute the statistics of a split."""
    shards, scan = scanned.split.shards, scanned.scan
    per_image, usable = scanned.objects_per_image, scanned.is_usable
    crowds = int(scan.objects["is_crowd"].sum())
    sides = shorter_sides(scanned, target)
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
        tiny_fraction=round(float((sides < TINY).mean()), 6) if len(sides) else None,
        small_fraction=round(float((sides < SMALL).mean()), 6) if len(sides) else None,
        widths=_spread(scanned.split.widths),
        heights=_spread(scanned.split.heights),
        categories=tuple(ClassRow(c["id"], c["name"], *map(int, counts)) for c, *counts in rows),
        histograms={
            "objects_per_image": Histogram.of(per_image, COUNT_EDGES),
            "shorter_side": Histogram.of(sides, SIDE_EDGES),
            "aspect": Histogram.of(scanned.split.widths / scanned.split.heights, ASPECT_EDGES),
        },
    )


def _percentile(values: npt.NDArray[Any], percent: int) -> int:
    return int(np.percentile(values, percent, method="nearest"))


def _spread(values: Floats) -> dict[str, int]:
    return {"min": int(values.min()), "median": _percentile(values, 50), "max": int(values.max())}


# --- The report ---

FORMAT_VERSION = 1
EXAMPLES_IN_TEXT = 3
WIDTH = 110  # Characters


@dataclass(frozen=True)
class Report:
    """Result of an examination; findings are sorted by level, errors first."""

    target: TrainingTarget
    scanned: tuple[ScannedSplit, ...]
    statistics: tuple[SplitStatistics, ...]  # Of each split
    findings: tuple[Finding, ...]
    seconds: float

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
            "target": self.target.to_dict(),
            "splits": [statistics.to_dict() for statistics in self.statistics],
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def to_text(self) -> str:
        """Format a table of statistics, the findings and the verdict."""
        parts = [_table(summary_rows(self))] if self.statistics else []
        parts += [_finding_text(finding) for finding in self.findings]
        return "\n\n".join([*parts, self.verdict()])


def summary_rows(report: Report) -> list[list[str]]:
    """Return rows of statistics with a column for each split; the first column names the rows."""
    columns = [_column(statistics) for statistics in report.statistics]
    heads = ["", *(statistics.name for statistics in report.statistics)]
    return [heads, *([name, *(column[name] for column in columns)] for name in columns[0])]


def _table(rows: list[list[str]]) -> str:
    """Format rows as lines, with the first column aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _column(statistics: SplitStatistics) -> dict[str, str]:
    per_image, classes = statistics.objects_per_image, statistics.classes
    with_ids = classes["category_id"]
    return {
        "images": f"{statistics.images:,}",
        "  without objects": f"{statistics.empty_images:,}",
        "  that cannot be used": f"{statistics.unusable_images:,}",
        "  width": _spread_text(statistics.widths),
        "  height": _spread_text(statistics.heights),
        "objects": f"{statistics.objects:,}",
        "  per image": f"{per_image['p50']}, 90% {per_image['p90']}, max {per_image['max']}",
        f"  with a side under {TINY} pixels": _percent(statistics.tiny_fraction),
        f"  with a side under {SMALL} pixels": _percent(statistics.small_fraction),
        "crowds": f"{statistics.crowds:,}",
        "boxes that are not used": f"{statistics.unusable_boxes:,}",
        "classes": f"{classes['contiguous']}",
        "  with label_map=category_id": "-" if with_ids is None else f"{with_ids}",
    }


def _spread_text(values: dict[str, int]) -> str:
    if values["min"] == values["max"]:
        return str(values["min"])
    return f"{values['min']} to {values['max']}, median {values['median']}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.1%}"


def _finding_text(finding: Finding) -> str:
    lines = [f"{finding.level:8} {', '.join(finding.splits)}: {finding.text}"]
    lines += [_shortened(example) for example in finding.examples[:EXAMPLES_IN_TEXT]]
    lines.append(f"do: {finding.remedy}")
    return ("\n" + 9 * " ").join(lines) + f"  [{finding.code}]"


def _shortened(example: Example) -> str:
    text = str(example)
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
