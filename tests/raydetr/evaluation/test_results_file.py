"""Results of other tools: what is read, what is refused, and how it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raydetr.evaluation.results_file import read_results

TRUTH: dict[str, Any] = {
    "images": [{"id": 1, "width": 640, "height": 480}, {"id": 2**40, "width": 100, "height": 100}],
    "annotations": [],
    "categories": [{"id": 1, "name": "a"}, {"id": 3, "name": "b"}],
}
RECORD = {"image_id": 1, "category_id": 3, "bbox": [10, 20.5, 30, 40], "score": 0.25}


def written(folder: Path, content: Any) -> Path:
    path = folder / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_results_are_read_as_they_are(tmp_path: Path) -> None:
    records = [RECORD, {**RECORD, "image_id": 2**40, "score": 1, "segmentation": [], "bbox": [0, 0, 0, 5]}]
    found, warnings = read_results(written(tmp_path, records), TRUTH)
    assert warnings == []
    names = ("image_id", "category_id", "bbox", "score")
    assert found.to_coco() == [{name: record[name] for name in names} for record in records]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", r"results\.json: is not JSON \(.*line 1 column 3.*: is the file complete\?"),
        ({"annotations": [], "images": []}, "holds a dataset with annotations; results are a list"),
        ({"boxes": []}, "holds a dict; results are a list"),
        ("3", "holds a int; results are a list"),
        ([RECORD, [1, 2]], r"1 problem\n  \[1\]: is \[1, 2\], not an object"),
        ([{"image_id": 1}], r"\[0\]: category_id, bbox, score are missing"),
        ([{k: v for k, v in RECORD.items() if k != "score"}], r"\[0\]: score is missing: a record is like"),
        ([RECORD, {**RECORD, "image_id": 5}], r"\[1\]: image_id 5 is not in the ground truth\n.*of 1 of 2 records"),
        ([{**RECORD, "category_id": 0}], r"category_id 0 is not in the ground truth, which has 1, 3\n.*from 0"),
        ([{**RECORD, "image_id": "1"}], r"image_id is '1': it must be a whole number"),
        ([{**RECORD, "image_id": 1.5}], r"image_id is 1\.5: it must be a whole number"),
        ([{**RECORD, "category_id": True}], r"category_id is True: it must be a whole number"),
        ([{**RECORD, "image_id": 2**63}], r"image_id is 9223372036854775808: it must be"),
        ([{**RECORD, "score": float("nan")}], r"score is nan: it must be a finite number"),
        ([{**RECORD, "score": float("inf")}], r"score is inf: it must be a finite number"),
        ([{**RECORD, "score": None}], r"score is None: it must be a finite number"),
        ([{**RECORD, "bbox": [1, 2, float("nan"), 4]}], r"bbox is \[1, 2, nan, 4\]: it must be \[x, y, width"),
        ([{**RECORD, "bbox": [1, 2, 3]}], r"bbox is \[1, 2, 3\]: it must be"),
        ([{**RECORD, "bbox": [1, 2, -3, 4]}], r"its width is negative; bbox is \[x, y, width, height\]"),
        ([{**RECORD, "bbox": [1, 2, 3, -4]}], r"its height is negative"),
    ],
)  # fmt: skip
def test_what_is_no_result_is_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_results(written(tmp_path, content), TRUTH)


def test_all_problems_are_counted_and_ten_are_listed(tmp_path: Path) -> None:
    records = [{**RECORD, "score": None} if number % 2 else RECORD for number in range(60)]
    with pytest.raises(ValueError, match="30 problems") as raised:
        read_results(written(tmp_path, records), TRUTH)
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:11]] == [f"[{n}]" for n in range(1, 20, 2)]
    assert lines[11].strip() == "and 20 more"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json: there is no such file"):
        read_results(tmp_path / "none.json", TRUTH)


def test_boxes_that_look_wrong_are_warned_of(tmp_path: Path) -> None:
    corners = [{**RECORD, "bbox": [400, 300, 400 + 10 * n, 400]} for n in range(1, 10)]
    _, (warning,) = read_results(written(tmp_path, corners), TRUTH)
    assert "100% of the boxes leave their image: they look like corners [x1, y1, x2, y2]" in warning
    outside = [{**RECORD, "bbox": [600, 400, 500, 900]}] * 3
    _, (warning,) = read_results(written(tmp_path, outside), TRUTH)
    assert "100% of the boxes leave their image; bbox must be [x, y, width, height]" in warning
    fractions = [{**RECORD, "bbox": [0.5, 0.5, 0.25, 0.25]}]
    _, (warning,) = read_results(written(tmp_path, fractions), TRUTH)
    assert "boxes must be in pixels, not in fractions" in warning
    some = [RECORD, RECORD, {**RECORD, "bbox": [600, 400, 500, 900]}]
    assert read_results(written(tmp_path, some), TRUTH)[1] == []
    assert "has no detections" in read_results(written(tmp_path, []), TRUTH)[1][0]
    unsized = {**TRUTH, "images": [{"id": 1}]}
    assert read_results(written(tmp_path, outside), unsized)[1] == []
