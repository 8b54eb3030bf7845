"""Find images that occur twice, within a split or in two: the same bytes, or almost the same look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from raydetr.doctor.findings import MAX_EXAMPLES, Example, Finding, Floats, Integers, counted
from raydetr.doctor.scan import ScannedSplit

Hashes = npt.NDArray[np.uint64]
Thumbnails = npt.NDArray[np.uint8]

# --- The search for near duplicates, without comparing every pair ---
#
# Two gradient hashes are near if at most 7 of their 64 bits differ. The bits are dealt into 4 bands of 16. In one of
# the bands of a near pair at most one bit differs: two in each band would be 8. So all near pairs are among those that
# agree in a band except for one bit. For each of the 4 x 16 choices of this bit, the hashes are sorted by the other
# bits of the band, and neighbors in that order are compared. A pair counts if its thumbnails correlate.
#
# Measured on 160 photographs of COCO: copies that are recompressed, resized to a third, converted to gray, 15% brighter
# or darker differ in at most 5 bits and correlate to at least 0.96, with 2% cropped at each side to 0.91. Two different
# photographs differ in at least 7 bits (31 on average) and correlate to at most 0.83.

MAX_DIFFERENT_BITS = 7
MIN_CORRELATION = 0.9
FLAT = 2.0  # Gray values; a thumbnail with a smaller standard deviation has nothing to correlate
# These bound time and memory where thousands look the same, as frames of a fixed camera. Groups stay connected.
MAX_NEIGHBORS = 1024  # To compare with, in the order of a band
MAX_PARTNERS = 16  # To keep of them, per image

_NUM_BANDS, _BAND_BITS = 4, 16


def near_pairs(gradient_hashes: Hashes, thumbnails: Thumbnails) -> Integers:
    """Return the pairs [p, 2] of images that look the same, each once, the smaller number first.

    Of an image that looks like very many others, only enough pairs are returned to connect them.

    Args:
        gradient_hashes: [n].
        thumbnails: gray values [n, s].
    """
    # Sorted this way, similar images are neighbors before the bands are compared
    order = np.lexsort((thumbnails.mean(axis=1), gradient_hashes))
    hashes, total = gradient_hashes[order], len(order)
    encoded = np.empty(0, np.int64)
    for band in _bands(hashes).T:
        for bit in range(_BAND_BITS):
            encoded = np.union1d(encoded, _near_in_band(hashes, band & ~np.uint16(1 << bit)))
    pairs = order[np.stack([encoded // max(total, 1), encoded % max(total, 1)], axis=1)]
    return _correlated(np.sort(pairs, axis=1), thumbnails)


def correlation(a: Thumbnails, b: Thumbnails) -> Floats:
    """Correlate thumbnails [p, s] with those in the same row of the other array: 1 for the same, [p].

    Brightness and contrast do not count. Two flat images are the same if their gray values are.
    """
    x, y = a.astype(np.float32), b.astype(np.float32)
    gray = np.abs(x.mean(axis=1) - y.mean(axis=1))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    deviations = np.stack([x.std(axis=1), y.std(axis=1)])
    correlations = (x * y).mean(axis=1) / np.maximum(deviations, FLAT).prod(axis=0)
    both_flat = (deviations < FLAT).all(axis=0)
    result: Floats = np.where(both_flat, gray < FLAT, correlations)
    return result


def groups_of(pairs: Integers, num_images: int) -> list[Integers]:
    """Return the groups of images that pairs connect, each in ascending order."""
    graph = coo_array((np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1])), (num_images, num_images))
    labels = connected_components(graph, directed=False)[1]
    return groups_by(labels, np.unique(pairs))


def groups_by(keys: npt.NDArray[np.generic], members: Integers) -> list[Integers]:
    """Return the groups of `members` with equal keys, each in ascending order; no groups of one."""
    order = members[np.argsort(keys[members], kind="stable")]
    starts = np.flatnonzero(keys[order[1:]] != keys[order[:-1]]) + 1
    return [group for group in np.split(order, starts) if len(group) > 1]


def _bands(hashes: Hashes) -> npt.NDArray[np.uint16]:
    """Deal the bits of each hash into bands [n, 4]; bits of neighboring cells correlate and go to different bands."""
    bits = np.unpackbits(hashes.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1)
    dealt = bits.reshape(-1, _BAND_BITS, _NUM_BANDS).transpose(0, 2, 1)
    return np.packbits(np.ascontiguousarray(dealt), axis=2).view(np.uint16)[..., 0]


def _near_in_band(hashes: Hashes, keys: npt.NDArray[np.uint16]) -> Integers:
    """Return near pairs among hashes with equal keys, encoded as first * n + second."""
    order = np.argsort(keys, kind="stable")
    keys, hashes, total = keys[order], hashes[order], len(order)
    rows, num_partners = np.arange(total), np.zeros(total, np.int64)
    found = [np.empty(0, np.int64)]
    for distance in range(1, min(MAX_NEIGHBORS, total - 1) + 1):
        rows = rows[rows + distance < total]
        # Keys are sorted: a row without an equal key at this distance has none farther away
        rows = rows[keys[rows] == keys[rows + distance]]
        if not len(rows):
            break
        is_near = np.bitwise_count(hashes[rows] ^ hashes[rows + distance]) <= MAX_DIFFERENT_BITS
        first, second = order[rows[is_near]], order[rows[is_near] + distance]
        found.append(np.minimum(first, second) * total + np.maximum(first, second))
        num_partners[rows] += is_near
        rows = rows[num_partners[rows] < MAX_PARTNERS]
    return np.concatenate(found)


def _correlated(pairs: Integers, thumbnails: Thumbnails) -> Integers:
    kept = [
        part[correlation(thumbnails[part[:, 0]], thumbnails[part[:, 1]]) >= MIN_CORRELATION]
        for part in np.array_split(pairs, len(pairs) // 50_000 + 1)
    ]
    return np.concatenate(kept)


# --- Findings ---

MAX_NOTE_FRACTION = 0.01  # Of the images of a split, up to which near duplicates are only a note


@dataclass(frozen=True)
class _Images:
    """The n readable images of all splits."""

    splits: Sequence[ScannedSplit]
    split: Integers  # [n] numbers of their splits
    sample: Integers  # [n] numbers in their splits
    digests: Hashes
    gradient_hashes: Hashes
    thumbnails: Thumbnails


def duplicate_findings(splits: Sequence[ScannedSplit]) -> list[Finding]:
    """Find duplicates within splits and, worse, across them."""
    images = _readable_images(splits)
    total = len(images.split)
    exact = groups_by(images.digests, np.arange(total))
    # Only the first of several exact copies takes part in the second search: each image is reported once
    first = np.unique(images.digests, return_index=True)[1].astype(np.int64)
    pairs = first[near_pairs(images.gradient_hashes[first], images.thumbnails[first])]
    near = groups_of(pairs, total)
    found = []
    for groups, is_exact in ((exact, True), (near, False)):
        found += _across(images, groups, is_exact)
        found += _within(images, groups, is_exact)
    return found


def _readable_images(splits: Sequence[ScannedSplit]) -> _Images:
    samples = [np.flatnonzero(split.scan.images["is_read"]) for split in splits]
    rows = np.concatenate([split.scan.images[read] for split, read in zip(splits, samples, strict=True)])
    return _Images(
        splits,
        np.repeat(np.arange(len(splits)), [len(read) for read in samples]),
        np.concatenate(samples).astype(np.int64),
        rows["digest"].astype(np.uint64),
        rows["gradient_hash"].astype(np.uint64),
        rows["thumbnail"].astype(np.uint8),
    )


def _across(images: _Images, groups: list[Integers], is_exact: bool) -> list[Finding]:
    """Find images that are in two splits, for every pair of splits."""
    found = []
    for other in range(1, len(images.splits)):
        for one in range(other):
            shards, other_shards = (images.splits[number].split.shards for number in (one, other))
            if shards.fingerprint == other_shards.fingerprint:
                continue  # Reported as `same-data`
            leaks = [
                (group[images.split[group] == one], group[images.split[group] == other]) for group in groups
            ]
            leaks = [leak for leak in leaks if all(map(len, leak))]
            if leaks:
                found.append(_leak(images, one, other, leaks, is_exact))
    return found


def _leak(
    images: _Images, one: int, other: int, leaks: list[tuple[Integers, Integers]], is_exact: bool
) -> Finding:
    names = images.splits[one].name, images.splits[other].name
    count = sum(len(there) for _, there in leaks)
    fraction = count / images.splits[other].split.shards.num_samples
    relation = "also in" if is_exact else "almost the same as images of"
    return Finding(
        "leaked-images" if is_exact else "leaked-near-duplicates",
        "warning",
        names,
        f"{counted(count, 'image')} of {names[1]} ({fraction:.1%}) "
        f"{'is' if count == 1 else 'are'} {relation} {names[0]}",
        f"remove them from one of the two: AP on {names[1]} would reward memorizing them",
        count,
        _closest_pairs(images, [(here[0], there) for here, there in leaks], is_exact),
    )


def _within(images: _Images, groups: list[Integers], is_exact: bool) -> list[Finding]:
    found = []
    for number, split in enumerate(images.splits):
        own = [group[images.split[group] == number] for group in groups]
        own = [group for group in own if len(group) > 1]
        if not own:
            continue
        count = sum(len(group) - 1 for group in own)
        fraction = count / split.split.shards.num_samples
        relation = "the same bytes as" if is_exact else "almost the look of"
        found.append(
            Finding(
                "duplicate-images" if is_exact else "near-duplicates",
                "warning" if is_exact or fraction > MAX_NOTE_FRACTION else "note",
                (split.name,),
                f"{counted(count, 'image')} ({fraction:.1%}) {'has' if count == 1 else 'have'} {relation} another one, "
                f"in {counted(len(own), 'group')}",
                "keep one of each group, unless the duplicates are intended"
                if is_exact
                else "look at them: keep the frames of one scene in one split, and omit copies",
                count,
                _closest_pairs(images, [(group[0], group[1:]) for group in own], is_exact),
            )
        )
    return found


def _closest_pairs(
    images: _Images, found: list[tuple[np.int64, Integers]], is_exact: bool
) -> tuple[Example, ...]:
    """Return a pair of each of the first groups: its first image, and the one that correlates most with it."""
    examples = []
    for first, others in found[:MAX_EXAMPLES]:
        thumbnails = np.broadcast_to(images.thumbnails[first], images.thumbnails[others].shape)
        correlations = correlation(thumbnails, images.thumbnails[others])
        best = int(np.argmax(correlations))
        places = tuple(
            images.splits[images.split[number]].split.place(int(images.sample[number]))
            for number in (first, others[best])
        )
        detail = "the same bytes" if is_exact else f"correlation {correlations[best]:.3f}"
        examples.append(Example(places, detail))
    return tuple(examples)
