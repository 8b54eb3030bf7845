"""From a packed sample to one that can be batched: read, check, decode, transform."""

from __future__ import annotations

import numpy as np

from raydetr.data.batch import Sample
from raydetr.data.coco import usable_boxes
from raydetr.data.images import UNREADABLE, decode_rgb
from raydetr.data.index import Shards
from raydetr.data.transforms import Transform


def load_sample(shards: Shards, index: int, transform: Transform, *, seed: int, position: int) -> Sample:
    """Read, check, decode and transform one sample.

    Raises:
        ShardError: it is damaged.
    """
    raw = shards.read(index)
    try:
        image = decode_rgb(raw.image)
    except UNREADABLE as error:
        shards.refuse(index, f"its image cannot be decoded ({error})")
    original_size = (image.height, image.width)
    boxes, category_ids = usable_boxes(raw.annotations, image.width, image.height)
    labels = shards.label_map.labels
    image, boxes, kept = transform(image, boxes, seed=seed, position=position)
    kept_labels = np.array([labels[i] for i in category_ids], np.int64)[kept]
    return Sample(image, kept_labels, boxes, raw.record["id"], original_size)
