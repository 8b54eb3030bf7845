"""Read COCO annotation files and validate them; an invalid file is rejected with a list of all its problems.

Datasets of other formats (`importers/`) become COCO's records too, and pass the same checks. docs/data/prepare.md lists
how training treats each kind of unusual annotation.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Record = dict[str, Any]

MAX_REPORTED = 10


class Problems:
    """Collects problems: counts all of them and keeps the first ten messages."""

    def __init__(self, source: object, kind: str) -> None:
        self.source, self.kind = source, kind
        self.count = 0
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Add one problem; `message` names the field, the value found and the remedy."""
        self.count += 1
        if self.count <= MAX_REPORTED:
            self.messages.append(message)

    def add_many(self, messages: list[str], count: int) -> None:
        """Add `count` problems, given the messages of the first ten of them (or all)."""
        self.messages += messages[: max(0, MAX_REPORTED - len(self.messages))]
        self.count += count

    def raise_if_any(self) -> None:
        """Raise a ValueError that lists the problems, if there are any."""
        if self.count:
            more = f"\n  and {self.count - MAX_REPORTED} more" if self.count > MAX_REPORTED else ""
            listing = "".join(f"\n  {message}" for message in self.messages)
            plural = "" if self.count == 1 else "s"
            raise ValueError(f"{self.source}: {self.count} {self.kind}{plural}{listing}{more}")


@dataclass(frozen=True)
class CocoDataset:
    """A validated annotation file. Records are the original dicts, untouched."""

    images: list[Record]
    annotations: dict[int, list[Record]]  # by image id, in file order; images without any are absent
    categories: list[Record]  # in the order of their ids
    header: Record  # `info` and `licenses`, if the file has them
    sha256: str
    notices: list[str] = field(default_factory=list)  # valid but worth knowing


def load_coco(path: Path) -> CocoDataset:
    """Read and validate a COCO instances file.

    Raises:
        ValueError: the file is missing, is not JSON, or violates COCO's format; the message counts all problems and
            lists the first ten with field, value and remedy.
    """
    data, sha256 = _read_json(path)
    return check_records(data, path, sha256)


def check_records(data: Record, source: object, sha256: str) -> CocoDataset:
    """Validate the content of a COCO instances file.

    Args:
        data: the parsed JSON.
        source: where it was read from, for messages.
        sha256: hash of the source.

    Raises:
        ValueError: as `load_coco`.
    """
    problems = Problems(source, "problem")
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            problems.add(f'"{key}" {_found(data, key)}: it must be a list (is this a COCO instances file?)')
    problems.raise_if_any()
    if not data["images"]:
        problems.add('"images" is an empty list: there is nothing to write')
    categories = _by_id(data["categories"], "categories", _check_category, problems)
    images = _by_id(data["images"], "images", _check_image, problems)
    annotations = _by_id(data["annotations"], "annotations", _check_annotation, problems)
    _check_names(categories.values(), problems)
    _check_references(annotations.values(), images, categories, problems)
    problems.raise_if_any()
    by_image: dict[int, list[Record]] = {}
    for annotation in annotations.values():
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    return CocoDataset(
        images=list(images.values()),
        annotations=by_image,
        categories=[categories[category_id] for category_id in sorted(categories)],
        header={key: data[key] for key in ("info", "licenses") if key in data},
        sha256=sha256,
        notices=_notices(images, by_image),
    )


def usable_boxes(
    annotations: list[Record], width: int, height: int
) -> tuple[npt.NDArray[np.float64], list[int]]:
    """Return the boxes that training uses: not crowds, clamped to the image, with a positive area.

    Source: the conversion of COCO annotations in the official DETR code.

    Args:
        annotations: the records of one image.
        width: image width in pixels.
        height: image height in pixels.

    Returns:
        boxes_xyxy [t, 4] in pixels and their category ids.
    """
    boxes, category_ids = [], []
    for annotation in annotations:  # faster than arrays for the few objects of an image
        x, y, w, h = annotation["bbox"]
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if x2 > x1 and y2 > y1 and not annotation.get("iscrowd", 0):
            boxes.append((x1, y1, x2, y2))
            category_ids.append(annotation["category_id"])
    return np.array(boxes, dtype=np.float64).reshape(-1, 4), category_ids


def _read_json(path: Path) -> tuple[Record, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): name a COCO annotation file") from None
    try:
        data = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}): name a COCO annotation file") from None
    if not isinstance(data, dict):
        raise ValueError(
            f"{path}: holds a {type(data).__name__}, not an object with images, annotations and categories"
        )
    return data, hashlib.sha256(content).hexdigest()


def _by_id(
    records: list[Any], section: str, check: Callable[[Record, str, Problems], None], problems: Problems
) -> dict[int, Record]:
    """Check each record of a section; return those with a valid id by id, in file order."""
    found: dict[int, Record] = {}
    for index, record in enumerate(records):
        where = f"{section}[{index}]"
        if not isinstance(record, dict):
            problems.add(f"{where} is {record!r:.60}: it must be an object")
        elif not _is_int(record.get("id")):
            problems.add(f"{where}: id {_found(record, 'id')}: it must be a whole number")
        elif record["id"] in found:
            problems.add(f"{where}: id {record['id']} is used before: give each of the {section} its own id")
        else:
            found[record["id"]] = record
            check(record, f"{where} (id {record['id']})", problems)
    return found


def _check_category(record: Record, where: str, problems: Problems) -> None:
    if not isinstance(record.get("name"), str):
        problems.add(f"{where}: name {_found(record, 'name')}: it must be text")
    if record["id"] < 0:
        problems.add(f"{where}: the id must not be negative: number the categories from 0 or 1")


def _check_image(record: Record, where: str, problems: Problems) -> None:
    if not isinstance(record.get("file_name"), str) or not record["file_name"]:
        problems.add(f"{where}: file_name {_found(record, 'file_name')}: it must be the path of the image")
    for key in ("width", "height"):
        if not _is_int(record.get(key)) or record[key] <= 0:
            problems.add(
                f"{where}: {key} {_found(record, key)}: it must be a positive whole number of pixels"
            )


def _check_annotation(record: Record, where: str, problems: Problems) -> None:
    for key in ("image_id", "category_id"):
        if not _is_int(record.get(key)):
            problems.add(f"{where}: {key} {_found(record, key)}: it must be a whole number")
    if record.get("iscrowd", 0) not in (0, 1):
        problems.add(f"{where}: iscrowd {_found(record, 'iscrowd')}: it must be 0 or 1")
    if not _is_number(record.get("area")) or record["area"] < 0:
        problems.add(
            f"{where}: area {_found(record, 'area')}: COCO AP needs the area of the object's mask "
            "(without masks: the width times the height of the box)"
        )
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        problems.add(
            f"{where}: bbox {_found(record, 'bbox')}: it must be [x, y, width, height], four finite numbers"
        )
    elif box[2] < 0 or box[3] < 0:
        problems.add(
            f"{where}: bbox is {box}: width and height must not be negative (is it [x1, y1, x2, y2]?)"
        )


def _check_names(categories: Iterable[Record], problems: Problems) -> None:
    counts = Counter(category["name"] for category in categories if isinstance(category.get("name"), str))
    for name, count in counts.items():
        if count > 1:
            problems.add(f"categories: {count} are named {name!r}: give each category its own name")


def _check_references(
    annotations: Iterable[Record],
    images: dict[int, Record],
    categories: dict[int, Record],
    problems: Problems,
) -> None:
    for annotation in annotations:
        for key, known, section in (
            ("image_id", images, "images"),
            ("category_id", categories, "categories"),
        ):
            value = annotation.get(key)
            if _is_int(value) and value not in known:
                problems.add(
                    f"annotations (id {annotation['id']}): {key} {value} is not in {section}: add it there, "
                    "or remove the annotation"
                )


def _notices(images: dict[int, Record], annotations: dict[int, list[Record]]) -> list[str]:
    """Describe valid but unusual annotations that affect training or evaluation."""
    crowd, without_area, clamped, zero_id = [], [], [], []
    for image_id, records in annotations.items():
        width, height = images[image_id]["width"], images[image_id]["height"]
        for record in records:
            x, y, w, h = record["bbox"]
            inside_w, inside_h = min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)
            if record["id"] == 0:
                zero_id.append(record["id"])
            if record.get("iscrowd", 0):
                crowd.append(record["id"])
            elif inside_w <= 0 or inside_h <= 0:
                without_area.append(record["id"])
            elif inside_w < w - 0.5 or inside_h < h - 0.5:  # COCO's own boxes exceed the image by rounding
                clamped.append(record["id"])
    empty = [image_id for image_id in images if image_id not in annotations]
    lines = (
        (empty, "images without annotations: kept, training sees them as background", "images"),
        (crowd, "crowd annotations: not trained on, ignored regions in evaluation", "annotations"),
        (without_area, "boxes without any area inside their image: not trained on", "annotations"),
        (clamped, "boxes that reach out of their image: clamped in training", "annotations"),
        (
            zero_id,
            "annotation with id 0, which pycocotools takes for `no match`: number from 1",
            "annotations",
        ),
    )
    return [f"{len(ids)} {text} ({name} {_first(ids)})" for ids, text, name in lines if ids]


def _first(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")


def _found(record: Record, key: str) -> str:
    return f"is {record[key]!r:.60}" if key in record else "is missing"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Source:
    """A validated data set on disk."""

    dataset: CocoDataset
    images: Path  # folder that the records' file names are relative to
    name: str  # name of the annotation source, for the manifest


def coco_source(images: Path, annotations: Path) -> Source:
    """Read a COCO data set from an instances JSON and the folder of its images.

    Raises:
        ValueError: the folder is missing, or the annotations are invalid.
    """
    if not images.is_dir():
        raise ValueError(f"{images}: there is no such folder of images")
    return Source(load_coco(annotations), images, annotations.name)
