"""Detections as COCO results, and back.

One pass of a detector over a validation split, on one rank or on many. No Ray in here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


Postprocess = Callable[[Predictions, Tensor], list[Detections]]
AllGather = Callable[[list[dict[str, Any]]], list[list[dict[str, Any]]]]


def single_process(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The gather of a single process."""
    return [results]


def without_blanks(batches: Iterator[Batch | None], met: list[CorruptSample]) -> Iterator[Batch | None]:
    """The batches, with None for those of which damage left nothing; the damage is added to `met`."""
    for batch in batches:
        if batch is not None:
            met.extend(replace(row, action="not evaluated") for row in batch.corrupt)
        yield None if batch is None or batch.is_blank else batch


def evaluate(
    detector: nn.Module,
    postprocess: Postprocess,
    batches: Iterator[Batch | None],
    label_map: LabelMap,
    all_gather: AllGather = single_process,
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """COCO results of all ranks; what ranks other than 0 get is what `gather` gives them.

    Args:
        detector: in eval mode during the pass, and back in its former mode after it.
        postprocess: (predictions, original sizes [b, 2] as height, width) -> one Detections an image.
        batches: this rank's share; `None` is padding, so that all ranks count equally many batches.
        label_map: gives each label its category_id.
        gather: called once on every rank at the end, with that rank's results.
        device: where the detector is; None: where its parameters are.
    """
    device = device or next(detector.parameters()).device
    with _evaluating(detector), torch.inference_mode():
        results = [
            result
            for batch in batches
            if batch is not None
            for result in _batch_results(detector, postprocess, batch, label_map, device)
        ]
    return [result for share in all_gather(results) for result in share]


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
def _evaluating(module: nn.Module) -> Iterator[None]:
    # each module's own mode is kept: parts that are frozen stay in eval mode when training goes on
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
