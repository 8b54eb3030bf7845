"""The numbers of a split: for the summary, the JSON and the page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raydetr.doctor.balance import class_counts
from raydetr.doctor.scale import SMALL, TINY, small_by_class, smaller_sides
from raydetr.doctor.split import Examined
from raydetr.doctor.target import Target
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
class Statistics:
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


def statistics_of(examined: Examined, target: Target) -> Statistics:
    """All numbers of a split."""
    shards, facts = examined.split.shards, examined.facts
    per_image, usable = examined.objects_per_image, examined.is_usable
    crowds = int(facts.objects["is_crowd"].sum())
    sides = smaller_sides(examined, target)
    categories = shards.manifest.categories
    highest = max(category["id"] for category in categories)
    rows = zip(categories, *class_counts(examined), small_by_class(examined, target), strict=True)
    return Statistics(
        name=examined.name,
        location=shards.location,
        fingerprint=shards.fingerprint,
        images=shards.num_samples,
        unusable_images=len(facts.damage),
        empty_images=int((per_image == 0).sum()),
        objects=int(usable.sum()),
        crowds=crowds,
        unusable_boxes=int((~usable & ~facts.objects["is_crowd"]).sum()),
        objects_per_image={f"p{p}": _percentile(per_image, p) for p in PERCENTILES}
        | {"max": int(per_image.max())},
        classes={
            "contiguous": len(categories),
            "category_id": highest + 1 if highest <= MAX_LABEL else None,
        },
        tiny_share=round(float((sides < TINY).mean()), 6) if len(sides) else None,
        small_share=round(float((sides < SMALL).mean()), 6) if len(sides) else None,
        widths=_spread(examined.split.widths),
        heights=_spread(examined.split.heights),
        categories=tuple(ClassRow(c["id"], c["name"], *map(int, counts)) for c, *counts in rows),
        histograms={
            "objects_per_image": Histogram.of(per_image, COUNT_EDGES),
            "smaller_side": Histogram.of(sides, SIDE_EDGES),
            "aspect": Histogram.of(examined.split.widths / examined.split.heights, ASPECT_EDGES),
        },
    )


def _percentile(values: npt.NDArray[Any], percent: int) -> int:
    return int(np.percentile(values, percent, method="nearest"))


def _spread(values: npt.NDArray[np.float64]) -> dict[str, int]:
    return {"min": int(values.min()), "median": _percentile(values, 50), "max": int(values.max())}
