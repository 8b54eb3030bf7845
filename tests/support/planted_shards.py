"""Shards with planted problems, written with tarfile alone, without the checks of the library."""

from __future__ import annotations

import copy
import io
import json
import tarfile
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from made_coco import write_coco
from raydetr.shards.coco import annotation_problems, unusual_kinds, usable_boxes
from raydetr.shards.manifest import INDEX, MANIFEST, SAMPLE_DTYPE, Manifest, ShardFile, data_fingerprint
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
WIDTH, HEIGHT = 64, 48


@dataclass
class Sample:
    """One image with its records; tests may make any part invalid."""

    image: bytes
    record: dict[str, Any]
    annotations: list[dict[str, Any]]


@dataclass
class Split:
    """The samples and categories to write."""

    samples: list[Sample]
    categories: list[dict[str, Any]] = field(default_factory=lambda: copy.deepcopy(CATEGORIES))
    areas_follow_boxes: bool = True  # otherwise areas stay as they are


def healthy(num_images: int, seed: int) -> Split:
    """Return dissimilar images, each with one object of either class, of a reasonable size."""
    return copy.deepcopy(_healthy(num_images, seed))


@lru_cache
def _healthy(num_images: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(num_images):
        image_id = seed * 1000 + number + 1
        record = {"id": image_id, "file_name": f"{image_id}.jpg", "width": WIDTH, "height": HEIGHT}
        annotations = []
        for category in CATEGORIES:
            x, y, w, h = rng.uniform((0, 0, 14, 12), (36, 28, 27, 19)).round(2).tolist()
            annotations.append(
                {"id": image_id * 10 + category["id"], "image_id": image_id, "category_id": category["id"],
                 "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            )  # fmt: skip
        samples.append(Sample(encoded(random_image(rng)), record, annotations))
    return Split(samples)


def random_image(rng: np.random.Generator, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """Return an image of soft random spots."""
    spots = Image.fromarray(rng.integers(0, 256, (8, 10, 3), np.uint8))
    return spots.resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, **options: Any) -> bytes:
    """Encode an image as JPEG, or as `format`."""
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "JPEG", "quality": 90} | options))
    return buffer.getvalue()


def write(split: Split, out: Path) -> Path:
    """Write one shard with index and manifest, without checking the samples."""
    out.mkdir(parents=True)
    for item in (item for sample in split.samples for item in sample.annotations if split.areas_follow_boxes):
        if not annotation_problems(item):
            item["area"] = item["bbox"][2] * item["bbox"][3]
    rows = []
    with tarfile.open(out / "shard-00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in split.samples:
            rows.append(_add(tar, sample))
    content = (out / "shard-00000.tar").read_bytes()
    samples = np.array(rows, SAMPLE_DTYPE)
    samples["crc32"] = [zlib.crc32(content[row["offset"] :][: row["length"]]) for row in samples]
    np.savez(out / INDEX, samples=samples)
    save_manifest(split, samples, out, len(content))
    return out


def save_manifest(split: Split, samples: np.ndarray, out: Path, size: int) -> None:
    """Write a manifest for these samples; its other fields are those of a valid data set."""
    usable, unusual = Counter[str](), Counter[str]()
    for sample in split.samples:
        image_size = sample.record["width"], sample.record["height"]
        objects = [item for item in sample.annotations if not annotation_problems(item)]
        usable.update(map(str, usable_boxes(objects, *image_size)[1]))
        unusual.update(kind for item in objects for kind in unusual_kinds(item, *image_size))
    replace(
        _template(),
        fingerprint=data_fingerprint(samples, split.categories),
        num_samples=len(samples),
        num_annotations=int(samples["num_annotations"].sum()),
        usable_objects=dict(usable),
        unusual_objects=dict(unusual),
        shards=[ShardFile("shard-00000.tar", len(samples), size, "0" * 64)],
        categories=split.categories,
    ).save(out)
    assert (out / MANIFEST).exists()


@lru_cache
def _template() -> Manifest:
    with tempfile.TemporaryDirectory() as folder:
        return write_source(coco_source(*write_coco(Path(folder), 1)), Path(folder) / "shards")


def _add(tar: tarfile.TarFile, sample: Sample) -> tuple[int, ...]:
    image_id = sample.record["id"]
    text = json.dumps({"image": sample.record, "annotations": sample.annotations}).encode()
    begin, at = tar.offset, []
    for extension, content in (("jpg", sample.image), ("json", text)):
        member = tarfile.TarInfo(f"{image_id:012d}.{extension}")
        member.size = len(content)
        at.append(tar.offset - begin + 512)
        tar.addfile(member, io.BytesIO(content))
    parts = (at[0], len(sample.image), at[1], len(text))
    sizes = (sample.record["width"], sample.record["height"], len(sample.annotations))
    return (0, begin, tar.offset - begin, *parts, *sizes, image_id, 0)
