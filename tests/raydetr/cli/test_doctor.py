"""The command `raydetr doctor`: output, files and exit code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import planted_shards as made
from command_line import CommandLine
from raydetr import recipes
from raydetr.config import override, to_yaml

TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
LEVEL = {"enum": ["error", "warning", "note"]}


def exactly(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False}  # fmt: skip


def many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


FRACTION = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
SPREAD = exactly(min=NUMBER, median=NUMBER, max=NUMBER)
HISTOGRAM = exactly(edges=many({"type": "number"}), counts=many(NUMBER))
SCHEMA = exactly(
    format_version={"const": 1},
    may_start={"type": "boolean"},
    seconds={"type": "number"},
    target=exactly(recipe={"type": ["string", "null"]}, short_side={"type": ["integer", "null"]},
                   max_side=NUMBER, num_queries={"type": ["integer", "null"]},
                   batch_size={"type": ["integer", "null"]}, label_map={"type": ["string", "null"]},
                   max_corrupt={"type": ["integer", "null"]}),
    splits=many(exactly(
        name=TEXT, location=TEXT, fingerprint=TEXT, images=NUMBER, unusable_images=NUMBER, empty_images=NUMBER,
        objects=NUMBER, crowds=NUMBER, unusable_boxes=NUMBER,
        objects_per_image=exactly(p50=NUMBER, p90=NUMBER, p99=NUMBER, max=NUMBER),
        classes=exactly(contiguous=NUMBER, category_id={"type": ["integer", "null"]}),
        tiny_fraction=FRACTION, small_fraction=FRACTION, widths=SPREAD, heights=SPREAD,
        categories=many(exactly(id=NUMBER, name=TEXT, images=NUMBER, objects=NUMBER, small=NUMBER)),
        histograms=exactly(objects_per_image=HISTOGRAM, shorter_side=HISTOGRAM, aspect=HISTOGRAM),
    )),
    findings=many(exactly(
        code=TEXT, level=LEVEL, splits=many(TEXT), count=NUMBER, text=TEXT, remedy=TEXT,
        examples=many(exactly(
            detail=TEXT,
            places=many(exactly(split=TEXT, sample=NUMBER, image_id=NUMBER, file_name=TEXT,
                                annotations=many(NUMBER))),
        )),
    )),
)  # fmt: skip


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Return a function that runs `raydetr doctor ARGUMENTS` in a folder with healthy shards train and val."""
    monkeypatch.chdir(tmp_path)
    made.write(made.healthy(30, 1), tmp_path / "train")
    made.write(made.healthy(20, 2), tmp_path / "val")
    return CommandLine(monkeypatch, capsys, "doctor")


def test_healthy_data_may_be_trained_on(doctor) -> None:
    outcome = doctor("train", "val")
    assert outcome.code == 0
    rows = {line[:28].strip(): line[28:].split() for line in outcome.out.splitlines()}
    assert rows["images"] == ["30", "20"]
    assert rows["objects"] == ["60", "40"]
    assert rows["classes"] == ["2", "2"]
    assert rows["with label_map=category_id"] == ["3", "3"]
    assert outcome.out.splitlines()[-1] == "training may start: nothing was found"


def test_empty_images_crowds_and_classes_are_counted(doctor, tmp_path: Path) -> None:
    counted = made.healthy(20, 3)
    for sample in counted.samples[:3]:
        sample.annotations.clear()
    for sample in counted.samples[7:9]:
        sample.annotations[1]["iscrowd"] = 1
    made.write(counted, tmp_path / "counted")
    outcome = doctor("counted", "val", "--json", "doctor.json")
    rows = {line[:28].strip(): line[28:].split() for line in outcome.out.splitlines()}
    assert (rows["without objects"], rows["crowds"], rows["objects"]) == (
        ["3", "0"],
        ["2", "0"],
        ["32", "40"],
    )
    (split, _) = json.loads((tmp_path / "doctor.json").read_text())["splits"]
    assert (split["empty_images"], split["crowds"], split["objects"]) == (3, 2, 32)
    assert [(row["id"], row["name"], row["images"], row["objects"]) for row in split["categories"]] == [
        (1, "cat", 17, 17),
        (2, "dog", 15, 15),
    ]


def test_a_warning_does_not_prevent_training(doctor, tmp_path: Path) -> None:
    leaky = made.healthy(20, 2)
    leaky.samples[3].image = made.healthy(30, 1).samples[5].image
    made.write(leaky, tmp_path / "leaky")
    outcome = doctor("train", "leaky")
    assert outcome.code == 0
    assert "warning  train, leaky: 1 image of leaky (5.0%) is also in train" in outcome.out
    assert "train image 1006 (1006.jpg) and leaky image 2004 (2004.jpg): the same bytes" in outcome.out
    assert outcome.out.splitlines()[-1] == "training may start: 1 warning"


def test_an_error_prevents_training_and_all_files_are_written(doctor, tmp_path: Path) -> None:
    bad = made.healthy(20, 2)
    bad.samples[3].annotations[0]["bbox"][0] = "9"
    made.write(bad, tmp_path / "bad")
    outcome = doctor("train", "bad", "--json", "doctor.json", "--html", "doctor.html")
    assert outcome.code == 1
    assert outcome.out.splitlines()[-2:] == ["training must not start: 2 errors", "page: doctor.html"]
    result = json.loads((tmp_path / "doctor.json").read_text())
    jsonschema.validate(result, SCHEMA)
    assert not result["may_start"]
    assert [split["name"] for split in result["splits"]] == ["train", "bad"]
    (place,) = result["findings"][1]["examples"][0]["places"]
    assert place == {
        "split": "bad",
        "sample": 3,
        "image_id": 2004,
        "file_name": "2004.jpg",
        "annotations": [0],
    }
    page = (tmp_path / "doctor.html").read_text()
    assert "training must not start: 2 errors" in page


def test_a_recipe_decides_scale_and_queries(doctor, tmp_path: Path) -> None:
    def small_fraction(*arguments: object) -> float:
        assert doctor("train", "--json", "doctor.json", *arguments).code == 0
        return json.loads((tmp_path / "doctor.json").read_text())["splits"][0]["small_fraction"]

    assert small_fraction() == 0  # At 800 pixels
    assert small_fraction("--short-side", 20) > 0.5
    assert small_fraction("--short-side", 800, "--max-side", 25) > 0.5
    assert small_fraction("--recipe", "quickstart") == 0
    resized = override(recipes.quickstart(), {"data.val_transform.short_sides": [20], "model.num_queries": 1})
    (tmp_path / "mine.yaml").write_text(to_yaml(resized))
    assert small_fraction("--config", "mine.yaml") > 0.5
    assert (
        "30 images (100.0%) have more objects than quickstart has queries (1)"
        in doctor("train", "--config", "mine.yaml").out
    )


def test_ids_that_the_recipe_cannot_use_are_an_error(doctor, tmp_path: Path) -> None:
    large = made.healthy(10, 3)
    large.categories[1]["id"] = 20_000
    for sample in large.samples:
        sample.annotations[1]["category_id"] = 20_000
    made.write(large, tmp_path / "large")
    assert doctor("large").code == 0
    outcome = doctor("large", "--recipe", "detr_r50_150ep")  # data.label_map=category_id
    assert outcome.code == 1
    assert "category ids reach 20000, too large for labels: use data.label_map=contiguous" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "quickstart"], ["--recipe needs data", "name a folder of shards"]),
        (["--short-side", "800"], ["--short-side needs data"]),
        (["--html", "x.html"], ["--html needs data"]),
        (["train", "--recipe", "quickstrat"], ["did you mean quickstart"]),
        (["train", "--recipe", "quickstart", "--config", "x.yaml"], ["keep one"]),
        (["train", "--recipe", "quickstart", "--max-side", "500"], ["has no effect", "--short-side"]),
        (["train", "train"], ["given twice"]),
        (["train", "--json", "no/where.json"], ["there is no folder no"]),
    ],
)
def test_a_mistake_is_one_line(doctor, arguments: list[str], words: list[str]) -> None:
    outcome = doctor(*arguments)
    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


def test_a_location_without_shards_is_an_error(doctor) -> None:
    outcome = doctor("nowhere")
    assert outcome.code == 1
    assert "nowhere: no shards found" in outcome.out
    assert "nowhere: nowhere" not in outcome.out
    assert outcome.out.splitlines()[-1] == "training must not start: 1 error"


def test_without_data_the_machine_is_examined(doctor, tmp_path: Path) -> None:
    outcome = doctor("--json", "machine.json")
    report = json.loads((tmp_path / "machine.json").read_text())
    assert outcome.code == (0 if report["can_train"] else 1)
    assert "torch" in outcome.out


def test_photographs_have_no_false_errors(doctor, tmp_path: Path) -> None:
    folder = os.environ.get("RAYDETR_COCO_TINY")
    if not folder:
        pytest.skip("RAYDETR_COCO_TINY does not name a folder with annotations/, train2017/ and val2017/")
    from raydetr.shards.source import coco_source
    from raydetr.shards.writer import write_source

    for split in ("train", "val"):
        annotations = Path(folder) / "annotations" / f"instances_{split}2017.json"
        write_source(coco_source(Path(folder) / f"{split}2017", annotations), tmp_path / "coco" / split)
    outcome = doctor("coco/train", "coco/val", "--recipe", "dino_r50_4scale_12ep", "--json", "coco.json")
    assert outcome.code == 0
    result = json.loads((tmp_path / "coco.json").read_text())
    jsonschema.validate(result, SCHEMA)
    codes = {finding["code"] for finding in result["findings"]}
    assert codes == {"rare-classes", "gaps-in-ids", "imbalance"}  # The data has 80 images of 80 classes
    for split, number in (("train", 0), ("val", 1)):
        data = json.loads((Path(folder) / "annotations" / f"instances_{split}2017.json").read_text())
        crowds = sum(annotation["iscrowd"] for annotation in data["annotations"])
        assert result["splits"][number]["crowds"] == crowds
        assert result["splits"][number]["objects"] == len(data["annotations"]) - crowds
        counts = {row["id"]: row["objects"] for row in result["splits"][number]["categories"]}
        for category in data["categories"]:
            own = [a for a in data["annotations"] if a["category_id"] == category["id"] and not a["iscrowd"]]
            assert counts[category["id"]] == len(own)
