"""From a packed sample to one that can be batched: read, check, decode, transform."""

from __future__ import annotations

import numpy as np

from raydetr.data.batch import Sample
from raydetr.data.coco import usable_boxes
from raydetr.data.images import UNREADABLE, decode_rgb
from raydetr.data.index import Shards
from raydetr.data.integrity import RawSample
from raydetr.data.transforms import Transform


def load_sample(
    shards: Shards,
    index: int,
    transform: Transform,
    *,
    seed: int,
    position: int,
    short_side: int | None = None,
) -> Sample:
    """Read, check, decode and transform one sample.

    Raises:
        ShardError: it is damaged.
    """
    raw = shards.read(index)
    return make_sample(shards, index, raw, transform, seed=seed, position=position, short_side=short_side)


def make_sample(
    shards: Shards,
    index: int,
    raw: RawSample,
    transform: Transform,
    *,
    seed: int,
    position: int,
    short_side: int | None,
) -> Sample:
    """Decode and transform one sample that was read.

    Args:
        shards: what it was read from.
        index: of the sample in `shards`.
        raw: what `shards.read(index)` returned.
        transform: applied with randomness keyed by (seed, position).
        seed: of the run.
        position: G of the sample.
        short_side: pixels; of the step (`Transform.step_short_side`); None: the image has its own.

    Raises:
        ShardError: it is damaged.
    """
    try:
        image = decode_rgb(raw.image)
    except UNREADABLE as error:
        shards.refuse(index, f"its image cannot be decoded ({error})")
    original_size = (image.height, image.width)
    boxes, category_ids = usable_boxes(raw.annotations, image.width, image.height)
    labels = shards.label_map.labels
    image, boxes, kept = transform(image, boxes, seed=seed, position=position, short_side=short_side)
    kept_labels = np.array([labels[i] for i in category_ids], np.int64)[kept]
    return Sample(image, kept_labels, boxes, raw.record["id"], original_size)
