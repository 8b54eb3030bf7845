"""Find invalid and suspicious boxes, and objects that are too small to be seen after the resize."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from raydetr.doctor.findings import Finding, Floats, Integers, Level, TrainingTarget, counted, listed
from raydetr.doctor.scan import ScannedSplit

# --- Invalid and suspicious boxes ---

MAX_NOTE_FRACTION = 0.01  # Of the objects, up to which a minor problem is only a note; COCO itself has some
TOLERANCE = 0.5  # Pixels by which a box may exceed its image without a finding; COCO's boxes do, by rounding
MANY_EXCEEDING = 0.25  # Fraction of boxes above which [x1, y1, x2, y2] is likelier than inaccuracy
MANY_FULL_IMAGE = 0.1  # Fraction of objects that cover their full image
FULL_IMAGE = 0.99  # Fraction of the image's area
MANY_EQUAL = 0.05  # Fraction of the images that have the same box
MIN_BOXES = 10  # Fewer boxes do not show a pattern


def box_findings(scanned: ScannedSplit, corrupt_level: Level) -> list[Finding]:
    """Return all findings about the boxes of a split.

    `corrupt_level` is the level of problems for which the reader refuses a sample.
    """
    return [
        *_malformed_boxes(scanned, corrupt_level),
        *_unknown_categories(scanned, corrupt_level),
        *_box_format(scanned),
        *_boxes_without_area(scanned),
        *_full_image_boxes(scanned),
        *_equal_boxes(scanned),
        *_duplicate_objects(scanned),
    ]


def _malformed_boxes(scanned: ScannedSplit, level: Level) -> Iterator[Finding]:
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
    hint = "" if not shift else f"; all would fit with 1 {'added' if shift < 0 else 'subtracted'}"
    yield Finding(
        "unknown-categories", level, (scanned.name,),
        f"{counted(len(chosen), 'annotation')} of categories that are not in the list (ids {listed(unknown)}){hint}",
        "make the list and the annotations agree, and write the shards again",
        len(chosen), scanned.examples(chosen, boxes=False),
    )  # fmt: skip


def _box_format(scanned: ScannedSplit) -> Iterator[Finding]:
    """Distinguish relative coordinates from corners instead of sizes, and from boxes that merely exceed their image."""
    objects = scanned.scan.objects
    chosen = np.flatnonzero(objects["is_box"] & ~objects["is_crowd"])
    if not len(chosen):
        return
    boxes, sizes = objects["box"][chosen], scanned.sizes[chosen]
    relative = (boxes <= 1).all(axis=1) & (sizes > 2).all(axis=1)
    if relative.sum() >= MIN_BOXES and relative.mean() >= 0.9:
        yield Finding(
            "relative-boxes", "error", (scanned.name,),
            f"{relative.mean():.0%} of the boxes lie within one pixel: their numbers are fractions of the image's size",
            "multiply them by width and height of their image: COCO's boxes are in pixels",
            int(relative.sum()), scanned.examples(chosen[relative]),
        )  # fmt: skip
        return
    exceeds = (boxes[:, :2] + boxes[:, 2:] > sizes + TOLERANCE).any(axis=1)
    exceeds |= (boxes[:, :2] < -TOLERANCE).any(axis=1)
    exceeds &= (scanned.visible_sides[chosen] > 0).all(axis=1)
    if exceeds.sum() >= MIN_BOXES and exceeds.mean() >= MANY_EXCEEDING:
        yield Finding(
            "corner-boxes", "warning", (scanned.name,),
            f"{exceeds.mean():.0%} of the boxes exceed their image: are they [x1, y1, x2, y2]?",
            "COCO's boxes are [x, y, width, height]: subtract x1 from x2 and y1 from y2",
            int(exceeds.sum()), scanned.examples(chosen[exceeds]),
        )  # fmt: skip
    elif exceeds.any():
        yield _minor_problem(
            scanned, "boxes-exceed-image", chosen[exceeds], "box that exceeds", "boxes that exceed", "the image",
            "training clamps them; correct them if there are many",
        )  # fmt: skip


def _boxes_without_area(scanned: ScannedSplit) -> Iterator[Finding]:
    objects = scanned.scan.objects
    is_valid = objects["is_box"] & ~objects["is_crowd"]
    with np.errstate(invalid="ignore"):
        flat = is_valid & (objects["box"][:, 2:] <= 0).any(axis=1)
        outside = is_valid & ~flat & (scanned.visible_sides <= 0).any(axis=1)
    remedy = "training omits them; remove or correct them"
    for code, chosen, text in (
        ("boxes-without-area", np.flatnonzero(flat), "of zero width or height"),
        ("boxes-outside", np.flatnonzero(outside), "entirely outside the image"),
    ):
        if len(chosen):
            yield _minor_problem(scanned, code, chosen, "box", "boxes", text, remedy)


def _minor_problem(
    scanned: ScannedSplit, code: str, chosen: Integers, one: str, many: str, text: str, remedy: str
) -> Finding:
    """Return a note up to MAX_NOTE_FRACTION of the objects, a warning above."""
    fraction = len(chosen) / len(scanned.scan.objects)
    level: Level = "warning" if fraction > MAX_NOTE_FRACTION else "note"
    counts = f"{counted(len(chosen), one, many)} {text} ({fraction:.2%})"
    return Finding(code, level, (scanned.name,), counts, remedy, len(chosen), scanned.examples(chosen))


def _full_image_boxes(scanned: ScannedSplit) -> Iterator[Finding]:
    sides, sizes = scanned.visible_sides, scanned.sizes
    full = scanned.is_usable & (sides.prod(axis=1) >= FULL_IMAGE * sizes.prod(axis=1))
    num_usable = int(scanned.is_usable.sum())
    count = int(full.sum())
    if count >= MIN_BOXES and count >= MANY_FULL_IMAGE * num_usable:
        yield Finding(
            "full-image-boxes", "warning", (scanned.name,),
            f"{counted(count, 'box', 'boxes')} ({count / num_usable:.0%}) cover the full image",
            "check whether they were drawn around objects, or mean `somewhere in this image`",
            count, scanned.examples(np.flatnonzero(full)),
        )  # fmt: skip


def _equal_boxes(scanned: ScannedSplit) -> Iterator[Finding]:
    """Find a box that many images share: a default value, or a watermark."""
    sides, sizes = scanned.visible_sides, scanned.sizes
    partial = scanned.is_usable & (sides.prod(axis=1) < FULL_IMAGE * sizes.prod(axis=1))
    chosen = np.flatnonzero(partial)
    objects = scanned.scan.objects[chosen]
    keys = np.column_stack([objects["box"], objects["sample"]])
    distinct = np.unique(keys, axis=0)[:, :4]  # A box counts once per image
    boxes, counts = np.unique(distinct, axis=0, return_counts=True)
    if not len(boxes) or counts.max() < max(MIN_BOXES, MANY_EQUAL * scanned.split.shards.num_samples):
        return
    most = int(np.argmax(counts))
    box = ", ".join(f"{side:g}" for side in boxes[most])
    same = chosen[(objects["box"] == boxes[most]).all(axis=1)]
    yield Finding(
        "equal-boxes", "warning", (scanned.name,),
        f"the same box [{box}] is in {counted(int(counts[most]), 'image')}",
        "check whether it is a default value, or something that is printed on the images",
        int(counts[most]), scanned.examples(same),
    )  # fmt: skip


def _duplicate_objects(scanned: ScannedSplit) -> Iterator[Finding]:
    chosen = np.flatnonzero(scanned.is_usable)
    objects = scanned.scan.objects[chosen]
    keys = np.column_stack([objects["sample"], objects["category_id"], objects["box"]])
    order = np.lexsort(keys.T[::-1])
    is_copy = (np.diff(keys[order], axis=0) == 0).all(axis=1)
    copies = chosen[order[1:][is_copy]] if len(order) else chosen
    if len(copies):
        yield _minor_problem(
            scanned, "duplicate-objects", np.sort(copies), "object is", "objects are",
            "annotated twice: same image, class and box", "remove the copies: each query finds one object once",
        )  # fmt: skip


# --- Small objects ---

TINY, SMALL = 4, 8  # Pixels of the shorter side after the resize; the finest feature map has cells of 8
MANY_TINY = 0.05  # Fraction of all objects
MOSTLY_SMALL = 0.5  # Fraction of the objects of a class
MIN_CLASS_OBJECTS = 10  # Below this number of objects, a fraction of a class means nothing


def scale_findings(scanned: ScannedSplit, target: TrainingTarget, counts: Integers) -> Iterator[Finding]:
    """Find many tiny objects and classes of small ones; `counts` has the number of objects of each class."""
    sides = shorter_sides(scanned, target)
    numbers = np.flatnonzero(scanned.is_usable)
    tiny = sides < TINY
    if tiny.any() and tiny.mean() >= MANY_TINY:
        smallest = numbers[np.argsort(sides, kind="stable")]
        yield Finding(
            "tiny-objects", "warning", (scanned.name,),
            f"{tiny.mean():.0%} of the objects have a side under {TINY} pixels {target.describe_resize()}",
            "train at a larger scale, cut the images into tiles, or omit such objects",
            int(tiny.sum()), scanned.examples(smallest),
        )  # fmt: skip
    small = small_by_class(scanned, target)
    mostly = np.flatnonzero((counts >= MIN_CLASS_OBJECTS) & (small >= MOSTLY_SMALL * counts))
    if len(mostly):
        categories = [scanned.split.shards.manifest.categories[number] for number in mostly]
        fractions = [
            f"{category['name']} {small[number] / counts[number]:.0%}"
            for category, number in zip(categories, mostly, strict=True)
        ]
        ids = [category["id"] for category in categories]
        chosen = np.isin(scanned.scan.objects["category_id"][numbers], ids) & (sides < SMALL)
        yield Finding(
            "small-classes", "note", (scanned.name,),
            f"classes of which at least half have a side under {SMALL} pixels {target.describe_resize()}: "
            f"{listed(fractions)}",
            "train at a larger scale: a cell of the finest feature map has 8 pixels",
            len(mostly), scanned.examples(numbers[chosen]),
        )  # fmt: skip


def shorter_sides(scanned: ScannedSplit, target: TrainingTarget) -> Floats:
    """Return the shorter side of each usable object after the resize, in pixels."""
    usable = scanned.is_usable
    factors = target.scale_factors(*scanned.sizes[usable].T)
    sides: Floats = scanned.visible_sides[usable].min(axis=1) * factors
    return sides


def small_by_class(scanned: ScannedSplit, target: TrainingTarget) -> Integers:
    """Count the objects of each category with a side below SMALL, in the order of the list."""
    ids = np.array([category["id"] for category in scanned.split.shards.manifest.categories])
    objects = scanned.scan.objects[scanned.is_usable]
    small = shorter_sides(scanned, target) < SMALL
    return np.bincount(np.searchsorted(ids, objects["category_id"][small]), minlength=len(ids))
