"""Read the COCO results of any tool from a file, and check them against the ground truth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydetr.evaluation.results import Results
from raydetr.shards.coco import Problems, is_box, listed
from raydetr.user_files import read_file

RECORD = '{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9}'
MAX_SUSPICIOUS = 0.5  # fraction of the boxes
MARGIN = 1.0  # pixels that a box may leave its image


def read_results(path: Path, ground_truth: Mapping[str, Any]) -> tuple[Results, list[str]]:
    """Read a COCO results file: a JSON list of {"image_id", "category_id", "bbox", "score"}, boxes xywh in pixels.

    Args:
        path: of the file. Other fields of its records are not read.
        ground_truth: a COCO dict.

    Returns:
        The detections, and warnings about what is valid but looks wrong.

    Raises:
        ValueError: it is no such list, or records of it are invalid; the message counts all of them and lists the first
            ten by their place in the list, from 0, with the field, the value and the remedy.
    """
    records = _records(path)
    problems = Problems(path, "problem")
    images = {image["id"] for image in ground_truth["images"]}
    categories = {category["id"] for category in ground_truth["categories"]}
    unknown_images, unknown_categories, num_valid = 0, 0, 0
    for place, record in enumerate(records):
        if not isinstance(record, dict):
            problems.add(f"[{place}]: is {_shortened(record)}, not an object: it must be like {RECORD}")
            continue
        found = list(_field_problems(record))
        if not found:
            num_valid += 1
            if record["image_id"] not in images:
                unknown_images += 1
                found.append(f"image_id {record['image_id']} is not in the ground truth")
            if record["category_id"] not in categories:
                unknown_categories += 1
                found.append(
                    f"category_id {record['category_id']} is not in the ground truth, which has "
                    f"{listed(sorted(categories))}"
                )
        for text in found:
            problems.add(f"[{place}]: {text}")
    hints = [
        f"the ground truth lacks the {name} of {number} of {num_valid} records: {remedy}"
        for number, name, remedy in (
            (unknown_images, "image_id", "is it the one of the split that was detected on?"),
            (unknown_categories, "category_id", "the ids are those of the ground truth, not labels from 0"),
        )
        if number
    ]
    problems.raise_if_any("\n  ".join(hints))
    results = Results.from_coco(records)
    return results, _warnings(path, results, ground_truth)


def _records(path: Path) -> list[Any]:
    try:
        records = json.loads(read_file(path))  # with NaN: a record that has one is named
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not JSON ({error}): is the file complete?") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if isinstance(records, dict) and "annotations" in records:
        raise ValueError(
            f"{path}: holds a dataset with annotations; results are a list of records like {RECORD}"
        )
    if not isinstance(records, list):
        kind = type(records).__name__
        raise ValueError(f"{path}: holds a {kind}; results are a list of records like {RECORD}")
    return records


def _field_problems(record: Mapping[str, Any]) -> Iterable[str]:
    missing = [name for name in ("image_id", "category_id", "bbox", "score") if name not in record]
    if missing:
        yield f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: a record is like {RECORD}"
        return
    for name in ("image_id", "category_id"):
        if type(record[name]) is not int or abs(record[name]) >= 2**63:
            yield f"{name} is {_shortened(record[name])}: it must be a whole number, the id in the ground truth"
    if type(record["score"]) not in (int, float) or not math.isfinite(record["score"]):
        yield f"score is {_shortened(record['score'])}: it must be a finite number"
    box = record["bbox"]
    if not is_box(box):
        yield f"bbox is {_shortened(box)}: it must be [x, y, width, height], four numbers of pixels"
    elif min(box[2:]) < 0:
        side = "width" if box[2] < 0 else "height"
        yield f"bbox is {_shortened(box)}: its {side} is negative; bbox is [x, y, width, height], not corners"


def _warnings(path: Path, results: Results, ground_truth: Mapping[str, Any]) -> list[str]:
    if not len(results):
        return [f"{path}: has no detections"]
    sizes = {
        i["id"]: (i["width"], i["height"]) for i in ground_truth["images"] if "width" in i and "height" in i
    }
    unlimited = (math.inf, math.inf)
    limits = np.array([sizes.get(image_id, unlimited) for image_id in results.image_ids.tolist()])
    boxes = results.boxes_xywh
    lines = []
    outside = float(_leave(boxes[:, :2] + boxes[:, 2:], limits).mean())
    if boxes.max() <= 1:
        lines.append(
            f"{path}: no coordinate is larger than 1: boxes must be in pixels, not in fractions of the image"
        )
    elif outside > MAX_SUSPICIOUS:
        is_ordered = (boxes[:, 2:] >= boxes[:, :2]).all(1)
        as_corners = float((is_ordered & ~_leave(boxes[:, 2:], limits)).mean())
        guess = ": they look like corners [x1, y1, x2, y2]" if as_corners >= outside else ""
        lines.append(
            f"{path}: {outside:.0%} of the boxes leave their image{guess}; bbox must be [x, y, width, height]"
        )
    return lines


def _leave(ends: NDArray[np.float64], limits: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which boxes that end at `ends`, [n, 2], leave their images."""
    return np.asarray((ends > limits + MARGIN).any(1))


def _shortened(value: Any) -> str:
    return f"{value!r:.60}"
