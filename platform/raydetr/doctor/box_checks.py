"""Objects that are too small to be seen after the resize.

Boxes that are none, lie outside, or are suspiciously alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from raydetr.doctor.findings import Finding, Level, Target, counted, listed
from raydetr.doctor.scan import Floats, ScannedSplit

TINY, SMALL = 4, 8  # pixels of the smaller side after the resize; the finest feature map has cells of 8
MANY_TINY = 0.05  # share of all objects
MOSTLY_SMALL = 0.5  # share of the objects of a class
MIN_CLASS_OBJECTS = 10  # objects of a class, below which a share says nothing


def smaller_sides(scanned: ScannedSplit, target: Target) -> Floats:
    """The smaller side of each usable object after the resize, in pixels."""
    usable = scanned.is_usable
    factors = target.factors(*scanned.sizes[usable].T)
    sides: Floats = scanned.visible[usable].min(axis=1) * factors
    return sides


def small_by_class(scanned: ScannedSplit, target: Target) -> npt.NDArray[np.int64]:
    """Objects of each category with a side below SMALL, in the order of the list."""
    ids = np.array([category["id"] for category in scanned.split.shards.manifest.categories])
    objects = scanned.scan.objects[scanned.is_usable]
    small = smaller_sides(scanned, target) < SMALL
    return np.bincount(np.searchsorted(ids, objects["category_id"][small]), minlength=len(ids))


def scale_findings(scanned: ScannedSplit, target: Target, counts: npt.NDArray[np.int64]) -> Iterator[Finding]:
    """Many tiny objects, or classes of small ones; `counts` are the objects of each class."""
    sides = smaller_sides(scanned, target)
    numbers = np.flatnonzero(scanned.is_usable)
    tiny = sides < TINY
    if tiny.any() and tiny.mean() >= MANY_TINY:
        smallest = numbers[np.argsort(sides, kind="stable")]
        yield Finding(
            "tiny-objects", "warning", (scanned.name,),
            f"{tiny.mean():.0%} of the objects have a side under {TINY} pixels {target.scale()}",
            "train at a larger scale, cut the images into tiles, or leave such objects out",
            int(tiny.sum()), scanned.examples(smallest),
        )  # fmt: skip
    small = small_by_class(scanned, target)
    mostly = np.flatnonzero((counts >= MIN_CLASS_OBJECTS) & (small >= MOSTLY_SMALL * counts))
    if len(mostly):
        names = [category["name"] for category in scanned.split.shards.manifest.categories]
        told = [f"{names[number]} {small[number] / counts[number]:.0%}" for number in mostly]
        ids = [scanned.split.shards.manifest.categories[number]["id"] for number in mostly]
        of_them = np.isin(scanned.scan.objects["category_id"][numbers], ids) & (sides < SMALL)
        yield Finding(
            "small-classes", "note", (scanned.name,),
            f"classes of which at least half have a side under {SMALL} pixels {target.scale()}: {listed(told)}",
            "a cell of the finest feature map has 8 pixels: expect a low AP, or train at a larger scale",
            len(mostly), scanned.examples(numbers[of_them]),
        )  # fmt: skip


FEW = 0.01  # share of the objects up to which a blemish is only a note; COCO's own data has some
ROUNDING = 0.5  # pixels by which a box may reach out of its image; COCO's own do
MANY_REACH_OUT = 0.25  # share of boxes from which on [x1, y1, x2, y2] is likelier than carelessness
MANY_WHOLE = 0.1  # share of objects that cover their whole image
WHOLE = 0.99  # share of the image's area
MANY_EQUAL = 0.05  # share of the images that have one and the same box
ENOUGH = 10  # fewer boxes than this show nothing

Numbers = npt.NDArray[np.int64]


def box_findings(scanned: ScannedSplit, corrupt: Level) -> list[Finding]:
    """All that is wrong, or odd, with the boxes of a split.

    `damage` is the level of what makes a sample a damaged one to those who read it.
    """
    return [
        *_malformed(scanned, corrupt),
        *_unknown_categories(scanned, corrupt),
        *_wrong_format(scanned),
        *_without_area(scanned),
        *_whole_images(scanned),
        *_equal_in_many_images(scanned),
        *_twice_in_an_image(scanned),
    ]


def _malformed(scanned: ScannedSplit, level: Level) -> Iterator[Finding]:
    chosen = np.flatnonzero(~scanned.scan.objects["is_box"])
    if len(chosen):
        yield Finding(
            "malformed-boxes", level, (scanned.name,),
            f"{counted(len(chosen), 'annotation')} without a box of four finite numbers, none of them a negative size",
            "correct `bbox` to [x, y, width, height], or remove the annotations, and write the shards again",
            len(chosen), scanned.examples(chosen),
        )  # fmt: skip


def _unknown_categories(scanned: ScannedSplit, level: Level) -> Iterator[Finding]:
    chosen = np.flatnonzero(~scanned.is_known)
    if not len(chosen):
        return
    used = np.unique(scanned.scan.objects["category_id"])
    ids = np.array([category["id"] for category in scanned.split.shards.manifest.categories])
    unknown = sorted(set(used.tolist()) - set(ids.tolist()))
    shift = next((step for step in (-1, 1) if np.isin(used, ids + step).all()), 0)
    hint = "" if not shift else f"; all would fit with 1 {'added' if shift < 0 else 'taken off'}"
    yield Finding(
        "unknown-categories", level, (scanned.name,),
        f"{counted(len(chosen), 'annotation')} of categories that are not in the list (ids {listed(unknown)}){hint}",
        "make the list and the annotations agree, and write the shards again",
        len(chosen), scanned.examples(chosen, boxes=False),
    )  # fmt: skip


def _wrong_format(scanned: ScannedSplit) -> Iterator[Finding]:
    """Relative coordinates, corners instead of sizes, or just boxes that reach out."""
    objects = scanned.scan.objects
    chosen = np.flatnonzero(objects["is_box"] & ~objects["is_crowd"])
    if not len(chosen):
        return
    boxes, sizes = objects["box"][chosen], scanned.sizes[chosen]
    relative = (boxes <= 1).all(axis=1) & (sizes > 2).all(axis=1)
    if relative.sum() >= ENOUGH and relative.mean() >= 0.9:
        yield Finding(
            "relative-boxes", "fault", (scanned.name,),
            f"{relative.mean():.0%} of the boxes lie within one pixel: their numbers are shares of the image's size",
            "multiply them with width and height of their image: COCO's boxes are in pixels",
            int(relative.sum()), scanned.examples(chosen[relative]),
        )  # fmt: skip
        return
    out = (boxes[:, :2] + boxes[:, 2:] > sizes + ROUNDING).any(axis=1) | (boxes[:, :2] < -ROUNDING).any(
        axis=1
    )
    out &= (scanned.visible[chosen] > 0).all(axis=1)
    share = out.mean()
    if out.sum() >= ENOUGH and share >= MANY_REACH_OUT:
        yield Finding(
            "corner-boxes", "warning", (scanned.name,),
            f"{share:.0%} of the boxes reach out of their image: are they [x1, y1, x2, y2]?",
            "COCO's boxes are [x, y, width, height]: subtract x1 from x2 and y1 from y2",
            int(out.sum()), scanned.examples(chosen[out]),
        )  # fmt: skip
    elif out.any():
        yield _blemish(
            scanned, "boxes-reach-out", chosen[out], "box that reaches", "boxes that reach", "out of the image",
            "training clamps them; correct them if they are many",
        )  # fmt: skip


def _without_area(scanned: ScannedSplit) -> Iterator[Finding]:
    objects = scanned.scan.objects
    sound = objects["is_box"] & ~objects["is_crowd"]
    with np.errstate(invalid="ignore"):
        flat = sound & (objects["box"][:, 2:] <= 0).any(axis=1)
        outside = sound & ~flat & (scanned.visible <= 0).any(axis=1)
    if flat.any():
        yield _blemish(
            scanned, "boxes-without-area", np.flatnonzero(flat), "box", "boxes", "of zero width or height",
            "training leaves them out; remove or correct them",
        )  # fmt: skip
    if outside.any():
        yield _blemish(
            scanned, "boxes-outside", np.flatnonzero(outside), "box", "boxes", "entirely outside the image",
            "training leaves them out; remove or correct them",
        )  # fmt: skip


def _blemish(
    scanned: ScannedSplit, code: str, chosen: Numbers, one: str, many: str, text: str, remedy: str
) -> Finding:
    """A note where there are few, a warning where there are many."""
    share = len(chosen) / len(scanned.scan.objects)
    level: Level = "warning" if share > FEW else "note"
    counts = f"{counted(len(chosen), one, many)} {text} ({share:.2%})"
    return Finding(code, level, (scanned.name,), counts, remedy, len(chosen), scanned.examples(chosen))


def _whole_images(scanned: ScannedSplit) -> Iterator[Finding]:
    sides, sizes = scanned.visible, scanned.sizes
    whole = scanned.is_usable & (sides.prod(axis=1) >= WHOLE * sizes.prod(axis=1))
    num_usable = int(scanned.is_usable.sum())
    count = int(whole.sum())
    if count >= ENOUGH and count >= MANY_WHOLE * num_usable:
        yield Finding(
            "whole-image-boxes", "warning", (scanned.name,),
            f"{counted(count, 'box', 'boxes')} ({count / num_usable:.0%}) cover the whole image",
            "look whether they were drawn around objects, or stand for `somewhere in this image`",
            count, scanned.examples(np.flatnonzero(whole)),
        )  # fmt: skip


def _equal_in_many_images(scanned: ScannedSplit) -> Iterator[Finding]:
    """One and the same box in many images: a default value, or a watermark."""
    sides, sizes = scanned.visible, scanned.sizes
    partial = scanned.is_usable & (sides.prod(axis=1) < WHOLE * sizes.prod(axis=1))
    chosen = np.flatnonzero(partial)
    objects = scanned.scan.objects[chosen]
    keys = np.column_stack([objects["box"], objects["sample"]])
    distinct = np.unique(keys, axis=0)[:, :4]  # a box counts once in an image
    boxes, counts = np.unique(distinct, axis=0, return_counts=True)
    if not len(boxes) or counts.max() < max(ENOUGH, MANY_EQUAL * scanned.split.shards.num_samples):
        return
    most = int(np.argmax(counts))
    box = ", ".join(f"{side:g}" for side in boxes[most])
    same = chosen[(objects["box"] == boxes[most]).all(axis=1)]
    yield Finding(
        "equal-boxes", "warning", (scanned.name,),
        f"one and the same box [{box}] is in {counted(int(counts[most]), 'image')}",
        "look whether it is a default value, or something that is printed on the images",
        int(counts[most]), scanned.examples(same),
    )  # fmt: skip


def _twice_in_an_image(scanned: ScannedSplit) -> Iterator[Finding]:
    chosen = np.flatnonzero(scanned.is_usable)
    objects = scanned.scan.objects[chosen]
    keys = np.column_stack([objects["sample"], objects["category_id"], objects["box"]])
    order = np.lexsort(keys.T[::-1])
    is_repeated = (np.diff(keys[order], axis=0) == 0).all(axis=1)
    twice = chosen[order[1:][is_repeated]] if len(order) else chosen
    if len(twice):
        yield _blemish(
            scanned, "repeated-objects", np.sort(twice), "object is", "objects are",
            "annotated twice: same image, class and box", "remove the copies: each query finds one object once",
        )  # fmt: skip
