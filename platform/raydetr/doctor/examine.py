"""Examine data sets: quickly from manifests and indexes, or thoroughly by reading and decoding every sample once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np

from raydetr.console import counted
from raydetr.doctor import checks
from raydetr.doctor.duplicates import duplicate_findings
from raydetr.doctor.findings import LEVELS, Finding, Integers, Level, TrainingTarget
from raydetr.doctor.report import Report
from raydetr.doctor.scan import ScannedSplit, Split, scan
from raydetr.process_pool import Progress
from raydetr.shards.reader import Shards, open_shards


def named_splits(shards: Sequence[Shards]) -> list[Split]:
    """Name splits by the last part of their locations, or by the full location where that is ambiguous."""
    names = [one.location.rstrip("/").rpartition("/")[2] for one in shards]
    if len(set(names)) < len(names):
        names = [one.location for one in shards]
    return [Split(names[number], one, number == 0) for number, one in enumerate(shards)]


# --- The quick part, before each training: less than a second ---


def check_may_train(train: Shards, val: Shards) -> None:
    """Stop where training makes no sense.

    Raises:
        ValueError: manifests and indexes show an error.
    """
    findings = index_findings(named_splits([train, val]), TrainingTarget())
    errors = [finding.line() for finding in findings if finding.level == "error"]
    if errors:
        raise ValueError("; ".join(errors))


def quick_warnings(train: Shards, val: Shards, target: TrainingTarget) -> list[str]:
    """Return the warnings of the quick part, one line each."""
    splits = named_splits([train, val])
    found = [*index_findings(splits, target), *_quick_findings(splits, target)]
    return [finding.line() for finding in found if finding.level == "warning"]


def index_findings(splits: Sequence[Split], target: TrainingTarget) -> Iterator[Finding]:
    """Return the findings that manifests and indexes suffice for."""
    yield from checks.category_findings(splits)
    for split in splits:
        counts = _usable_objects(split.shards)
        if not (split.shards.samples["num_annotations"] if counts is None else counts).any():
            yield checks.no_objects_finding(split)
    size, batch = splits[0].shards.num_samples, target.batch_size
    if batch is not None and size < batch:
        yield Finding(
            "less-than-a-batch", "warning", (splits[0].name,),
            f"{counted(size, 'image')} are fewer than a batch has ({batch}): each step sees images more than once",
            f"set data.batch_size to at most {size}",
        )  # fmt: skip
    for one, other in combinations(splits, 2):
        if one.shards.fingerprint == other.shards.fingerprint:
            yield Finding(
                "same-data", "warning", (one.name, other.name), "they hold exactly the same samples",
                "evaluate on images that are not trained on: AP would reward memorizing them",
            )  # fmt: skip


def _quick_findings(splits: Sequence[Split], target: TrainingTarget) -> Iterator[Finding]:
    """Estimate some findings of the thorough part."""
    for split in splits:
        # An upper bound: the index counts crowds and boxes without area too
        per_image = split.shards.samples["num_annotations"].astype(np.int64)
        yield from checks.object_count_findings(split, per_image, target)
        counts = _usable_objects(split.shards)
        if counts is None or not counts.any():
            continue
        yield from checks.class_findings(split, counts)
        clamped = split.shards.manifest.unusual_objects.get("clamped", 0)
        if checks.are_corners(clamped, int(counts.sum())):
            yield checks.corner_boxes_finding(split.name, clamped, int(counts.sum()))
    for one, other in combinations(splits, 2):
        if one.shards.fingerprint != other.shards.fingerprint:
            yield from _shared_samples(one, other)


def _shared_samples(one: Split, other: Split) -> Iterator[Finding]:
    """Find samples with the same crc and length: the same image under the same id with the same annotations."""
    rows = one.shards.samples, other.shards.samples
    keys = [row["crc32"].astype(np.uint64) << np.uint64(32) | row["length"] for row in rows]
    count = len(np.intersect1d(*keys))
    if count:
        yield Finding(
            "shared-samples", "warning", (one.name, other.name),
            f"{counted(count, 'image')} of {other.name} ({count / other.shards.num_samples:.1%}) "
            f"{'is' if count == 1 else 'are'} also in {one.name}",
            "`raydetr doctor` lists them; remove them from one of the two",
            count,
        )  # fmt: skip


def _usable_objects(shards: Shards) -> Integers | None:
    """Return the number of objects that train, of each category; None for a part of the data (`Shards.head`)."""
    if shards.num_samples < shards.manifest.num_samples and shards.manifest.num_usable:
        return None
    counts = shards.manifest.usable_objects
    return np.array([counts.get(str(category["id"]), 0) for category in shards.manifest.categories])


# --- The thorough part ---


def examine(
    locations: Sequence[str],
    target: TrainingTarget | None = None,
    *,
    open_location: Callable[[str], Shards] = open_shards,
    progress: Progress | None = None,
    num_processes: int | None = None,
) -> Report:
    """Examine data sets; the first is the training split.

    Args:
        locations: folders of shards, or their URLs.
        target: the training that the data is for.
        open_location: opens one of them.
        progress: called with (samples read, total samples).
        num_processes: processes that read and decode; None: one per CPU.

    Raises:
        ValueError: the same location is given twice.
    """
    start = time.perf_counter()
    target = target or TrainingTarget()
    if len(set(locations)) < len(locations):
        raise ValueError(f"the same data is given twice ({', '.join(locations)}): name each once")
    opened, findings = [], []
    for location in locations:
        try:
            opened.append(open_location(location))
        except (ValueError, OSError) as error:
            text = str(error).removeprefix(f"{location}: ")  # The finding names the split already
            findings.append(
                Finding("unusable-shards", "error", (location,), text, "replace it: it was not examined")
            )
    total, before = sum(shards.num_samples for shards in opened), 0
    scanned: list[ScannedSplit] = []
    for split in named_splits(opened):
        report = (lambda done, _, before=before: progress(before + done, total)) if progress else None
        result = scan(split.shards, progress=report, num_processes=num_processes)
        scanned.append(ScannedSplit(split, result, target))
        before += split.shards.num_samples
    if scanned:
        findings += _all_findings(scanned, target, num_processes)
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    return Report(target, tuple(scanned), tuple(findings), time.perf_counter() - start)


def _all_findings(
    scanned: Sequence[ScannedSplit], target: TrainingTarget, num_threads: int | None
) -> Iterator[Finding]:
    yield from index_findings([one.split for one in scanned], target)
    num_corrupt = sum(len(one.scan.corrupt) for one in scanned)
    is_tolerated = target.tolerates(num_corrupt, scanned[0].split.shards.num_samples)
    corrupt_level: Level = "warning" if is_tolerated else "error"
    for one in scanned:
        yield from checks.image_findings(one, corrupt_level)
        yield from checks.box_findings(one, corrupt_level)
        yield from checks.object_count_findings(one.split, one.objects_per_image, target)
        yield from checks.scale_findings(one)
    yield from checks.balance_findings(scanned)
    yield from duplicate_findings(scanned, num_threads)
