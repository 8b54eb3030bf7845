"""Check images, boxes and classes of a split, and the categories of several."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from raydetr.console import counted
from raydetr.doctor.findings import Example, Finding, Integers, Level, TrainingTarget
from raydetr.doctor.scan import Flags, ScannedSplit, Split
from raydetr.shards.coco import listed
from raydetr.shards.manifest import MAX_LABEL
from raydetr.shards.reader import check_same_categories

# --- Images that cannot be read, differ from their record, or have an unusual shape ---

MAX_SIDE_RATIO = 5  # Long side by short side
MIN_SIDE = 32  # Pixels of the short side: one cell of the coarsest feature map


def _about_images(
    split: Split, code: str, level: Level, chosen: Integers, text: str, remedy: str, detail: Callable[[int], str]
) -> Iterator[Finding]:  # fmt: skip
    if len(chosen):
        text = f"{counted(len(chosen), 'image')} {text}"
        yield Finding(code, level, (split.name,), text, remedy, len(chosen), split.examples(chosen, detail))


def image_findings(scanned: ScannedSplit, corrupt_level: Level) -> Iterator[Finding]:
    """Check the images of a split; `corrupt_level` is the level of corrupt samples."""
    images, split, corrupt = scanned.scan.images, scanned.split, scanned.scan.corrupt
    samples = split.shards.samples
    if corrupt:

        def problem(sample: int) -> str:
            file = split.shards.manifest.shards[samples[sample]["shard"]].name
            return f"{file}, key {split.shards.key(sample)}: {corrupt[sample]:.120}"

        yield Finding(
            "corrupt-samples", corrupt_level, (split.name,),
            f"{counted(len(corrupt), 'sample')} of {len(samples):,} cannot be used",
            "copy these shards again; if the record is wrong, correct it and write the shards again",
            len(corrupt), split.examples(sorted(corrupt), problem),
        )  # fmt: skip
    sizes = split.image_sizes.astype(np.int64)
    short, long = sizes.min(axis=1), sizes.max(axis=1)
    differs = (images["width"] != sizes[:, 0]) | (images["height"] != sizes[:, 1])

    def shape(sample: int) -> str:
        return f"{sizes[sample, 0]}x{sizes[sample, 1]}"

    def mismatch(sample: int) -> str:
        row = images[sample]
        return f"the file holds {row['width']}x{row['height']} pixels, the record has {shape(sample)}"

    checks: tuple[tuple[str, Level, Flags, str, str, Callable[[int], str]], ...] = (
        ("size-mismatch", "error", images["is_read"] & differs,
         "of another size than in the record: the boxes do not fit",
         "correct width and height, or replace the images, and write the shards again", mismatch),
        ("exif-orientation", "note", images["is_rotated"],
         "with an EXIF orientation, which is not applied",
         "look at the images: if the boxes are beside the objects, store the pixels rotated", lambda _: ""),
        ("narrow-images", "note", long > MAX_SIDE_RATIO * short,
         f"with one side more than {MAX_SIDE_RATIO} times the other",
         "they are mostly padding in a batch: cut them into parts, or omit them", shape),
        ("tiny-images", "note", short < MIN_SIDE,
         f"with a side under {MIN_SIDE} pixels", "are they thumbnails? omit them", shape),
    )  # fmt: skip
    for code, level, is_found, text, remedy, detail in checks:
        chosen = np.flatnonzero(is_found)
        yield from _about_images(split, code, level, chosen, text, remedy, detail)


# --- Invalid and suspicious boxes ---

MAX_NOTE_FRACTION = 0.01  # Of the objects, up to which a minor problem is only a note; COCO itself has some
TOLERANCE = 0.5  # Pixels by which a box may exceed its image without a finding; COCO's boxes do, by rounding
MANY_RELATIVE = 0.9  # Fraction of boxes within one pixel above which their numbers are fractions of the image
MANY_EXCEEDING = 0.25  # Fraction of boxes above which [x1, y1, x2, y2] is likelier than inaccuracy
MANY_FULL_IMAGE = 0.1  # Fraction of objects that cover their full image
FULL_IMAGE = 0.99  # Fraction of the image's area
MANY_EQUAL = 0.05  # Fraction of the images that have the same box
MIN_BOXES = 10  # Fewer boxes do not show a pattern


def box_findings(scanned: ScannedSplit, corrupt_level: Level) -> Iterator[Finding]:
    """Check the boxes of a split; `corrupt_level` is the level of problems for which the reader refuses a sample."""
    objects, boxes = scanned.scan.objects, scanned.scan.objects["box"]
    malformed = np.flatnonzero(~objects["is_box"])
    yield from _about_objects(
        scanned, "malformed-boxes", corrupt_level, malformed,
        f"{counted(len(malformed), 'annotation')} without a box of four finite numbers, none of them a negative size",
        "correct `bbox` to [x, y, width, height], or remove the annotations, and write the shards again",
    )  # fmt: skip
    yield from _unknown_categories(scanned, corrupt_level)
    is_single = objects["is_box"] & ~objects["is_crowd"]
    has_area = (boxes[:, 2:] > 0).all(axis=1)
    exceeds = (boxes[:, :2] + boxes[:, 2:] > scanned.sizes + TOLERANCE) | (boxes[:, :2] < -TOLERANCE)
    exceeding = np.flatnonzero(is_single & scanned.is_visible & exceeds.any(axis=1))
    relative = np.flatnonzero(is_single & (boxes <= 1).all(axis=1) & (scanned.sizes > 2).all(axis=1))
    num_boxes = int(is_single.sum())
    if len(relative) >= max(MIN_BOXES, MANY_RELATIVE * num_boxes):
        exceeding = exceeding[:0]
        yield from _about_objects(
            scanned, "relative-boxes", "error", relative,
            f"{len(relative) / num_boxes:.0%} of the boxes lie within one pixel: their numbers are fractions of the "
            "image's size",
            "multiply them by width and height of their image: COCO's boxes are in pixels",
        )  # fmt: skip
    elif are_corners(len(exceeding), num_boxes):
        yield corner_boxes_finding(scanned.name, len(exceeding), num_boxes, scanned.examples(exceeding))
        exceeding = exceeding[:0]
    usable = np.flatnonzero(scanned.is_usable)
    keys = np.column_stack([objects["sample"], objects["category_id"], boxes])[usable]
    repeated = np.delete(usable, np.unique(keys, axis=0, return_index=True)[1])
    for code, chosen, one, many, remedy in (
        ("boxes-exceed-image", exceeding, "box that exceeds the image", "boxes that exceed the image",
         "training clamps them; correct them if there are many"),
        ("boxes-without-area", np.flatnonzero(is_single & ~has_area),
         "box of zero width or height", "boxes of zero width or height",
         "training omits them; remove or correct them"),
        ("boxes-outside", np.flatnonzero(is_single & has_area & ~scanned.is_visible),
         "box entirely outside the image", "boxes entirely outside the image",
         "training omits them; remove or correct them"),
        ("duplicate-objects", repeated, "object is annotated twice: same image, class and box",
         "objects are annotated twice: same image, class and box",
         "remove the copies: each query finds one object once"),
        ("wrong-areas", np.flatnonzero(objects["is_wrong_area"]),
         "area that is 0, above the box's, or under 1% of it", "areas that are 0, above the box's, or under 1% of it",
         "AP by size (APs, APm, APl) means nothing for them; without masks, use the width times the height of the box"),
    ):  # fmt: skip
        fraction = len(chosen) / max(1, len(objects))
        level: Level = "warning" if fraction > MAX_NOTE_FRACTION else "note"
        text = f"{counted(len(chosen), one, many)} ({fraction:.2%})"
        yield from _about_objects(scanned, code, level, chosen, text, remedy)
    yield from _default_boxes(scanned)


def _about_objects(
    scanned: ScannedSplit, code: str, level: Level, chosen: Integers, text: str, remedy: str
) -> Iterator[Finding]:
    if len(chosen):
        yield Finding(code, level, (scanned.name,), text, remedy, len(chosen), scanned.examples(chosen))


def _unknown_categories(scanned: ScannedSplit, level: Level) -> Iterator[Finding]:
    chosen = np.flatnonzero(~scanned.is_known)
    used, ids = np.unique(scanned.scan.objects["category_id"]), scanned.category_ids
    shift = next((step for step in (-1, 1) if np.isin(used, ids + step).all()), 0)
    hint = f"; all would fit with 1 {'added' if shift < 0 else 'subtracted'}" if shift else ""
    yield from _about_objects(
        scanned, "unknown-categories", level, chosen,
        f"{counted(len(chosen), 'annotation')} of categories that are not in the list "
        f"(ids {listed(np.setdiff1d(used, ids).tolist())}){hint}",
        "make the list and the annotations agree, and write the shards again",
    )  # fmt: skip


def are_corners(num_exceeding: int, num_boxes: int) -> bool:
    """Return whether so many boxes exceed their image that they are probably corners."""
    return num_exceeding >= MIN_BOXES and num_exceeding >= MANY_EXCEEDING * num_boxes


def corner_boxes_finding(
    name: str, num_exceeding: int, num_boxes: int, examples: tuple[Example, ...] = ()
) -> Finding:
    """Return the finding about boxes of a split that are probably corners."""
    return Finding(
        "corner-boxes", "warning", (name,),
        f"{num_exceeding / num_boxes:.0%} of the boxes exceed their image: are they [x1, y1, x2, y2]?",
        "COCO's boxes are [x, y, width, height]: subtract x1 from x2 and y1 from y2",
        num_exceeding, examples,
    )  # fmt: skip


def _default_boxes(scanned: ScannedSplit) -> Iterator[Finding]:
    """Find many boxes of the full image, and a box that many images share: a default value, or a watermark."""
    objects, num_usable = scanned.scan.objects, int(scanned.is_usable.sum())
    is_full = scanned.visible_sides.prod(axis=1) >= FULL_IMAGE * scanned.sizes.prod(axis=1)
    full = np.flatnonzero(scanned.is_usable & is_full)
    if len(full) >= max(MIN_BOXES, MANY_FULL_IMAGE * num_usable):
        yield from _about_objects(
            scanned, "full-image-boxes", "warning", full,
            f"{counted(len(full), 'box', 'boxes')} ({len(full) / num_usable:.0%}) cover the full image",
            "check whether they were drawn around objects, or mean `somewhere in this image`",
        )  # fmt: skip
    others = np.flatnonzero(scanned.is_usable & ~is_full)
    once_per_image = np.unique(np.column_stack([objects["box"], objects["sample"]])[others], axis=0)
    boxes, counts = np.unique(once_per_image[:, :4], axis=0, return_counts=True)
    most = int(np.argmax(counts)) if len(boxes) else 0
    if len(boxes) and counts[most] >= max(MIN_BOXES, MANY_EQUAL * scanned.split.shards.num_samples):
        box = ", ".join(f"{side:g}" for side in boxes[most])
        yield Finding(
            "equal-boxes", "warning", (scanned.name,),
            f"the same box [{box}] is in {counted(int(counts[most]), 'image')}",
            "check whether it is a default value, or something that is printed on the images",
            int(counts[most]), scanned.examples(others[(objects["box"][others] == boxes[most]).all(axis=1)]),
        )  # fmt: skip


# --- Small objects ---

TINY, SMALL = 4, 8  # Pixels of the shorter side after the resize; the finest feature map has cells of 8
MANY_TINY = 0.05  # Fraction of all objects
MOSTLY_SMALL = 0.5  # Fraction of the objects of a class
MIN_CLASS_OBJECTS = 10  # Below this number of objects, a fraction of a class means nothing


def scale_findings(scanned: ScannedSplit) -> Iterator[Finding]:
    """Find many tiny objects, and classes of small ones."""
    sides, numbers = scanned.shorter_sides, np.flatnonzero(scanned.is_usable)
    tiny = sides < TINY
    if tiny.any() and tiny.mean() >= MANY_TINY:
        yield from _about_objects(
            scanned, "tiny-objects", "warning", numbers[np.argsort(sides, kind="stable")][: tiny.sum()],
            f"{tiny.mean():.0%} of the objects have a side under {TINY} pixels {scanned.target.describe_resize()}",
            "train at a larger scale, cut the images into tiles, or omit such objects",
        )  # fmt: skip
    counts, small = scanned.objects_per_class, small_per_class(scanned)
    mostly = np.flatnonzero((counts >= MIN_CLASS_OBJECTS) & (small >= MOSTLY_SMALL * counts))
    if len(mostly):
        names = scanned.split.category_names
        fractions = [f"{names[n]} {small[n] / counts[n]:.0%}" for n in mostly]
        yield Finding(
            "small-classes", "note", (scanned.name,),
            f"classes of which at least half have a side under {SMALL} pixels {scanned.target.describe_resize()}: "
            f"{listed(fractions)}",
            "train at a larger scale: a cell of the finest feature map has 8 pixels",
            len(mostly), scanned.examples(numbers[np.isin(scanned.classes, mostly) & (sides < SMALL)]),
        )  # fmt: skip


def small_per_class(scanned: ScannedSplit) -> Integers:
    """Count the usable objects of each category with a side below SMALL after the resize, [k]."""
    return np.bincount(scanned.classes[scanned.shorter_sides < SMALL], minlength=len(scanned.category_ids))


# --- The list of categories ---

BACKGROUND_NAMES = {
    "background", "bg", "na", "none", "nothing", "noobject", "unlabeled", "unlabelled", "unused",
}  # fmt: skip


def category_findings(splits: Sequence[Split]) -> Iterator[Finding]:
    """Check the categories of the first split, and find differences of the others from it."""
    first, *others = splits
    categories = first.shards.manifest.categories
    background = [
        f"{c['id']} {c['name']!r}" for c in categories if _normalized(c["name"]) in BACKGROUND_NAMES
    ]
    if background:
        yield Finding(
            "background-category", "warning", (first.name,),
            f"the category {listed(background)} seems to stand for no object",
            "remove it, and its annotations: these models need no class for the background",
            len(background),
        )  # fmt: skip
    groups: dict[str, list[str]] = {}
    for name in first.category_names:
        groups.setdefault(_normalized(name), []).append(repr(name))
    similar = [" and ".join(group) for group in groups.values() if len(group) > 1]
    if similar:
        yield Finding(
            "similar-names", "warning", (first.name,),
            f"names that differ only in case, spaces or punctuation: {listed(similar)}",
            "give each class one name, and merge those that are the same",
            len(similar),
        )  # fmt: skip
    lowest, highest = categories[0]["id"], categories[-1]["id"]
    gaps = highest - lowest + 1 - len(categories)
    if highest > MAX_LABEL:
        yield Finding(
            "large-ids", "note", (first.name,),
            f"category ids reach {highest}: too large to be labels",
            "use data.label_map=contiguous, which numbers the classes from 0",
        )  # fmt: skip
    elif gaps:
        yield Finding(
            "gaps-in-ids", "note", (first.name,),
            f"the ids run from {lowest} to {highest} with {counted(gaps, 'gap')}",
            f"choose data.label_map: contiguous has {len(categories)} classes, category_id {highest + 1} "
            "as in the official checkpoints of COCO",
            gaps,
        )  # fmt: skip
    for other in others:
        try:
            check_same_categories(first.shards, other.shards)
        except ValueError as error:
            text, _, remedy = str(error).rpartition(": ")
            text += _explain_difference(first, other)
            yield Finding("different-categories", "error", (first.name, other.name), text, remedy)


def _explain_difference(first: Split, other: Split) -> str:
    here, there = ({c["name"]: c["id"] for c in split.shards.manifest.categories} for split in (first, other))
    moved = [name for name in here if name in there and there[name] != here[name]]
    if moved:
        steps = {there[name] - here[name] for name in moved}
        by_one = f", all by {steps.pop():+d}" if len(steps) == 1 else ""
        examples = [f"{name!r} is {here[name]} and {there[name]}" for name in moved]
        return f"; the same names have other ids{by_one} ({listed(examples, 3)})"
    normalized = {_normalized(name): name for name in here}
    spellings = [
        f"{normalized[_normalized(name)]!r} and {name!r}"
        for name in there
        if name not in here and _normalized(name) in normalized
    ]
    return f"; some differ only in spelling ({listed(spellings, 3)})" if spellings else ""


def _normalized(name: str) -> str:
    """Keep only letters and digits, in lower case; a name without any stays as it is."""
    return re.sub(r"[\W_]+", "", name.casefold()) or name


# --- The balance of classes ---

MIN_OBJECTS = 10  # With fewer objects, a class is hardly learned
IMBALANCE = 100  # Objects of the largest class by those of the smallest


def balance_findings(splits: Sequence[ScannedSplit]) -> Iterator[Finding]:
    """Find classes without objects, rare classes, and classes that the training split alone lacks."""
    first = splits[0]
    for scanned in splits:
        counts = scanned.objects_per_class
        # Without any usable object in the manifest, the quick part has reported it
        if counts.any() or scanned.split.shards.manifest.num_usable:
            yield from class_findings(scanned.split, counts)
        if counts.any():
            yield from _rare_classes(scanned)
        if scanned.split.shards.manifest.categories == first.split.shards.manifest.categories:
            missing = np.flatnonzero((counts > 0) & (first.objects_per_class == 0))
            yield from _about_classes(
                "classes-not-trained", "warning", (first.name, scanned.name),
                [first.split.category_names[number] for number in missing],
                f"with objects in {scanned.name}, but none in {first.name}",
                "split the images again, so that each class is in both",
            )  # fmt: skip


def _about_classes(
    code: str, level: Level, splits: tuple[str, ...], classes: list[str], text: str, remedy: str
) -> Iterator[Finding]:
    if classes:
        text = f"{counted(len(classes), 'class', 'classes')} {text}: {listed(classes)}"
        yield Finding(code, level, splits, text, remedy, len(classes))


def class_findings(split: Split, counts: Integers) -> Iterator[Finding]:
    """Find a split without any object, or classes without any, given the number of objects of each class."""
    if not counts.any():
        yield no_objects_finding(split)
        return
    absent = [name for name, count in zip(split.category_names, counts, strict=True) if not count]
    level: Level = "warning" if split.is_trained_on else "note"
    remedy = "their AP will be undefined; split the images again if they matter"
    if split.is_trained_on:
        remedy = "add images of them, or omit them from the categories"
    text = f"of {len(counts)} without any object"
    yield from _about_classes("classes-without-objects", level, (split.name,), absent, text, remedy)


def no_objects_finding(split: Split) -> Finding:
    """Return the finding about a split without any object to train on."""
    level: Level = "error" if split.is_trained_on else "warning"
    effect = "there is nothing to learn" if split.is_trained_on else "AP will be undefined"
    manifest, text = split.shards.manifest, "not one object to find"
    kinds = {"crowd": "crowds", "outside": "boxes without any area inside their image"}
    unusual = manifest.unusual_objects
    counts = [f"{unusual[kind]} {name}" for kind, name in kinds.items() if kind in unusual]
    if counts:
        text += f" among {manifest.num_annotations} annotations ({', '.join(counts)})"
    return Finding("no-objects", level, (split.name,), text, f"are these the right annotations? {effect}")


def _rare_classes(scanned: ScannedSplit) -> Iterator[Finding]:
    counts, names = scanned.objects_per_class, scanned.split.category_names
    present = [int(number) for number in np.argsort(counts, kind="stable") if counts[number]]
    rare = [f"{names[number]} {counts[number]}" for number in present if counts[number] < MIN_OBJECTS]
    level: Level = "warning" if scanned.split.is_trained_on else "note"
    effect = "; they will hardly be learned" if level == "warning" else ": their AP depends on a few objects"
    text = f"with fewer than {MIN_OBJECTS} objects"
    yield from _about_classes(
        "rare-classes", level, (scanned.name,), rare, text, f"add images of them{effect}"
    )
    least, most = present[0], present[-1]
    ratio = counts[most] / counts[least]
    if ratio >= IMBALANCE:
        yield Finding(
            "imbalance", "note", (scanned.name,),
            f"{names[most]!r} has {counts[most]:,} objects, {ratio:,.0f} times those of {names[least]!r} "
            f"({counts[least]:,})",
            "add images of the rare classes: AP is the mean of all classes",
        )  # fmt: skip


# --- Objects per image ---

MAX_DETECTIONS = 100  # Detections per image that COCO's AP counts


def object_count_findings(
    split: Split, objects_per_image: Integers, target: TrainingTarget
) -> Iterator[Finding]:
    """Find images with more objects than there are queries, or than detections count."""
    checks: tuple[tuple[str, Level, int | None, str, str], ...] = (
        ("more-objects-than-queries", "warning", target.num_queries,
         f"more objects than {target.recipe} has queries ({target.num_queries})",
         "raise model.num_queries: an object without a query is not found"),
        ("more-objects-than-detections", "note", MAX_DETECTIONS,
         f"more than {MAX_DETECTIONS} objects",
         f"COCO's AP counts {MAX_DETECTIONS} detections per image"),
    )  # fmt: skip
    order = np.argsort(-objects_per_image, kind="stable")
    for code, level, most, text, remedy in checks:
        above = order[objects_per_image[order] > (most or np.inf)]
        text = f"({len(above) / len(order):.1%}) {'has' if len(above) == 1 else 'have'} {text}"
        yield from _about_images(
            split, code, level, above, text, remedy, lambda n: counted(int(objects_per_image[n]), "object")
        )
