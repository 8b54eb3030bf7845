"""The label files of YOLO data sets: a line for each object, in parts of the image's size."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from raydetr.shards.coco import Problems, Record

BOX_NUMBERS = 5
MIN_OUTLINE_NUMBERS = 7  # the class and three points
SLACK = 0.01  # of the size; further outside, the numbers are not in parts of it


@dataclass
class Labels:
    """The objects of all images, as they are read."""

    problems: Problems
    num_classes: int
    annotations: list[Record] = field(default_factory=list)
    num_mixed: int = 0  # files with boxes and outlines

    def add(self, file: Path, text: str, image_id: int, width: int, height: int) -> None:
        """Add the objects of one image, `width` x `height` pixels, from the text of its label file."""
        lengths = set()
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words:
                continue
            where = f"{file}, line {number}"
            lengths.add(len(words) == BOX_NUMBERS)
            try:
                category_id, values = _parse_line(words, self.num_classes)
            except ValueError as error:
                self.problems.add(f"{where}: {error}")
                continue
            geometry = _box(values, width, height) if len(values) == 4 else _outline(values, width, height)
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    **geometry,
                    "iscrowd": 0,
                }
            )
        self.num_mixed += len(lengths) == 2


def _parse_line(words: list[str], num_classes: int) -> tuple[int, list[float]]:
    if len(words) != BOX_NUMBERS and (len(words) < MIN_OUTLINE_NUMBERS or len(words) % 2 == 0):
        raise ValueError(
            f"holds {len(words)} numbers: there must be 5 (class cx cy w h), or the class and three or more points"
        )
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{' '.join(words)!r:.60} holds something that is no number: correct it") from None
    if not values[0].is_integer() or not 0 <= values[0] < num_classes:
        raise ValueError(f"the class is {words[0]}: it must be a whole number from 0 to {num_classes - 1}")
    for value in values[1:]:
        if not -SLACK <= value <= 1 + SLACK:  # NaN too
            raise ValueError(
                f"{value:g} is not between 0 and 1: positions and sizes are in parts of the image's width and height"
            )
    if len(words) == BOX_NUMBERS and min(values[3:]) < 0:
        raise ValueError(f"the box is {words[3]} wide and {words[4]} high: neither must be negative")
    return int(values[0]), values[1:]


def _box(values: list[float], width: int, height: int) -> Record:
    cx, cy, w, h = values
    box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
    return {"bbox": box, "area": box[2] * box[3]}


def _outline(values: list[float], width: int, height: int) -> Record:
    xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
    following = [*range(1, len(xs)), 0]
    double_area = sum(xs[i] * ys[j] - xs[j] * ys[i] for i, j in enumerate(following))
    return {
        "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
        "area": abs(double_area) / 2,
        "segmentation": [[value for point in zip(xs, ys, strict=True) for value in point]],
    }
