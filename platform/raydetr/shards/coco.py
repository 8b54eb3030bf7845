"""Read COCO annotation files and validate them; an invalid file is rejected with a list of all its problems.

Datasets of other formats (`importers/`) become COCO's records too, and pass the same checks. docs/data/prepare.md lists
how training treats each kind of unusual annotation.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raydetr.user_files import parse_json, read_file

Record = dict[str, Any]

MAX_REPORTED = 10
SUSPICIOUS_SHARE = 0.2  # of boxes that reach out of their image; of COCO's own, hardly any do
MAX_COORDINATE = 2**31  # pixels; sums of two stay exact in float64


class Problems:
    """Collects problems: counts all of them and keeps the first messages."""

    def __init__(self, source: object, kind: str, *, limit: int = MAX_REPORTED) -> None:
        self.source, self.kind, self.limit = source, kind, limit
        self.count = 0
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Add one problem; `message` names the field, the value found and the remedy."""
        self.count += 1
        if self.count <= self.limit:
            self.messages.append(message)

    def add_all(self, part: Problems) -> None:
        """Add the problems of a part of the source; its name comes before each message."""
        self.count += part.count
        self.messages += [f"{part.source}: {message}" for message in part.messages]
        del self.messages[self.limit :]

    @contextmanager
    def collect(self, where: object) -> Iterator[None]:
        """Add the error that ends the block, if one does, and go on; `where` comes before its message."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.add(f"{where}: {error}")

    def raise_if_any(self, remedy: str = "") -> None:
        """Raise a ValueError that lists the problems, if there are any; `remedy` is a last line, for all of them."""
        if self.count:
            more = f"and {self.count - self.limit} more" if self.count > self.limit else ""
            plural = "" if self.count == 1 else "s"
            first = f"{self.source}: {self.count} {self.kind}{plural}"
            raise ValueError("\n  ".join(filter(None, [first, *self.messages, more, remedy])))


@dataclass(frozen=True)
class CocoDataset:
    """A validated annotation file. Records are the original dicts; spaces around class names are removed."""

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
    data, content = read_document(path, parse_json, "JSON", "a COCO annotation file")
    if not isinstance(data, dict):
        raise ValueError(
            f"{path}: holds a {type(data).__name__}, not an object with images, annotations and categories"
        )
    return check_records(data, path, hashlib.sha256(content).hexdigest())


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
    for key, remedy in (("images", "there is nothing to write"), ("categories", "name the classes")):
        if not data[key]:
            problems.add(f'"{key}" is an empty list: {remedy}')
    categories = checked_categories(data["categories"], problems)
    images = _by_id(data["images"], "images", IMAGE, problems)
    annotations = _by_id(data["annotations"], "annotations", ANNOTATION, problems)
    valid = list(annotations.values())
    if problems.count:
        valid = [annotation for annotation in valid if not annotation_problems(annotation)]
    names, notices = _clean_names(categories.values())
    _check_names(names, valid, problems)
    _check_pixels(valid, problems)
    _check_references(annotations.values(), "image_id", images, "images", problems)
    _check_references(annotations.values(), "category_id", categories, "categories", problems)
    problems.raise_if_any()
    by_image: dict[int, list[Record]] = {}
    for annotation in annotations.values():
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    return CocoDataset(
        images=list(images.values()),
        annotations=by_image,
        categories=[{**categories[number], "name": names[number]} for number in sorted(categories)],
        header={key: data[key] for key in ("info", "licenses") if key in data},
        sha256=sha256,
        notices=notices + _notices(images, by_image),
    )


def read_categories(path: Path) -> list[Record]:
    """Read COCO's category records from a file, sorted by id.

    Args:
        path: a COCO file, a JSON list of {"id", "name"}, or a JSON list of names, numbered from 0.

    Raises:
        ValueError: it holds no categories.
    """
    data, _ = read_document(path, parse_json, "JSON", "a JSON file of categories")
    records: Any = data.get("categories") if isinstance(data, dict) else data
    if isinstance(records, list) and all(isinstance(name, str) for name in records):
        records = [{"id": number, "name": name} for number, name in enumerate(records)]
    problems = Problems(path, "problem")
    found = checked_categories(records, problems) if isinstance(records, list) else {}
    names = {record["name"] for record in found.values() if not problems.count}
    if not found or len(names) < len(found):
        raise ValueError(
            f"{path}: holds no categories: a COCO file, a list of objects with id and name (each used once), or a "
            "list of names is needed"
        )
    return [found[number] for number in sorted(found)]


def checked_categories(records: list[Any], problems: Problems) -> dict[int, Record]:
    """Check COCO's category records; return those with a valid id by id, in their order."""
    return _by_id(records, "categories", CATEGORY, problems)


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


def read_document(path: Path, parse: Callable[[bytes], Any], kind: str, wanted: str) -> tuple[Any, bytes]:
    """Return the parsed content of a file, JSON or YAML, and its bytes; the user should have named a `wanted`.

    Raises:
        ValueError: it cannot be read, or is not of this kind.
    """
    try:
        content = read_file(path)
        return parse(content), content
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): name {wanted}") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not {kind} ({error}): name {wanted}") from None


def _by_id(
    records: list[Any], section: str, checks: Sequence[Check], problems: Problems
) -> dict[int, Record]:
    """Check each record of a section; return those with a valid id by id, in file order."""
    found: dict[int, Record] = {}
    for index, record in enumerate(records):
        where = f"{section}[{index}]"
        if not isinstance(record, dict):
            problems.add(f"{where} is {record!r:.60}: it must be an object")
        elif not _is_int(record.get("id")):
            problems.add(f"{where}: id {_found(record, 'id')}: {WHOLE}")
        elif record["id"] in found:
            problems.add(f"{where}: id {record['id']} is used before: give each of the {section} its own id")
        else:
            found[record["id"]] = record
            for problem in _record_problems(record, checks):
                problems.add(f"{where} (id {record['id']}): {problem}")
    return found


def _record_problems(record: Record, checks: Sequence[Check]) -> list[str]:
    return [
        f"{key} {_found(record, key)}: {remedy}"
        for key, is_valid, remedy in checks
        if not is_valid(record.get(key, DEFAULTS.get(key)))
    ]


def annotation_problems(record: Record) -> list[str]:
    """Describe what is wrong with COCO's record of an object: each field, the value found and the remedy.

    The writer and the reader of shards both use this, so that one accepts what the other does.
    """
    return _record_problems(record, ANNOTATION)


def _clean_names(categories: Iterable[Record]) -> tuple[dict[int, str], list[str]]:
    """Return the names by category id, without spaces and line breaks around them, and a notice about those."""
    names = {record["id"]: record["name"] for record in categories if isinstance(record.get("name"), str)}
    spaced = [name for name in names.values() if name != name.strip()]
    notices = [f"spaces around {len(spaced)} class names are removed ({spaced[0]!r:.60})"] if spaced else []
    return {number: name.strip() for number, name in names.items()}, notices


def _check_names(names: dict[int, str], annotations: list[Record], problems: Problems) -> None:
    counts = Counter(names.values())
    if len(counts) == len(names):
        return
    used = Counter(annotation["category_id"] for annotation in annotations)
    for name in (name for name, count in counts.items() if count > 1):
        ids = [number for number, other in names.items() if other == name]
        found = ", ".join(f"{number} ({used[number] or 'no'} annotations)" for number in ids)
        problems.add(
            f"categories: several are named {name!r:.60}, with the ids {found}: give each its own name, or remove "
            "one that has no annotations"
        )


def _check_pixels(annotations: list[Record], problems: Problems) -> None:
    boxes = [annotation["bbox"] for annotation in annotations]
    if boxes and 0 < max(max(x + w, y + h) for x, y, w, h in boxes) <= 1:
        problems.add(
            "annotations: no box reaches beyond the first pixel: boxes must be in pixels, not normalized to the image"
        )


def _check_references(
    annotations: Iterable[Record], key: str, known: dict[int, Record], section: str, problems: Problems
) -> None:
    for annotation in annotations:
        value = annotation.get(key)
        if _is_int(value) and value not in known:
            problems.add(
                f"annotations (id {annotation['id']}): {key} {value} is not in {section}: add it there, "
                "or remove the annotation"
            )


UNUSUAL = {
    "crowd": "crowd annotations: not trained on, ignored regions in evaluation",
    "outside": "boxes without any area inside their image: not trained on",
    "clamped": "boxes that reach out of their image: clamped in training",
    "zero id": "annotation with id 0, which pycocotools takes for `no match`: number from 1",
    "ignore": 'annotations with "ignore": 1: objects like all others, as in pycocotools; crowds have "iscrowd": 1',
    "area": "areas that are 0, above the box's, or under 1% of it: AP by size (APs, APm, APl) means nothing for them; "
    "without masks, the area is the width times the height of the box",
}


def unusual_kinds(record: Record, width: int, height: int) -> Iterator[str]:
    """Yield the keys of `UNUSUAL` that apply to an object in an image of this size, in pixels."""
    x, y, w, h = record["bbox"]
    inside_w, inside_h = min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)
    if record["id"] == 0:
        yield "zero id"
    if record.get("ignore", 0) not in (0, None):
        yield "ignore"
    if record.get("iscrowd", 0):
        yield "crowd"
        return
    if inside_w <= 0 or inside_h <= 0:
        yield "outside"
    elif inside_w < w - 0.5 or inside_h < h - 0.5:  # COCO's own boxes exceed the image by rounding
        yield "clamped"
    if is_wrong_area(record["area"], w, h):
        yield "area"


def _notices(images: dict[int, Record], annotations: dict[int, list[Record]]) -> list[str]:
    """Describe valid but unusual annotations that affect training or evaluation."""
    found: dict[str, list[int]] = {kind: [] for kind in UNUSUAL}
    for image_id, records in annotations.items():
        for record in records:
            for kind in unusual_kinds(record, images[image_id]["width"], images[image_id]["height"]):
                found[kind].append(record["id"])
    empty = [image_id for image_id in images if image_id not in annotations]
    lines = [f"{len(ids)} {UNUSUAL[kind]} (annotations {listed(ids)})" for kind, ids in found.items() if ids]
    if empty:
        text = "images without annotations: kept, training sees them as background"
        lines.insert(0, f"{len(empty)} {text} (images {listed(empty)})")
    num_clamped, num_objects = len(found["clamped"]), sum(map(len, annotations.values()))
    if num_clamped > SUSPICIOUS_SHARE * num_objects:
        lines.append(
            f"{num_clamped} of {num_objects} boxes reach out of their image, as boxes [x1, y1, x2, y2] do when they "
            "are read as [x, y, width, height]: check one of them"
        )
    return lines + _repeated_files(images.values())


def is_wrong_area(area: float, width: float, height: float) -> bool:
    """Return whether an area cannot be that of a mask in a box of this width and height, in pixels."""
    # Masks and boxes are rounded differently: a mask may reach half a pixel beyond its box on each side
    return width * height > 0 and not 0.01 * width * height <= area <= (width + 1) * (height + 1)


def _repeated_files(images: Iterable[Record]) -> list[str]:
    ids: dict[str, list[int]] = {}
    for image in images:
        ids.setdefault(image["file_name"], []).append(image["id"])
    repeated = {name: numbers for name, numbers in ids.items() if len(numbers) > 1}
    if not repeated:
        return []
    name, numbers = next(iter(repeated.items()))
    return [
        f"{len(repeated)} files are named by several images, such as {name} (images {listed(numbers)}): each copy is "
        "trained on with its own annotations only; give each file one image with all of its annotations"
    ]


def listed(words: Sequence[object], most: int = 8) -> str:
    """Format a list, shortened: `a, b, c and 4 more`."""
    shown = ", ".join(map(str, words[:most]))
    return f"{shown} and {len(words) - most} more" if len(words) > most else shown


def _found(record: Record, key: str) -> str:
    return f"is {record[key]!r:.60}" if key in record else "is missing"


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_box(value: Any) -> bool:
    """Return whether a value is a list of four numbers of pixels."""
    return (
        type(value) is list
        and len(value) == 4
        and all(_is_number(number) and -MAX_COORDINATE < number < MAX_COORDINATE for number in value)
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_plain(value: Any) -> bool:
    """Return whether a text has no control characters, line breaks or halves of characters."""
    return not isinstance(value, str) or not any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in value
    )


# The fields of COCO's records: name, whether a value is valid, and the remedy if it is not
Check = tuple[str, Callable[[Any], bool], str]
WHOLE = "it must be a whole number"
PIXELS = "it must be a positive whole number of pixels"
DEFAULTS = {"iscrowd": 0}  # of fields that may be missing
CATEGORY: list[Check] = [
    ("name", _is_text, "it must be text"),
    ("name", lambda name: not _is_text(name) or _is_plain(name.strip()), "remove its control characters"),
    ("id", lambda number: number >= 0, "the id must not be negative: number the categories from 0 or 1"),
]
IMAGE: list[Check] = [
    ("file_name", lambda name: isinstance(name, str) and name != "", "it must be the path of the image"),
    ("file_name", _is_plain, "it must not have control characters"),
    *((key, lambda size: _is_int(size) and 0 < size < MAX_COORDINATE, PIXELS) for key in ("width", "height")),
]
ANNOTATION: list[Check] = [
    *((key, _is_int, WHOLE) for key in ("id", "image_id", "category_id")),
    ("iscrowd", lambda flag: type(flag) is int and flag in (0, 1), "it must be 0 or 1"),
    (
        "area",
        lambda area: _is_number(area) and 0 <= area < float(MAX_COORDINATE) ** 2,
        "COCO AP needs the area of the object's mask (without masks: the width times the height of the box)",
    ),
    ("bbox", is_box, "it must be [x, y, width, height], four finite numbers of pixels"),
    (
        "bbox",
        lambda box: not is_box(box) or (box[2] >= 0 and box[3] >= 0),
        "width and height must not be negative (is it [x1, y1, x2, y2]?)",
    ),
]
