from __future__ import annotations

import torch

from detrs.structures import Detections
from raydetr.evaluation.evaluator import to_coco_results
from raydetr.shards.manifest import LabelMap

LABEL_MAP = LabelMap("contiguous", (3, 7), ("disc", "ring"))


def detections(scores: list[float], labels: list[int], boxes: list[list[float]]) -> Detections:
    queries = torch.arange(len(scores))
    found = torch.tensor(labels, dtype=torch.int64)
    return Detections(torch.tensor(scores), found, torch.tensor(boxes).reshape(-1, 4), queries)


def test_boxes_become_xywh_and_labels_category_ids() -> None:
    found = [
        detections([0.75, 0.5], [1, 0], [[10.0, 20.0, 40.0, 30.0], [0.0, 0.0, 1.5, 2.5]]),
        detections([], [], []),
    ]
    assert to_coco_results([5, 6], found, LABEL_MAP) == [
        {"image_id": 5, "category_id": 7, "bbox": [10.0, 20.0, 30.0, 10.0], "score": 0.75},
        {"image_id": 5, "category_id": 3, "bbox": [0.0, 0.0, 1.5, 2.5], "score": 0.5},
    ]


def test_labels_beyond_the_data_are_dropped() -> None:
    found = detections([0.9, 0.8], [12, 1], [[0.0, 0.0, 1.0, 1.0]] * 2)
    assert [r["category_id"] for r in to_coco_results([5], [found], LABEL_MAP)] == [7]
