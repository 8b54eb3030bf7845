"""Import YOLO data sets in the layout of Ultralytics as COCO's records.

`data.yaml` names the splits and the classes. The labels of `.../images/a.jpg` are in `.../labels/a.txt`, one line per
object: `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 ...` for a polygon. Coordinates are normalized to the image size.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from raydetr.shards.coco import Problems, Record, check_records, read_document
from raydetr.shards.images import ImageError, read_header
from raydetr.shards.source import ImageFile, Source
from raydetr.user_files import open_file, parse_yaml, read_text

BOX_NUMBERS = 5
MIN_POLYGON_NUMBERS = 7  # the class and three points
TOLERANCE = 0.01  # normalized; coordinates further outside [0, 1] are an error

# The extensions that Ultralytics accepts; images that are neither JPEG nor PNG are rejected when they are packed.
IMAGE_EXTENSIONS = frozenset(
    ["bmp", "dng", "heic", "jpeg", "jpg", "mpo", "pfm", "png", "tif", "tiff", "webp"]
)


def yolo_source(path: Path, split: str) -> Source:
    """Read one split of a YOLO data set.

    Images are numbered from 1 in the order of their paths; category ids are YOLO's class numbers.

    Args:
        path: path of `data.yaml`.
        split: key of the split in it: train, val or test.

    Raises:
        ValueError: files are missing or invalid; the first ten problems are listed with file, line, value and remedy.
    """
    values, content = read_document(path, parse_yaml, "YAML", "a YOLO data.yaml")
    root, entries, names = _layout(path, values, split)
    problems = Problems(path, "problem")
    files = _image_files(root, entries, problems)
    problems.raise_if_any()
    digest = hashlib.sha256(content)
    images: list[Record] = []
    annotations: list[Record] = []
    label_files: set[Path] = set()
    num_mixed = 0  # label files with boxes and polygons
    for image_id, file in enumerate(files, 1):
        name = os.path.relpath(file, root)
        label_file = _label_file(file)
        text = _read_labels(label_file, problems)
        digest.update(f"{name}\n{text}\n".encode())
        with problems.collect(file):
            width, height = _read_size(file)
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            if text is None:
                continue
            label_files.add(label_file)
            objects = _objects(label_file, text, (width, height), len(names), problems)
            num_mixed += len({"segmentation" in item for item in objects}) == 2
            for item in objects:
                number = len(annotations) + 1
                annotations.append({"id": number, "image_id": image_id, **item, "iscrowd": 0})
    problems.raise_if_any()
    if not label_files:
        raise ValueError(
            f"{path}: none of its {len(files)} images of {split!r} has labels ({_label_file(files[0])} and so on): "
            "put them there, in a folder `labels` next to `images`"
        )
    categories = [{"id": number, "name": name} for number, name in names.items()]
    data = {"images": images, "annotations": annotations, "categories": categories}
    dataset = check_records(data, path, digest.hexdigest())
    if num_mixed:
        dataset.notices.append(
            f"{num_mixed} label files hold boxes and polygons: lines of 5 numbers are read as boxes"
        )
    unused = _unused_files(label_files)
    if unused:
        dataset.notices.append(f"{len(unused)} label files match no image of the split ({unused[0]} ...)")
    return Source(dataset, [ImageFile(file) for file in files], f"{path.name} [{split}]")


def _objects(
    file: Path, text: str, size: tuple[int, int], num_classes: int, problems: Problems
) -> list[Record]:
    """Return category and geometry of the objects in a label file, of an image of this width and height in pixels."""
    objects = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            with problems.collect(f"{file}, line {number}"):
                category_id, values = _parse_line(line.split(), num_classes)
                geometry = _box(values, *size) if len(values) == 4 else _polygon(values, *size)
                objects.append({"category_id": category_id, **geometry})
    return objects


def _parse_line(words: list[str], num_classes: int) -> tuple[int, list[float]]:
    if len(words) == MIN_POLYGON_NUMBERS:
        raise ValueError(
            "holds 7 numbers, a triangle or a box with its confidence and track: keep the first 5 of a box, repeat "
            "the last point of a triangle"
        )
    if len(words) != BOX_NUMBERS and (len(words) < MIN_POLYGON_NUMBERS or len(words) % 2 == 0):
        raise ValueError(
            f"holds {len(words)} numbers: there must be 5 (class cx cy w h), or the class and three or more points"
        )
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise ValueError(
            f"{' '.join(words)!r:.60} holds something that is not a number: correct it"
        ) from None
    if not values[0].is_integer() or not 0 <= values[0] < num_classes:
        raise ValueError(f"the class is {words[0]}: it must be a whole number from 0 to {num_classes - 1}")
    for value in values[1:]:
        if not -TOLERANCE <= value <= 1 + TOLERANCE:  # also true for NaN
            raise ValueError(
                f"{value:g} is not between 0 and 1: positions and sizes are normalized by the image's width and height"
            )
    if len(words) == BOX_NUMBERS and min(values[3:]) < 0:
        raise ValueError(f"the box is {words[3]} wide and {words[4]} high: neither must be negative")
    return int(values[0]), values[1:]


def _box(values: list[float], width: int, height: int) -> Record:
    cx, cy, w, h = values
    box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
    return {"bbox": box, "area": box[2] * box[3]}


def _polygon(values: list[float], width: int, height: int) -> Record:
    xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
    double_area = sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))
    return {
        "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
        "area": abs(double_area) / 2,
        "segmentation": [[value for point in zip(xs, ys, strict=True) for value in point]],
    }


def _read_size(path: Path) -> tuple[int, int]:
    """Read width and height in pixels from the header of an image, to scale its labels.

    Raises:
        ValueError: it cannot be read, or has an EXIF orientation: the labels then refer to the rotated image, because
            labeling tools show it rotated.
    """
    try:
        with open_file(path) as file:
            header = read_header(file)
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from None
    if header.is_rotated:
        raise ValueError(
            f"has the EXIF orientation {header.orientation}, and its labels refer to the rotated image: "
            "store the rotated pixels (ImageOps.exif_transpose)"
        )
    return header.size


def _layout(path: Path, values: Any, split: str) -> tuple[Path, list[str], dict[int, str]]:
    """Return the root of the paths in `data.yaml`, folders or lists of the split's images, and the class names."""
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no settings: name a YOLO data.yaml")
    if "kpt_shape" in values:
        raise ValueError(f"{path}: kpt_shape is set, so the labels hold key points: export boxes instead")
    entries = values.get(split)
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, str) for entry in entries):
        found = [key for key in ("train", "val", "test") if values.get(key)]
        raise ValueError(
            f"{path}: {split} is {values.get(split)!r:.60}: it must be a folder, a text file or a list of them "
            f"(the file has {', '.join(found) or 'no splits'})"
        )
    return _root(path, values), entries, _class_names(path, values)


def _root(path: Path, values: dict[str, Any]) -> Path:
    root = path.parent / str(values.get("path") or ".")
    if not root.is_dir():
        raise ValueError(
            f"{path}: path is {values['path']!r}, and there is no folder {root}: set it to the data set's folder, "
            "absolute or relative to this file"
        )
    return Path(os.path.normpath(root))


def _class_names(path: Path, values: dict[str, Any]) -> dict[int, str]:
    names = values.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    is_numbered = isinstance(names, dict) and set(map(str, names)) == set(map(str, range(len(names))))
    if not names or not is_numbered:
        raise ValueError(
            f"{path}: names is {values.get('names')!r:.60}: it must be the list of class names, "
            "or numbers from 0 with names"
        )
    if values.get("nc", len(names)) != len(names):
        raise ValueError(
            f"{path}: nc is {values['nc']!r}, but there are {len(names)} names: correct one of them"
        )
    return {int(number): str(names[number]) for number in sorted(names, key=int)}


def _image_files(root: Path, entries: list[str], problems: Problems) -> list[Path]:
    """Return all images of the split, sorted by path."""
    files: set[Path] = set()
    for entry in entries:
        place = root / entry
        if not place.exists() and entry.startswith("../"):
            place = root / entry[3:]  # as Ultralytics does, because Roboflow writes ../train/images
        if place.is_dir():
            files |= {file for file in place.rglob("*") if _is_image(file)}
        elif place.is_file():
            files |= _listed_files(place, root, problems)
        else:
            problems.add(f"there is no {place}: correct `path` or the split's entry {entry!r}")
    if not files and not problems.count:
        problems.add(f"there are no images in {', '.join(entries)} (of {root})")
    return sorted({Path(os.path.normpath(file)) for file in files})


def _is_image(file: Path) -> bool:
    return file.suffix[1:].lower() in IMAGE_EXTENSIONS and not file.name.startswith(".")


def _listed_files(listing: Path, root: Path, problems: Problems) -> set[Path]:
    """Return the images in a text file; its paths are relative to its own folder, or to the data set's."""
    found = set()
    with problems.collect(f"{listing}: cannot be read as a list of images"):
        for number, line in enumerate(read_text(listing).splitlines(), 1):
            name = line.strip()
            existing = [file for file in (listing.parent / name, root / name) if file.is_file()]
            if existing:
                found.add(existing[0])
            elif name:
                problems.add(f"{listing}, line {number}: there is no file {name!r}: correct or remove it")
    return found


def _label_file(image: Path) -> Path:
    """Return the path of the label file: like Ultralytics, replace the last folder `images` by `labels`."""
    parts = list(image.parts)
    places = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read_labels(file: Path, problems: Problems) -> str | None:
    if not file.exists():
        return None  # an image without objects
    try:
        return read_text(file)
    except (OSError, ValueError) as error:
        problems.add(f"{file}: cannot be read as text ({error}): replace the file")
        return None


def _unused_files(label_files: set[Path]) -> list[Path]:
    """Return the other label files in the folders of these."""
    found = {file for folder in {file.parent for file in label_files} for file in folder.glob("*.txt")}
    return sorted(file for file in found - label_files if file.name != "classes.txt")
