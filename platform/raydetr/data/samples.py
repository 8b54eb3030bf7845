"""Turn a packed sample into one that can be batched: read, check, decode, transform."""

from __future__ import annotations

import numpy as np

from raydetr.data.batch import Sample
from raydetr.data.transforms.mosaic import LabeledImage, make_mosaic
from raydetr.data.transforms.pixels import size_of
from raydetr.data.transforms.transform import Transform
from raydetr.shards.coco import usable_boxes
from raydetr.shards.images import ImageError, decode_pixels
from raydetr.shards.reader import ShardError, Shards
from raydetr.shards.validation import RawSample


def load_sample(
    shards: Shards,
    index: int,
    transform: Transform,
    *,
    seed: int,
    position: int,
    short_side: int | None = None,
    raw: RawSample | None = None,
) -> Sample:
    """Read, check, decode and transform one sample.

    Args:
        shards: the data set.
        index: of the sample in `shards`.
        transform: applied with randomness keyed by (seed, position).
        seed: of the run.
        position: G of the sample.
        short_side: in pixels, common to the step (`Transform.step_short_side`); None: drawn for this image.
        raw: the result of `shards.read(index)`; None: it is read here.

    Raises:
        ShardError: the sample is corrupt, or another one that its mosaic needs; the message names which.
    """
    raw = shards.read(index) if raw is None else raw
    images = [decode(shards, index, raw)]
    original_size = images[0].pixels.shape[:2]
    mosaic = transform.mosaic(seed, position, index, shards.num_samples)
    if mosaic is not None:
        images += [decode(shards, partner, _read_partner(shards, partner)) for partner in mosaic.partners]
        images = [make_mosaic(mosaic, images)]
    pixels, boxes, labels = images[0].pixels, images[0].boxes_xyxy, images[0].labels
    image, boxes, kept = transform(pixels, boxes, seed=seed, position=position, short_side=short_side)
    return Sample(image, labels[kept], boxes, raw.record["id"], original_size, position)


def _read_partner(shards: Shards, index: int) -> RawSample:
    try:
        return shards.read(index)
    except ShardError:
        return shards.reread(index)


def decode(shards: Shards, index: int, raw: RawSample) -> LabeledImage:
    """Decode the image of a sample, and select the boxes that training uses.

    Raises:
        ShardError: the image is corrupt, or has another size than in the index.
    """
    try:
        pixels = decode_pixels(raw.image)
    except ImageError as error:
        raise shards.corrupt(index, f"its image cannot be decoded ({error})") from None
    (width, height), row = size_of(pixels), shards.samples[index]
    if (width, height) != (row["width"], row["height"]):
        expected = f"{row['width']}x{row['height']}"
        raise shards.corrupt(
            index, f"its image has {width}x{height} pixels instead of the index's {expected}"
        )
    boxes, category_ids = usable_boxes(raw.annotations, width, height)
    labels = shards.label_map.labels
    return LabeledImage(pixels, boxes, np.array([labels[i] for i in category_ids], np.int64))
