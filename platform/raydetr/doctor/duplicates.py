"""Find images that occur twice, within a split or in two: the same bytes, or almost the same look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from raydetr.console import counted
from raydetr.doctor.findings import MAX_EXAMPLES, Example, Finding, Integers
from raydetr.doctor.scan import ScannedSplit

Hashes = npt.NDArray[np.uint64]

MAX_DIFFERENT_BITS = 8  # Of 64; docs/data/doctor.md has the measurements
MAX_NOTE_FRACTION = 0.01  # Of the images of a split, up to which near duplicates are only a note
ROWS = 1024  # Images that one task of the search compares with all later ones


def near_groups(hashes: Hashes, num_threads: int | None = None) -> list[Integers]:
    """Return the groups of images of almost the same look, each in ascending order.

    Every pair of hashes is compared: 7e9 pairs, as in COCO's training split, take seconds.

    Args:
        hashes: [n].
        num_threads: None: a few more than CPUs.
    """
    with ThreadPoolExecutor(num_threads) as threads:  # numpy releases the lock of the interpreter
        edges = list(threads.map(lambda start: _near_edges(hashes, start), range(0, len(hashes), ROWS)))
    if not edges:
        return []
    pairs = np.concatenate(edges)
    graph = coo_array((np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1])), (len(hashes),) * 2)
    return groups_by(connected_components(graph, directed=False)[1])


def _near_edges(hashes: Hashes, start: int) -> Integers:
    """Return enough pairs [p, 2] to connect ROWS images from `start` on with the later ones that are near."""
    # Equal for images that the pairs so far connect, whose other pairs are left out: thousands may look the same
    group = np.arange(len(hashes))
    edges = [np.empty((0, 2), np.int64)]
    for number in range(start, min(start + ROWS, len(hashes))):
        distances = np.bitwise_count(hashes[number + 1 :] ^ hashes[number])
        near = number + 1 + np.flatnonzero(distances <= MAX_DIFFERENT_BITS)
        near = near[group[near] != group[number]]
        group[near] = group[number]
        if len(near):
            edges.append(np.stack([np.full(len(near), number), near], axis=1))
    return np.concatenate(edges)


def groups_by(keys: npt.NDArray[np.generic]) -> list[Integers]:
    """Return the groups of positions with equal keys, each in ascending order; no groups of one."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(keys[order[1:]] != keys[order[:-1]]) + 1
    return [group for group in np.split(order, starts) if len(group) > 1]


# --- Findings ---


class _Images:
    """The n readable images of all splits."""

    def __init__(self, splits: Sequence[ScannedSplit]) -> None:
        samples = [np.flatnonzero(split.scan.images["is_read"]) for split in splits]
        rows = np.concatenate([split.scan.images[read] for split, read in zip(splits, samples, strict=True)])
        self.splits, self.digests, self.hashes = splits, rows["digest"], rows["hash"]
        # [n]: numbers of their splits, and their numbers in these
        self.split = np.repeat(np.arange(len(splits)), [len(read) for read in samples])
        self.sample = np.concatenate(samples)

    def closest_pair(self, one: int, others: Integers, is_exact: bool) -> Example:
        """Return an image and the one of `others` that differs least from it."""
        bits = np.bitwise_count(self.hashes[others] ^ self.hashes[one])
        pair = (one, others[np.argmin(bits)])
        places = (self.splits[self.split[n]].split.place(int(self.sample[n])) for n in pair)
        return Example(tuple(places), "the same bytes" if is_exact else f"{bits.min()} of 64 bits differ")

    def labels_differ(self, number: int, group: Integers) -> bool:
        """Return whether images of one split have other objects than the first of them."""
        objects = self.splits[number].scan.objects
        labels = []
        for sample in self.sample[group]:
            begin, end = np.searchsorted(objects["sample"], (sample, sample + 1))
            labels.append(
                sorted((int(row["category_id"]), *row["box"].tolist()) for row in objects[begin:end])
            )
        return any(other != labels[0] for other in labels[1:])


def duplicate_findings(splits: Sequence[ScannedSplit], num_threads: int | None = None) -> Iterator[Finding]:
    """Find duplicates within splits and, worse, across them."""
    images = _Images(splits)
    # Only the first of several exact copies takes part in the second search: each image is reported once
    first = np.sort(np.unique(images.digests, return_index=True)[1])
    near = [first[group] for group in near_groups(images.hashes[first], num_threads)]
    for groups, is_exact in ((groups_by(images.digests), True), (near, False)):
        for one, other in combinations(range(len(splits)), 2):
            yield from _across(images, one, other, groups, is_exact)
        for number in range(len(splits)):
            yield from _within(images, number, groups, is_exact)


def _across(
    images: _Images, one: int, other: int, groups: list[Integers], is_exact: bool
) -> Iterator[Finding]:
    """Find images that are in two splits."""
    first, second = images.splits[one].split, images.splits[other].split
    pairs = [(group[images.split[group] == one], group[images.split[group] == other]) for group in groups]
    pairs = [(here, there) for here, there in pairs if len(here) and len(there)]
    if not pairs or first.shards.fingerprint == second.shards.fingerprint:  # That is reported as `same-data`
        return
    count = sum(len(there) for _, there in pairs)
    relation = "also in" if is_exact else "almost the same as images of"
    yield Finding(
        "leaked-images" if is_exact else "leaked-near-duplicates", "warning", (first.name, second.name),
        f"{counted(count, 'image')} of {second.name} ({count / second.shards.num_samples:.1%}) "
        f"{'is' if count == 1 else 'are'} {relation} {first.name}",
        f"remove them from one of the two: AP on {second.name} would reward memorizing them",
        count,
        tuple(images.closest_pair(here[0], there, is_exact) for here, there in pairs[:MAX_EXAMPLES]),
    )  # fmt: skip


def _within(images: _Images, number: int, groups: list[Integers], is_exact: bool) -> Iterator[Finding]:
    """Find images that are in a split more than once."""
    split = images.splits[number].split
    own = [group[images.split[group] == number] for group in groups]
    own = [group for group in own if len(group) > 1]
    if not own:
        return
    count = sum(len(group) - 1 for group in own)
    fraction = count / split.shards.num_samples
    num_differing = sum(images.labels_differ(number, group) for group in own) if is_exact else 0
    relation = "the same bytes as" if is_exact else "almost the look of"
    text = f"{counted(count, 'image')} ({fraction:.1%}) {'has' if count == 1 else 'have'} {relation} another one, in "
    text += counted(len(own), "group")
    remedy = "look at them: keep the frames of one scene in one split, and omit copies"
    if is_exact:
        remedy = "keep one of each group, unless the duplicates are intended"
    if num_differing:
        text += f"; in {counted(num_differing, 'group')} their annotations differ"
        remedy = "where annotations differ, join them in one image: omitting a copy would lose labels"
    yield Finding(
        "duplicate-images" if is_exact else "near-duplicates",
        "warning" if is_exact or fraction > MAX_NOTE_FRACTION else "note", (split.name,),
        text, remedy, count,
        tuple(images.closest_pair(group[0], group[1:], is_exact) for group in own[:MAX_EXAMPLES]),
    )  # fmt: skip
