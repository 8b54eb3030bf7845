"""Pairs of images that look the same, among very many: without comparing each with each.

Two gradient hashes are near if at most 7 of their 64 bits differ. The bits are dealt into 4 bands of 16; in one of
the bands of a near pair at most one bit differs (if two differed in each band, it were 8). So all near pairs are
found among those that agree in a band but for one bit: for each of the 4 x 16 choices of such a bit, the hashes are
sorted by the rest of the band, and neighbours in that order are compared. A pair counts if the thumbnails correlate.

Measured on 160 photographs of COCO: copies that are recompressed, resized to a third, turned gray, 15% brighter or
darker differ in at most 5 bits and correlate to at least 0.96, with 2% cut off at each side 0.91; two different
photographs differ in at least 7 bits (in 31 on average) and correlate to at most 0.83.

Images that are there twice: the same bytes, or the same look, in one split or in two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from raydetr.doctor.findings import MAX_EXAMPLES, Example, Finding, counted
from raydetr.doctor.scan import ScannedSplit

MAX_DIFFERENT_BITS = 7
MIN_CORRELATION = 0.9
FLAT = 2.0  # gray values; the deviation of a thumbnail that has nothing to correlate
# They bound time and memory where thousands look the same, as frames of a fixed camera; groups stay connected
MAX_NEIGHBOURS = 1024  # that are compared in the order of a band
MAX_PARTNERS = 16  # that are taken from them for one image

_NUM_BANDS, _BAND_BITS = 4, 16

Hashes = npt.NDArray[np.uint64]
Thumbnails = npt.NDArray[np.uint8]
Pairs = npt.NDArray[np.int64]


def near_pairs(gradients: Hashes, thumbnails: Thumbnails) -> Pairs:
    """The pairs [p, 2] of images that look the same, each once, the smaller number first.

    Of an image that looks like very many, not every pair is there, but enough to connect them.

    Args:
        gradients: gradient hashes [n].
        thumbnails: gray values [n, s].
    """
    order = np.lexsort((thumbnails.mean(axis=1), gradients))  # likes are neighbours already
    hashes, total = gradients[order], len(order)
    numbers = np.empty(0, np.int64)
    for band in _bands(hashes).T:
        for bit in range(_BAND_BITS):
            numbers = np.union1d(numbers, _near_in_band(hashes, band & ~np.uint16(1 << bit)))
    pairs = order[np.stack([numbers // max(total, 1), numbers % max(total, 1)], axis=1)]
    return _that_correlate(np.sort(pairs, axis=1), thumbnails)


def correlation(a: Thumbnails, b: Thumbnails) -> npt.NDArray[np.float64]:
    """How much thumbnails [p, s] look like others, each with the one in its row: 1 for the same, [p].

    Brightness and contrast do not count. Two flat pictures are the same where their gray is.
    """
    x, y = a.astype(np.float32), b.astype(np.float32)
    gray = np.abs(x.mean(axis=1) - y.mean(axis=1))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    deviations = np.stack([x.std(axis=1), y.std(axis=1)])
    likeness = (x * y).mean(axis=1) / np.maximum(deviations, FLAT).prod(axis=0)
    both_flat = (deviations < FLAT).all(axis=0)
    result: npt.NDArray[np.float64] = np.where(both_flat, gray < FLAT, likeness)
    return result


def groups_of(pairs: Pairs, num_images: int) -> list[npt.NDArray[np.int64]]:
    """The images that are connected by pairs, each group in ascending order."""
    graph = coo_array((np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1])), (num_images, num_images))
    labels = connected_components(graph, directed=False)[1]
    return groups_by(labels, np.unique(pairs))


def groups_by(keys: npt.NDArray[np.generic], members: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The `members` that share a key with another one, each group in ascending order."""
    order = members[np.argsort(keys[members], kind="stable")]
    starts = np.flatnonzero(keys[order[1:]] != keys[order[:-1]]) + 1
    return [group for group in np.split(order, starts) if len(group) > 1]


def _bands(hashes: Hashes) -> npt.NDArray[np.uint16]:
    """The bits of each hash, dealt into bands [n, 4]: neighbouring cells are alike and come into different ones."""
    bits = np.unpackbits(hashes.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1)
    dealt = bits.reshape(-1, _BAND_BITS, _NUM_BANDS).transpose(0, 2, 1)
    return np.packbits(np.ascontiguousarray(dealt), axis=2).view(np.uint16)[..., 0]


def _near_in_band(hashes: Hashes, keys: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """Near pairs among hashes with equal keys, as first * n + second."""
    order = np.argsort(keys, kind="stable")
    keys, hashes, total = keys[order], hashes[order], len(order)
    rows, num_partners = np.arange(total), np.zeros(total, np.int64)
    found = [np.empty(0, np.int64)]
    for distance in range(1, min(MAX_NEIGHBOURS, total - 1) + 1):
        rows = rows[rows + distance < total]
        rows = rows[
            keys[rows] == keys[rows + distance]
        ]  # sorted: who has no such neighbour has no farther one
        if not len(rows):
            break
        is_near = np.bitwise_count(hashes[rows] ^ hashes[rows + distance]) <= MAX_DIFFERENT_BITS
        first, second = order[rows[is_near]], order[rows[is_near] + distance]
        found.append(np.minimum(first, second) * total + np.maximum(first, second))
        num_partners[rows] += is_near
        rows = rows[num_partners[rows] < MAX_PARTNERS]
    return np.concatenate(found)


def _that_correlate(pairs: Pairs, thumbnails: Thumbnails) -> Pairs:
    kept = [
        part[correlation(thumbnails[part[:, 0]], thumbnails[part[:, 1]]) >= MIN_CORRELATION]
        for part in np.array_split(pairs, len(pairs) // 50_000 + 1)
    ]
    return np.concatenate(kept)


FEW = 0.01  # share of images that look like another one of their split, up to which it is only a note

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _All:
    """The readable images of all splits, numbered through."""

    splits: Sequence[ScannedSplit]
    fingerprints: list[str]
    split: Numbers  # [n] which split
    sample: Numbers  # [n] which sample of it
    digests: npt.NDArray[np.uint64]
    gradients: npt.NDArray[np.uint64]
    thumbnails: npt.NDArray[np.uint8]


def duplicate_findings(splits: Sequence[ScannedSplit]) -> list[Finding]:
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


def _all(splits: Sequence[ScannedSplit]) -> _All:
    read = [np.flatnonzero(split.scan.images["is_read"]) for split in splits]
    images = [split.scan.images[samples] for split, samples in zip(splits, read, strict=True)]

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
