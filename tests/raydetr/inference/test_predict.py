from __future__ import annotations

import dataclasses
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detrs import zoo
from raydetr.config import to_dict
from raydetr.inference.predict import find_images, predict
from raydetr.recipes import quickstart

CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 7, "name": "ring"}, {"id": 9, "name": "square"}]


def write_checkpoint(folder: Path, label_map: str = "contiguous") -> Path:
    """Write a checkpoint of a small untrained model."""
    config = quickstart()
    num_classes = 3 if label_map == "contiguous" else 10
    model = dataclasses.replace(config.model, num_classes=num_classes)
    data = config.data.model_copy(update={"label_map": label_map})
    config = config.model_copy(update={"model": model, "data": data})
    torch.manual_seed(0)
    weights = zoo.build(model).detector.state_dict()
    folder.mkdir()
    torch.save({"model": weights, "ema": None}, folder / "state.pt")
    content = (folder / "state.pt").read_bytes()
    meta = {
        "config": to_dict(config),
        "categories": CATEGORIES,
        "fingerprint": "f",
        "epoch": 1,
        "position": 16,
        "metrics": {},
        "state_bytes": len(content),
        "state_crc32": zlib.crc32(content),
        "format": 1,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "epoch-0001")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (70, 96, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "b.jpg")
    Image.fromarray(pixels).convert("L").save(folder / "a.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_writes_annotated_images_and_results(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = predict(checkpoint, [photos], out, score_threshold=0.0, device="cpu")
    written = sorted(file.name for file in out.iterdir())
    assert written == ["00001-a.jpg", "00002-b.jpg", "images.json", "results.json"]
    assert json.loads((out / "results.json").read_text()) == results
    described = json.loads((out / "images.json").read_text())
    assert described["categories"] == CATEGORIES
    assert [(i["id"], Path(i["file_name"]).name, i["width"], i["height"]) for i in described["images"]] == [
        (1, "a.png", 96, 70),
        (2, "b.jpg", 96, 70),
    ]
    assert {r["image_id"] for r in results} == {1, 2}
    assert {r["category_id"] for r in results} <= {3, 7, 9}
    with Image.open(out / "00002-b.jpg") as annotated:
        assert annotated.size == (320, 233)


def test_boxes_are_in_pixels_of_the_image(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    """Boxes lie inside the image, although the network gets it in another size."""
    first = predict(checkpoint, [photos / "b.jpg"], tmp_path / "first", device="cpu")
    centers = [(r["bbox"][0] + r["bbox"][2] / 2, r["bbox"][1] + r["bbox"][3] / 2) for r in first]
    assert all(0 <= x <= 96 and 0 <= y <= 70 for x, y in centers)
    assert max(x for x, _ in centers) > 20  # not in [0, 1]
    again = predict(checkpoint, [photos / "b.jpg"], tmp_path / "again", device="cpu")
    assert again == first


def test_the_threshold_affects_the_drawn_boxes_only(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    low = predict(checkpoint, [photos], tmp_path / "low", score_threshold=0.0, device="cpu")
    high = predict(checkpoint, [photos], tmp_path / "high", score_threshold=1.0, device="cpu")
    assert low == high
    annotated = [(tmp_path / name / "00001-a.jpg").read_bytes() for name in ("low", "high")]
    assert annotated[0] != annotated[1]


def test_labels_without_a_category_are_omitted(photos: Path, tmp_path: Path) -> None:
    sparse = write_checkpoint(tmp_path / "sparse", "category_id")
    results = predict(sparse, [photos], tmp_path / "out", device="cpu")
    assert results
    assert {r["category_id"] for r in results} <= {3, 7, 9}


def test_files_are_listed_in_order_and_once(photos: Path) -> None:
    found = find_images([photos / "b.jpg", photos])
    assert [file.name for file in found] == ["b.jpg", "a.png"]


def test_bad_input_is_named_and_nothing_is_written(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.jpg").write_bytes((photos / "b.jpg").read_bytes()[:300])
    (tmp_path / "empty.jpg").write_bytes(b"")
    bad = {
        tmp_path / "gone.jpg": "gone.jpg: no such file or folder",
        tmp_path / "empty": "empty: no images found",
        photos / "notes.txt": "notes.txt: not a readable",
        tmp_path / "cut.jpg": "cut.jpg: not a readable",
        tmp_path / "empty.jpg": "empty.jpg: not a readable",
    }
    for path, message in bad.items():
        with pytest.raises(ValueError, match=message):
            predict(checkpoint, [photos, path], out, device="cpu")
        assert not out.exists()
    with pytest.raises(ValueError, match="no images given"):
        predict(checkpoint, [], out)
    with pytest.raises(ValueError, match="score_threshold is 30"):
        predict(checkpoint, [photos], out, score_threshold=30)
    with pytest.raises(ValueError, match=r"photos is not empty \(it holds a.png and 2 more\)"):
        predict(checkpoint, [photos], photos)
    assert len(list(photos.iterdir())) == 3


def test_a_folder_without_a_checkpoint_is_named(photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for content in (None, "{}", '{"model": 1}', "no json"):
        if content is not None:
            other.mkdir(exist_ok=True)
            (other / "meta.json").write_text(content)
        with pytest.raises(ValueError, match="other"):
            predict(other, [photos], tmp_path / "out", device="cpu")
        assert not (tmp_path / "out").exists()


def test_real_photographs(checkpoint: Path, tmp_path: Path) -> None:
    folder = os.environ.get("RAYDETR_COCO_TINY")
    if folder is None:
        pytest.skip("RAYDETR_COCO_TINY is not set: it names a folder with annotations/ train2017/ val2017/")
    files = sorted((Path(folder) / "val2017").glob("*.jpg"))[:3]
    predict(checkpoint, files, tmp_path / "out", device="cpu")
    for number, file in enumerate(files, start=1):
        with (
            Image.open(file) as photo,
            Image.open(tmp_path / "out" / f"{number:05d}-{file.stem}.jpg") as annotated,
        ):
            assert annotated.size == photo.size
