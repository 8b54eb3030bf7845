"""One pass of a detector over a validation split, on one rank or on many. No Ray in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from detrs.structures import Detections, Predictions
from raydetr.data.batch import Batch, to_model
from raydetr.data.corrupt import Damage
from raydetr.evaluation.results import to_coco_results
from raydetr.shards.manifest import LabelMap

Postprocess = Callable[[Predictions, Tensor], list[Detections]]
Gather = Callable[[list[dict[str, Any]]], list[list[dict[str, Any]]]]


def alone(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The gather of a single process."""
    return [results]


def without_blanks(batches: Iterator[Batch | None], met: list[Damage]) -> Iterator[Batch | None]:
    """The batches, with None for those of which damage left nothing; the damage is added to `met`."""
    for batch in batches:
        if batch is not None:
            met.extend(replace(row, action="not evaluated") for row in batch.damage)
        yield None if batch is None or batch.is_blank else batch


def evaluate(
    detector: nn.Module,
    postprocess: Postprocess,
    batches: Iterator[Batch | None],
    label_map: LabelMap,
    gather: Gather = alone,
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
    return [result for share in gather(results) for result in share]


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
