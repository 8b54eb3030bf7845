"""Find images that cannot be read, differ from their record, or have an unusual shape."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from raydetr.doctor.findings import Finding, Level, counted
from raydetr.doctor.scan import ScannedSplit

MAX_SIDE_RATIO = 5  # Long side by short side
MIN_SIDE = 32  # Pixels of the short side: one cell of the coarsest feature map


def image_findings(scanned: ScannedSplit, corrupt_level: Level) -> list[Finding]:
    """Return all findings about the images of a split; `corrupt_level` is the level of corrupt samples."""
    return [
        *_corrupt_samples(scanned, corrupt_level),
        *_size_mismatches(scanned),
        *_exif_orientations(scanned),
        *_unusual_shapes(scanned),
    ]


def _corrupt_samples(scanned: ScannedSplit, level: Level) -> Iterator[Finding]:
    corrupt, shards = scanned.scan.corrupt, scanned.split.shards
    if not corrupt:
        return

    def detail(sample: int) -> str:
        file = shards.manifest.shards[shards.samples[sample]["shard"]].name
        return f"{file}, key {shards.key(sample)}: {corrupt[sample]:.120}"

    yield Finding(
        "corrupt-samples", level, (scanned.name,),
        f"{counted(len(corrupt), 'sample')} of {shards.num_samples:,} cannot be used",
        "copy these shards again; if the record is wrong, correct it and write the shards again",
        len(corrupt), scanned.split.examples(sorted(corrupt), detail),
    )  # fmt: skip


def _size_mismatches(scanned: ScannedSplit) -> Iterator[Finding]:
    images, split = scanned.scan.images, scanned.split
    differs = (images["width"] != split.shards.samples["width"]) | (
        images["height"] != split.shards.samples["height"]
    )
    chosen = np.flatnonzero(images["is_read"] & differs)
    if len(chosen):
        examples = split.examples(
            chosen,
            lambda sample: (
                f"the file holds {images['width'][sample]}x{images['height'][sample]} pixels, "
                f"the record has {split.widths[sample]:.0f}x{split.heights[sample]:.0f}"
            ),
        )
        yield Finding(
            "size-mismatch", "error", (scanned.name,),
            f"{counted(len(chosen), 'image')} of another size than in the record: the boxes do not fit",
            "correct width and height, or replace the images, and write the shards again",
            len(chosen), examples,
        )  # fmt: skip


def _exif_orientations(scanned: ScannedSplit) -> Iterator[Finding]:
    chosen = np.flatnonzero(scanned.scan.images["has_orientation"])
    if len(chosen):
        yield Finding(
            "exif-orientation", "note", (scanned.name,),
            f"{counted(len(chosen), 'image')} with an EXIF orientation, which is not applied",
            "look at the images: if the boxes are beside the objects, store the pixels rotated",
            len(chosen), scanned.split.examples(chosen),
        )  # fmt: skip


def _unusual_shapes(scanned: ScannedSplit) -> Iterator[Finding]:
    widths, heights = scanned.split.widths, scanned.split.heights
    short, long = np.minimum(widths, heights), np.maximum(widths, heights)
    for code, chosen, text, remedy in (
        ("narrow-images", np.flatnonzero(long > MAX_SIDE_RATIO * short),
         f"with one side more than {MAX_SIDE_RATIO} times the other",
         "they are mostly padding in a batch: cut them into parts, or omit them"),
        ("tiny-images", np.flatnonzero(short < MIN_SIDE),
         f"with a side under {MIN_SIDE} pixels", "are they thumbnails? omit them"),
    ):  # fmt: skip
        if len(chosen):
            examples = scanned.split.examples(chosen, lambda n: f"{widths[n]:.0f}x{heights[n]:.0f}")
            yield Finding(
                code, "note", (scanned.name,),
                f"{counted(len(chosen), 'image')} {text}", remedy, len(chosen), examples,
            )  # fmt: skip
