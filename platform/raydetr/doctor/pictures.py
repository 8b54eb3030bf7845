"""Pictures for the page: small JPEGs with boxes, inside the HTML itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from raydetr.doctor.findings import Place
from raydetr.doctor.reading import as_record, is_box, read_anyway
from raydetr.doctor.split import Examined
from raydetr.shards.images import UNREADABLE, decode_rgb
from raydetr.visualization.boxes import Box, coco_boxes, draw_boxes

SIDE = 340  # pixels of the long side
QUALITY = 82


def thumbnail(examined: Examined, place: Place) -> str | None:
    """A picture of a place as a data URL, with the boxes that are meant; None where it cannot be read."""
    raw = read_anyway(examined.split.shards, place.sample)
    if raw is None:
        return None
    try:
        image = decode_rgb(raw.image)
    except UNREADABLE:
        return None
    names = {c["id"]: c["name"] for c in examined.split.shards.manifest.categories}
    records = [as_record(raw.annotations[number]) for number in place.annotations]
    boxes = coco_boxes([record for record in records if is_box(record.get("bbox"))], names)
    return data_url(_drawn(image, boxes))


def gallery_places(examined: Examined, count: int) -> list[Place]:
    """Some images, evenly over the split."""
    shards = examined.split.shards
    chosen = np.unique(np.linspace(0, shards.num_samples - 1, count).round().astype(int)).tolist()
    return [examined.split.place(sample) for sample in chosen]


def with_all_boxes(examined: Examined, place: Place) -> Place:
    """The place with all annotations of its image."""
    count = int(examined.split.shards.samples["num_annotations"][place.sample])
    return replace(place, annotations=tuple(range(count)))


def data_url(image: Image.Image) -> str:
    """An image as the text that `src` takes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _drawn(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """The image in the size of the page, and only then the boxes: lines and labels stay readable."""
    factor = SIDE / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    across, down = size[0] / image.width, size[1] / image.height
    scaled = [
        Box(box.category_id, box.name, (x0 * across, y0 * down, x1 * across, y1 * down), box.score)
        for box in boxes
        for x0, y0, x1, y1 in (box.xyxy,)
    ]
    resample = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC
    return draw_boxes(image.resize(size, resample), scaled)
