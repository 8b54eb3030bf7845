"""Hold what one process found in its share of a split as packed arrays, and write and read them as one file.

This module loads neither torch nor Ray: a scoring process imports it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raydetr.evaluation.results import Results

PER_IMAGE = ("evaluated_ids", "seconds", "ended", "losses")  # arrays with a row per image


@dataclass(frozen=True)
class PackedDetections:
    """The detections of some images, one row per box, and one row per image that was evaluated.

    `boxes_xyxy` and `scores` are what the model returned, bit for bit.
    """

    image_ids: NDArray[np.int64]  # [n]
    category_ids: NDArray[np.int64]  # [n]
    boxes_xyxy: NDArray[np.float32]  # [n, 4], pixels
    scores: NDArray[np.float32]  # [n]
    evaluated_ids: NDArray[np.int64]  # [m], the images, also those without a detection
    # [m], from the pixels on the host to the detections on the host, over the batch size
    seconds: NDArray[np.float32]
    # [m], from the start of the evaluation in its process to the end of the image's batch, in seconds
    ended: NDArray[np.float64]
    losses: NDArray[np.float32]  # [m], see `detrs.criterion.Criterion.by_image`; NaN: not computed

    @classmethod
    def concatenate(cls, parts: Iterable[PackedDetections]) -> PackedDetections:
        """Join the arrays of batches or processes."""
        parts = [*parts, _NONE]
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def of_images(self, image_ids: Iterable[int]) -> PackedDetections:
        """Return the detections of some images."""
        wanted = np.array(list(image_ids), np.int64)
        rows, images = np.isin(self.image_ids, wanted), np.isin(self.evaluated_ids, wanted)
        return PackedDetections(
            *(getattr(self, f.name)[images if f.name in PER_IMAGE else rows] for f in fields(self))
        )

    def image_losses(self) -> dict[int, float]:
        """Return the losses that were computed, by image id."""
        pairs = zip(self.evaluated_ids.tolist(), self.losses.tolist(), strict=True)
        return {image_id: loss for image_id, loss in pairs if np.isfinite(loss)}

    def results(self) -> Results:
        """Return the detections with boxes as COCO has them, in float64."""
        boxes = self.boxes_xyxy.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        return Results(self.image_ids, self.category_ids, boxes, self.scores.astype(np.float64))

    def to_npz(self) -> bytes:
        """Return the content of a file, uncompressed: compression takes seconds, and saves a fifth."""
        file = io.BytesIO()
        np.savez(file, **{f.name: getattr(self, f.name) for f in fields(self)})
        return file.getvalue()

    @classmethod
    def from_npz(cls, file: Path | bytes) -> PackedDetections:
        """Read a file, or its content.

        Raises:
            ValueError: it is not complete, or not one of `to_npz`.
            OSError: it cannot be read.
        """
        name = "the arrays" if isinstance(file, bytes) else str(file)
        try:
            # numpy does not close a corrupt file
            with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
                arrays = np.load(stream)
                packed = cls(**{f.name: arrays[f.name] for f in fields(cls)})
        except OSError:
            raise
        except Exception as error:  # numpy and zipfile raise any error for a corrupt npz
            raise ValueError(f"{name}: not detections of an evaluation ({error}): evaluate again") from None
        packed._check(name)
        return packed

    def _check(self, name: str) -> None:
        for f in fields(self):
            found, wanted = getattr(self, f.name), getattr(_NONE, f.name)
            rows = self.evaluated_ids if f.name in PER_IMAGE else self.scores
            shape = (len(rows), *wanted.shape[1:])
            if found.dtype != wanted.dtype or found.shape != shape:
                raise ValueError(
                    f"{name}: {f.name} is {found.dtype}{list(found.shape)}, expected {wanted.dtype}{list(shape)}: "
                    "evaluate again"
                )


_NONE = PackedDetections(
    np.zeros(0, np.int64),
    np.zeros(0, np.int64),
    np.zeros((0, 4), np.float32),
    np.zeros(0, np.float32),
    np.zeros(0, np.int64),
    np.zeros(0, np.float32),
    np.zeros(0, np.float64),
    np.zeros(0, np.float32),
)
