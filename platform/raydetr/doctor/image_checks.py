"""Images that cannot be read, are not what their record says, or have an unusual shape."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from raydetr.doctor.findings import MAX_EXAMPLES, Finding, Level, counted
from raydetr.doctor.scan import ScannedSplit

NARROW = 5  # long side by short side
TINY = 32  # pixels of the short side: one cell of the coarsest feature map


def image_findings(scanned: ScannedSplit, corrupt: Level) -> list[Finding]:
    """All that is wrong, or odd, with the images of a split; `damage` is the level of damaged samples."""
    return [
        *_corrupt_samples(scanned, corrupt),
        *_of_other_sizes(scanned),
        *_turned(scanned),
        *_unusual(scanned),
    ]


def _corrupt_samples(scanned: ScannedSplit, level: Level) -> Iterator[Finding]:
    corrupt, shards = scanned.scan.corrupt, scanned.split.shards
    if not corrupt:
        return
    examples = []
    for sample in sorted(corrupt)[:MAX_EXAMPLES]:
        row = shards.samples[sample]
        file = shards.manifest.shards[row["shard"]].name
        where = f"{file}, key {shards.key(sample)}: {corrupt[sample]:.120}"
        examples.append(scanned.split.example(sample, where))
    yield Finding(
        "damaged-samples", level, (scanned.name,),
        f"{counted(len(corrupt), 'sample')} of {shards.num_samples:,} cannot be used",
        "copy these shards again; where a record is at fault, correct it and write the shards again",
        len(corrupt), tuple(examples),
    )  # fmt: skip


def _of_other_sizes(scanned: ScannedSplit) -> Iterator[Finding]:
    images, split = scanned.scan.images, scanned.split
    differs = (images["width"] != split.shards.samples["width"]) | (
        images["height"] != split.shards.samples["height"]
    )
    chosen = np.flatnonzero(images["is_read"] & differs)
    if len(chosen):
        examples = tuple(
            split.example(
                sample,
                f"the file holds {images['width'][sample]}x{images['height'][sample]} pixels, the record says "
                f"{split.widths[sample]:.0f}x{split.heights[sample]:.0f}",
            )
            for sample in chosen[:MAX_EXAMPLES]
        )
        yield Finding(
            "other-sizes", "fault", (scanned.name,),
            f"{counted(len(chosen), 'image')} of another size than the record says: the boxes do not fit",
            "correct width and height, or replace the images, and write the shards again",
            len(chosen), examples,
        )  # fmt: skip


def _turned(scanned: ScannedSplit) -> Iterator[Finding]:
    chosen = np.flatnonzero(scanned.scan.images["turned"])
    if len(chosen):
        yield Finding(
            "turned-images", "note", (scanned.name,),
            f"{counted(len(chosen), 'image')} with an EXIF orientation, which is not applied",
            "look at the pictures: if the boxes are beside the objects, store the pixels turned",
            len(chosen), tuple(scanned.split.example(sample) for sample in chosen[:MAX_EXAMPLES]),
        )  # fmt: skip


def _unusual(scanned: ScannedSplit) -> Iterator[Finding]:
    widths, heights = scanned.split.widths, scanned.split.heights
    short, long = np.minimum(widths, heights), np.maximum(widths, heights)
    for code, chosen, text, remedy in (
        ("narrow-images", np.flatnonzero(long > NARROW * short),
         f"with one side more than {NARROW} times the other",
         "they are mostly padding in a batch: cut them into parts, or leave them out"),
        ("tiny-images", np.flatnonzero(short < TINY),
         f"with a side under {TINY} pixels", "are they thumbnails? leave them out"),
    ):  # fmt: skip
        if len(chosen):
            examples = tuple(
                scanned.split.example(sample, f"{widths[sample]:.0f}x{heights[sample]:.0f}")
                for sample in chosen[:MAX_EXAMPLES]
            )
            yield Finding(
                code, "note", (scanned.name,),
                f"{counted(len(chosen), 'image')} {text}", remedy, len(chosen), examples,
            )  # fmt: skip
