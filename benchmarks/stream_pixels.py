"""Measure decoding, augmenting and batching on one core, against a Pillow float pipeline like the official code's.

Both get the same encoded images from memory, draw the same flips, crops and scales and make the same batch; they
alternate batch by batch. Ours reuses one buffer, as the loader processes do. Times are CPU times, and all figures are
medians over batches. Images are the photographs of `RAYDETR_COCO_TINY`, otherwise generated ones of 640x480.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from float_pipeline import Target, float_batch
from PIL import Image
from torch import Tensor

from detrs.structures import Images, Targets
from raydetr.config import TransformConfig
from raydetr.data.batch import collate, to_model
from raydetr.data.samples import load_sample
from raydetr.data.transforms.transform import Transform
from raydetr.recipes.coco import OFFICIAL_SHORT_SIDES, official_training_transform
from raydetr.shards.reader import Shards, open_shards
from raydetr.shards.source import coco_source
from raydetr.shards.validation import RawSample
from raydetr.shards.writer import write_source

BATCH = 4
NUM_IMAGES = 40


def cases(seconds: float) -> list[dict[str, Any]]:
    """Measure all cases for about `seconds` each; return images per second and the target ratio."""
    torch.set_num_threads(1)
    scales = Transform(TransformConfig(short_sides=OFFICIAL_SHORT_SIDES, max_side=1333, horizontal_flip=0.5))
    small = Transform(TransformConfig(short_sides=(320,), max_side=1333, horizontal_flip=0.5))
    with tempfile.TemporaryDirectory() as folder:
        shards = _shards(Path(folder))
        official = Transform(official_training_transform())
        jpegs = [shards.read(index) for index in range(min(NUM_IMAGES, shards.num_samples))]
        pngs = [dataclasses.replace(raw, image=_as_png(raw.image)) for raw in jpegs]
        return [
            _case("480 to 800 px", shards, jpegs, scales, 3.0, seconds),
            _case("480 to 800 px, with the official crops", shards, jpegs, official, 3.0, seconds),
            _case("320 px", shards, jpegs, small, 2.5, seconds),
            _case("480 to 800 px, PNG", shards, pngs, scales, 2.0, seconds),
        ]


def _case(
    name: str, shards: Shards, raws: list[RawSample], transform: Transform, target: float, seconds: float
) -> dict[str, Any]:
    memory = np.zeros(BATCH * 1400 * 1400 * 3, np.uint8)

    def ours(numbers: list[int], position: int) -> tuple[Images, Targets]:
        samples = [
            load_sample(shards, number, transform, seed=0, position=position + slot, raw=raws[number])
            for slot, number in enumerate(numbers)
        ]
        batch = collate(samples, position, out=lambda shape: memory[: int(np.prod(shape))].reshape(shape))
        return to_model(batch, "cpu")

    def baseline(numbers: list[int], position: int) -> object:
        return float_batch([raws[number] for number in numbers], transform, position)

    check_equal(*ours(list(range(BATCH)), 0), float_batch(raws[:BATCH], transform, 0))
    took: dict[Callable[..., Any], list[float]] = {ours: [], baseline: []}
    for batch, numbers in enumerate(_batches(len(raws), seconds)):
        for pipeline in (ours, baseline) if batch % 2 else (baseline, ours):
            start = time.process_time()
            pipeline(numbers, batch * BATCH)
            took[pipeline].append(time.process_time() - start)
    pairs = list(zip(took[ours], took[baseline], strict=True))[2:]  # after a warm-up
    return {
        "case": f"decode, augment, batch: {name}",
        "ours": BATCH / statistics.median(own for own, _ in pairs),
        "baseline": BATCH / statistics.median(other for _, other in pairs),
        "ratio": statistics.median(other / own for own, other in pairs),
        "unit": "images/s",
        "target": target,
    }


def check_equal(images: Images, targets: Targets, expected: tuple[Tensor, Tensor, list[Target]]) -> None:
    """Check that both make the same batch, pixels to within one of 255 levels (two where noise is shrunk)."""
    pixels, padding, target = expected
    assert torch.equal(images.padding_mask, padding)
    assert (images.pixels - pixels).abs().max() < 2.01 / 255 / 0.224
    torch.testing.assert_close(targets.boxes, torch.cat([one["boxes"] for one in target]))


def _batches(num_images: int, seconds: float) -> Iterator[list[int]]:
    end, start = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or start < 8 * BATCH:
        yield [(start + slot) % num_images for slot in range(BATCH)]
        start += BATCH


def _shards(folder: Path) -> Shards:
    photographs = os.environ.get("RAYDETR_COCO_TINY")
    if photographs:
        images = Path(photographs, "train2017")
        annotations = Path(photographs, "annotations", "instances_train2017.json")
    else:
        images, annotations = _draw_images(folder / "generated")
    write_source(coco_source(images, annotations), folder / "shards")
    return open_shards(folder / "shards")


def _draw_images(folder: Path) -> tuple[Path, Path]:
    """Draw smooth noise of 640x480, whose JPEGs are as large as those of photographs."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, NUM_IMAGES + 1):
        layers = [rng.integers(0, 256, (480 // step, 640 // step, 3), np.uint8) for step in (80, 20, 4)]
        resized = [np.asarray(Image.fromarray(layer).resize((640, 480)), float) for layer in layers]
        pixels = np.average(resized, axis=0, weights=[4, 2, 1]).astype(np.uint8)
        name = f"{number:012d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=95)
        images.append({"id": number, "file_name": name, "width": 640, "height": 480})
        box = {"bbox": [100, 100, 200, 200], "area": 40000, "iscrowd": 0, "category_id": 1}
        annotations += [{**box, "id": number * 10 + k, "image_id": number} for k in range(7)]
    record = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations.json").write_text(json.dumps(record))
    return folder, folder / "annotations.json"


def _as_png(content: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(content)).convert("RGB").save(buffer, "PNG", icc_profile=None)
    return buffer.getvalue()


if __name__ == "__main__":
    for case in cases(8.0):
        print(
            f"{case['case']:60} {case['ours']:8.1f} {case['baseline']:8.1f} {case['ratio']:6.2f} ({case['target']})"
        )
