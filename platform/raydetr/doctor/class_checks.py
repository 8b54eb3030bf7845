"""Find mistakes in the list of categories, missing, rare and imbalanced classes, and images with many objects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from raydetr.doctor.findings import Finding, Integers, Level, TrainingTarget, counted, listed
from raydetr.doctor.scan import ScannedSplit, Split
from raydetr.shards.manifest import MAX_LABEL
from raydetr.shards.reader import check_same_categories

# --- The list of categories ---

BACKGROUND_NAMES = {
    "background", "bg", "na", "none", "nothing", "noobject", "unlabeled", "unlabelled", "unused",
}  # fmt: skip


def category_findings(splits: Sequence[Split]) -> list[Finding]:
    """Return findings about the categories of the first split, and about differences of the others from it."""
    first, *others = splits
    return [*_category_list(first), *(finding for other in others for finding in _differences(first, other))]


def _category_list(split: Split) -> Iterator[Finding]:
    categories = split.shards.manifest.categories
    ids = [category["id"] for category in categories]
    names = [category["name"] for category in categories]
    background = [
        f"{c['id']} {c['name']!r}" for c in categories if _normalized(c["name"]) in BACKGROUND_NAMES
    ]
    if background:
        yield Finding(
            "background-category", "warning", (split.name,),
            f"the category {listed(background)} seems to stand for no object",
            "remove it, and its annotations: these models need no class for the background",
            len(background),
        )  # fmt: skip
    similar = _similar_names(names)
    if similar:
        yield Finding(
            "similar-names", "warning", (split.name,),
            f"names that differ only in case, spaces or punctuation: {listed(similar)}",
            "give each class one name, and merge those that are the same",
            len(similar),
        )  # fmt: skip
    gaps = max(ids) - min(ids) + 1 - len(ids)
    if max(ids) > MAX_LABEL:
        yield Finding(
            "large-ids", "note", (split.name,),
            f"category ids reach {max(ids)}: too large to be labels",
            "use data.label_map=contiguous, which numbers the classes from 0",
            1,
        )  # fmt: skip
    elif gaps:
        yield Finding(
            "gaps-in-ids", "note", (split.name,),
            f"the ids run from {min(ids)} to {max(ids)} with {counted(gaps, 'gap')}",
            f"choose data.label_map: contiguous has {len(ids)} classes, category_id {max(ids) + 1} "
            "as in the official checkpoints of COCO",
            gaps,
        )  # fmt: skip


def _differences(first: Split, other: Split) -> Iterator[Finding]:
    try:
        check_same_categories(first.shards, other.shards)
    except ValueError as error:
        text, _, remedy = str(error).rpartition(": ")
        yield Finding(
            "different-categories", "error", (first.name, other.name),
            text + _explain_difference(first, other), remedy, 1,
        )  # fmt: skip


def _explain_difference(first: Split, other: Split) -> str:
    here, there = ({c["name"]: c["id"] for c in split.shards.manifest.categories} for split in (first, other))
    shifts = {name: there[name] - here[name] for name in here if name in there and there[name] != here[name]}
    if shifts:
        steps = set(shifts.values())
        by_one = f", all by {steps.pop():+d}" if len(steps) == 1 else ""
        examples = [f"{name!r} is {here[name]} and {there[name]}" for name in shifts]
        return f"; the same names have other ids{by_one} ({listed(examples, 3)})"
    normalized = {_normalized(name): name for name in here}
    spellings = [
        f"{normalized[_normalized(name)]!r} and {name!r}"
        for name in there
        if name not in here and _normalized(name) in normalized
    ]
    return f"; some differ only in spelling ({listed(spellings, 3)})" if spellings else ""


def _similar_names(names: list[str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_normalized(name), []).append(repr(name))
    return [" and ".join(group) for group in groups.values() if len(group) > 1]


def _normalized(name: str) -> str:
    """Keep only letters and digits, in lower case; a name without any stays as it is."""
    return re.sub(r"[\W_]+", "", name.casefold()) or name


# --- The balance of classes ---

MIN_OBJECTS = 10  # With fewer objects, a class is hardly learned
IMBALANCE = 100  # Objects of the largest class by those of the smallest


def class_counts(scanned: ScannedSplit) -> tuple[Integers, Integers]:
    """Count the images and the objects of each category, in the order of the list; only objects that training uses."""
    ids = np.array([category["id"] for category in scanned.split.shards.manifest.categories])
    objects = scanned.scan.objects[scanned.is_usable]
    classes = np.searchsorted(ids, objects["category_id"])
    pairs = np.unique(objects["sample"].astype(np.int64) * len(ids) + classes) % len(ids)
    return np.bincount(pairs, minlength=len(ids)), np.bincount(classes, minlength=len(ids))


def balance_findings(splits: Sequence[ScannedSplit]) -> list[Finding]:
    """Find classes without objects, rare classes, and classes that the training split alone lacks."""
    found: list[Finding] = []
    trained = class_counts(splits[0])[1]
    for scanned in splits:
        counts = class_counts(scanned)[1]
        # Without any annotation, the checks of the index have reported it
        if scanned.split.shards.samples["num_annotations"].any():
            found += class_findings(scanned.split, counts)
        if counts.any():
            found += _rare_classes(scanned, counts)
        manifest, first = scanned.split.shards.manifest, splits[0].split.shards.manifest
        if scanned is not splits[0] and manifest.categories == first.categories:
            missing = np.flatnonzero((counts > 0) & (trained == 0))
            if len(missing):
                names = listed([manifest.categories[number]["name"] for number in missing])
                found.append(
                    Finding(
                        "classes-not-trained", "warning", (splits[0].name, scanned.name),
                        f"{counted(len(missing), 'class', 'classes')} with objects in {scanned.name}, "
                        f"but none in {splits[0].name}: {names}",
                        "split the images again, so that each class is in both",
                        len(missing),
                    )
                )  # fmt: skip
    return found


def class_findings(split: Split, counts: Integers) -> Iterator[Finding]:
    """Find a split without any object, or classes without any, given the number of objects of each class."""
    if not counts.any():
        yield no_objects_finding(split)
        return
    names = [category["name"] for category in split.shards.manifest.categories]
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    if absent:
        yield Finding(
            "classes-without-objects", "warning" if split.is_trained_on else "note", (split.name,),
            f"{counted(len(absent), 'class', 'classes')} of {len(names)} without any object: {listed(absent)}",
            "add images of them, or omit them from the categories"
            if split.is_trained_on
            else "their AP will be undefined; split the images again if they matter",
            len(absent),
        )  # fmt: skip


def no_objects_finding(split: Split) -> Finding:
    """Return the finding about a split without any object."""
    level: Level = "error" if split.is_trained_on else "warning"
    effect = "there is nothing to learn" if split.is_trained_on else "AP will be undefined"
    remedy = f"are these the right annotations? {effect}"
    return Finding("no-objects", level, (split.name,), "not one object to find", remedy, 1)


def _rare_classes(scanned: ScannedSplit, counts: Integers) -> Iterator[Finding]:
    names = [category["name"] for category in scanned.split.shards.manifest.categories]
    order = np.argsort(counts, kind="stable")
    rare = [number for number in order if 0 < counts[number] < MIN_OBJECTS]
    is_trained_on = scanned.split.is_trained_on
    if rare:
        yield Finding(
            "rare-classes", "warning" if is_trained_on else "note", (scanned.name,),
            f"{counted(len(rare), 'class', 'classes')} with fewer than {MIN_OBJECTS} objects: "
            + listed([f"{names[number]} {counts[number]}" for number in rare]),
            "add images of them; they will hardly be learned"
            if is_trained_on
            else "add images of them: their AP depends on a few objects",
            len(rare),
        )  # fmt: skip
    most, least = int(order[-1]), next(int(number) for number in order if counts[number])
    ratio = counts[most] / counts[least]
    if ratio >= IMBALANCE:
        yield Finding(
            "imbalance", "note", (scanned.name,),
            f"{names[most]!r} has {counts[most]:,} objects, {ratio:,.0f} times those of {names[least]!r} "
            f"({counts[least]:,})",
            "add images of the rare classes: AP is the mean of all classes",
            1,
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
        if most is None:
            continue
        above = order[objects_per_image[order] > most]
        if len(above):
            examples = split.examples(above, lambda n: counted(int(objects_per_image[n]), "object"))
            have = "has" if len(above) == 1 else "have"
            yield Finding(
                code, level, (split.name,),
                f"{counted(len(above), 'image')} ({len(above) / len(order):.1%}) {have} {text}",
                remedy, len(above), examples,
            )  # fmt: skip
