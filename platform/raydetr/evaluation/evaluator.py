"""Evaluate a detector on a split, on one or many ranks, and convert detections to and from COCO results.

The only communication between ranks is the `all_gather` that is passed in: there is no Ray here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from detrs.structures import Detections, Predictions
from raydetr.data.batch import Batch, to_model
from raydetr.data.corrupt import CorruptSample
from raydetr.shards.manifest import LabelMap


def to_coco_results(
    image_ids: Sequence[int], detections: Sequence[Detections], label_map: LabelMap
) -> list[dict[str, Any]]:
    """Convert the detections of a batch to COCO results: one dict per box, boxes xywh in pixels.

    Labels beyond the label map are dropped: a model may be configured with more classes than the data has.

    Args:
        image_ids: COCO image id of each image of the batch.
        detections: one entry per image, in the same order.
        label_map: maps labels to category_ids.
    """
    return [
        result
        for image_id, found in zip(image_ids, detections, strict=True)
        for result in _image_results(image_id, found, label_map.category_ids)
    ]


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


Postprocess = Callable[[Predictions, Tensor], list[Detections]]
AllGather = Callable[[list[dict[str, Any]]], list[list[dict[str, Any]]]]


def single_process(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the results of the only process: the `all_gather` of a world of one."""
    return [results]


def drop_blank_batches(
    batches: Iterator[Batch | None], corrupt: list[CorruptSample]
) -> Iterator[Batch | None]:
    """Replace blank batches by None, and append the corrupt samples of all batches to `corrupt`."""
    for batch in batches:
        if batch is not None:
            corrupt.extend(replace(row, action="not predicted") for row in batch.corrupt)
        yield None if batch is None or batch.is_blank else batch


def evaluate(
    detector: nn.Module,
    postprocess: Postprocess,
    batches: Iterator[Batch | None],
    label_map: LabelMap,
    all_gather: AllGather = single_process,
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """Run a detector over batches, and return the COCO results that `all_gather` returns: those of all ranks.

    Args:
        detector: put into eval mode during the pass, and restored afterwards.
        postprocess: (predictions, original sizes [b, 2] as height, width) -> one Detections per image.
        batches: those of this rank; `None` pads them to the same number on all ranks.
        label_map: maps labels to category_ids.
        all_gather: called once on every rank at the end, with that rank's results.
        device: of the detector; None: that of its parameters.

    Raises:
        ShardError, LoaderError, RemoteError: from `batches`.
    """
    device = device or next(detector.parameters()).device
    with _eval_mode(detector), torch.inference_mode():
        results = [
            result
            for batch in batches
            if batch is not None
            for result in _batch_results(detector, postprocess, batch, label_map, device)
        ]
    return [result for rank_results in all_gather(results) for result in rank_results]


def _batch_results(
    detector: nn.Module,
    postprocess: Postprocess,
    batch: Batch,
    label_map: LabelMap,
    device: torch.device,
) -> list[dict[str, Any]]:
    images, _ = to_model(batch, device)
    outputs = detector(images)
    detections = postprocess(outputs.predictions, batch.original_sizes.to(device))
    return to_coco_results(batch.image_ids.tolist(), detections, label_map)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    # Each module's own mode is restored: frozen parts stay in eval mode when training resumes
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
