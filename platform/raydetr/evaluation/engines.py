"""Compute precision and recall over thresholds, classes, areas and limits, with hotcoco or with pycocotools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import hotcoco
import numpy as np
from numpy.typing import NDArray
from pycocotools import coco, cocoeval

from raydetr.evaluation.results import Results

if TYPE_CHECKING:
    from raydetr.config import Engine

# pycocotools prints its progress. Its modules get a silent `print` of their own, because redirecting sys.stdout would
# affect every thread of the process, and Ray's workers replace the builtin.
for _module in (coco, cocoeval):
    vars(_module)["print"] = lambda *_values, **_options: None


@dataclass(frozen=True)
class Accumulated:
    """COCO's precision and recall: 10 IoU thresholds (T), 101 recalls (R), ascending categories (K), areas all,
    small, medium, large (A), and 1, 10 and 100 detections per image (M). -1 where there is no object.
    """

    precision: NDArray[np.float64]  # [T, R, K, A, M]
    recall: NDArray[np.float64]  # [T, K, A, M]
    category_ids: tuple[int, ...]  # [K]

    @classmethod
    def empty(cls, category_ids: tuple[int, ...]) -> Accumulated:
        """Return that of no images, or no categories."""
        shape = 10, 101, len(category_ids), 4, 3
        return cls(np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0), category_ids)


def accumulate(ground_truth: Mapping[str, Any], results: Results, engine: Engine) -> Accumulated:
    """Match results, which rank equal scores by their order, with the objects, and accumulate over the images.

    Args:
        ground_truth: a COCO dict.
        results: of images of the ground truth, all numbers finite.
        engine: what computes it.
    """
    category_ids = tuple(sorted({int(category["id"]) for category in ground_truth["categories"]}))
    if not category_ids or not ground_truth["images"]:
        return Accumulated.empty(category_ids)
    if engine == "hotcoco":
        evaluation = hotcoco_evaluation(ground_truth, results)
        evaluation.evaluate()
        return accumulated_by(evaluation, category_ids)
    values = _with_pycocotools(ground_truth, results)
    return Accumulated(values["precision"], values["recall"], category_ids)


def hotcoco_evaluation(ground_truth: Mapping[str, Any], results: Results) -> hotcoco.COCOeval:
    """Return hotcoco's evaluation of boxes, in which nothing is computed yet.

    Its ids are numbers from 1 on, its names too: those of images and categories are in the ascending order of the ids,
    those of annotations and detections in the order of the records and rows. Records and rows of unknown images and
    categories are left out before. Crowds are included.

    Args:
        ground_truth: a COCO dict with images and categories.
        results: all numbers finite.
    """
    # Its arrays of detections are float64, which holds ids up to 2^53 only: ids become numbers in ascending order, from
    # 1 on, which leaves every order as it was
    image_ids = np.unique([image["id"] for image in ground_truth["images"]])
    category_ids = np.unique([category["id"] for category in ground_truth["categories"]])
    annotations = ground_truth["annotations"]
    boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
    areas = [
        a.get("area", width * height) for a, (_, _, width, height) in zip(annotations, boxes, strict=True)
    ]
    images, image_known = _number([a["image_id"] for a in annotations], image_ids)
    categories, category_known = _number([a["category_id"] for a in annotations], category_ids)
    known = image_known & category_known
    truth = hotcoco.COCO.from_arrays(
        [{"id": number} for number in range(1, len(image_ids) + 1)],
        [{"id": number, "name": str(number)} for number in range(1, len(category_ids) + 1)],
        images[known],
        categories[known],
        boxes[known],
        area=np.array(areas, np.float64)[known],
        iscrowd=np.array([a.get("iscrowd", 0) for a in annotations], np.int64)[known],
    )
    images, image_known = _number(results.image_ids, image_ids)
    categories, category_known = _number(results.category_ids, category_ids)
    known = image_known & category_known
    rows = np.column_stack([images, results.boxes_xywh, results.scores, categories])
    return hotcoco.COCOeval(truth, truth.load_res(rows[known]), "bbox")


def accumulated_by(evaluation: hotcoco.COCOeval, category_ids: tuple[int, ...]) -> Accumulated:
    """Return what hotcoco accumulates; `evaluate` was called before."""
    evaluation.accumulate()
    values = evaluation.eval
    assert values is not None
    return Accumulated(values["precision"], values["recall"], category_ids)


def _number(
    ids: NDArray[np.int64] | list[int], known: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the places of ids among the known ones, counted from 1, and which ids are known."""
    places = np.searchsorted(known, np.asarray(ids, np.int64))
    return places + 1, known[np.minimum(places, len(known) - 1)] == ids


def _with_pycocotools(ground_truth: Mapping[str, Any], results: Results) -> Mapping[str, Any]:
    # A match is marked by the annotation's id: an object with id 0 would never count as matched
    annotations = [
        {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a, "id": number}
        for number, a in enumerate(ground_truth["annotations"], start=1)
    ]
    columns = (results.image_ids, results.category_ids, results.boxes_xywh, results.scores)
    detections = [
        {
            "id": number,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": box,
            "score": score,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for number, (image_id, category_id, box, score) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), start=1
        )
    ]
    evaluation = cocoeval.COCOeval(
        _index(ground_truth, annotations), _index(ground_truth, detections), "bbox"
    )
    evaluation.evaluate()
    evaluation.accumulate()
    values: Mapping[str, Any] = evaluation.eval
    return values


def _index(ground_truth: Mapping[str, Any], annotations: list[dict[str, Any]]) -> Any:
    index = coco.COCO()
    index.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": annotations,
    }
    index.createIndex()
    return index
