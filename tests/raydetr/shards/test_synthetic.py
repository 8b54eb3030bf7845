from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from made_coco import folder_bytes
from raydetr.shards.coco import load_coco
from raydetr.shards.synthetic import HARD, ORDINARY, Variant, draw_image, write_synthetic_data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "data"
    write_synthetic_data(out, num_train=24, num_val=6)
    return out


def test_layout_is_valid_coco(written: Path) -> None:
    for split, count in (("train", 24), ("val", 6)):
        dataset = load_coco(written / "annotations" / f"instances_{split}.json")
        names = [record["file_name"] for record in dataset.images]
        assert names == sorted(path.name for path in (written / split).iterdir())
        assert len(names) == count
        assert [category["name"] for category in dataset.categories] == list(ORDINARY.class_names)
        assert dataset.notices == []
        for name in names:
            with Image.open(written / split / name) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (96, 96))


def test_same_seed_same_bytes_other_seed_other_images(written: Path, tmp_path: Path) -> None:
    write_synthetic_data(tmp_path / "again", num_train=24, num_val=6)
    write_synthetic_data(tmp_path / "other", num_train=24, num_val=6, seed=1)
    first, again, other = (
        folder_bytes(written),
        folder_bytes(tmp_path / "again"),
        folder_bytes(tmp_path / "other"),
    )
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_an_image_depends_on_its_number_alone(written: Path, tmp_path: Path) -> None:
    write_synthetic_data(tmp_path / "fewer", num_train=5, num_val=2)
    assert folder_bytes(tmp_path / "fewer" / "train").items() <= folder_bytes(written / "train").items()
    assert folder_bytes(tmp_path / "fewer" / "val").items() <= folder_bytes(written / "val").items()
    assert (written / "train" / "000000.jpg").read_bytes() != (written / "val" / "000000.jpg").read_bytes()


@pytest.mark.parametrize("variant", [ORDINARY, HARD])
def test_objects_have_the_promised_number_size_and_visibility(variant: Variant) -> None:
    sides, labels = [], set()
    for index in range(60):
        _, shapes = draw_image(variant, 0, "train", index)
        assert 1 <= len(shapes) <= 4
        hidden = np.zeros((96, 96), bool)
        for shape in reversed(shapes):
            assert (shape.mask & ~hidden).sum() >= 0.5 * shape.mask.sum()
            hidden |= shape.mask
            sides.append(np.sqrt(shape.mask.any(0).sum() * shape.mask.any(1).sum()))
            labels.add(shape.label)
    assert labels == set(range(len(variant.class_names)))
    assert variant.min_side * 0.7 < np.quantile(sides, 0.02)
    assert np.quantile(sides, 0.98) < variant.max_side * 1.3


def test_boxes_are_the_extent_of_the_masks(written: Path) -> None:
    data = json.loads((written / "annotations" / "instances_train.json").read_text())
    boxes = iter(data["annotations"])
    for index in range(24):
        for shape in draw_image(ORDINARY, 0, "train", index)[1]:
            x, y, width, height = next(boxes)["bbox"]
            outside = shape.mask.copy()
            outside[y : y + height, x : x + width] = False
            edges = (
                shape.mask[[y, y + height - 1]].any(1).tolist()
                + shape.mask[:, [x, x + width - 1]].any(0).tolist()
            )
            assert not outside.any()
            assert all(edges)
    assert next(boxes, None) is None


def test_hard_variant_has_five_classes_and_no_color_cue(tmp_path: Path) -> None:
    write_synthetic_data(tmp_path / "hard", hard=True, num_train=3, num_val=1)
    data = json.loads((tmp_path / "hard" / "annotations" / "instances_train.json").read_text())
    assert [category["name"] for category in data["categories"]] == [
        "disc",
        "ring",
        "square",
        "triangle",
        "cross",
    ]
    assert HARD.hue_fraction == 0


def test_progress_counts_to_the_end_and_a_second_write_is_rejected(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_synthetic_data(
        tmp_path / "out", num_train=2, num_val=1, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(
        ValueError, match=r"out is not empty \(it holds annotations and 2 more\): name another"
    ):
        write_synthetic_data(tmp_path / "out", num_train=2, num_val=1)
