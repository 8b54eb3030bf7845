"""JSON members that others wrote, as COCO's records: three conventions are understood.

`coco`: {"image": {...}, "annotations": [...]}, as in our own shards. `objects`: a list of objects, each with its
box and label, under "annotations" or "objects". `arrays`: one list of boxes and one of labels, in the record or
under "objects".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from raydetr.shards.manifest import BoxFormat, RecordFormat
from raydetr.shards.validation import InvalidDataError

LISTS = ("annotations", "objects")
BOXES = ("bbox", "boxes", "bboxes")
LABELS = (
    "category_id", "category", "category_name", "category_ids", "categories",
    "label", "labels", "class", "classes", "class_id", "class_ids", "class_name", "name",
)  # fmt: skip
OWN = ("id", "image_id", "iscrowd", "area")  # of an object: taken over, or made

Record = dict[str, Any]
CategoryOf = Callable[[int | str], int]


def find_format(content: Any, box_format: BoxFormat | None) -> RecordFormat | None:
    """The convention that a record follows; None: it has no objects, so another one has to tell.

    Args:
        content: the parsed JSON.
        box_format: what the user says about the boxes.

    Raises:
        Fault: none is followed, or nobody said how the boxes are written.
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
        # a list of objects with `bbox` is what COCO has, and there it is x, y, width, height
        return RecordFormat(kind, name, boxes, labels, _box_format(box_format, boxes, default="xywh"), False)
    name = "objects" if isinstance(content.get("objects"), dict) else ""
    arrays = content[name] if name else content
    boxes, labels = _fields(arrays, name or "the record")
    if not arrays[boxes]:
        return None
    return RecordFormat("arrays", name, boxes, labels, _box_format(box_format, boxes, default=None), False)


def unpack(content: Any, form: RecordFormat) -> tuple[Record, list[Record]]:
    """The fields of the image, and for each object its `bbox` (x, y, width, height), `label` and other fields.

    Raises:
        Fault: the record does not follow the convention.
    """
    if not isinstance(content, dict):
        raise InvalidDataError(f"the record is a {type(content).__name__}, not an object")
    holder = content.get(form.objects) if form.objects else content
    if holder is None:
        raise InvalidDataError(f"the record has no {form.objects!r}; its fields are {_names(content)}")
    if form.kind == "coco":
        image = content.get("image")
        if not isinstance(image, dict):
            raise InvalidDataError(f"the record has no object 'image'; its fields are {_names(content)}")
    else:
        taken = (form.objects,) if form.objects else (form.boxes, form.labels, "area", "iscrowd")
        image = {name: value for name, value in content.items() if name not in taken}
    objects = _rows(holder, form) if form.kind == "arrays" else holder
    if not isinstance(objects, list):
        raise InvalidDataError(f"{form.objects} is {objects!r:.60}, not a list")
    return image, [_object(number, item, form) for number, item in enumerate(objects)]


def convert(
    content: Any,
    form: RecordFormat,
    *,
    key: str,
    image_id: int,
    size: tuple[int, int],
    first_id: int,
    category_of: CategoryOf,
) -> tuple[Record, list[Record]]:
    """COCO's records of an image and its annotations.

    Args:
        content: the parsed JSON.
        form: its convention.
        key: of the sample.
        image_id: that the index gives it.
        size: width and height in pixels.
        first_id: of its annotations, which are numbered from there; theirs stay if `form.own_ids`.
        category_of: the id of a label.

    Raises:
        Fault: the record does not follow the convention.
    """
    image, objects = unpack(content, form)
    record = {"file_name": key, **image, "id": image_id, "width": size[0], "height": size[1]}
    annotations = []
    for number, item in enumerate(objects):
        box, label = item["bbox"], item.pop("label")
        made = {"id": first_id + number} if not form.own_ids else {}
        own = {"image_id": image_id, "category_id": category_of(label)}
        annotations.append({"area": box[2] * box[3], "iscrowd": 0, **item, **own, **made})
    return record, annotations


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
            "say which with --boxes xywh or --boxes xyxy"
        )
    return given or default or "xywh"


def _rows(holder: Any, form: RecordFormat) -> list[Record]:
    """Arrays of boxes and labels, as objects."""
    if not isinstance(holder, dict):
        raise InvalidDataError(f"{form.objects} is {holder!r:.60}, not an object with lists")
    columns: dict[str, list[Any]] = {}
    for name in (form.boxes, form.labels, *OWN[2:]):
        values = holder.get(name)
        if values is None and name in OWN:
            continue
        if not isinstance(values, list):
            raise InvalidDataError(f"{name} is {values!r:.60}, not a list; the fields are {_names(holder)}")
        columns[name] = values
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidDataError(f"its lists have different lengths: {lengths}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _object(number: int, item: Any, form: RecordFormat) -> Record:
    if not isinstance(item, dict):
        raise InvalidDataError(f"object {number} is {item!r:.60}")
    label = item.get(form.labels)
    if not isinstance(label, int | str) or isinstance(label, bool):
        raise InvalidDataError(
            f"object {number}: {form.labels} is {label!r:.60}, neither a whole number nor a name"
        )
    others = {name: value for name, value in item.items() if name not in (form.boxes, form.labels)}
    return {**others, "bbox": _xywh(number, item.get(form.boxes), form), "label": label}


def _xywh(number: int, value: Any, form: RecordFormat) -> list[float]:
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        raise InvalidDataError(f"object {number}: {form.boxes} is {value!r:.60}, not four finite numbers")
    box: list[float] = value
    if form.box_format == "xyxy":
        box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    if box[2] < 0 or box[3] < 0:
        raise InvalidDataError(
            f"object {number}: {form.boxes}, read as {form.box_format}, has a negative size: {box}"
        )
    return box


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(record: Record) -> str:
    return ", ".join(sorted(map(repr, record))[:12]) or "none"
