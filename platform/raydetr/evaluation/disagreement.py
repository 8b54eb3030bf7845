"""Find the images on which two sets of detections disagree most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydetr.evaluation.bootstrap import match_images
from raydetr.evaluation.results import Results


@dataclass(frozen=True)
class Disagreement:
    """An image, and at IoU 0.5 what each of two sets has there, from its score threshold on."""

    image_id: int
    num_objects: int
    num_found: tuple[int, int]  # objects
    num_false: tuple[int, int]  # detections of no object, or of one that was found already
    num_only_one: int  # objects that only one of them found

    @property
    def size(self) -> int:
        """Number of objects and false detections on which they disagree."""
        return self.num_only_one + abs(self.num_false[0] - self.num_false[1])


def disagreements(
    ground_truth: Mapping[str, Any], sets: Sequence[Results], thresholds: Sequence[float]
) -> list[Disagreement]:
    """Return the images on which two sets of detections disagree, most first.

    Args:
        ground_truth: a COCO dict.
        sets: two sets of detections of its images.
        thresholds: of each set: detections with at least this score count.
    """
    image_ids = sorted({int(image["id"]) for image in ground_truth["images"]})
    found: list[dict[int, set[int]]] = [{}, {}]
    false: list[dict[int, int]] = [{}, {}]
    objects: dict[int, set[int]] = {}
    for number, (results, threshold) in enumerate(zip(sets, thresholds, strict=True)):
        for cell in match_images(ground_truth, results.sorted()):
            image = cell["image_id"]
            counts = ~np.array(cell["gtIgnore"], bool)
            ids = np.array(cell["gtIds"], np.int64)
            objects.setdefault(image, set()).update(ids[counts].tolist())
            scores = np.array(cell["dtScores"], np.float64)
            is_above = scores >= threshold
            above = set(np.array(cell["dtIds"], np.int64)[is_above].tolist())
            matches = zip(ids.tolist(), cell["gtMatches"][0], cell["gtMatched"][0], counts, strict=True)
            found[number].setdefault(image, set()).update(
                object_id
                for object_id, detection, is_matched, is_counted in matches
                if is_matched and is_counted and int(detection) in above
            )
            wrong = is_above & ~np.array(cell["dtMatched"][0], bool) & ~np.array(cell["dtIgnore"][0], bool)
            false[number][image] = false[number].get(image, 0) + int(wrong.sum())
    rows = []
    for image, ids_of_image in objects.items():
        a, b = found[0].get(image, set()), found[1].get(image, set())
        rows.append(
            Disagreement(
                image_id=image_ids[image - 1],
                num_objects=len(ids_of_image),
                num_found=(len(a), len(b)),
                num_false=(false[0].get(image, 0), false[1].get(image, 0)),
                num_only_one=len(a ^ b),
            )
        )
    rows.sort(key=lambda row: (-row.size, row.image_id))
    return [row for row in rows if row.size]
