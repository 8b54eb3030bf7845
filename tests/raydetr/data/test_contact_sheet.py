"""Test the contact sheet: boxes are drawn around their objects, as packed and augmented, with names and ids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from raydetr.cli.main import app
from raydetr.config import TransformConfig, to_yaml
from raydetr.data.contact_sheet import contact_sheet
from raydetr.data.transforms.transform import Transform
from raydetr.recipes import quickstart
from raydetr.shards.reader import Shards, open_shards
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source
from raydetr.visualization.boxes import color_of

CATEGORIES = [{"id": 3, "name": "square"}]


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Pack six black images of 480x320, each with one white rectangle that its box surrounds."""
    folder = tmp_path_factory.mktemp("painted")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, 7):
        x, y, width, height = (int(n) for n in rng.integers((80, 60, 90, 80), (200, 120, 200, 150)))
        pixels = np.zeros((320, 480, 3), np.uint8)
        pixels[y : y + height, x : x + width] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 480, "height": 320})
        annotations.append(
            {"id": number, "image_id": number, "category_id": 3, "iscrowd": 0,
             "bbox": [x, y, width, height], "area": width * height}
        )  # fmt: skip
    record = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "annotations.json").write_text(json.dumps(record))
    write_source(coco_source(folder, folder / "annotations.json"), folder / "shards")
    return open_shards(folder / "shards")


def panels(sheet: Image.Image) -> list[np.ndarray]:
    """Find the images of a sheet, in reading order: what is not background, and too high to be text."""
    pixels, found = np.asarray(sheet).astype(int), []
    drawn = (pixels != pixels[0, 0]).any(axis=2)
    for top, bottom in runs(drawn.mean(axis=1) > 0.1):
        if bottom - top > 100:
            for left, right in runs(drawn[top:bottom].mean(axis=0) > 0.3):
                inside = drawn[top:bottom, left:right].mean(axis=1) > 0.5
                found.append(pixels[top:bottom, left:right][inside])
    return found


def runs(flags: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def check_boxes(sheet: Image.Image, num: int) -> None:
    """Check in each panel that dashes of the category's color surround the white rectangle."""
    found = panels(sheet)
    assert len(found) == num
    for panel in found:
        white = (panel > 200).all(axis=2)
        colored = (abs(panel - color_of(3)) < 40).all(axis=2)
        rows, columns = np.nonzero(white)
        top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
        middle_row, middle_column = (top + bottom) // 2, (left + right) // 2
        edges = {
            "left": colored[middle_row - 15 : middle_row + 15, max(0, left - 4) : left + 5],
            "right": colored[middle_row - 15 : middle_row + 15, right - 4 : right + 5],
            "top": colored[max(0, top - 4) : top + 5, middle_column - 15 : middle_column + 15],
            "bottom": colored[bottom - 4 : bottom + 5, middle_column - 15 : middle_column + 15],
        }
        assert {name for name, edge in edges.items() if edge.sum() < 20} == set()
        inside = colored[top + 12 : bottom - 12, left + 12 : right - 12]
        assert inside.mean() < 0.15  # apart from a caption


def test_boxes_surround_their_objects(painted: Shards) -> None:
    check_boxes(contact_sheet(painted, 24), 6)


def test_boxes_surround_their_objects_after_the_augmentation(painted: Shards) -> None:
    transform = Transform(TransformConfig(
        short_sides=(240, 320, 400), max_side=600, horizontal_flip=0.5,
        crop_probability=0.5, crop_short_sides=(300, 320), crop_min_side=290, crop_max_side=480, brightness=0.1,
    ))  # fmt: skip
    augmented = contact_sheet(painted, 6, seed=3, transform=transform)
    check_boxes(augmented, 6)
    assert augmented.tobytes() != contact_sheet(painted, 6, seed=3).tobytes()
    again = contact_sheet(painted, 6, seed=3, transform=transform)
    assert augmented.tobytes() == again.tobytes()


def test_shards_may_be_remote(painted: Shards) -> None:
    """Only the heading uses the location; bytes come from the files that the shards were opened with."""
    contact_sheet(replace(painted, location="s3://bucket/shards"), 2)


def test_the_command_writes_a_png(painted: Shards, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    run = CliRunner().invoke(app, ["shards", "browse", str(painted.path), "--out", str(out), "--num", "2"])
    assert run.exit_code == 0, run.output
    assert "wrote" in run.output
    check_boxes(Image.open(out), 2)
    augment = ["--augment", "quickstart", "data.train_transform.horizontal_flip=1"]
    run = CliRunner().invoke(
        app, ["shards", "browse", str(painted.path), "--out", str(out), "--num", "2", *augment]
    )
    assert run.exit_code == 0, run.output
    check_boxes(Image.open(out), 2)
    flipped = contact_sheet(painted, 2, transform=Transform(TransformConfig(horizontal_flip=1.0)))
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(flipped))


def test_a_configuration_file_names_the_augmentation_too(painted: Shards, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(quickstart()))
    out = tmp_path / "sheet.png"
    arguments = [
        "shards",
        "browse",
        str(painted.path),
        "--out",
        str(out),
        "--augment",
        str(tmp_path / "config.yaml"),
    ]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "sheet.jpg"], r"sheet\.jpg: the sheet is a PNG file"),
        (["--out", "sheet.png", "data.train_transform.hue=0.1"], r"has no effect without --augment"),
        (
            ["--out", "sheet.png", "--augment", "quickstat"],
            r"no recipe 'quickstat' .*; did you mean quickstart",
        ),
    ],
)
def test_mistakes_are_explained(painted: Shards, arguments: list[str], message: str) -> None:
    run = CliRunner().invoke(app, ["shards", "browse", str(painted.path), *arguments])
    assert isinstance(run.exception, ValueError)
    with pytest.raises(ValueError, match=message):
        raise run.exception
