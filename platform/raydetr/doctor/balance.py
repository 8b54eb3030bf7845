"""How many images and objects there are, of each class and in each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from raydetr.doctor.findings import MAX_EXAMPLES, Finding, Level, counted, listed
from raydetr.doctor.split import Examined, Split
from raydetr.doctor.target import Target

RARE = 10  # objects of a class, below which it is hardly learned
IMBALANCE = 100  # the largest class by the smallest
MOST_DETECTIONS = 100  # that COCO's AP counts in an image

Counts = npt.NDArray[np.int64]


def class_counts(examined: Examined) -> tuple[Counts, Counts]:
    """Images with, and objects of, each category in the order of the list; those that training uses."""
    ids = np.array([category["id"] for category in examined.split.shards.manifest.categories])
    objects = examined.facts.objects[examined.is_usable]
    classes = np.searchsorted(ids, objects["category_id"])
    pairs = np.unique(objects["sample"].astype(np.int64) * len(ids) + classes) % len(ids)
    return np.bincount(pairs, minlength=len(ids)), np.bincount(classes, minlength=len(ids))


def balance_findings(splits: Sequence[Examined]) -> list[Finding]:
    """Classes without objects, rare ones, and those that only other splits have."""
    found: list[Finding] = []
    trained = class_counts(splits[0])[1]
    for examined in splits:
        counts = class_counts(examined)[1]
        if examined.split.shards.samples["num_annotations"].any():  # else it is told from the index
            found += class_findings(examined.split, counts)
        if counts.any():
            found += _rare(examined, counts)
        manifest, first = examined.split.shards.manifest, splits[0].split.shards.manifest
        if examined is not splits[0] and manifest.categories == first.categories:
            missing = np.flatnonzero((counts > 0) & (trained == 0))
            if len(missing):
                names = listed([manifest.categories[number]["name"] for number in missing])
                found.append(
                    Finding(
                        "classes-not-trained", "warning", (splits[0].name, examined.name),
                        f"{counted(len(missing), 'class', 'classes')} with objects in {examined.name}, "
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


def _rare(examined: Examined, counts: Counts) -> Iterator[Finding]:
    names = [category["name"] for category in examined.split.shards.manifest.categories]
    order = np.argsort(counts, kind="stable")
    rare = [number for number in order if 0 < counts[number] < RARE]
    trained_on = examined.split.is_trained_on
    if rare:
        yield Finding(
            "rare-classes", "warning" if trained_on else "note", (examined.name,),
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
            "imbalance", "note", (examined.name,),
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
