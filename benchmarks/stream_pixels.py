"""Decode, augment and batch on one core, against a Pillow float pipeline in the style of the official code.

Both get the same encoded images from memory and draw the same flips, crops and scales; they take turns, batch by
batch. Ours fills one buffer again and again, as the loader processes do. Times are CPU times, and all figures medians
over batches. Images are the photographs of `RAYDETR_COCO_TINY`, else drawn ones of 640x480.
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
from PIL import Image
from torch import Tensor

from raydetr.data.batch import Batch, collate
from raydetr.data.geometry import resized_size
from raydetr.data.index import Shards, open_shards
from raydetr.data.integrity import RawSample
from raydetr.data.samples import make_sample
from raydetr.data.shards import write_shards
from raydetr.data.transforms import Choices, Transform
from raydetr.recipes.coco import OFFICIAL_SHORT_SIDES, official_training_transform

BATCH = 4
NUM_IMAGES = 40
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def cases(seconds: float) -> list[dict[str, Any]]:
    """Measure all cases, each for about `seconds`; images a second, and what the ratio should be."""
    torch.set_num_threads(1)
    scales = Transform(short_sides=OFFICIAL_SHORT_SIDES, max_side=1333, horizontal_flip=0.5)
    small = Transform(short_sides=(320,), max_side=1333, horizontal_flip=0.5)
    with tempfile.TemporaryDirectory() as folder:
        shards = _shards(Path(folder))
        official = official_training_transform().build()
        jpegs = [shards.read(index) for index in range(min(NUM_IMAGES, shards.num_samples))]
        pngs = [dataclasses.replace(raw, image=_as_png(raw.image)) for raw in jpegs]
        return [
            _case("480 to 800 px", shards, jpegs, scales, 3.5, seconds),
            _case(
                "480 to 800 px, with the official crops",
                shards,
                jpegs,
                official,
                3.5,
                seconds,
            ),
            _case("320 px", shards, jpegs, small, 2.5, seconds),
            _case("480 to 800 px, PNG", shards, pngs, scales, 2.0, seconds),
        ]


def _case(
    name: str, shards: Shards, raws: list[RawSample], transform: Transform, wanted: float, seconds: float
) -> dict[str, Any]:
    memory = np.zeros(BATCH * 1400 * 1400 * 3, np.uint8)

    def ours(numbers: list[int], position: int) -> Batch:
        samples = [
            make_sample(
                shards, number, raws[number], transform, seed=0, position=position + slot, short_side=None
            )
            for slot, number in enumerate(numbers)
        ]
        return collate(samples, position, out=lambda shape: memory[: int(np.prod(shape))].reshape(shape))

    def anchor(numbers: list[int], position: int) -> tuple[Tensor, Tensor]:
        return float_batch([raws[number] for number in numbers], transform, position)

    took: dict[Callable[..., Any], list[float]] = {ours: [], anchor: []}
    for batch, numbers in enumerate(_batches(len(raws), seconds)):
        for pipeline in (ours, anchor) if batch % 2 else (anchor, ours):
            start = time.process_time()
            pipeline(numbers, batch * BATCH)
            took[pipeline].append(time.process_time() - start)
    pairs = list(zip(took[ours], took[anchor], strict=True))[2:]  # after a warm-up
    return {
        "case": f"decode, augment, batch: {name}",
        "ours": BATCH / statistics.median(own for own, _ in pairs),
        "anchor": BATCH / statistics.median(other for _, other in pairs),
        "ratio": statistics.median(other / own for own, other in pairs),
        "unit": "images/s",
        "wanted": wanted,
    }


def _batches(num_images: int, seconds: float) -> Iterator[list[int]]:
    end, start = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or start < 8 * BATCH:
        yield [(start + slot) % num_images for slot in range(BATCH)]
        start += BATCH


def float_batch(raws: list[RawSample], transform: Transform, position: int) -> tuple[Tensor, Tensor]:
    """The anchor: Pillow images, float tensors, normalised, then padded into one float batch with its mask."""
    images = []
    for slot, raw in enumerate(raws):
        image = Image.open(io.BytesIO(raw.image)).convert("RGB")
        boxes = torch.tensor([a["bbox"] for a in raw.annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        choices = transform.draw(0, position + slot, image.size)
        images.append(_float_image(image, boxes, choices, transform.max_side))
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixels = torch.zeros(len(images), 3, height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for image, canvas, mask in zip(images, pixels, padding, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]].copy_(image)
        mask[: image.shape[1], : image.shape[2]] = False
    return pixels, padding


def _float_image(image: Image.Image, boxes: Tensor, choices: Choices, max_side: int) -> Tensor:
    if choices.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor(
            [image.width, 0, image.width, 0]
        )
    crop = choices.crop
    if crop is not None:
        image, boxes = _resize(image, boxes, crop.short_side, None)
        image = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
        boxes = (boxes - torch.tensor([crop.left, crop.top] * 2)).clamp(min=0)
    image, boxes = _resize(image, boxes, choices.short_side, max_side)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    return (pixels - MEAN) / STD


def _resize(
    image: Image.Image, boxes: Tensor, short_side: int | None, max_side: int | None
) -> tuple[Image.Image, Tensor]:
    assert short_side is not None
    size = resized_size(*image.size, short_side, max_side)
    ratio = torch.tensor([size[0] / image.width, size[1] / image.height] * 2)
    return image.resize(size, Image.Resampling.BILINEAR), boxes * ratio


def _shards(folder: Path) -> Shards:
    photographs = os.environ.get("RAYDETR_COCO_TINY")
    if photographs:
        images = Path(photographs, "train2017")
        annotations = Path(photographs, "annotations", "instances_train2017.json")
    else:
        images, annotations = _draw_images(folder / "drawn")
    write_shards(images, annotations, folder / "shards")
    return open_shards(folder / "shards")


def _draw_images(folder: Path) -> tuple[Path, Path]:
    """Smooth noise of 640x480, which a JPEG holds in as many bytes as a photograph."""
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
            f"{case['case']:60} {case['ours']:8.1f} {case['anchor']:8.1f} {case['ratio']:6.2f} ({case['wanted']})"
        )
