"""The list of categories: what it means for the labels, and what looks like a slip in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from raydetr.doctor.findings import Finding, counted, listed
from raydetr.doctor.split import Split
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
