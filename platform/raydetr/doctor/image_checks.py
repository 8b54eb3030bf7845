"""Images that cannot be read, are not what their record says, or have an unusual shape."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from raydetr.doctor.findings import MAX_EXAMPLES, Finding, Level, counted
from raydetr.doctor.scan import Examined

NARROW = 5  # long side by short side
TINY = 32  # pixels of the short side: one cell of the coarsest feature map


def image_findings(examined: Examined, damage: Level) -> list[Finding]:
    """All that is wrong, or odd, with the images of a split; `damage` is the level of damaged samples."""
    return [*_damaged(examined, damage), *_of_other_sizes(examined), *_turned(examined), *_unusual(examined)]


def _damaged(examined: Examined, level: Level) -> Iterator[Finding]:
    damage, shards = examined.facts.damage, examined.split.shards
    if not damage:
        return
    examples = []
    for sample in sorted(damage)[:MAX_EXAMPLES]:
        row = shards.samples[sample]
        file = shards.manifest.shards[row["shard"]].name
        where = f"{file}, key {shards.key(sample)}: {damage[sample]:.120}"
        examples.append(examined.split.example(sample, where))
    yield Finding(
        "damaged-samples", level, (examined.name,),
        f"{counted(len(damage), 'sample')} of {shards.num_samples:,} cannot be used",
        "copy these shards again; where a record is at fault, correct it and write the shards again",
        len(damage), tuple(examples),
    )  # fmt: skip


def _of_other_sizes(examined: Examined) -> Iterator[Finding]:
    images, split = examined.facts.images, examined.split
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
            "other-sizes", "fault", (examined.name,),
            f"{counted(len(chosen), 'image')} of another size than the record says: the boxes do not fit",
            "correct width and height, or replace the images, and write the shards again",
            len(chosen), examples,
        )  # fmt: skip


def _turned(examined: Examined) -> Iterator[Finding]:
    chosen = np.flatnonzero(examined.facts.images["turned"])
    if len(chosen):
        yield Finding(
            "turned-images", "note", (examined.name,),
            f"{counted(len(chosen), 'image')} with an EXIF orientation, which is not applied",
            "look at the pictures: if the boxes are beside the objects, store the pixels turned",
            len(chosen), tuple(examined.split.example(sample) for sample in chosen[:MAX_EXAMPLES]),
        )  # fmt: skip


def _unusual(examined: Examined) -> Iterator[Finding]:
    widths, heights = examined.split.widths, examined.split.heights
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
                examined.split.example(sample, f"{widths[sample]:.0f}x{heights[sample]:.0f}")
                for sample in chosen[:MAX_EXAMPLES]
            )
            yield Finding(
                code, "note", (examined.name,),
                f"{counted(len(chosen), 'image')} {text}", remedy, len(chosen), examples,
            )  # fmt: skip
