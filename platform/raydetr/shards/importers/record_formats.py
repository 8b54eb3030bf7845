"""Read the JSON records of other programs as COCO's objects; three formats are known.

`coco`: {"image": {...}, "annotations": [...]}, as in our own shards. `objects`: a list of objects, each with its box
and label, under "annotations" or "objects". `arrays`: one list of boxes and one of labels, in the record or under
"objects".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raydetr.shards.coco import Record, is_box
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
    kind: Literal["coco", "objects", "arrays"] = "arrays"
    name = next((name for name in LISTS if isinstance(content.get(name), list)), None)
    if name is None:
        name = "objects" if isinstance(content.get("objects"), dict) else ""
        where, first = name or "the record", content[name] if name else content
    elif not content[name]:
        return None
    else:
        kind = "coco" if name == "annotations" and isinstance(content.get("image"), dict) else "objects"
        where, first = f"{name}[0]", content[name][0]
    if not isinstance(first, dict):
        raise InvalidDataError(f"{where} is {first!r:.60}, not an object with a box and a label")
    boxes = _known_field(first, BOXES, where, "boxes")
    labels = _known_field(first, [label for label in LABELS if label != boxes], where, "labels")
    if kind == "arrays" and not first[boxes]:
        return None
    # A list of objects with `bbox` is COCO's convention, where it is x, y, width, height
    if box_format is None and (kind == "arrays" or boxes != "bbox"):
        raise InvalidDataError(
            f"the boxes are in {boxes!r}, and may be [x, y, width, height] or [x1, y1, x2, y2]: "
            "specify --boxes xywh or --boxes xyxy"
        )
    return RecordFormat(kind, name, boxes, labels, box_format or "xywh")


def unpack(content: Any, record_format: RecordFormat) -> tuple[Record, list[Record]]:
    """Return the fields of the image, and per object its `bbox` (x, y, width, height), `label` and other fields.

    Raises:
        InvalidDataError: the record does not follow the format.
    """
    if not isinstance(content, dict):
        raise InvalidDataError(f"the record is a {type(content).__name__}, not an object")
    name = record_format.objects
    needed = [name] if name else []
    taken = needed or [record_format.boxes, record_format.labels, *OPTIONAL_ARRAYS]
    image: Any = {field: value for field, value in content.items() if field not in taken}
    if record_format.kind == "coco":
        needed.append("image")
        image = content.get("image")
    for field in needed:
        if content.get(field) is None:
            raise InvalidDataError(f"the record has no {field!r}; its fields are {_names(content)}")
    if not isinstance(image, dict):
        raise InvalidDataError(f"image is {image!r:.60}, not an object")
    objects = content[name] if name else content
    if record_format.kind == "arrays":
        objects = _rows(objects, record_format)
    if not isinstance(objects, list):
        raise InvalidDataError(f"{name} is {objects!r:.60}, not a list")
    return image, [_object(f"object {number}", item, record_format) for number, item in enumerate(objects)]


def _known_field(holder: Record, known: Sequence[str], where: str, what: str) -> str:
    for name in known:
        if name in holder:
            return name
    raise InvalidDataError(
        f"{where} has no {what}; its fields are {_names(holder)}, and known are {', '.join(known)}"
    )


def _rows(holder: Any, record_format: RecordFormat) -> list[Record]:
    """Convert lists of boxes and labels to a list of objects."""
    if not isinstance(holder, dict):
        raise InvalidDataError(f"{record_format.objects} is {holder!r:.60}, not an object with lists")
    optional = [name for name in OPTIONAL_ARRAYS if holder.get(name) is not None]
    columns: dict[str, Any] = {
        name: holder.get(name) for name in (record_format.boxes, record_format.labels, *optional)
    }
    for name, values in columns.items():
        if not isinstance(values, list):
            raise InvalidDataError(f"{name} is {values!r:.60}, not a list; the fields are {_names(holder)}")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidDataError(f"its lists have different lengths: {lengths}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _object(where: str, item: Any, record_format: RecordFormat) -> Record:
    if not isinstance(item, dict):
        raise InvalidDataError(f"{where} is {item!r:.60}")
    fields = dict(item)
    label, box = fields.pop(record_format.labels, None), fields.pop(record_format.boxes, None)
    if type(label) not in (int, str):
        raise InvalidDataError(
            f"{where}: {record_format.labels} is {label!r:.60}, neither a whole number nor a name"
        )
    if not is_box(box):
        raise InvalidDataError(f"{where}: {record_format.boxes} is {box!r:.60}, not four numbers of pixels")
    if record_format.box_format == "xyxy":
        box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    if box[2] < 0 or box[3] < 0:
        raise InvalidDataError(
            f"{where}: {record_format.boxes}, read as {record_format.box_format}, has a negative size: {box}"
        )
    return {**fields, "bbox": box, "label": label}


def _names(record: Record) -> str:
    return ", ".join(sorted(map(repr, record))[:12]) or "none"
