"""Hold the detections of a split as arrays: one row per box."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Results:
    """Detections of a split, in any order; four arrays with one row per box."""

    image_ids: NDArray[np.int64]  # [n]
    category_ids: NDArray[np.int64]  # [n]
    boxes_xywh: NDArray[np.float64]  # [n, 4], pixels
    scores: NDArray[np.float64]  # [n]

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def from_coco(cls, rows: Iterable[Mapping[str, Any]]) -> Results:
        """Convert COCO results ({"image_id", "category_id", "bbox", "score"})."""
        rows = list(rows)
        return cls(
            np.array([row["image_id"] for row in rows], np.int64),
            np.array([row["category_id"] for row in rows], np.int64),
            np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4),
            np.array([row["score"] for row in rows], np.float64),
        )

    def to_coco(self) -> list[dict[str, Any]]:
        """Convert to COCO results."""
        columns = (self.image_ids, self.category_ids, self.boxes_xywh, self.scores)
        names = ("image_id", "category_id", "bbox", "score")
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [dict(zip(names, row, strict=True)) for row in rows]

    @classmethod
    def concatenate(cls, parts: Iterable[Results]) -> Results:
        """Join the results of several processes."""
        parts = [*parts, cls.from_coco([])]
        return cls(
            np.concatenate([part.image_ids for part in parts]),
            np.concatenate([part.category_ids for part in parts]),
            np.concatenate([part.boxes_xywh for part in parts]),
            np.concatenate([part.scores for part in parts]),
        )

    def sorted(self) -> Results:
        """Return the rows in the one order by which equal scores are ranked: by image, score, category and box."""
        left, top, width, height = self.boxes_xywh.T
        keys = (
            height,
            width,
            top,
            left,
            self.category_ids,
            -self.scores,
            self.image_ids,
        )  # the last one is the first
        return self[np.lexsort(keys)]

    def of_image(self, image_id: int) -> Results:
        """Return the detections of one image."""
        return self[self.image_ids == image_id]

    def __getitem__(self, rows: NDArray[Any]) -> Results:
        """Return some rows, by index or by mask."""
        return Results(
            self.image_ids[rows], self.category_ids[rows], self.boxes_xywh[rows], self.scores[rows]
        )
