from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detrs.structures import Detections, Images, Outputs, Predictions
from raydetr.data.batch import Batch, Sample, collate
from raydetr.data.transforms.pixels import LazyImage
from raydetr.evaluation.coco_metrics import coco_ap
from raydetr.evaluation.evaluator import evaluate
from raydetr.shards.manifest import LabelMap

LABEL_MAP = LabelMap("contiguous", (3, 7), ("disc", "ring"))


class Detector(nn.Module):
    """Finds one box per image, whose class is the brighter of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Dropout().eval()
        self.seen_modes: list[tuple[bool, bool, bool]] = []

    def forward(self, images: Images) -> Outputs:
        self.seen_modes.append((self.training, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        brightness = images.pixels.mean(dim=(2, 3))[:, :2] * self.scale
        boxes = torch.tensor([0.5, 0.5, 0.5, 0.25]).expand(len(brightness), 1, 4)
        return Outputs(Predictions(brightness[None, :, None], boxes[None]), None)


def postprocess(predictions: Predictions, sizes: Tensor) -> list[Detections]:
    scores, labels = predictions.logits[-1].sigmoid().max(-1)
    center, extent = predictions.boxes[-1][..., :2], predictions.boxes[-1][..., 2:] / 2
    boxes = torch.cat([center - extent, center + extent], dim=-1) * sizes.flip(1).repeat(1, 2)[:, None]
    return [Detections(*parts) for parts in zip(scores, labels, boxes, strict=True)]


def make_batch(*image_ids: int) -> Batch:
    samples = []
    for image_id in image_ids:
        pixels = np.random.default_rng(image_id).integers(0, 256, (8, 12, 3), np.uint8)
        pixels[..., image_id % 2] //= 2
        labels, boxes = np.array([image_id % 2]), np.array([[2.0, 1.0, 8.0, 3.0]])
        samples.append(Sample(LazyImage.unresized(pixels), labels, boxes, image_id, (80, 120)))
    return collate(samples, position=0)


def truth(num_images: int) -> dict[str, Any]:
    annotations = [
        {"id": i, "image_id": i, "category_id": (3, 7)[1 - i % 2], "bbox": [30.0, 30.0, 60.0, 25.0]}
        for i in range(num_images)
    ]
    categories = [{"id": 3, "name": "disc"}, {"id": 7, "name": "ring"}]
    return {
        "images": [{"id": i} for i in range(num_images)],
        "annotations": annotations,
        "categories": categories,
    }


class FakeAllGather:
    """Collects the results of the ranks, which run one after another in one process."""

    def __init__(self) -> None:
        self.results: list[list[dict[str, Any]]] = []

    def __call__(self, results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        self.results.append(results)
        return self.results


def test_results_are_in_pixels_and_category_ids() -> None:
    results = evaluate(Detector(), postprocess, iter([make_batch(0, 1), make_batch(2)]), LABEL_MAP)
    assert [r["image_id"] for r in results] == [0, 1, 2]
    assert [r["category_id"] for r in results] == [7, 3, 7]
    assert results[0]["bbox"] == pytest.approx([30, 30, 60, 20])
    assert 0 < results[0]["score"] < 1


def test_modes_are_restored() -> None:
    detector = Detector().train()
    detector.frozen.eval()
    evaluate(detector, postprocess, iter([make_batch(0)]), LABEL_MAP)
    assert detector.seen_modes == [(False, True, False)]
    assert (detector.training, detector.frozen.training) == (True, False)

    def broken(predictions: Predictions, sizes: Tensor) -> list[Detections]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        evaluate(detector, broken, iter([make_batch(0)]), LABEL_MAP)
    assert (detector.training, detector.frozen.training) == (True, False)


def test_sharded_equals_single_to_the_last_digit() -> None:
    batches = [make_batch(*range(start, min(start + 3, 20))) for start in range(0, 20, 3)]
    single = evaluate(Detector(), postprocess, iter(batches), LABEL_MAP)
    expected = coco_ap(truth(20), single).to_dict()
    assert 0 < expected["AP"] < 1
    for world_size in (2, 3, 4):
        all_gather = FakeAllGather()
        for rank in range(world_size):
            mine: list[Batch | None] = [*batches[rank::world_size]]
            padding: list[Batch | None] = [None] * (-(-len(batches) // world_size) - len(mine))
            sharded = evaluate(Detector(), postprocess, iter(mine + padding), LABEL_MAP, all_gather)
        assert len(all_gather.results) == world_size
        assert [r["image_id"] for r in sharded] != [r["image_id"] for r in single]
        assert coco_ap(truth(20), sharded).to_dict() == expected


def test_gather_is_called_once_even_without_batches() -> None:
    all_gather = FakeAllGather()
    assert evaluate(Detector(), postprocess, iter([None]), LABEL_MAP, all_gather) == []
    assert all_gather.results == [[]]
