from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import CommandLine
from raydetr.inference.predict import find_images, predict
from small_checkpoint import CATEGORIES, write_checkpoint


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
    results = predict(checkpoint, [photos], out, score_threshold=0.0, device="cpu").results
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
    first = predict(checkpoint, [photos / "b.jpg"], tmp_path / "first", device="cpu").results
    centers = [(r["bbox"][0] + r["bbox"][2] / 2, r["bbox"][1] + r["bbox"][3] / 2) for r in first]
    assert all(0 <= x <= 96 and 0 <= y <= 70 for x, y in centers)
    assert max(x for x, _ in centers) > 20  # not in [0, 1]
    again = predict(checkpoint, [photos / "b.jpg"], tmp_path / "again", device="cpu").results
    assert again == first


def test_the_threshold_affects_the_drawn_boxes_only(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    low = predict(checkpoint, [photos], tmp_path / "low", score_threshold=0.0, device="cpu")
    high = predict(checkpoint, [photos], tmp_path / "high", score_threshold=1.0, device="cpu")
    assert low == high
    annotated = [(tmp_path / name / "00001-a.jpg").read_bytes() for name in ("low", "high")]
    assert annotated[0] != annotated[1]


def test_labels_without_a_category_are_omitted(photos: Path, tmp_path: Path) -> None:
    sparse = write_checkpoint(tmp_path / "sparse", "category_id")
    results = predict(sparse, [photos], tmp_path / "out", device="cpu").results
    assert results
    assert {r["category_id"] for r in results} <= {3, 7, 9}


def test_files_are_listed_in_order_and_once(photos: Path) -> None:
    found, notes = find_images([photos / "b.jpg", photos])
    assert [file.name for file in found] == ["b.jpg", "a.png"]
    assert notes == ["omitted 1 files (notes.txt): hidden, or not named like images"]


def test_what_is_left_out_is_told(photos: Path) -> None:
    (photos / "deep/er").mkdir(parents=True)
    for name in ("deep/c.jpg", "deep/er/d.png"):
        (photos / name).write_bytes((photos / "b.jpg").read_bytes())
    (photos / "._b.jpg").write_bytes(b"\0\5\x16\7")  # of macOS
    found, notes = find_images([photos])
    assert [file.name for file in found] == ["a.png", "b.jpg"]
    assert notes == [
        "omitted 2 files (._b.jpg, notes.txt): hidden, or not named like images",
        "omitted 1 folders (deep): --recursive searches them",
    ]
    found, notes = find_images([photos], recursive=True)
    assert [file.name for file in found] == ["a.png", "b.jpg", "c.jpg", "d.png"]
    assert len(notes) == 1


@pytest.mark.parametrize("suffix", ["webp", "bmp", "tiff", "jfif", "gif"])
def test_every_format_of_pillow_is_read(checkpoint: Path, photos: Path, tmp_path: Path, suffix: str) -> None:
    image = Image.open(photos / "a.png")
    image.save(tmp_path / f"x.{suffix}")
    predicted = predict(checkpoint, [tmp_path / f"x.{suffix}"], tmp_path / "out", device="cpu")
    assert predicted.failed == []
    assert {r["image_id"] for r in predicted.results} == {1}


def test_an_orientation_is_told(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    for number, name in ((6, "phone.jpg"), (0, "zero.jpg"), (1, "upright.jpg")):
        exif[0x0112] = number
        Image.open(photos / "b.jpg").save(photos / name, exif=exif)
    (_, note) = predict(checkpoint, [photos], tmp_path / "out", device="cpu").notes
    assert note.startswith("the EXIF orientation of 1 images (phone.jpg) is not applied, as in training")


def test_tiny_and_thin_images(checkpoint: Path, tmp_path: Path) -> None:
    for name, size in (("dot.png", (1, 1)), ("thumb.png", (12, 12)), ("thin.png", (2000, 36))):
        Image.new("RGB", size).save(tmp_path / name)
    predicted = predict(checkpoint, [tmp_path], tmp_path / "out", device="cpu")
    assert predicted.failed == []
    assert {r["image_id"] for r in predicted.results} == {1, 2, 3}


def test_bad_images_do_not_stop_the_others(
    raydetr: CommandLine, checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "cut.jpg").write_bytes((photos / "b.jpg").read_bytes()[:300])
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.webp").write_text("no image")
    os.mkfifo(photos / "pipe.jpg")
    result = raydetr("predict", checkpoint, photos, "--out", tmp_path / "out")
    assert result.code == 1
    assert "4 files cannot be read" in result.err
    for name, reason in (
        ("cut.jpg", ""), ("empty.jpg", "it is not an image"), ("text.webp", "it is not an image"),
        ("pipe.jpg", "cannot be read (not a regular file)"),
    ):  # fmt: skip
        assert f"{photos}/{name}: {reason}" in result.err
    assert "0x" not in result.err
    images = json.loads((tmp_path / "out/images.json").read_text())["images"]
    assert [Path(image["file_name"]).name for image in images] == ["a.png", "b.jpg"]
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 2


@pytest.fixture
def raydetr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def test_bad_input_is_named_and_nothing_is_written(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"gone.jpg: no such file or folder"):
        predict(checkpoint, [photos, tmp_path / "gone.jpg"], out, device="cpu")
    with pytest.raises(ValueError, match=r"no images found in .*empty"):
        predict(checkpoint, [tmp_path / "empty"], out, device="cpu")
    with pytest.raises(ValueError, match=r"no image can be read:\n  .*notes.txt: it is not an image"):
        predict(checkpoint, [photos / "notes.txt"], out, device="cpu")
    with pytest.raises(ValueError, match="no images found in no paths"):
        predict(checkpoint, [], out)
    with pytest.raises(ValueError, match="score_threshold is 30"):
        predict(checkpoint, [photos], out, score_threshold=30)
    assert not out.exists()
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
