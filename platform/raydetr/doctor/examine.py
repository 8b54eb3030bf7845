"""The whole examination of one or more data sets: every sample is read and decoded once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from raydetr.doctor.balance import balance_findings, class_counts, crowding_findings
from raydetr.doctor.boxes import box_findings
from raydetr.doctor.duplicates import duplicate_findings
from raydetr.doctor.findings import Finding, Level, by_level
from raydetr.doctor.images import image_findings
from raydetr.doctor.quick import index_findings, named_splits
from raydetr.doctor.report import Report
from raydetr.doctor.scale import scale_findings
from raydetr.doctor.scan import scan
from raydetr.doctor.split import Examined
from raydetr.doctor.statistics import statistics_of
from raydetr.doctor.target import Target
from raydetr.shards.reader import Shards, open_shards

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
    examined: list[Examined] = []
    for split in named_splits(opened):
        before = sum(len(one.facts.images) for one in examined)
        report = _shifted(progress, before, total) if progress else None
        examined.append(Examined(split, scan(split.shards, progress=report, num_processes=num_processes)))
    if examined:
        findings += _findings(examined, target)
    return Report(
        target,
        tuple(examined),
        tuple(statistics_of(one, target) for one in examined),
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


def _findings(examined: Sequence[Examined], target: Target) -> list[Finding]:
    found = index_findings([one.split for one in examined], target)
    num_damaged = sum(len(one.facts.damage) for one in examined)
    tolerated = target.tolerates(num_damaged, examined[0].split.shards.num_samples)
    damage: Level = "warning" if tolerated else "fault"
    for one in examined:
        found += image_findings(one, damage)
        found += box_findings(one, damage)
        found += crowding_findings(one.split, one.objects_per_image, target)
        found += scale_findings(one, target, class_counts(one)[1])
    found += balance_findings(examined)
    found += duplicate_findings(examined)
    return found
