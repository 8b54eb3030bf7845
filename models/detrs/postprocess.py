"""Convert predictions to detections in pixels."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from detrs.boxes import to_xyxy
from detrs.layers import full_precision
from detrs.structures import Detections, Predictions


def best_pairs(predictions: Predictions, sizes: Int[Tensor, "b 2"], num_select: int) -> list[Detections]:
    """Return the `num_select` (query, class) pairs of each image with the highest sigmoid scores, from the last layer.

    Args:
        predictions: of a model with sigmoid scores.
        sizes: (height, width) of the original images in pixels.
        num_select: pairs per image; a query can appear with several classes.
    """
    scores = full_precision(predictions.logits[-1]).sigmoid()
    num_classes = scores.shape[-1]
    best, pairs = scores.flatten(1).topk(min(num_select, scores[0].numel()), dim=1)
    queries, labels = pairs // num_classes, pairs % num_classes
    boxes = _to_pixels(predictions.boxes[-1], sizes)
    return [Detections(best[i], labels[i], boxes[i, queries[i]], queries[i]) for i in range(len(boxes))]


def best_classes(predictions: Predictions, sizes: Int[Tensor, "b 2"]) -> list[Detections]:
    """Return every query with its best class other than "no object", by softmax score, from the last layer (DETR)."""
    scores, labels = full_precision(predictions.logits[-1]).softmax(-1)[..., :-1].max(-1)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    boxes = _to_pixels(predictions.boxes[-1], sizes)
    return [
        Detections(scores[i], labels[i, order[i]], boxes[i, order[i]], order[i]) for i in range(len(boxes))
    ]


def _to_pixels(boxes: Float[Tensor, "b q 4"], sizes: Int[Tensor, "b 2"]) -> Float[Tensor, "b q 4"]:
    boxes = full_precision(boxes)
    scale = sizes.flip(1).repeat(1, 2).to(boxes)  # width, height, width, height
    return to_xyxy(boxes) * scale[:, None]
