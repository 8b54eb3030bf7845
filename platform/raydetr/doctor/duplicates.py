"""Images that are there twice: the same bytes, or the same look, in one split or in two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydetr.doctor.findings import MAX_EXAMPLES, Example, Finding, counted
from raydetr.doctor.near import correlation, groups_by, groups_of, near_pairs
from raydetr.doctor.split import Examined

FEW = 0.01  # share of images that look like another one of their split, up to which it is only a note

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _All:
    """The readable images of all splits, numbered through."""

    splits: Sequence[Examined]
    fingerprints: list[str]
    split: Numbers  # [n] which split
    sample: Numbers  # [n] which sample of it
    digests: npt.NDArray[np.uint64]
    gradients: npt.NDArray[np.uint64]
    thumbnails: npt.NDArray[np.uint8]


def duplicate_findings(splits: Sequence[Examined]) -> list[Finding]:
    """Repetitions within splits and, graver, across them."""
    images = _all(splits)
    total = len(images.split)
    same = groups_by(images.digests, np.arange(total))
    # what has the same bytes is told once: only the first of them is compared by its look
    first = np.unique(images.digests, return_index=True)[1].astype(np.int64)
    pairs = first[near_pairs(images.gradients[first], images.thumbnails[first])]
    near = groups_of(pairs, total)
    found = []
    for groups, is_same in ((same, True), (near, False)):
        found += _across(images, groups, is_same)
        found += _within(images, groups, is_same)
    return found


def _all(splits: Sequence[Examined]) -> _All:
    read = [np.flatnonzero(split.facts.images["is_read"]) for split in splits]
    images = [split.facts.images[samples] for split, samples in zip(splits, read, strict=True)]

    def column(name: str) -> npt.NDArray[np.generic]:
        return np.concatenate([part[name] for part in images])

    return _All(
        splits,
        [split.split.shards.fingerprint for split in splits],
        np.repeat(np.arange(len(splits)), [len(samples) for samples in read]),
        np.concatenate(read).astype(np.int64),
        column("digest").astype(np.uint64),
        column("gradients").astype(np.uint64),
        column("thumbnail").astype(np.uint8),
    )


def _across(images: _All, groups: Iterable[Numbers], is_same: bool) -> list[Finding]:
    """Images that are in the first split and in another one, and so on for each two splits."""
    groups = list(groups)
    found = []
    for other in range(1, len(images.splits)):
        for one in range(other):
            if images.fingerprints[one] == images.fingerprints[other]:
                continue  # told as `same-data`
            leaks = [
                (group[images.split[group] == one], group[images.split[group] == other]) for group in groups
            ]
            leaks = [leak for leak in leaks if all(map(len, leak))]
            if leaks:
                found.append(_leak(images, one, other, leaks, is_same))
    return found


def _leak(images: _All, one: int, other: int, leaks: list[tuple[Numbers, Numbers]], is_same: bool) -> Finding:
    names = images.splits[one].name, images.splits[other].name
    count = sum(len(there) for _, there in leaks)
    share = count / images.splits[other].split.shards.num_samples
    what = "also in" if is_same else "almost the same as images of"
    pairs = _closest(images, [(here[0], there) for here, there in leaks], is_same)
    return Finding(
        "leaked-images" if is_same else "leaked-look-alikes",
        "warning",
        names,
        f"{counted(count, 'image')} of {names[1]} ({share:.1%}) "
        f"{'is' if count == 1 else 'are'} {what} {names[0]}",
        f"take them out of one of the two: AP on {names[1]} would reward what was learned by heart",
        count,
        pairs,
    )


def _within(images: _All, groups: Iterable[Numbers], is_same: bool) -> list[Finding]:
    groups = list(groups)
    found = []
    for number, split in enumerate(images.splits):
        own = [group[images.split[group] == number] for group in groups]
        own = [group for group in own if len(group) > 1]
        if not own:
            continue
        count = sum(len(group) - 1 for group in own)
        share = count / split.split.shards.num_samples
        kind = "the same bytes as" if is_same else "almost the look of"
        found.append(
            Finding(
                "repeated-images" if is_same else "look-alikes",
                "warning" if is_same or share > FEW else "note",
                (split.name,),
                f"{counted(count, 'image')} ({share:.1%}) {'has' if count == 1 else 'have'} {kind} another one, "
                f"in {counted(len(own), 'group')}",
                "keep one of each group, unless repetition is meant"
                if is_same
                else "look at them: frames of one scene belong into one split, and copies may be left out",
                count,
                _closest(images, [(group[0], group[1:]) for group in own], is_same),
            )
        )
    return found


def _closest(images: _All, found: list[tuple[np.int64, Numbers]], is_same: bool) -> tuple[Example, ...]:
    """Pairs to show, one of each group: its first image with that which is most like it."""
    examples = []
    for first, others in found[:MAX_EXAMPLES]:
        thumbnails = np.broadcast_to(images.thumbnails[first], images.thumbnails[others].shape)
        likeness = correlation(thumbnails, images.thumbnails[others])
        best = int(np.argmax(likeness))
        pair = (first, others[best])
        places = tuple(
            images.splits[images.split[number]].split.place(int(images.sample[number])) for number in pair
        )
        detail = "the same bytes" if is_same else f"likeness {likeness[best]:.3f}"
        examples.append(Example(places, detail))
    return tuple(examples)
