"""Write COCO as WebDataset shards: plain tars, an index of their samples and a manifest.

A sample is the original image file (`jpg` or `png`) and `json` = {"image": ..., "annotations": [...]}, the
original records. The same input gives the same bytes. The index is read back from the finished tars.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset.writer import TarWriter

from raydetr.data.coco import MAX_REPORTED, CocoDataset, Problems, Record, load_coco
from raydetr.data.folders import new_folder
from raydetr.data.images import read_checked
from raydetr.data.manifest import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    SAMPLE_DTYPE,
    Manifest,
    Samples,
    ShardFile,
    data_fingerprint,
    sample_key,
)

Progress = Callable[[int, int], None]

READ_AHEAD = 64  # images that are read and checked together, by threads


def write_shards(
    images: Path,
    annotations: Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    progress: Progress | None = None,
) -> Manifest:
    """Write the images of a COCO data set, in the order of its annotation file, as shards.

    Args:
        images: folder of the image files.
        annotations: COCO instances JSON.
        out: output folder; missing or empty. Nothing appears in it before everything is written.
        samples_per_shard: images in each tar file.
        progress: called with (images written, images in all).

    Raises:
        ValueError: the annotations or images are faulty (up to ten faults are listed), or `out` is not empty.
        OSError: writing failed, for example because the disk is full; nothing is left behind.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}: it must be at least 1")
    if not images.is_dir():
        raise ValueError(f"{images}: there is no such folder of images")
    dataset = load_coco(annotations)
    with new_folder(out, last=MANIFEST) as folder:
        num_turned = _write_tars(dataset, images, folder, samples_per_shard, progress)
        paths = sorted(folder.glob("*.tar"))
        samples = np.concatenate([index_shard(path, number) for number, path in enumerate(paths)])
        np.savez(folder / INDEX, samples=samples)
        manifest = _describe(dataset, annotations.name, samples, paths, samples_per_shard, num_turned)
        manifest.save(folder)
        _flush(folder)
    return manifest


def index_shard(path: Path, number: int) -> Samples:
    """Index the samples of a tar file as they lie on disk.

    Args:
        path: a plain tar; each two members are a sample, one of them its json.
        number: the shard's number, to be noted in each row.
    """
    with tarfile.open(path, "r:") as tar, path.open("rb") as file:
        members = tar.getmembers()
        rows = [_index_row(file, number, pair) for pair in zip(members[::2], members[1::2], strict=True)]
    return np.array(rows, dtype=SAMPLE_DTYPE)


def _index_row(file: BinaryIO, number: int, pair: tuple[tarfile.TarInfo, tarfile.TarInfo]) -> tuple[int, ...]:
    begin, last = pair[0].offset, pair[1]
    end = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    file.seek(begin)
    raw = file.read(end - begin)
    image, record = sorted(pair, key=lambda member: member.name.endswith(".json"))  # they lie in either order
    image_at, json_at = image.offset_data - begin, record.offset_data - begin
    content = json.loads(raw[json_at : json_at + record.size])
    parts = (image_at, image.size, json_at, record.size)
    size = (content["image"]["width"], content["image"]["height"])
    checks = (len(content["annotations"]), content["image"]["id"], zlib.crc32(raw))
    return (number, begin, len(raw), *parts, *size, *checks)


def _write_tars(
    dataset: CocoDataset, images: Path, folder: Path, samples_per_shard: int, progress: Progress | None
) -> int:
    """Write all tar files; returns how many images carry an EXIF orientation."""
    total = len(dataset.images)
    samples = _checked_samples(dataset, images)
    done = num_turned = 0
    for number in range(-(-total // samples_per_shard)):
        count = min(samples_per_shard, total - done)
        with (
            (folder / f"shard-{number:05d}.tar").open("wb") as file,
            TarWriter(file, mtime=0, encoder=False) as writer,
        ):
            for _ in range(count):
                sample, turned = next(samples)
                writer.write(sample)
                done, num_turned = done + 1, num_turned + turned
                if progress:
                    progress(done, total)
    return num_turned


def _checked_samples(dataset: CocoDataset, images: Path) -> Iterator[tuple[dict[str, str | bytes], bool]]:
    """The samples in order. A faulty image does not stop the checks, only what is yielded at the end."""
    problems = Problems(images, "faulty image")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(dataset.images), READ_AHEAD):
            records = dataset.images[start : start + READ_AHEAD]
            for record, found in zip(records, pool.map(partial(_try_read, images), records), strict=True):
                if isinstance(found, ValueError):
                    problems.add(str(found))
                    continue
                content, extension, turned = found
                pair = {"image": record, "annotations": dataset.annotations.get(record["id"], [])}
                text = json.dumps(pair, separators=(",", ":")).encode()
                yield {"__key__": sample_key(record["id"]), extension: content, "json": text}, turned
            if problems.count >= MAX_REPORTED:
                break
    problems.raise_if_any()


def _try_read(images: Path, record: Record) -> tuple[bytes, str, bool] | ValueError:
    try:
        return read_checked(images / record["file_name"], record)
    except ValueError as error:
        return error


def _describe(
    dataset: CocoDataset,
    source: str,
    samples: Samples,
    paths: list[Path],
    samples_per_shard: int,
    num_turned: int,
) -> Manifest:
    counts = np.bincount(samples["shard"], minlength=len(paths))
    ids = [category["id"] for category in dataset.categories]
    turned = (
        f"{num_turned} images carry an EXIF orientation, which is not applied: boxes refer to stored pixels"
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=data_fingerprint(samples, dataset.categories),
        num_samples=len(samples),
        num_annotations=int(samples["num_annotations"].sum()),
        samples_per_shard=samples_per_shard,
        shards=[_describe_shard(path, int(count)) for path, count in zip(paths, counts, strict=True)],
        categories=dataset.categories,
        label_maps={
            "contiguous": {str(category_id): label for label, category_id in enumerate(ids)},
            "category_id": {str(category_id): category_id for category_id in ids},
        },
        source={"name": source, "sha256": dataset.sha256},
        header=dataset.header,
        notices=dataset.notices + ([turned] if num_turned else []),
    )


def _describe_shard(path: Path, num_samples: int) -> ShardFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return ShardFile(path.name, num_samples, path.stat().st_size, digest.hexdigest())


def _flush(folder: Path) -> None:
    """Make sure that the files are on the disk before the manifest can be seen."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
