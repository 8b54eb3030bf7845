"""Import Pascal VOC data sets as COCO's records.

`ImageSets/Main/<split>.txt` lists the images, `Annotations/<name>.xml` holds their objects, `JPEGImages/` the files.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from xml.etree import ElementTree

from raydetr.shards.coco import Problems, Record, check_records
from raydetr.shards.source import ImageFile, Source
from raydetr.user_files import read_file, read_text

CORNERS = ("xmin", "ymin", "xmax", "ymax")
SUFFIXES = (".jpg", ".jpeg", ".png")


def voc_source(folder: Path, split: str, *, zero_based: bool = False) -> Source:
    """Read one split of a Pascal VOC data set.

    Images are numbered from 1 in the order of their names. Categories are numbered from 1 in alphabetical order; they
    are the names in all of `Annotations`, so that all splits have the same ones. An object marked `difficult` becomes
    a crowd: it is not trained on, and ignored in evaluation, as in VOC's own.

    Args:
        folder: folder with ImageSets, Annotations and JPEGImages.
        split: train, val, trainval, test: the name of a file in ImageSets/Main.
        zero_based: pixels count from 0 and the end is exclusive, as many tools write boxes. VOC itself counts pixels
            from 1, and xmax and ymax are the last pixel inside: a box spans from xmin - 1 to xmax.

    Raises:
        ValueError: files are missing or invalid; the first ten problems are listed with file, field, value and
            remedy.
    """
    problems = Problems(folder, "problem")
    names = _read_split(folder, split, problems)
    problems.raise_if_any()
    trees = _read_annotations(folder / "Annotations", problems)
    files = _image_files(folder / "JPEGImages")
    elements = [element for tree in trees.values() for element in tree.findall("object")]
    class_names = sorted({element.findtext("name", "").strip() for element in elements} - {""})
    numbers = {name: number for number, name in enumerate(class_names, 1)}
    images: list[Record] = []
    annotations: list[Record] = []
    digest = hashlib.sha256()
    for image_id, name in enumerate(names, 1):
        path = folder / "Annotations" / f"{name}.xml"
        if name not in files:
            problems.add(
                f"{folder / 'JPEGImages' / name}.jpg: there is no such image (.jpg, .jpeg, .png): add it, or remove "
                "it from the split"
            )
        elif not path.is_file():
            problems.add(f"{path}: there is no such file: add it, or remove the image from the split")
        if name not in files or name not in trees:
            continue
        digest.update(f"{name}\n".encode() + path.read_bytes())
        with problems.collect(path):
            named = trees[name].findtext("filename", "").strip()
            file_name = named if named in files[name] else files[name][0]
            images.append({"id": image_id, "file_name": file_name, **_size(trees[name])})
            for element in trees[name].findall("object"):
                record = _annotation(element, numbers, zero_based=zero_based)
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **record})
    problems.raise_if_any()
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    data = {"images": images, "annotations": annotations, "categories": categories}
    dataset = check_records(data, folder, digest.hexdigest())
    num_difficult = sum(annotation["iscrowd"] for annotation in annotations)
    if num_difficult:
        dataset.notices.append(
            f"{num_difficult} crowd annotations are objects that Pascal VOC marks as difficult"
        )
    ambiguous = [name for name in names if len(files[name]) > 1]
    if ambiguous:
        dataset.notices.append(
            f"{len(ambiguous)} names belong to several images ({', '.join(files[ambiguous[0]])}): the one that "
            "<filename> of the annotation names is used, else the first"
        )
    paths = [ImageFile(folder / "JPEGImages" / image["file_name"]) for image in dataset.images]
    return Source(dataset, paths, f"{folder.name} [{split}]")


def _image_files(folder: Path) -> dict[str, list[str]]:
    """Return the image files by name without suffix."""
    files: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            files.setdefault(path.stem, []).append(path.name)
    return files


def _read_split(folder: Path, split: str, problems: Problems) -> list[str]:
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        if not (folder / part).is_dir():
            raise ValueError(
                f"{folder}: has no folder {part}: name a folder in Pascal VOC's layout (VOC2012, ...)"
            )
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.txt"))
        raise ValueError(f"{path}: there is no such split; there are {', '.join(known[:10]) or 'none'}")
    names: list[str] = []
    with problems.collect(f"{path}: cannot be read as a list of names"):
        for number, line in enumerate(read_text(path).splitlines(), 1):
            words = line.split()
            if len(words) > 1:
                problems.add(
                    f"{path}, line {number}: is {line!r:.40}: a split has one name per line (is this the list of a "
                    "class?)"
                )
            names += words[:1]
    if len(set(names)) != len(names):
        problems.add(f"{path}: names {len(names) - len(set(names))} images twice: remove them")
    if not names and not problems.count:
        problems.add(f"{path}: names no images")
    return sorted(names)


def _read_annotations(folder: Path, problems: Problems) -> dict[str, ElementTree.Element]:
    trees = {}
    for path in sorted(folder.glob("*.xml")):
        try:
            trees[path.stem] = ElementTree.fromstring(read_file(path))
        # The last one: an unknown encoding
        except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
            problems.add(f"{path}: is not XML ({error}): replace or remove the file")
    return trees


def _size(tree: ElementTree.Element) -> Record:
    size = {}
    for key in ("width", "height"):
        text = tree.findtext(f"size/{key}", "").strip()
        if not text.isdecimal() or int(text) == 0:
            raise ValueError(f"size/{key} is {text!r}: it must be a positive whole number of pixels")
        size[key] = int(text)
    return size


def _annotation(element: ElementTree.Element, numbers: dict[str, int], *, zero_based: bool) -> Record:
    name = element.findtext("name", "").strip()
    if not name:
        raise ValueError("an object has no name: add it")
    box = [_coordinate(element, name, key) for key in CORNERS]
    first = 0 if zero_based else 1
    if min(box[:2]) < first and not zero_based:
        raise ValueError(
            f"{name}: the box begins at {box[0]:g}, {box[1]:g}, but Pascal VOC counts pixels from 1: correct it, "
            "or use --zero-based if the tool that wrote it counts from 0 with an exclusive end"
        )
    x, y = box[0] - first, box[1] - first
    width, height = box[2] - x, box[3] - y
    if width < 0 or height < 0:
        raise ValueError(f"{name}: the box ends before it begins: {', '.join(f'{value:g}' for value in box)}")
    difficult = element.findtext("difficult", "0").strip()
    if difficult not in ("0", "1"):
        raise ValueError(f"{name}: difficult is {difficult!r}: it must be 0 or 1")
    return {
        "category_id": numbers[name],
        "bbox": [x, y, width, height],
        "area": width * height,
        "iscrowd": int(difficult),
    }


def _coordinate(element: ElementTree.Element, name: str, key: str) -> float:
    text = element.findtext(f"bndbox/{key}", "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name}: bndbox/{key} is {text!r}: it must be a number of pixels")
    return value
