"""Objects that are too small to be seen after the resize."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from raydetr.doctor.findings import Finding, listed
from raydetr.doctor.split import Examined, Floats
from raydetr.doctor.target import Target

TINY, SMALL = 4, 8  # pixels of the smaller side after the resize; the finest feature map has cells of 8
MANY_TINY = 0.05  # share of all objects
MOSTLY_SMALL = 0.5  # share of the objects of a class
ENOUGH = 10  # objects of a class, below which a share says nothing


def smaller_sides(examined: Examined, target: Target) -> Floats:
    """The smaller side of each usable object after the resize, in pixels."""
    usable = examined.is_usable
    factors = target.factors(*examined.sizes[usable].T)
    sides: Floats = examined.visible[usable].min(axis=1) * factors
    return sides


def small_by_class(examined: Examined, target: Target) -> npt.NDArray[np.int64]:
    """Objects of each category with a side below SMALL, in the order of the list."""
    ids = np.array([category["id"] for category in examined.split.shards.manifest.categories])
    objects = examined.facts.objects[examined.is_usable]
    small = smaller_sides(examined, target) < SMALL
    return np.bincount(np.searchsorted(ids, objects["category_id"][small]), minlength=len(ids))


def scale_findings(examined: Examined, target: Target, counts: npt.NDArray[np.int64]) -> Iterator[Finding]:
    """Many tiny objects, or classes of small ones; `counts` are the objects of each class."""
    sides = smaller_sides(examined, target)
    numbers = np.flatnonzero(examined.is_usable)
    tiny = sides < TINY
    if tiny.any() and tiny.mean() >= MANY_TINY:
        smallest = numbers[np.argsort(sides, kind="stable")]
        yield Finding(
            "tiny-objects", "warning", (examined.name,),
            f"{tiny.mean():.0%} of the objects have a side under {TINY} pixels {target.scale()}",
            "train at a larger scale, cut the images into tiles, or leave such objects out",
            int(tiny.sum()), examined.examples(smallest),
        )  # fmt: skip
    small = small_by_class(examined, target)
    mostly = np.flatnonzero((counts >= ENOUGH) & (small >= MOSTLY_SMALL * counts))
    if len(mostly):
        names = [category["name"] for category in examined.split.shards.manifest.categories]
        told = [f"{names[number]} {small[number] / counts[number]:.0%}" for number in mostly]
        ids = [examined.split.shards.manifest.categories[number]["id"] for number in mostly]
        of_them = np.isin(examined.facts.objects["category_id"][numbers], ids) & (sides < SMALL)
        yield Finding(
            "small-classes", "note", (examined.name,),
            f"classes of which at least half have a side under {SMALL} pixels {target.scale()}: {listed(told)}",
            "a cell of the finest feature map has 8 pixels: expect a low AP, or train at a larger scale",
            len(mostly), examined.examples(numbers[of_them]),
        )  # fmt: skip
