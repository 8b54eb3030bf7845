"""Index third-party shards so that the reader can use them as they are: `raydetr shards index`.

The tars are not modified; `index.npz` and `manifest.json` are written next to them. The categories come from a file, or
are the labels that occur.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from raydetr.process_pool import Progress, run_tasks
from raydetr.shards.coco import Problems, Record
from raydetr.shards.manifest import (
    INDEX,
    MANIFEST,
    THIRD_PARTY_VERSION,
    BoxFormat,
    Manifest,
    RecordFormat,
    Samples,
    ThirdPartyRecords,
    data_fingerprint,
    label_maps,
)
from raydetr.shards.tar_samples import tar_samples
from raydetr.shards.third_party.record_formats import find_format
from raydetr.shards.third_party.shard import (
    IndexedShard,
    IndexTask,
    image_and_record,
    index_third_party,
    read_content,
)
from raydetr.shards.validation import InvalidDataError, check_index, check_manifest
from raydetr.store.output_folder import write_atomically


def read_categories(path: Path) -> list[Record]:
    """Read COCO's category records from a file, sorted by id.

    Args:
        path: a COCO file, a JSON list of {"id", "name"}, or a JSON list of names, numbered from 0.

    Raises:
        ValueError: it holds no categories.
    """
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    records: Any = data.get("categories") if isinstance(data, dict) else data
    if isinstance(records, list) and records and all(isinstance(name, str) for name in records):
        records = [{"id": number, "name": name} for number, name in enumerate(records)]
    records = records if isinstance(records, list) else []
    valid = (
        bool(records)
        and all(isinstance(record, dict) for record in records)
        and all(type(record.get("id")) is int and record["id"] >= 0 for record in records)
        and all(isinstance(record.get("name"), str) for record in records)
    )
    if not valid or any(len({record[key] for record in records}) < len(records) for key in ("id", "name")):
        raise ValueError(
            f"{path}: holds no categories: a COCO file, a list of objects with id and name (each used once), or a "
            "list of names is needed"
        )
    return sorted(records, key=lambda record: int(record["id"]))


def categories_of(found: Counter[int | str], known: list[Record] | None, problems: Problems) -> list[Record]:
    """Return the category records, sorted by id, to which the labels refer by id or name.

    Args:
        found: number of objects per label.
        known: the categories of a file; None: number the labels that occur, in alphabetical order from 1.
        problems: collects the labels without a category.
    """
    if known is not None:
        usable = {value for record in known for value in (record["id"], record["name"])}
        for label in sorted(set(found) - usable, key=str):
            problems.add(
                f"the label {label!r} ({found[label]} objects) is not in the file of categories: add it"
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


def index_folder(
    folder: Path,
    *,
    categories: Path | None = None,
    box_format: BoxFormat | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Manifest:
    """Index all tars of a folder; read every sample and decode its image.

    Args:
        folder: folder of plain tars whose samples have an image (.jpg, .jpeg, .png) and a .json.
        categories: a JSON file that names them: a COCO file, a list of {"id", "name"}, or a list of names, numbered
            from 0. None: the labels that occur, names in alphabetical order from 1.
        box_format: format of the boxes, unless the records are COCO's.
        workers: number of processes.
        progress: called with (bytes read, total bytes).

    Raises:
        ValueError: the folder has an index, or samples are invalid (the first ten problems are listed).
        OSError: the index cannot be written.
    """
    paths = _tars(folder)
    known = None if categories is None else read_categories(categories)
    record_format = _find_format(paths, box_format)
    problems = Problems(folder, "problem")
    total = sum(path.stat().st_size for path in paths)
    advance = (lambda done: progress(done, total)) if progress else None
    tasks = (IndexTask(number, path, record_format) for number, path in enumerate(paths))
    shards: list[IndexedShard] = []
    with closing(
        run_tasks(index_third_party, tasks, workers=min(workers, len(paths)), progress=advance)
    ) as results:
        for shard in results:
            shards.append(shard)
            problems.add_many(shard.problems, shard.num_problems)
    _check_boxes(shards, record_format, problems)
    found = sum((shard.labels for shard in shards), Counter[int | str]())
    chosen = categories_of(found, known, problems)
    problems.raise_if_any()
    manifest, samples = _describe(folder, shards, record_format, chosen, named=known is not None)
    content = io.BytesIO()
    np.savez(content, samples=samples)
    write_atomically(folder / INDEX, content.getvalue())
    write_atomically(folder / MANIFEST, manifest.to_json())
    return manifest


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    if (folder / MANIFEST).exists():
        raise ValueError(
            f"{folder}: has a {MANIFEST}, so it is indexed: to index it again, remove that first"
        )
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        packed = sorted(path.name for path in folder.glob("*.tar.*")) + [
            path.name for path in folder.glob("*.tgz")
        ]
        hint = f" ({packed[0]}: unpack it to a plain tar, which allows random access)" if packed else ""
        raise ValueError(f"{folder}: holds no *.tar{hint}")
    return paths


def _find_format(paths: list[Path], box_format: BoxFormat | None) -> RecordFormat:
    """Return the format of the first record that has objects."""
    for path in paths:
        try:
            with path.open("rb") as file:
                for sample in tar_samples(path):
                    if "json" not in sample.members:
                        image_and_record(sample)  # raises
                    record_format = find_format(read_content(file, sample), box_format)
                    if record_format is not None:
                        return record_format
        except InvalidDataError as error:
            raise ValueError(
                f"{path}: the first records cannot be read as boxes and labels: {error}"
            ) from None
    raise ValueError(f"{paths[0].parent}: no record has any object, so there is nothing to train on")


def _check_boxes(shards: list[IndexedShard], record_format: RecordFormat, problems: Problems) -> None:
    if 0 < max(shard.max_coordinate for shard in shards) <= 1:
        problems.add(
            f"no coordinate in {record_format.boxes!r} exceeds 1: boxes must be in pixels, not normalized"
        )


def _describe(
    folder: Path,
    shards: list[IndexedShard],
    record_format: RecordFormat,
    categories: list[Record],
    *,
    named: bool,
) -> tuple[Manifest, Samples]:
    samples = np.concatenate([shard.samples for shard in shards])
    image_ids = [image_id for shard in shards for image_id in shard.image_ids]
    annotation_ids = [number for shard in shards for number in shard.annotation_ids]
    own_images = _usable_ids(image_ids)
    own_annotations = record_format.kind == "coco" and _usable_ids(annotation_ids)
    samples["image_id"] = image_ids if own_images else np.arange(1, len(samples) + 1)
    files = [shard.file for shard in shards if shard.file is not None]
    digest = hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()
    notices = _notices(shards, samples, own_images=own_images)
    if not named and all(isinstance(label, int) for shard in shards for label in shard.labels):
        notices.append("the categories have no names but their numbers (--categories FILE provides them)")
    manifest = Manifest(
        format_version=THIRD_PARTY_VERSION,
        fingerprint=data_fingerprint(samples, categories),
        num_samples=len(samples),
        num_annotations=int(samples["num_annotations"].sum()),
        samples_per_shard=max(file.num_samples for file in files),
        shards=files,
        categories=categories,
        label_maps=label_maps([category["id"] for category in categories]),
        source={"name": folder.resolve().name, "sha256": digest},
        header={},
        notices=notices,
        third_party=ThirdPartyRecords(
            [key for shard in shards for key in shard.keys],
            dataclasses.replace(record_format, own_ids=own_annotations),
        ),
    )
    check_manifest(manifest)
    check_index(samples, manifest)
    return manifest, samples


def _usable_ids(ids: list[Any]) -> bool:
    valid = all(
        isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63 for number in ids
    )
    return valid and len(set(ids)) == len(ids)


def _notices(shards: list[IndexedShard], samples: Samples, *, own_images: bool) -> list[str]:
    ignored = sum((shard.ignored for shard in shards), Counter[str]())
    num_empty = int((samples["num_annotations"] == 0).sum())
    num_rotated = sum(shard.num_rotated for shard in shards)
    num_without_area = sum(shard.num_without_area for shard in shards)
    lines = [
        (num_empty, "images without annotations: kept, training sees them as background"),
        (num_rotated, "images have an EXIF orientation, which is not applied: boxes refer to stored pixels"),
        (num_without_area, "objects have no area: that of their box is used"),
        *((count, f"members .{extension} are ignored") for extension, count in sorted(ignored.items())),
    ]
    notices = [f"{count} {text}" for count, text in lines if count]
    if not own_images:
        notices.append("the records have no unique integer image ids: images are numbered from 1")
    return notices
