"""Read the images of a report, with the boxes to draw on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from raydetr.console import counted
from raydetr.evaluation.analysis import Report
from raydetr.evaluation.mistakes import Mistake
from raydetr.shards.images import ImageError, ReadImage, decode_image
from raydetr.visualization.boxes import Box, Rectangle, coco_boxes, draw_boxes
from raydetr.visualization.page import jpeg_url

IMAGE_SIDE = 360  # pixels of the long side, in the page
CROP_FACTOR = 2.0  # sides of a crop, by those of the boxes it is about
MIN_CROP = 96  # pixels
MIN_ASPECT = 0.7  # of a crop: shorter by longer side, where the image is large enough
MAX_CAPTION = 64  # letters of `short_caption`


def from_encoded(read: Callable[[int], bytes]) -> ReadImage:
    """Return a function that reads an image by its id, from its encoded form that `read` returns."""

    def decoded(image_id: int) -> Image.Image | None:
        try:
            return decode_image(read(image_id))
        except (ImageError, OSError):  # the report must not end for a picture
            return None

    return decoded


@dataclass(frozen=True)
class ImageWithCaption:
    """An image with boxes, and its caption; the image is None where it cannot be read."""

    title: str
    text: str
    image: Image.Image | None
    boxes: tuple[Box, ...]

    @property
    def short_caption(self) -> str:
        """One line."""
        text = f"{self.title}   {self.text}"
        return text if len(text) <= MAX_CAPTION else text[: MAX_CAPTION - 1] + "…"

    def for_page(self) -> dict[str, str | None]:
        """Return title, text and the source of an `img`, None without an image."""
        drawn = None if self.image is None else draw_boxes(self.image, self.boxes, IMAGE_SIDE)
        return {"title": self.title, "text": self.text, "source": None if drawn is None else jpeg_url(drawn)}


def mistake_images(report: Report, read_image: ReadImage) -> Iterator[ImageWithCaption]:
    """Yield the parts of images around the most confident mistakes."""
    files = _files(report)
    for mistake in report.mistakes:
        image, boxes = read_image(mistake.image_id), _mistake_boxes(report, mistake)
        if image is not None:
            image, boxes = _cropped(image, boxes, mistake)
        yield ImageWithCaption(
            f"{report.names[mistake.category_id]} {mistake.score:.2f}",
            f"{_explained(mistake, report.names)}; {files[mistake.image_id]}",
            image,
            boxes,
        )


def _explained(mistake: Mistake, names: Mapping[int, str]) -> str:
    name = names.get(mistake.object_category_id) if mistake.object_category_id is not None else None
    texts = {
        "classification": f"the object is: {name} (IoU {mistake.iou:.2f})",
        "localization": f"the IoU with the object is {mistake.iou:.2f}",
        "both": f"IoU {mistake.iou:.2f} with an object that is: {name}",
        "duplicate": f"another detection matches the object (IoU {mistake.iou:.2f})",
        "background": "no object here",
    }
    return f"{mistake.error}: {texts[mistake.error]}"


def _mistake_boxes(report: Report, mistake: Mistake) -> tuple[Box, ...]:
    """Return the box of a mistake, and the objects that it overlaps: in a crowd of objects, no box could be seen."""
    left, top, width, height = mistake.box_xywh
    own = Box(
        mistake.category_id,
        report.names[mistake.category_id],
        (left, top, left + width, top + height),
        mistake.score,
    )
    return own, *(box for box in _objects(report, mistake.image_id) if _overlap(box.xyxy, own.xyxy))


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _objects(report: Report, image_id: int) -> tuple[Box, ...]:
    own = [a for a in report.ground_truth["annotations"] if a["image_id"] == image_id]
    return coco_boxes(own, report.names)


def _cropped(
    image: Image.Image, boxes: tuple[Box, ...], mistake: Mistake
) -> tuple[Image.Image, tuple[Box, ...]]:
    """Return the part of an image around a mistake and the object it is about, and the boxes in its pixels."""
    about = np.array([mistake.box_xywh, *([mistake.object_box_xywh] if mistake.object_box_xywh else [])])
    starts, stops = about[:, :2].min(0), (about[:, :2] + about[:, 2:]).max(0)
    sides = np.maximum(CROP_FACTOR * (stops - starts), MIN_CROP)
    sides = np.maximum(sides, MIN_ASPECT * sides.max())
    edges = []
    for middle, side, limit in zip((starts + stops) / 2, sides, image.size, strict=True):
        low = int(min(max(middle - side / 2, 0), max(limit - side, 0)))
        edges.append((low, min(limit, max(low + 1, int(np.ceil(low + side))))))
    (x0, x1), (y0, y1) = edges
    moved = []
    for box in boxes:
        left, top, right, bottom = box.xyxy
        moved.append(replace(box, xyxy=(left - x0, top - y0, right - x0, bottom - y0)))
    return image.crop((x0, y0, x1, y1)), tuple(moved)


def loss_images(report: Report, read_image: ReadImage) -> Iterator[ImageWithCaption]:
    """Yield the images with the largest losses."""
    files = _files(report)
    for image_id, loss in report.losses:
        found = coco_boxes(report.results.of_image(image_id).to_coco(), report.names, report.min_score)
        objects = _objects(report, image_id)
        text = f"{files[image_id]}; {counted(len(objects), 'object')}, {counted(len(found), 'detection')}"
        yield ImageWithCaption(f"loss {loss:.3g}", text, read_image(image_id), (*found, *objects))


def _files(report: Report) -> dict[int, str]:
    return {
        image["id"]: str(image.get("file_name", f"image {image['id']}"))
        for image in report.ground_truth["images"]
    }
