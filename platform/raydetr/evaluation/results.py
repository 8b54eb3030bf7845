"""Detections as COCO results, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from detrs.structures import Detections
from raydetr.shards.manifest import LabelMap


def to_coco_results(
    image_ids: Sequence[int], detections: Sequence[Detections], label_map: LabelMap
) -> list[dict[str, Any]]:
    """The detections of a batch as COCO results: one dict a box, boxes xywh in pixels.

    A label beyond the label map is dropped: a model may be configured with more classes than the data has.

    Args:
        image_ids: COCO image id of each image of the batch.
        detections: one entry an image, in the same order.
        label_map: gives each label its category_id.
    """
    return [
        result
        for image_id, found in zip(image_ids, detections, strict=True)
        for result in _image_results(image_id, found, label_map.category_ids)
    ]


def from_coco_results(results: Sequence[Mapping[str, Any]], label_map: LabelMap) -> Detections:
    """The results of one image as detections, best first.

    Raises:
        ValueError: a category_id that no label stands for.
    """
    labels = label_map.labels
    unknown = {result["category_id"] for result in results} - labels.keys()
    if unknown:
        raise ValueError(f"results name category_id {sorted(unknown)}, the data has {sorted(labels)}")
    ordered = sorted(results, key=lambda result: -result["score"])
    xywh = torch.tensor([result["bbox"] for result in ordered], dtype=torch.float32).reshape(-1, 4)
    return Detections(
        scores=torch.tensor([result["score"] for result in ordered], dtype=torch.float32),
        labels=torch.tensor([labels[result["category_id"]] for result in ordered], dtype=torch.int64),
        boxes_xyxy=torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1),
    )


def _image_results(image_id: int, found: Detections, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    rows = zip(found.scores.tolist(), found.labels.tolist(), found.boxes_xyxy.tolist(), strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
        }
        for score, label, (left, top, right, bottom) in rows
        if label < len(category_ids)
    ]
