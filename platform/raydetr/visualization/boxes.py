"""Draw boxes on images, and image grids that compare ground-truth with predicted boxes.

Small images are enlarged first, so that captions are readable. A category has the same color everywhere. Ground-truth
boxes are dashed; predicted boxes are solid, with their score.
"""

from __future__ import annotations

import colorsys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom
Color = tuple[int, int, int]

MIN_SIDE = 320  # pixels of the long side; smaller images are enlarged to it
PANEL_SIDE = 480  # pixels of the long side of a grid's panel
MAX_OVERLAP = 0.05  # fraction of a caption that others may cover; if every place is worse, it is omitted
MANY_BOXES = 12  # boxes above which captions are smaller

_BLACK, _WHITE, _BACKGROUND, _FOREGROUND = (0, 0, 0), (255, 255, 255), (250, 250, 250), (30, 30, 30)
_GAP = 10


@dataclass(frozen=True)
class Box:
    """A box in pixels of its image. `score` is None for a ground-truth box."""

    category_id: int
    name: str
    xyxy: Rectangle
    score: float | None = None

    @property
    def caption(self) -> str:
        """Text drawn at the box."""
        name = _printable(self.name)
        return name if self.score is None else f"{name} {self.score:.2f}"


@dataclass(frozen=True)
class AnnotatedImage:
    """An image with its true and its predicted boxes."""

    title: str
    image: Image.Image
    true: tuple[Box, ...]
    predicted: tuple[Box, ...] = ()


def coco_boxes(
    records: Iterable[Mapping[str, Any]], names: Mapping[int, str], score_threshold: float = 0.0
) -> tuple[Box, ...]:
    """Convert COCO annotations or COCO results of one image to boxes, best first.

    Args:
        records: with `category_id`, `bbox` (xywh) and, for results, `score`.
        names: category_id -> name.
        score_threshold: results with a lower score are omitted.
    """
    boxes = []
    for record in records:
        left, top, width, height = record["bbox"]
        score = record.get("score")
        if score is None or score >= score_threshold:
            name = names.get(record["category_id"], f"category {record['category_id']}")
            crowd = " (crowd)" if record.get("iscrowd", 0) else ""
            rectangle = (left, top, left + width, top + height)
            boxes.append(Box(record["category_id"], name + crowd, rectangle, score))
    return tuple(sorted(boxes, key=lambda box: -(box.score or 0.0)))


def draw_boxes(image: Image.Image, boxes: Sequence[Box], long_side: int | None = None) -> Image.Image:
    """Return a copy of the image with boxes and captions, scaled to `long_side` pixels, or enlarged if it is small.

    Captions stay inside the image and do not overlap. They are placed in the order of `boxes`, best first; one that
    would cover others is omitted.
    """
    side = long_side or max(MIN_SIDE, *image.size)
    return _draw(_scaled(image, side), image.size, boxes)


def draw_grid(
    images: Sequence[AnnotatedImage], *, score_threshold: float, num_columns: int = 2
) -> Image.Image:
    """Draw an image grid that shows each image twice: ground-truth boxes at the left, predicted boxes at the right.

    Args:
        images: with their boxes.
        score_threshold: named in the heading only; see `coco_boxes`.
        num_columns: images per row.
    """
    heading = (
        "each image twice:  left, dashed: ground truth    "
        f"right, solid: predicted boxes with score ≥ {score_threshold:g}"
    )
    return _page(heading, [_cell(image) for image in images], num_columns)


def draw_contact_sheet(
    images: Sequence[AnnotatedImage], *, heading: str, num_columns: int = 4
) -> Image.Image:
    """Draw an image grid with ground-truth boxes."""
    cells = []
    for image in images:
        panel = _draw(_panel(image.image), image.image.size, image.true)
        cells.append(_stacked([_text_image(image.title, 13), panel], 2))
    return _page(heading, cells, num_columns)


def color_of(category_id: int) -> Color:
    """Return the color of a category: neighboring ids have very different hues, in three saturations."""
    hue = category_id * 0.61803398875 % 1.0
    saturation, value = ((0.85, 1.0), (0.55, 1.0), (1.0, 0.75))[category_id // 7 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


# --- Boxes and captions ---


def _draw(canvas: Image.Image, size: tuple[int, int], boxes: Sequence[Box]) -> Image.Image:
    """Draw boxes, given in pixels of an image of `size`, on its scaled copy `canvas`."""
    x_scale, y_scale = canvas.width / size[0], canvas.height / size[1]
    scaled = [
        _inside((x0 * x_scale, y0 * y_scale, x1 * x_scale, y1 * y_scale), canvas.size)
        for x0, y0, x1, y1 in (box.xyxy for box in boxes)
    ]
    draw = ImageDraw.Draw(canvas)
    thickness = max(2, round(max(canvas.size) / 240))
    for box, rectangle in reversed(list(zip(boxes, scaled, strict=True))):
        _outline(draw, rectangle, color_of(box.category_id), thickness, dashed=box.score is None)
    # Smaller captions leave more of a crowded image visible
    font = _font(max(11, round(max(canvas.size) / (36 if len(boxes) <= MANY_BOXES else 44))))
    taken: list[Rectangle] = []
    for box, rectangle in zip(boxes, scaled, strict=True):
        text = _shortened(box, font, canvas.width)
        place = _free_place(rectangle, _text_size(text, font), canvas.size, taken)
        if place is not None:
            taken.append(place)
            _draw_caption(draw, place, text, color_of(box.category_id), font)
    return canvas


def _outline(
    draw: ImageDraw.ImageDraw, rectangle: Rectangle, color: Color, thickness: int, *, dashed: bool
) -> None:
    left, top, right, bottom = rectangle
    # A dark line below keeps a box visible on a background of its own color
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_BLACK, width=thickness + 2)
    if not dashed:
        draw.rectangle(rectangle, outline=color, width=thickness)
        return
    dash, inset = 4 * thickness, thickness - 1
    for start in range(round(left), round(right), 2 * dash):
        end = min(start + dash, right)
        draw.rectangle((start, top, end, top + inset), fill=color)
        draw.rectangle((start, bottom - inset, end, bottom), fill=color)
    for start in range(round(top), round(bottom), 2 * dash):
        end = min(start + dash, bottom)
        draw.rectangle((left, start, left + inset, end), fill=color)
        draw.rectangle((right - inset, start, right, end), fill=color)


def _draw_caption(
    draw: ImageDraw.ImageDraw, place: Rectangle, text: str, color: Color, font: ImageFont.FreeTypeFont
) -> None:
    draw.rectangle(place, fill=color)
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    middle = ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
    draw.text(middle, text, fill=_BLACK if luminance > 120 else _WHITE, font=font, anchor="mm")


def _free_place(
    box: Rectangle, size: tuple[int, int], canvas: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle | None:
    """Return a place for a caption: at the box, inside the canvas, apart from the others; None if there is none."""
    left, top, right, bottom = box
    width, height = size
    corners = [
        (x, y)
        for y in (top - height, top, bottom - height, bottom, (top + bottom - height) / 2)
        for x in (left, right - width, (left + right - width) / 2)
    ]
    places = [_pushed_inside((x, y, x + width, y + height), canvas) for x, y in corners]
    covered = [sum(_overlap(place, other) for other in taken) / (width * height) for place in places]
    best = min(range(len(places)), key=covered.__getitem__)
    return places[best] if covered[best] <= MAX_OVERLAP else None


def _shortened(box: Box, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return the caption, with the class name truncated to `width`; the score is always complete."""
    text, name = box.caption, _printable(box.name)
    while _text_size(text, font)[0] > width and name:
        name = name[:-1]
        text = f"{name.rstrip()}… {'' if box.score is None else f'{box.score:.2f}'}".rstrip()
    return text


def _overlap(a: Rectangle, b: Rectangle) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _inside(box: Rectangle, canvas: tuple[int, int]) -> Rectangle:
    """Return the part of a box that the canvas shows; at least a point at its border."""
    x0, x1 = (min(max(x, 1.0), canvas[0] - 2.0) for x in (box[0], box[2]))
    y0, y1 = (min(max(y, 1.0), canvas[1] - 2.0) for y in (box[1], box[3]))
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _pushed_inside(place: Rectangle, canvas: tuple[int, int]) -> Rectangle:
    x = max(0.0, min(place[0], canvas[0] - 1 - (place[2] - place[0])))
    y = max(0.0, min(place[1], canvas[1] - 1 - (place[3] - place[1])))
    return x, y, x + place[2] - place[0], y + place[3] - place[1]


# --- Image grids ---


def _page(heading: str, cells: Sequence[Image.Image], num_columns: int) -> Image.Image:
    rows = [cells[start : start + num_columns] for start in range(0, len(cells), num_columns)]
    page = [_text_image(heading, 16), *(_beside(row, 2 * _GAP) for row in rows)]
    return _framed(_stacked(page, _GAP))


def _cell(image: AnnotatedImage) -> Image.Image:
    panels = [_draw(_panel(image.image), image.image.size, boxes) for boxes in (image.true, image.predicted)]
    title = f"{image.title}    {len(image.true)} true, {len(image.predicted)} predicted"
    return _stacked([_text_image(title, 13), _beside(panels, 4)], 2)


def _panel(image: Image.Image) -> Image.Image:
    return _scaled(image, min(max(MIN_SIDE, *image.size), PANEL_SIDE))


def _scaled(image: Image.Image, long_side: int) -> Image.Image:
    """Return a copy in RGB whose long side has `long_side` pixels."""
    scale = long_side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(
        size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    )


def _stacked(images: Sequence[Image.Image], gap: int) -> Image.Image:
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    page = Image.new("RGB", (max(image.width for image in images), height), _BACKGROUND)
    top = 0
    for image in images:
        page.paste(image, (0, top))
        top += image.height + gap
    return page


def _beside(images: Sequence[Image.Image], gap: int) -> Image.Image:
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    page = Image.new("RGB", (width, max(image.height for image in images)), _BACKGROUND)
    left = 0
    for image in images:
        page.paste(image, (left, 0))
        left += image.width + gap
    return page


def _framed(image: Image.Image) -> Image.Image:
    page = Image.new("RGB", (image.width + 2 * _GAP, image.height + 2 * _GAP), _BACKGROUND)
    page.paste(image, (_GAP, _GAP))
    return page


def _text_image(text: str, size: int) -> Image.Image:
    text, font = _printable(text), _font(size)
    page = Image.new("RGB", _text_size(text, font), _BACKGROUND)
    ImageDraw.Draw(page).text(
        (page.width / 2, page.height / 2), text, fill=_FOREGROUND, font=font, anchor="mm"
    )
    return page


def _text_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    ascent, descent = font.getmetrics()
    return round(font.getlength(text)) + 6, ascent + descent + 2


def _printable(text: str) -> str:
    """Replace line breaks and other control characters, for which Pillow's text layout raises an error."""
    unprintable = {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")}
    return "".join("\N{REPLACEMENT CHARACTER}" if letter in unprintable else letter for letter in text)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # This font of matplotlib covers most alphabets
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
