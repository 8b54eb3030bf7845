"""The list of categories: what it means for the labels, and what looks like a slip in it.

How many images and objects there are, of each class and in each image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from raydetr.doctor.findings import MAX_EXAMPLES, Finding, Level, Target, counted, listed
from raydetr.doctor.scan import ScannedSplit, Split
from raydetr.shards.manifest import MAX_LABEL
from raydetr.shards.reader import check_same_categories

BACKGROUND = {"background", "bg", "na", "none", "nothing", "noobject", "unlabeled", "unlabelled", "unused"}


def category_findings(splits: Sequence[Split]) -> list[Finding]:
    """What is to be said of the categories: of those of the first split, and where others differ."""
    return [*_of_one(splits[0]), *(finding for other in splits[1:] for finding in _between(splits[0], other))]


def _of_one(split: Split) -> Iterator[Finding]:
    categories = split.shards.manifest.categories
    ids = [category["id"] for category in categories]
    names = [category["name"] for category in categories]
    background = [f"{i} {name!r}" for i, name in zip(ids, names, strict=True) if _plain(name) in BACKGROUND]
    if background:
        yield Finding(
            "background-category", "warning", (split.name,),
            f"the category {listed(background)} seems to stand for no object",
            "remove it, and its annotations: these models need no class for the background",
            len(background),
        )  # fmt: skip
    alike = _alike(names)
    if alike:
        yield Finding(
            "similar-names", "warning", (split.name,),
            f"names that differ in capitals, spaces or signs only: {listed(alike)}",
            "give each class one name, and join those that are the same",
            len(alike),
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
            f"data.label_map=contiguous makes {len(ids)} classes of them, category_id {max(ids) + 1} "
            "as in the official checkpoints of COCO",
            gaps,
        )  # fmt: skip


def _between(first: Split, other: Split) -> Iterator[Finding]:
    try:
        check_same_categories(first.shards, other.shards)
    except ValueError as error:
        text, _, remedy = str(error).rpartition(": ")
        yield Finding(
            "different-categories", "fault", (first.name, other.name),
            text + _how_they_differ(first, other), remedy, 1,
        )  # fmt: skip


def _how_they_differ(first: Split, other: Split) -> str:
    here, there = ({c["name"]: c["id"] for c in split.shards.manifest.categories} for split in (first, other))
    moved = {name: there[name] - here[name] for name in here if name in there and there[name] != here[name]}
    if moved:
        steps = set(moved.values())
        by_one = f", all by {steps.pop():+d}" if len(steps) == 1 else ""
        examples = [f"{name!r} is {here[name]} and {there[name]}" for name in moved]
        return f"; the same names have other ids{by_one} ({listed(examples, 3)})"
    plain = {_plain(name): name for name in here}
    spelled = [
        f"{plain[_plain(name)]!r} and {name!r}"
        for name in there
        if name not in here and _plain(name) in plain
    ]
    return f"; some are only spelled otherwise ({listed(spelled, 3)})" if spelled else ""


def _alike(names: list[str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_plain(name), []).append(repr(name))
    return [" and ".join(group) for group in groups.values() if len(group) > 1]


def _plain(name: str) -> str:
    """Letters and digits only; a name of none stays as it is."""
    return re.sub(r"[\W_]+", "", name.casefold()) or name


RARE = 10  # objects of a class, below which it is hardly learned
IMBALANCE = 100  # the largest class by the smallest
MOST_DETECTIONS = 100  # that COCO's AP counts in an image

Counts = npt.NDArray[np.int64]


def class_counts(scanned: ScannedSplit) -> tuple[Counts, Counts]:
    """Images with, and objects of, each category in the order of the list; those that training uses."""
    ids = np.array([category["id"] for category in scanned.split.shards.manifest.categories])
    objects = scanned.scan.objects[scanned.is_usable]
    classes = np.searchsorted(ids, objects["category_id"])
    pairs = np.unique(objects["sample"].astype(np.int64) * len(ids) + classes) % len(ids)
    return np.bincount(pairs, minlength=len(ids)), np.bincount(classes, minlength=len(ids))


def balance_findings(splits: Sequence[ScannedSplit]) -> list[Finding]:
    """Classes without objects, rare ones, and those that only other splits have."""
    found: list[Finding] = []
    trained = class_counts(splits[0])[1]
    for scanned in splits:
        counts = class_counts(scanned)[1]
        if scanned.split.shards.samples["num_annotations"].any():  # else it is told from the index
            found += class_findings(scanned.split, counts)
        if counts.any():
            found += _rare(scanned, counts)
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
                        "divide the images anew, so that each class is in both",
                        len(missing),
                    )
                )  # fmt: skip
    return found


def class_findings(split: Split, counts: Counts) -> Iterator[Finding]:
    """No object at all, or none of some class, given the objects of each class."""
    if not counts.any():
        yield no_objects(split)
        return
    names = [category["name"] for category in split.shards.manifest.categories]
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    if absent:
        yield Finding(
            "classes-without-objects", "warning" if split.is_trained_on else "note", (split.name,),
            f"{counted(len(absent), 'class', 'classes')} of {len(names)} without any object: {listed(absent)}",
            "add images of them, or leave them out of the categories"
            if split.is_trained_on
            else "their AP will be undefined; divide the images anew if they matter",
            len(absent),
        )  # fmt: skip


def no_objects(split: Split) -> Finding:
    """Not one object in a whole split."""
    level: Level = "fault" if split.is_trained_on else "warning"
    remedy = (
        "are these the right annotations? there is nothing to learn"
        if split.is_trained_on
        else "are these the right annotations? AP will be undefined"
    )
    return Finding("no-objects", level, (split.name,), "not one object to find", remedy, 1)


def _rare(scanned: ScannedSplit, counts: Counts) -> Iterator[Finding]:
    names = [category["name"] for category in scanned.split.shards.manifest.categories]
    order = np.argsort(counts, kind="stable")
    rare = [number for number in order if 0 < counts[number] < RARE]
    trained_on = scanned.split.is_trained_on
    if rare:
        yield Finding(
            "rare-classes", "warning" if trained_on else "note", (scanned.name,),
            f"{counted(len(rare), 'class', 'classes')} with fewer than {RARE} objects: "
            + listed([f"{names[number]} {counts[number]}" for number in rare]),
            "add images of them; they will hardly be learned"
            if trained_on
            else "their AP is a matter of chance",
            len(rare),
        )  # fmt: skip
    most, least = int(order[-1]), next(int(number) for number in order if counts[number])
    ratio = counts[most] / counts[least]
    if ratio >= IMBALANCE:
        yield Finding(
            "imbalance", "note", (scanned.name,),
            f"{names[most]!r} has {counts[most]:,} objects, {ratio:,.0f} times those of {names[least]!r} "
            f"({counts[least]:,})",
            "expect a low AP of small classes; it is the mean of all",
            1,
        )  # fmt: skip


def crowding_findings(split: Split, objects_per_image: Counts, target: Target) -> Iterator[Finding]:
    """More objects in an image than there are queries, or detections that count."""
    limit = target.num_queries
    for code, level, most, text, remedy in (
        ("more-objects-than-queries", "warning", limit,
         f"more objects than {target.recipe} has queries ({limit})",
         "raise model.num_queries: what has no query is not found"),
        ("more-objects-than-detections", "note", MOST_DETECTIONS,
         f"more than {MOST_DETECTIONS} objects",
         f"COCO's AP counts {MOST_DETECTIONS} detections in an image"),
    ):  # fmt: skip
        if most is None:
            continue
        order = np.argsort(-objects_per_image, kind="stable")
        above = order[objects_per_image[order] > most]
        if len(above):
            examples = tuple(
                split.example(int(sample), counted(int(objects_per_image[sample]), "object"))
                for sample in above[:MAX_EXAMPLES]
            )
            share = len(above) / len(order)
            have = "has" if len(above) == 1 else "have"
            yield Finding(
                code, "warning" if level == "warning" else "note", (split.name,),
                f"{counted(len(above), 'image')} ({share:.1%}) {have} {text}", remedy, len(above), examples,
            )  # fmt: skip
