"""The part of the examination that takes less than a second: what manifests and indexes tell, and little more.

The whole examination of one or more data sets: every sample is read and decoded once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from raydetr.config.paths import is_remote
from raydetr.doctor.box_checks import box_findings, scale_findings
from raydetr.doctor.class_checks import (
    balance_findings,
    category_findings,
    class_counts,
    class_findings,
    crowding_findings,
    no_objects,
)
from raydetr.doctor.duplicates import duplicate_findings
from raydetr.doctor.findings import MAX_EXAMPLES, Example, Finding, Level, Target, by_level, counted
from raydetr.doctor.image_checks import image_findings
from raydetr.doctor.report import Report, split_statistics
from raydetr.doctor.scan import ScannedSplit, Split, scan
from raydetr.shards.reader import ShardError, Shards, open_shards

FEW_SAMPLES = 2_500  # of a split, which are read to count the objects of each class: about 0.2 s


def named_splits(shards: Sequence[Shards]) -> list[Split]:
    """Splits under the last part of their locations, or the whole where that is not enough."""
    short = [one.location.rstrip("/").rpartition("/")[2] for one in shards]
    names = short if len(set(short)) == len(short) else [one.location for one in shards]
    return [
        Split(name, one, number == 0) for number, (name, one) in enumerate(zip(names, shards, strict=True))
    ]


def check_may_train(train: Shards, val: Shards) -> None:
    """Stop where training makes no sense.

    Raises:
        ValueError: what the doctor calls a fault, as far as manifests and indexes show it.
    """
    splits = named_splits([train, val])
    faults = [found for found in index_findings(splits, Target()) if found.level == "fault"]
    if faults:
        raise ValueError("; ".join(fault.line() for fault in faults))


def warnings(train: Shards, val: Shards, target: Target) -> list[str]:
    """What somebody who starts a training should know of the data, one line each; nothing where all is well."""
    splits = named_splits([train, val])
    found = [*index_findings(splits, target), *_quick_findings(splits, target)]
    return [finding.line() for finding in by_level(found) if finding.level == "warning"]


def index_findings(splits: Sequence[Split], target: Target) -> list[Finding]:
    """What manifests and indexes are enough for."""
    found = category_findings(splits)
    for split in splits:
        if not split.shards.samples["num_annotations"].any():
            found.append(no_objects(split))
    found += _small_data(splits[0], target)
    for one, other in combinations(splits, 2):
        if one.shards.fingerprint == other.shards.fingerprint:
            found.append(
                Finding(
                    "same-data", "warning", (one.name, other.name), "they hold the very same samples",
                    "evaluate on images that are not trained on: AP would reward what was learned by heart",
                    1,
                )
            )  # fmt: skip
    return found


def _quick_findings(splits: Sequence[Split], target: Target) -> Iterator[Finding]:
    """Rougher than what the whole examination says of the same things."""
    for split in splits:
        # crowds and boxes without area are counted too: there may be fewer
        per_image = split.shards.samples["num_annotations"].astype(np.int64)
        yield from crowding_findings(split, per_image, target)
        counts = _class_counts(split.shards)
        if counts is not None and per_image.any():
            yield from class_findings(split, counts)
    for one, other in combinations(splits, 2):
        if one.shards.fingerprint != other.shards.fingerprint:
            yield from _shared_samples(one, other)


def _small_data(split: Split, target: Target) -> Iterator[Finding]:
    size, batch = split.shards.num_samples, target.batch_size
    if batch is not None and size < batch:
        yield Finding(
            "less-than-a-batch", "warning", (split.name,),
            f"{counted(size, 'image')} are fewer than a batch has ({batch}): each step sees images more than once",
            f"set data.batch_size to at most {size}",
            1,
        )  # fmt: skip


def _shared_samples(one: Split, other: Split) -> Iterator[Finding]:
    """Samples with the same crc and length: the same image under the same id with the same annotations."""
    keys = _sample_keys(one.shards), _sample_keys(other.shards)
    shared, here, there = np.intersect1d(keys[0], keys[1], return_indices=True)
    if len(shared):
        share = len(shared) / other.shards.num_samples
        examples = tuple(
            Example((one.place(int(a)), other.place(int(b))))
            for a, b in zip(here[:MAX_EXAMPLES], there[:MAX_EXAMPLES], strict=True)
        )
        yield Finding(
            "shared-samples", "warning", (one.name, other.name),
            f"{counted(len(shared), 'image')} of {other.name} ({share:.1%}) {'is' if len(shared) == 1 else 'are'} "
            f"also in {one.name}",
            "`raydetr doctor` shows which; take them out of one of the two",
            len(shared), examples,
        )  # fmt: skip


def _sample_keys(shards: Shards) -> npt.NDArray[np.uint64]:
    rows = shards.samples
    keys: npt.NDArray[np.uint64] = rows["crc32"].astype(np.uint64) << np.uint64(32) | rows["length"]
    return keys


def _class_counts(shards: Shards) -> npt.NDArray[np.int64] | None:
    """Objects of each category; None where counting takes too long, or a sample is damaged."""
    if is_remote(shards.location) or shards.num_samples > FEW_SAMPLES:
        return None
    numbers = {category["id"]: number for number, category in enumerate(shards.manifest.categories)}
    counts = np.zeros(len(numbers), np.int64)
    for index in range(shards.num_samples):
        try:
            annotations = shards.read(index).annotations
        except ShardError:
            return None  # the stream says it, or replaces it as it is told to
        for annotation in annotations:
            if not annotation.get("iscrowd", 0) and min(annotation["bbox"][2:]) > 0:
                counts[numbers[annotation["category_id"]]] += 1
    return counts


Progress = Callable[[int, int], None]


def examine(
    locations: Sequence[str],
    target: Target | None = None,
    *,
    open_location: Callable[[str], Shards] = open_shards,
    progress: Progress | None = None,
    num_processes: int | None = None,
) -> Report:
    """Examine data sets; the first is that which is trained on.

    Args:
        locations: folders of shards, or their URLs.
        target: what they are to be trained with.
        open_location: opens one of them.
        progress: called with (samples read, samples in all).
        num_processes: that read and decode; None: as many as there are CPUs.

    Raises:
        ValueError: the same location is given twice.
    """
    began = time.perf_counter()
    target = target or Target()
    if len(set(locations)) < len(locations):
        raise ValueError(f"the same data is given twice ({', '.join(locations)}): name each once")
    opened, findings = _open(locations, open_location)
    total = sum(shards.num_samples for shards in opened)
    scanned: list[ScannedSplit] = []
    for split in named_splits(opened):
        before = sum(len(one.scan.images) for one in scanned)
        report = _shifted(progress, before, total) if progress else None
        scanned.append(ScannedSplit(split, scan(split.shards, progress=report, num_processes=num_processes)))
    if scanned:
        findings += _findings(scanned, target)
    return Report(
        target,
        tuple(scanned),
        tuple(split_statistics(one, target) for one in scanned),
        tuple(by_level(findings)),
        time.perf_counter() - began,
    )


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    """Progress of one split as that of all."""
    return lambda done, _: progress(before + done, total)


def _open(
    locations: Sequence[str], open_location: Callable[[str], Shards]
) -> tuple[list[Shards], list[Finding]]:
    opened, findings = [], []
    for location in locations:
        try:
            opened.append(open_location(location))
        except (ValueError, OSError) as error:
            text = str(error).removeprefix(f"{location}: ")  # the split is named anyway
            findings.append(
                Finding("unusable-shards", "fault", (location,), text, "nothing of it was examined", 1)
            )
    return opened, findings


def _findings(scanned: Sequence[ScannedSplit], target: Target) -> list[Finding]:
    found = index_findings([one.split for one in scanned], target)
    num_corrupt = sum(len(one.scan.corrupt) for one in scanned)
    tolerated = target.tolerates(num_corrupt, scanned[0].split.shards.num_samples)
    corrupt: Level = "warning" if tolerated else "fault"
    for one in scanned:
        found += image_findings(one, corrupt)
        found += box_findings(one, corrupt)
        found += crowding_findings(one.split, one.objects_per_image, target)
        found += scale_findings(one, target, class_counts(one)[1])
    found += balance_findings(scanned)
    found += duplicate_findings(scanned)
    return found
