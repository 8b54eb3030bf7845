"""Run a detector over a split, in one of one or many processes, and convert detections to COCO results.

The processes do not communicate: each returns the packed arrays of its share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detrs.criterion import Criterion
from detrs.matcher import NonFiniteError
from detrs.structures import Detections, Outputs, Predictions, Targets
from raydetr.data.batch import Batch, to_model
from raydetr.data.corrupt import CorruptSample
from raydetr.evaluation.detections import PackedDetections
from raydetr.shards.manifest import LabelMap

Postprocess = Callable[[Predictions, Tensor], list[Detections]]


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
    return pack(image_ids, detections, label_map).results().to_coco()


def pack(image_ids: Sequence[int], detections: Sequence[Detections], label_map: LabelMap) -> PackedDetections:
    """Pack the detections of a batch, without losses and with 0 as all times; see `to_coco_results`."""
    ids = np.array(image_ids, np.int64)
    counts = [len(found.scores) for found in detections]
    # One copy to the host for each kind, because each waits for the device
    labels = _to_host([found.labels for found in detections], np.int64, (0,))
    known = labels < len(label_map.category_ids)
    return PackedDetections(
        np.repeat(ids, counts)[known],
        np.array(label_map.category_ids, np.int64)[labels[known]],
        _to_host([found.boxes_xyxy for found in detections], np.float32, (0, 4))[known],
        _to_host([found.scores for found in detections], np.float32, (0,))[known],
        ids,
        np.zeros(len(ids), np.float32),
        np.zeros(len(ids), np.float64),
        np.full(len(ids), np.nan, np.float32),
    )


def _to_host(parts: Sequence[Tensor], dtype: type, empty: tuple[int, ...]) -> Any:
    return torch.cat(list(parts)).cpu().numpy().astype(dtype) if parts else np.zeros(empty, dtype)


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
    device: torch.device | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    criterion: Criterion | None = None,
) -> PackedDetections:
    """Run a detector over the batches of this process.

    Args:
        detector: put into eval mode during the pass, and restored afterwards.
        postprocess: (predictions, original sizes [b, 2] as height, width) -> one Detections per image.
        batches: those of this rank; `None` pads them to the same number on all ranks.
        label_map: maps labels to category_ids.
        device: of the detector; None: that of its parameters.
        autocast: returns the context of the detector's forward pass.
        criterion: computes the loss of each image; None: there are no losses.

    Raises:
        ShardError, LoaderError, RemoteError: from `batches`.
    """
    device = device or next(detector.parameters()).device
    began, parts = time.perf_counter(), []
    with _eval_mode(detector), torch.inference_mode():
        for batch in batches:
            if batch is not None:
                part = _detect(detector, postprocess, batch, label_map, device, autocast, criterion)
                ended = time.perf_counter() - began
                parts.append(replace(part, ended=np.full_like(part.ended, ended)))
    return PackedDetections.concatenate(parts)


def _detect(
    detector: nn.Module,
    postprocess: Postprocess,
    batch: Batch,
    label_map: LabelMap,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    criterion: Criterion | None,
) -> PackedDetections:
    began = time.perf_counter()
    images, targets = to_model(batch, device)
    with autocast():
        outputs = detector(images)
    detections = postprocess(outputs.predictions, batch.original_sizes.to(device))
    packed = pack(batch.image_ids.tolist(), detections, label_map)
    # The copies to the host have waited for the device
    seconds = (time.perf_counter() - began) / len(batch.image_ids)
    packed = replace(packed, seconds=np.full_like(packed.seconds, seconds))
    return packed if criterion is None else replace(packed, losses=_losses(criterion, outputs, targets))


def _losses(criterion: Criterion, outputs: Outputs, targets: Targets) -> NDArray[np.float32]:
    """Return the loss of each image of a batch; NaN for all of them if one has none."""
    try:
        return criterion.by_image(outputs, targets).cpu().numpy().astype(np.float32)
    except NonFiniteError:  # losses only explain: the scores say whether the model has diverged
        return np.full(len(targets.counts), np.nan, np.float32)


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
