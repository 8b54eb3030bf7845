"""One pass of a detector over a validation split, on one rank or on many. No Ray in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from detrs.structures import Detections, Predictions
from raydetr.data.batch import Batch, to_model
from raydetr.evaluate.results import to_coco_results

Postprocess = Callable[[Predictions, Tensor], list[Detections]]
Gather = Callable[[list[dict[str, Any]]], list[list[dict[str, Any]]]]


def alone(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The gather of a single process."""
    return [results]


def evaluate(
    detector: nn.Module,
    postprocess: Postprocess,
    batches: Iterator[Batch | None],
    category_ids: Mapping[int, int],
    gather: Gather = alone,
) -> list[dict[str, Any]]:
    """COCO results of all ranks; what ranks other than 0 get is what `gather` gives them.

    Args:
        detector: on the device where it shall run; it is in eval mode during the pass, and back in its
            former mode after it.
        postprocess: (predictions, original sizes [b, 2] as height, width) -> one Detections an image.
        batches: this rank's share; `None` is padding, so that all ranks count equally many batches.
        category_ids: label -> category_id.
        gather: called once on every rank at the end, with that rank's results.
    """
    with _evaluating(detector), torch.inference_mode():
        results = [
            result
            for batch in batches
            if batch is not None
            for result in _batch_results(detector, postprocess, batch, category_ids)
        ]
    return [result for share in gather(results) for result in share]


def _batch_results(
    detector: nn.Module, postprocess: Postprocess, batch: Batch, category_ids: Mapping[int, int]
) -> list[dict[str, Any]]:
    device = next(detector.parameters()).device
    images, _ = to_model(batch, device)
    outputs = detector(images)
    detections = postprocess(outputs.predictions, batch.original_sizes.to(device))
    return to_coco_results(batch.image_ids.tolist(), detections, category_ids)


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
