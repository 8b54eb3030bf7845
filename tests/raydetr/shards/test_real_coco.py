"""With photographs of COCO 2017."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from made_results import average_precision
from raydetr.config import TransformConfig
from raydetr.data.batch import Batch
from raydetr.data.layout import Layout
from raydetr.data.samples import load_sample
from raydetr.data.stream import train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.shards.info import describe
from raydetr.shards.reader import Shards, open_shards
from raydetr.shards.source import coco_source
from raydetr.shards.verify import check_shards
from raydetr.shards.writer import write_source


@pytest.fixture(scope="module")
def real(coco_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    out = tmp_path_factory.mktemp("real") / "val"
    write_source(coco_source(coco_tiny / "val2017", annotation_file(coco_tiny)), out, samples_per_shard=32)
    return open_shards(out, label_map="category_id")


def annotation_file(coco_tiny: Path) -> Path:
    return coco_tiny / "annotations" / "instances_val2017.json"


def test_average_precision_from_the_shards_is_that_of_the_json(coco_tiny: Path, real: Shards) -> None:
    original = json.loads(annotation_file(coco_tiny).read_text())
    expected = average_precision(original)
    assert 0.1 < expected[0] < 0.9
    assert average_precision(real.coco()) == expected
    assert real.label_map.num_classes == 91


def test_images_and_crowds_survive(coco_tiny: Path, real: Shards) -> None:
    data = json.loads(annotation_file(coco_tiny).read_text())
    for index, record in enumerate(data["images"]):
        sample = real.read(index)
        assert sample.record == record
        assert sample.image == (coco_tiny / "val2017" / record["file_name"]).read_bytes()
    num_crowds = sum(annotation["iscrowd"] for annotation in data["annotations"])
    assert f"{num_crowds} crowd annotations" in " ".join(real.manifest.notices)


def test_every_byte_is_verified(coco_tiny: Path, real: Shards) -> None:
    data = json.loads(annotation_file(coco_tiny).read_text())
    manifest = check_shards(real.path)
    assert manifest.num_samples == len(data["images"])
    counts = Counter(annotation["category_id"] for annotation in data["annotations"])
    described = describe(real)["categories"]
    assert {
        category["id"]: category["annotations"] for category in described if category["annotations"]
    } == counts


def test_batches_hold_the_photographs_and_their_boxes(coco_tiny: Path, real: Shards) -> None:
    data = json.loads(annotation_file(coco_tiny).read_text())
    stream = train_batches(real, seed=0, position=0, layout=Layout(4), transform=Transform(TransformConfig()))
    names = {record["id"]: record["file_name"] for record in data["images"]}
    seen: list[int] = []
    for _ in range(20):
        batch = next(stream)
        check_batch(batch, data["annotations"], coco_tiny / "val2017", names)
        seen += batch.image_ids.tolist()
    assert sorted(seen) == sorted(names)


@pytest.mark.parametrize("short_side", [224, 320, 544, 800])
def test_resized_photographs_are_pillows(real: Shards, short_side: int) -> None:
    """Up to the rounding of sums halfway between two levels."""
    for index in range(0, 80, 11):
        raw = real.read(index)
        sample = load_sample(
            real, index, Transform(TransformConfig(short_sides=(short_side,))), seed=0, position=0
        )
        with Image.open(io.BytesIO(raw.image)) as image:
            expected = image.convert("RGB").resize(sample.image.size, Image.Resampling.BILINEAR)
        difference = sample.image.pixels().astype(int) - np.asarray(expected)
        assert abs(difference).max() <= 1
        assert (difference != 0).mean() < 0.05
        assert abs(difference.mean()) < 0.002


def check_batch(batch: Batch, annotations: list[dict[str, Any]], images: Path, names: dict[int, str]) -> None:
    """Compare a batch with files and records, read in the plainest way."""
    boxes = torch.split(batch.boxes, batch.counts)
    labels = torch.split(batch.labels, batch.counts)
    for i, image_id in enumerate(batch.image_ids.tolist()):
        with Image.open(images / names[image_id]) as image:
            pixels = np.asarray(image.convert("RGB"))
        height, width = pixels.shape[:2]
        np.testing.assert_array_equal(batch.pixels[i, :, :height, :width].permute(1, 2, 0), pixels)
        own = [a for a in annotations if a["image_id"] == image_id and not a["iscrowd"]]
        assert labels[i].tolist() == [annotation["category_id"] for annotation in own]
        x, y, w, h = np.array([annotation["bbox"] for annotation in own]).reshape(-1, 4).T
        expected = np.stack([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height], axis=1)
        np.testing.assert_allclose(boxes[i], expected, atol=0.01)  # COCO's boxes reach out by rounding
