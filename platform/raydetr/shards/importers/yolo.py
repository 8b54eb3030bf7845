"""Import YOLO data sets in the layout of Ultralytics as COCO's records.

`data.yaml` names the splits and the classes. The labels of `.../images/a.jpg` are in `.../labels/a.txt`, one line per
object: `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 ...` for a polygon. Coordinates are normalized to the image size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydetr.shards.coco import Problems, Record, check_records
from raydetr.shards.images import ImageError, read_header
from raydetr.shards.source import ImageFile, Source
from raydetr.user_files import open_file, parse_yaml, read_file, read_text

BOX_NUMBERS = 5
MIN_POLYGON_NUMBERS = 7  # the class and three points
TOLERANCE = 0.01  # normalized; coordinates further outside [0, 1] are an error


@dataclass
class Labels:
    """Collects the objects of all images."""

    problems: Problems
    num_classes: int
    annotations: list[Record] = field(default_factory=list)
    num_mixed: int = 0  # files with boxes and polygons

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
            geometry = _box(values, width, height) if len(values) == 4 else _polygon(values, width, height)
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
    following = [*range(1, len(xs)), 0]
    double_area = sum(xs[i] * ys[j] - xs[j] * ys[i] for i, j in enumerate(following))
    return {
        "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
        "area": abs(double_area) / 2,
        "segmentation": [[value for point in zip(xs, ys, strict=True) for value in point]],
    }


# The extensions that Ultralytics accepts; images that are neither JPEG nor PNG are rejected when they are packed.
IMAGE_EXTENSIONS = frozenset(
    ["bmp", "dng", "heic", "jpeg", "jpg", "mpo", "pfm", "png", "tif", "tiff", "webp"]
)


@dataclass(frozen=True)
class _Layout:
    """The content of `data.yaml`."""

    path: Path
    root: Path
    entries: list[str]  # of the split: folders, or text files with one path per line
    names: dict[int, str]


def yolo_source(path: Path, split: str) -> Source:
    """Read one split of a YOLO data set.

    Images are numbered from 1 in the order of their paths; category ids are YOLO's class numbers.

    Args:
        path: path of `data.yaml`.
        split: key of the split in it: train, val or test.

    Raises:
        ValueError: files are missing or invalid; the first ten problems are listed with file, line, value and remedy.
    """
    layout = _read_layout(path, split)
    problems = Problems(path, "problem")
    files = _image_files(layout, problems)
    problems.raise_if_any()
    labels = Labels(problems, len(layout.names))
    digest = hashlib.sha256(read_file(path))
    images: list[Record] = []
    paths: list[Path] = []
    label_files: set[Path] = set()
    for image_id, file in enumerate(files, 1):
        name = os.path.relpath(file, layout.root)
        label_file = _label_file(file)
        text = _read_labels(label_file, problems)
        digest.update(f"{name}\n{text}\n".encode())
        try:
            width, height = _read_size(file)
        except ValueError as error:
            problems.add(f"{file}: {error}")
            continue
        paths.append(file)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        if text is not None:
            label_files.add(label_file)
            labels.add(label_file, text, image_id, width, height)
    problems.raise_if_any()
    if not label_files:
        raise ValueError(
            f"{path}: none of its {len(files)} images of {split!r} has labels ({_label_file(files[0])} and so on): "
            "put them there, in a folder `labels` next to `images`"
        )
    categories = [{"id": number, "name": name} for number, name in layout.names.items()]
    data = {"images": images, "annotations": labels.annotations, "categories": categories}
    dataset = check_records(data, path, digest.hexdigest())
    dataset.notices.extend(_notices(labels, label_files))
    return Source(dataset, [ImageFile(file) for file in paths], f"{path.name} [{split}]")


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


def _read_layout(path: Path, split: str) -> _Layout:
    try:
        values = parse_yaml(read_text(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): name a YOLO data.yaml") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not YAML ({error}): name a YOLO data.yaml") from None
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
    return _Layout(path, _root(path, values), entries, _class_names(path, values))


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
    if (
        not isinstance(names, dict)
        or not names
        or sorted(map(str, names)) != sorted(map(str, range(len(names))))
    ):
        raise ValueError(
            f"{path}: names is {values.get('names')!r:.60}: it must be the list of class names, "
            "or numbers from 0 with names"
        )
    if values.get("nc", len(names)) != len(names):
        raise ValueError(
            f"{path}: nc is {values['nc']!r}, but there are {len(names)} names: correct one of them"
        )
    return {int(number): str(names[number]) for number in sorted(names, key=int)}


def _image_files(layout: _Layout, problems: Problems) -> list[Path]:
    """Return all images of the split, sorted by path."""
    files: set[Path] = set()
    for entry in layout.entries:
        place = layout.root / entry
        if not place.exists() and entry.startswith("../"):
            place = layout.root / entry[3:]  # as Ultralytics does, because Roboflow writes ../train/images
        if place.is_dir():
            files |= {Path(os.path.normpath(file)) for file in place.rglob("*") if _is_image(file)}
        elif place.is_file():
            files |= _listed_files(place, layout.root, problems)
        else:
            problems.add(f"there is no {place}: correct `path` or the split's entry {entry!r}")
    if not files and not problems.count:
        problems.add(f"there are no images in {', '.join(layout.entries)} (of {layout.root})")
    return sorted(files)


def _is_image(file: Path) -> bool:
    return file.suffix[1:].lower() in IMAGE_EXTENSIONS and not file.name.startswith(".")


def _listed_files(listing: Path, root: Path, problems: Problems) -> set[Path]:
    """Return the images in a text file; its paths are relative to its own folder, or to the data set's."""
    found = set()
    try:
        lines = read_text(listing).splitlines()
    except (OSError, ValueError) as error:
        problems.add(f"{listing}: cannot be read as a list of images ({error})")
        return set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        candidates = [listing.parent / line.strip(), root / line.strip()]
        existing = [file for file in candidates if file.is_file()]
        if existing:
            found.add(Path(os.path.normpath(existing[0])))
        else:
            problems.add(f"{listing}, line {number}: there is no file {line.strip()!r}: correct or remove it")
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


def _notices(labels: Labels, label_files: Iterable[Path]) -> list[str]:
    used = set(label_files)
    unused = sorted(
        file for folder in {file.parent for file in used} for file in folder.glob("*.txt") if file not in used
    )
    unused = [file for file in unused if file.name != "classes.txt"]
    notices = []
    if labels.num_mixed:
        notices.append(
            f"{labels.num_mixed} label files hold boxes and polygons: lines of 5 numbers are read as boxes"
        )
    if unused:
        notices.append(f"{len(unused)} label files match no image of the split ({unused[0]} ...)")
    return notices
