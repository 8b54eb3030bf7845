"""Import WebDataset shards of other programs: tars of images with a JSON record each, grouped as webdataset does."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import braceexpand

from raydetr.process_pool import Progress
from raydetr.shards.coco import Problems, Record, annotation_problems, check_records, read_categories
from raydetr.shards.images import read_header
from raydetr.shards.importers.record_formats import BoxFormat, RecordFormat, find_format, unpack
from raydetr.shards.source import ImageFile, Source
from raydetr.shards.tar_samples import TarSample, tar_samples
from raydetr.shards.validation import InvalidDataError
from raydetr.user_files import open_file, parse_json

IMAGES = ("jpg", "jpeg", "png")


@dataclass
class _Found:
    """Everything in the tars, before ids are assigned."""

    problems: Problems
    images: list[Record] = field(default_factory=list)
    files: list[ImageFile] = field(default_factory=list)
    objects: list[list[Record]] = field(default_factory=list)  # per image; with `label` in place of the ids
    ignored: Counter[str] = field(default_factory=Counter)  # extensions of other members
    num_without_area: int = 0

    def add(self, path: Path, sample: TarSample, content: Any, record_format: RecordFormat) -> None:
        """Add the records of a sample in a tar, given the content of its JSON.

        Raises:
            InvalidDataError, ImageError: they cannot be used.
        """
        fields, objects = unpack(content, record_format)
        extension = _image_extension(sample)
        member = sample.members[extension]
        file = ImageFile(path, member.offset_data, member.size, sample.key)
        width, height = _stated_size(fields) or read_header(io.BytesIO(file.read())).size
        self.images.append({"file_name": sample.key, **fields, "width": width, "height": height})
        self.files.append(file)
        self.ignored.update(set(sample.members) - {"json", extension})
        self.num_without_area += sum("area" not in item for item in objects)
        objects = [{"area": item["bbox"][2] * item["bbox"][3], "iscrowd": 0, **item} for item in objects]
        self.objects.append(objects)
        for number, item in enumerate(objects):
            for problem in annotation_problems({**item, "id": 1, "image_id": 1, "category_id": 1}):
                self.problems.add(f"{file}: object {number}: {problem}")


def webdataset_source(
    pattern: str,
    *,
    categories: Path | None = None,
    box_format: BoxFormat | None = None,
    progress: Progress | None = None,
) -> Source:
    """Read the records of all samples in tars; the images are read when they are written.

    Args:
        pattern: a folder of tars, or paths with braces and wildcards, such as `shard-{000..009}.tar`.
        categories: a JSON file that names them: a COCO file, a list of {"id", "name"}, or a list of names, numbered
            from 0. None: the labels that occur, names in alphabetical order from 1.
        box_format: format of the boxes, unless the records are COCO's.
        progress: called with (bytes read, total bytes).

    Raises:
        ValueError: there are no tars, or they are invalid; the first problems are listed with shard and sample.
    """
    paths = _expand(pattern)
    known = None if categories is None else read_categories(categories)
    record_format = _first_format(paths, box_format)
    digest = hashlib.sha256()
    found = _Found(Problems(pattern, "problem"))
    total, done = sum(path.stat().st_size for path in paths), 0
    for path in paths:
        with found.problems.collect(path), open_file(path) as file:
            for sample in tar_samples(path):
                with found.problems.collect(f"{path}: sample {sample.key}"):
                    found.add(path, sample, _read_record(file, sample), record_format)
                    digest.update(f"{sample.key} {found.files[-1].size}\n".encode())
                if progress:
                    progress(done + sample.end, total)
        done += path.stat().st_size
    labels = Counter(item["label"] for items in found.objects for item in items)
    chosen = _categories_of(labels, known, found.problems)
    found.problems.raise_if_any()
    return _make_source(found, chosen, pattern, digest.hexdigest(), named=known is not None)


def _categories_of(found: Counter[int | str], known: list[Record] | None, problems: Problems) -> list[Record]:
    """Return the category records, sorted by id, to which labels refer by id or name, given their numbers of objects.

    Without `known` records of a file, they are the labels that occur, names in alphabetical order from 1.
    """
    if known is not None:
        usable = {value for record in known for value in (record["id"], record["name"])}
        for label in sorted(set(found) - usable, key=str):
            problems.add(
                f"the label {label!r:.60} ({found[label]} objects) is not in the file of categories: add it"
            )
        return known
    names = sorted(label for label in found if isinstance(label, str))
    ids = sorted(label for label in found if isinstance(label, int))
    if names and ids:
        problems.add(
            f"labels are numbers ({ids[0]}, ...) and names ({names[0]!r}, ...): list all categories with --categories"
        )
    if ids and ids[0] < 0:
        problems.add(f"the label {ids[0]} is negative: number the categories from 0 or 1")
    return [{"id": number, "name": name} for number, name in enumerate(names, 1)] or [
        {"id": number, "name": str(number)} for number in ids
    ]


def _expand(pattern: str) -> list[Path]:
    folder = Path(pattern)
    paths: list[Path] = []
    if folder.is_dir():
        paths = sorted(folder.glob("*.tar"))
        if not paths:
            packed = [path.name for kind in ("*.tar.*", "*.tgz") for path in sorted(folder.glob(kind))]
            hint = f" ({packed[0]}: unpack it to a plain tar)" if packed else ""
            raise ValueError(f"{pattern}: holds no *.tar{hint}")
    else:
        for path in map(Path, braceexpand.braceexpand(pattern)):
            is_wildcard = "*" in path.name or "?" in path.name
            paths += (sorted(path.parent.glob(path.name)) if is_wildcard else []) or [path]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
    return paths


def _first_format(paths: list[Path], box_format: BoxFormat | None) -> RecordFormat:
    """Return the format of the first record that has objects."""
    for path in paths:
        try:
            with open_file(path) as file:
                for sample in tar_samples(path):
                    record_format = find_format(_read_record(file, sample), box_format)
                    if record_format is not None:
                        return record_format
        except (OSError, InvalidDataError) as error:
            raise ValueError(
                f"{path}: the first records cannot be read as boxes and labels: {error}"
            ) from None
    raise ValueError(f"{paths[0]}: no record has any object, so there is nothing to train on")


def _image_extension(sample: TarSample) -> str:
    """Return the extension of a sample's image.

    Raises:
        InvalidDataError: there is not exactly one image and one JSON.
    """
    images = [extension for extension in sample.members if extension in IMAGES]
    if len(images) != 1 or "json" not in sample.members:
        found = ", ".join(f".{extension}" for extension in sample.members)
        raise InvalidDataError(
            f"its members are {found}: one image (.jpg, .jpeg or .png) and one .json are needed"
        )
    return images[0]


def _read_record(file: BinaryIO, sample: TarSample) -> Any:
    """Return the content of a sample's JSON.

    Raises:
        InvalidDataError: it is not JSON, or the sample has other members than needed.
    """
    _image_extension(sample)
    member = sample.members["json"]
    file.seek(member.offset_data)
    try:
        return parse_json(file.read(member.size))
    except ValueError as error:
        raise InvalidDataError(f"its record is not JSON ({error})") from None


def _stated_size(fields: Record) -> tuple[int, int] | None:
    width, height = fields.get("width"), fields.get("height")
    if width is None or height is None:
        return None
    if type(width) is not int or type(height) is not int:
        raise InvalidDataError(
            f"its width and height are {width!r:.40} and {height!r:.40}, not numbers of pixels"
        )
    return width, height


def _make_source(
    found: _Found, categories: list[Record], pattern: str, sha256: str, *, named: bool
) -> Source:
    """Assign ids, and validate the records like those of a COCO file."""
    image_ids = [image.get("id", image.get("image_id")) for image in found.images]
    keeps_images = _usable_ids(image_ids)
    if not keeps_images:
        image_ids = list(range(1, len(image_ids) + 1))
    keeps_objects = _usable_ids([item.get("id") for items in found.objects for item in items])
    ids = {record["name"]: record["id"] for record in categories}
    annotations: list[Record] = []
    for image_id, items in zip(image_ids, found.objects, strict=True):
        for item in items:
            label = item.pop("label")
            new_id = {} if keeps_objects else {"id": len(annotations) + 1}
            category_id = ids[label] if isinstance(label, str) else label
            annotations.append({**item, "image_id": image_id, "category_id": category_id, **new_id})
    images = [{**image, "id": image_id} for image, image_id in zip(found.images, image_ids, strict=True)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    dataset = check_records(data, pattern, sha256)
    notices = [
        f"{count} members .{extension} are ignored" for extension, count in sorted(found.ignored.items())
    ]
    if found.num_without_area:
        notices.append(f"{found.num_without_area} objects have no area: that of their box is used")
    if not keeps_images:
        notices.append("the records have no unique integer image ids: images are numbered from 1")
    if not named and all(name == str(number) for name, number in ids.items()):
        notices.append("the categories have no names but their numbers (--categories FILE provides them)")
    dataset.notices.extend(notices)
    return Source(dataset, found.files, Path(pattern).name)


def _usable_ids(ids: list[Any]) -> bool:
    valid = all(type(number) is int and 0 <= number < 2**63 for number in ids)
    return valid and len(set(ids)) == len(ids)
