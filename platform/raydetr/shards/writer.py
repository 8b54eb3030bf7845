"""Write a data set as WebDataset shards: plain tars, an index of their samples and a manifest.

A sample is the original image file (`jpg` or `png`) and `json` = {"image": ..., "annotations": [...]}, COCO's
records. The same input gives the same bytes, with any number of processes and after any number of stops. The index
is read back from the finished tars.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from raydetr.process_pool import Progress, run_tasks
from raydetr.shards.coco import CocoDataset, Problems
from raydetr.shards.manifest import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    Manifest,
    Samples,
    ShardFile,
    data_fingerprint,
    label_maps,
)
from raydetr.shards.packing import PackedShard, ShardTask, pack_shard
from raydetr.shards.sources import Source, coco_source
from raydetr.store.output_folder import publish, resumable_folder


def write_shards(
    images: Path,
    annotations: Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    workers: int = 1,
    progress: Progress | None = None,
) -> Manifest:
    """Write the images of a COCO data set, in the order of its annotation file, as shards: see `write_source`.

    Args:
        images: folder of the image files.
        annotations: COCO instances JSON.
        out: output folder; missing, empty, or what a stopped run left.
        samples_per_shard: images in each tar file.
        workers: processes that write; each writes whole shards.
        progress: called with (images written, images in all).

    Raises:
        ValueError: the annotations or images are faulty (up to ten faults are listed), or `out` is not empty.
        OSError: writing failed, for example because the disk is full; the next run goes on there.
    """
    _check_arguments(samples_per_shard, workers)
    return write_source(
        coco_source(images, annotations),
        out,
        samples_per_shard=samples_per_shard,
        workers=workers,
        progress=progress,
    )


def write_source(
    source: Source,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    workers: int = 1,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Manifest:
    """Write a data set as shards. Nothing appears in `out` before everything is written.

    A run that was stopped is continued: its finished shards are kept if input and sha256 are still the same.

    Args:
        source: what to write.
        out: output folder; missing, empty, or what a stopped run left.
        samples_per_shard: images in each tar file.
        workers: processes that write; each writes whole shards.
        progress: called with (images written, images in all).
        tell: called with a line on what was found of an earlier run.

    Raises:
        ValueError: images are faulty (up to ten faults are listed, all are counted), or `out` is not empty.
        OSError: writing failed, for example because the disk is full; the next run goes on there.
        RuntimeError: a worker process died; the next run goes on there.
    """
    _check_arguments(samples_per_shard, workers)
    with resumable_folder(out) as folder:
        num_found = len(list(folder.glob("*.tar.json")))
        packed = _pack(source, folder, samples_per_shard, workers, progress)
        if num_found and tell:
            tell(_found_earlier(num_found, sum(shard.kept for shard in packed)))
        manifest = _finish(source, folder, packed, samples_per_shard)
    return manifest


def _check_arguments(samples_per_shard: int, workers: int) -> None:
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}: it must be at least 1")
    if workers < 1:
        raise ValueError(f"workers is {workers}: it must be at least 1")


def _pack(
    source: Source, folder: Path, samples_per_shard: int, workers: int, progress: Progress | None
) -> list[PackedShard]:
    """Write all tar files.

    Raises:
        ValueError: images are faulty.
    """
    total = len(source.dataset.images)
    num_shards = -(-total // samples_per_shard)
    problems = Problems(source.images, "faulty image")
    tasks = _tasks(source, folder, samples_per_shard)
    packed: list[PackedShard] = []
    advance = (lambda done: progress(done, total)) if progress else None
    with closing(run_tasks(pack_shard, tasks, workers=min(workers, num_shards), progress=advance)) as results:
        for shard in results:
            packed.append(shard)
            problems.add_many(shard.faults, shard.num_faults)
    problems.raise_if_any()
    return packed


def _tasks(source: Source, folder: Path, samples_per_shard: int) -> Iterator[ShardTask]:
    dataset = source.dataset
    for number, start in enumerate(range(0, len(dataset.images), samples_per_shard)):
        records = dataset.images[start : start + samples_per_shard]
        annotations = [dataset.annotations.get(record["id"], []) for record in records]
        yield ShardTask(number, source.images, folder, records, annotations)


def _finish(source: Source, folder: Path, packed: list[PackedShard], samples_per_shard: int) -> Manifest:
    samples = np.concatenate([shard.samples for shard in packed])
    files = [shard.file for shard in packed if shard.file is not None]
    num_turned = sum(shard.num_turned for shard in packed)
    np.savez(folder / INDEX, samples=samples)
    manifest = _describe(source.dataset, source.name, samples, files, samples_per_shard, num_turned)
    manifest.save(folder)
    publish(folder, [*(file.name for file in files), INDEX, MANIFEST])
    return manifest


def _describe(
    dataset: CocoDataset,
    source: str,
    samples: Samples,
    files: list[ShardFile],
    samples_per_shard: int,
    num_turned: int,
) -> Manifest:
    turned = (
        f"{num_turned} images carry an EXIF orientation, which is not applied: boxes refer to stored pixels"
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=data_fingerprint(samples, dataset.categories),
        num_samples=len(samples),
        num_annotations=int(samples["num_annotations"].sum()),
        samples_per_shard=samples_per_shard,
        shards=files,
        categories=dataset.categories,
        label_maps=label_maps([category["id"] for category in dataset.categories]),
        source={"name": source, "sha256": dataset.sha256},
        header=dataset.header,
        notices=dataset.notices + ([turned] if num_turned else []),
    )


def _found_earlier(num_found: int, num_kept: int) -> str:
    line = f"an earlier run was stopped: {num_kept} of its finished shards were kept"
    if num_kept < num_found:
        line += f", {num_found - num_kept} of other input or damaged were discarded"
    return line
