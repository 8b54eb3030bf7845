"""Read the JSON records of other programs as COCO's objects; three formats are known.

`coco`: {"image": {...}, "annotations": [...]}, as in our own shards. `objects`: a list of objects, each with its box
and label, under "annotations" or "objects". `arrays`: one list of boxes and one of labels, in the record or under
"objects".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from raydetr.shards.coco import Record, is_coordinate
from raydetr.shards.validation import InvalidDataError

BoxFormat = Literal["xywh", "xyxy"]  # x, y, width, height, or both corners, in pixels

LISTS = ("annotations", "objects")
BOXES = ("bbox", "boxes", "bboxes")
LABELS = (
    "category_id", "category", "category_name", "category_ids", "categories",
    "label", "labels", "class", "classes", "class_id", "class_ids", "class_name", "name",
)  # fmt: skip
OPTIONAL_ARRAYS = ("iscrowd", "area")  # lists next to those of boxes and labels


@dataclass(frozen=True)
class RecordFormat:
    """How the records describe objects."""

    kind: Literal["coco", "objects", "arrays"]
    objects: str  # field of the record with the objects; empty: the record itself
    boxes: str  # field with the box of an object, or with all boxes
    labels: str  # field with the category (id or name) of an object, or with those of all boxes
    box_format: BoxFormat


def find_format(content: Any, box_format: BoxFormat | None) -> RecordFormat | None:
    """Detect the format of a record; None if it has no objects, so that another record must be tried.

    Args:
        content: the parsed JSON.
        box_format: format of the boxes, if the user specified it.

    Raises:
        InvalidDataError: the format is unknown, or that of the boxes is ambiguous.
    """
    if not isinstance(content, dict):
        raise InvalidDataError(
            f"the record is a {type(content).__name__}, not an object with boxes and labels"
        )
    name = next((name for name in LISTS if isinstance(content.get(name), list)), None)
    if name is not None:
        objects = content[name]
        if not objects:
            return None
        is_coco = name == "annotations" and isinstance(content.get("image"), dict)
        kind: Literal["coco", "objects"] = "coco" if is_coco else "objects"
        first = objects[0]
        if not isinstance(first, dict):
            raise InvalidDataError(f"{name}[0] is {first!r:.60}, not an object with a box and a label")
        boxes, labels = _fields(first, f"{name}[0]")
        # A list of objects with `bbox` is COCO's convention, where it is x, y, width, height.
        return RecordFormat(kind, name, boxes, labels, _box_format(box_format, boxes, default="xywh"))
    name = "objects" if isinstance(content.get("objects"), dict) else ""
    arrays = content[name] if name else content
    boxes, labels = _fields(arrays, name or "the record")
    if not arrays[boxes]:
        return None
    return RecordFormat("arrays", name, boxes, labels, _box_format(box_format, boxes, default=None))


def unpack(content: Any, record_format: RecordFormat) -> tuple[Record, list[Record]]:
    """Return the fields of the image, and per object its `bbox` (x, y, width, height), `label` and other fields.

    Raises:
        InvalidDataError: the record does not follow the format.
    """
    if not isinstance(content, dict):
        raise InvalidDataError(f"the record is a {type(content).__name__}, not an object")
    holder = content.get(record_format.objects) if record_format.objects else content
    if holder is None:
        raise InvalidDataError(
            f"the record has no {record_format.objects!r}; its fields are {_names(content)}"
        )
    if record_format.kind == "coco":
        image = content.get("image")
        if not isinstance(image, dict):
            raise InvalidDataError(f"the record has no object 'image'; its fields are {_names(content)}")
    else:
        taken = (
            (record_format.objects,)
            if record_format.objects
            else (record_format.boxes, record_format.labels, "area", "iscrowd")
        )
        image = {name: value for name, value in content.items() if name not in taken}
    objects = _rows(holder, record_format) if record_format.kind == "arrays" else holder
    if not isinstance(objects, list):
        raise InvalidDataError(f"{record_format.objects} is {objects!r:.60}, not a list")
    return image, [_object(number, item, record_format) for number, item in enumerate(objects)]


def _fields(holder: Record, where: str) -> tuple[str, str]:
    boxes = next((name for name in BOXES if name in holder), None)
    labels = next((name for name in LABELS if name in holder and name != boxes), None)
    if boxes is None or labels is None:
        raise InvalidDataError(
            f"{where} has no {'boxes' if boxes is None else 'labels'}; its fields are {_names(holder)}, and known are "
            f"{', '.join(BOXES if boxes is None else LABELS)}"
        )
    return boxes, labels


def _box_format(given: BoxFormat | None, boxes: str, default: BoxFormat | None) -> BoxFormat:
    if given is None and (default is None or boxes != "bbox"):
        raise InvalidDataError(
            f"the boxes are in {boxes!r}, and may be [x, y, width, height] or [x1, y1, x2, y2]: "
            "specify --boxes xywh or --boxes xyxy"
        )
    return given or default or "xywh"


def _rows(holder: Any, record_format: RecordFormat) -> list[Record]:
    """Convert lists of boxes and labels to a list of objects."""
    if not isinstance(holder, dict):
        raise InvalidDataError(f"{record_format.objects} is {holder!r:.60}, not an object with lists")
    columns: dict[str, list[Any]] = {}
    for name in (record_format.boxes, record_format.labels, *OPTIONAL_ARRAYS):
        values = holder.get(name)
        if values is None and name in OPTIONAL_ARRAYS:
            continue
        if not isinstance(values, list):
            raise InvalidDataError(f"{name} is {values!r:.60}, not a list; the fields are {_names(holder)}")
        columns[name] = values
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidDataError(f"its lists have different lengths: {lengths}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _object(number: int, item: Any, record_format: RecordFormat) -> Record:
    if not isinstance(item, dict):
        raise InvalidDataError(f"object {number} is {item!r:.60}")
    label = item.get(record_format.labels)
    if not isinstance(label, int | str) or isinstance(label, bool):
        raise InvalidDataError(
            f"object {number}: {record_format.labels} is {label!r:.60}, neither a whole number nor a name"
        )
    others = {
        name: value for name, value in item.items() if name not in (record_format.boxes, record_format.labels)
    }
    return {**others, "bbox": _xywh(number, item.get(record_format.boxes), record_format), "label": label}


def _xywh(number: int, value: Any, record_format: RecordFormat) -> list[float]:
    if not isinstance(value, list) or len(value) != 4 or not all(map(is_coordinate, value)):
        raise InvalidDataError(
            f"object {number}: {record_format.boxes} is {value!r:.60}, not four numbers of pixels"
        )
    box: list[float] = value
    if record_format.box_format == "xyxy":
        box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    if box[2] < 0 or box[3] < 0:
        raise InvalidDataError(
            f"object {number}: {record_format.boxes}, read as {record_format.box_format}, has a negative size: {box}"
        )
    return box


def _names(record: Record) -> str:
    return ", ".join(sorted(map(repr, record))[:12]) or "none"
