"""`raydetr explain`: which pictures each model gets, what is drawn where, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import CommandLine
from raydetr.inference.explain import explain_image
from raydetr.visualization import attention as drawing
from small_checkpoint import write_checkpoint
from small_models import CONFIGS

DENSE = ("detections", "attention", "heads", "boxes")
SAMPLED = ("detections", "points", "levels", "boxes")
PICTURES = {
    "detr": DENSE,
    "conditional": DENSE,
    "dab": DENSE,
    "deformable": SAMPLED,
    "deformable_two_stage": (*SAMPLED, "proposals"),
    "dino": (*SAMPLED, "proposals", "denoising", "attention_mask"),
    "dino_without": (*SAMPLED, "proposals", "denoising", "attention_mask"),
}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


@pytest.fixture
def raydetr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.mark.parametrize("name", PICTURES)
def test_each_model_gets_the_pictures_of_its_paper(name: str, photo: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model=CONFIGS[name])
    pictures = explain_image(checkpoint, photo, tmp_path / "out", num_detections=2, device="cpu")
    assert [Path(picture.name).stem for picture in pictures] == list(PICTURES[name])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {picture.name for picture in pictures}
    for picture in pictures:
        with Image.open(tmp_path / "out" / picture.name) as image:
            image.load()
            assert min(image.size) > 100
        assert picture.caption.endswith(".")
    if name.startswith(("conditional", "dab")):
        assert "spatial" in pictures[2].caption
    if name == "dino":
        assert "the negatives, which it must reject" in pictures[-2].caption
    if name == "dino_without":
        assert "negatives" not in pictures[-2].caption


def test_the_command_prints_file_and_caption(raydetr: CommandLine, photo: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", label_map="category_id")
    result = raydetr("explain", checkpoint, photo, "--out", tmp_path / "out", "--detections", 1)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == 7
    for line in lines:
        file, _, caption = line.partition("  ")
        assert Path(file).is_file()
        assert caption.strip().endswith(".")
    assert "1 detection " in lines[0]


def test_tiny_thin_and_gray_images(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    for name, size in (("dot.png", (1, 1)), ("thin.png", (400, 8))):
        Image.new("L", size).save(tmp_path / name)
        assert explain_image(checkpoint, tmp_path / name, tmp_path / f"{name}-out", device="cpu")


def test_bad_input_is_one_line_and_nothing_is_written(
    raydetr: CommandLine, photo: Path, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a.txt").touch()
    out = tmp_path / "out"
    for arguments, message in (
        ((checkpoint, tmp_path / "text.jpg", "--out", out), "text.jpg: it is not an image"),
        ((checkpoint, tmp_path / "gone.jpg", "--out", out), "gone.jpg: no such file"),
        ((checkpoint, tmp_path, "--out", out), "is a folder: name one image"),
        ((tmp_path / "full", photo, "--out", out), "no checkpoint"),
        ((checkpoint, photo, "--out", tmp_path / "full"), "full is not empty (it holds a.txt)"),
        ((checkpoint, photo, "--out", photo), "photo.jpg is a file, not a folder"),
        ((checkpoint, photo, "--out", photo / "out"), "photo.jpg/out: writing stopped"),
    ):
        result = raydetr("explain", *arguments)
        assert result.code == 1
        assert result.err.startswith("error: "), result.err
        assert message in result.err
        assert not out.exists()
    with pytest.raises(ValueError, match="num_detections is 0"):
        explain_image(checkpoint, photo, out, num_detections=0)


def test_samples_and_references_are_drawn_at_their_pixels() -> None:
    image = Image.new("RGB", (40, 20))
    samples = drawing.Samples(
        np.array([[10.0, 5.0], [30.0, 15.0]]), np.array([0.75, 0.25]), np.array([20.0, 10.0])
    )
    row = drawing.SampleRow("disc 0.50", np.array([5.0, 2.0, 35.0, 18.0]), (samples,))
    figure = drawing.draw_samples(image, [row], ["layer 1"])
    panel = figure.axes[0]
    (points,) = panel.collections
    # Those with high weights are last, and so on top
    assert points.get_offsets().tolist() == [[30.0, 15.0], [10.0, 5.0]]
    assert points.get_array().tolist() == [0.25, 0.75]
    assert points.get_clim() == (0, 0.75)
    assert [line.get_xydata().tolist() for line in panel.lines] == [[[20.0, 10.0]]]
    (box,) = panel.patches
    assert box.get_bbox().extents.tolist() == [5.0, 2.0, 35.0, 18.0]


def test_a_map_covers_the_image() -> None:
    image = Image.new("RGB", (40, 20))
    maps = np.array([[[0.0, 0.5], [0.25, 0.0]]])
    row = drawing.MapRow("disc 0.50", np.array([0.0, 0.0, 40.0, 20.0]), maps)
    figure = drawing.draw_maps(image, [row], ["layer 1"])
    _, drawn = figure.axes[0].images
    assert drawn.get_extent() == [0, 40, 20, 0]  # the first row of tokens is at the top
    assert drawn.get_array().tolist() == [[0.0, 1.0], [0.5, 0.0]]


def test_the_mask_is_drawn_with_queries_as_rows() -> None:
    mask = np.array([[False, True, False], [True, False, False], [True, True, False]])
    (drawn,) = drawing.draw_mask(mask, 2, 1).axes[0].images
    assert (drawn.get_array() == ~mask).all()
