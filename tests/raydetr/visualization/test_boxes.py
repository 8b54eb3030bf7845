from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from raydetr.visualization import boxes as module
from raydetr.visualization.boxes import AnnotatedImage, Box, coco_boxes, color_of, draw_boxes, draw_grid

GROUND = (90, 120, 90)


def blank(width: int = 96, height: int = 96, mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (width, height), GROUND).convert(mode)


def pixels_of(image: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """Return (y, x) of the pixels of a color."""
    return np.argwhere((np.asarray(image) == color).all(axis=-1))


@pytest.mark.parametrize(
    ("size", "drawn"), [((96, 48), (320, 160)), ((640, 480), (640, 480)), ((1, 1), (320, 320))]
)
def test_small_images_are_enlarged(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    assert draw_boxes(blank(*size), []).size == drawn


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16"])
def test_any_mode_is_drawn_in_rgb_and_the_original_is_kept(mode: str) -> None:
    image = Image.new("I;16", (400, 300)) if mode == "I;16" else blank(400, 300, mode)
    before = image.tobytes()
    drawn = draw_boxes(image, [Box(1, "ring", (10, 10, 200, 200), 0.5)])
    assert (drawn.mode, drawn.size) == ("RGB", (400, 300))
    assert image.tobytes() == before


def test_boxes_are_enlarged_with_the_image() -> None:
    drawn = draw_boxes(blank(), [Box(1, "x", (24, 48, 72, 84), 0.9)])
    found = pixels_of(drawn, color_of(1))
    scale = 320 / 96
    assert found[:, 0].max() == pytest.approx(84 * scale, abs=2)
    assert (found[:, 1].min(), found[:, 1].max()) == pytest.approx((24 * scale, 72 * scale), abs=2)
    column = np.asarray(drawn)[:, round(60 * scale)]  # beside the caption: only the lines
    rows = np.flatnonzero((column == color_of(1)).all(axis=-1))
    assert (rows.min(), rows.max()) == pytest.approx((48 * scale, 84 * scale), abs=2)


def test_true_boxes_are_dashed_and_predicted_ones_solid() -> None:
    def fraction_of_left_side(score: float | None) -> float:
        drawn = draw_boxes(blank(400, 400), [Box(1, "x", (100, 100, 300, 300), score)])
        side = np.asarray(drawn)[120:290, 100]
        return float((side == color_of(1)).all(axis=-1).mean())

    assert fraction_of_left_side(0.5) == 1.0
    assert 0.3 < fraction_of_left_side(None) < 0.7


def test_neighboring_categories_have_different_colors() -> None:
    colors = np.array([color_of(category_id) for category_id in range(1, 91)], float)
    assert len(np.unique(colors, axis=0)) == 90
    beside = [np.abs(colors[i] - colors[i + k]).sum() for k in (1, 2, 3, 4) for i in range(86)]
    assert min(beside) > 100


def test_captions_stay_inside_and_do_not_overlap() -> None:
    draw = random.Random(0)
    canvas, taken = (320, 240), []
    for _ in range(60):
        left, top = draw.uniform(-40, 340), draw.uniform(-40, 260)
        box = module._inside((left, top, left + draw.uniform(0, 90), top + draw.uniform(0, 90)), canvas)
        place = module._free_place(box, (60, 15), canvas, taken)
        if place is not None:
            taken.append(place)
    assert len(taken) > 20
    for index, (left, top, right, bottom) in enumerate(taken):
        assert 0 <= left < right < 320
        assert 0 <= top < bottom < 240
        covered = sum(module._overlap(taken[index], other) for other in taken[:index])
        assert covered <= module.MAX_OVERLAP * 60 * 15


@pytest.mark.parametrize("corner", [(0, 0), (80, 0), (0, 80), (80, 80), (300, 300), (-50, 40)])
def test_a_caption_at_the_border_is_complete(corner: tuple[int, int]) -> None:
    left, top = corner
    box = Box(5, "triangle", (left, top, left + 16, top + 16), 0.87)
    drawn = draw_boxes(blank(), [box])
    width, height = module._text_size(box.caption, module._font(11))
    found = pixels_of(drawn, color_of(5))
    rows = found[:, 0]
    widest = max(np.ptp(found[rows == row][:, 1]) for row in np.unique(rows))
    assert widest >= width - 1
    assert len(np.unique(rows)) >= height - 1


def test_long_names_are_truncated_and_keep_the_score() -> None:
    font = module._font(12)
    text = module._shortened(Box(1, "name " * 40, (0, 0, 9, 9), 0.987), font, 300)
    assert text.startswith("name name")
    assert text.endswith("… 0.99")
    assert module._text_size(text, font)[0] <= 300
    assert module._shortened(Box(1, "short", (0, 0, 9, 9)), font, 300) == "short"
    assert module._shortened(Box(1, "name " * 40, (0, 0, 9, 9)), font, 300).endswith("…")


def test_coco_records_become_boxes_best_first() -> None:
    records = [
        {"category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.2},
        {"category_id": 2, "bbox": [0, 0, 5, 5], "score": 0.9},
        {"category_id": 9, "bbox": [0, 0, 5, 5], "score": 0.5},
    ]
    boxes = coco_boxes(records, {1: "disc", 2: "ring"}, score_threshold=0.3)
    assert [box.caption for box in boxes] == ["ring 0.90", "category 9 0.50"]
    true = coco_boxes([{"category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 1}], {1: "disc"}, 0.3)
    assert true == (Box(1, "disc (crowd)", (1, 2, 4, 6), None),)


def test_grid_shows_each_image_twice() -> None:
    true, predicted = (Box(1, "x", (10, 10, 50, 50)),), (Box(4, "x", (10, 10, 50, 50), 0.5),)
    grid = draw_grid(
        [AnnotatedImage(f"{i}.jpg", blank(), true, predicted) for i in range(3)], score_threshold=0.3
    )
    assert grid.width > 4 * 320
    assert 2 * 320 < grid.height < 2 * 400
    middle_of_first = 10 + 320 + 2
    left_side, right_side = grid.crop((0, 0, middle_of_first, 400)), grid.crop((middle_of_first, 0, 654, 400))
    assert len(pixels_of(left_side, color_of(1))) > 100
    assert len(pixels_of(left_side, color_of(4))) == 0
    assert len(pixels_of(right_side, color_of(4))) > 100
    assert len(pixels_of(right_side, color_of(1))) == 0
    again = draw_grid(
        [AnnotatedImage(f"{i}.jpg", blank(), true, predicted) for i in range(3)], score_threshold=0.3
    )
    assert grid.tobytes() == again.tobytes()


def test_grid_of_large_images_and_of_none() -> None:
    grid = draw_grid([AnnotatedImage("large", blank(3000, 1000), (), ())], score_threshold=0.3)
    assert 2 * 480 < grid.width < 2 * 480 + 60
    assert draw_grid([], score_threshold=0.3).width > 100
