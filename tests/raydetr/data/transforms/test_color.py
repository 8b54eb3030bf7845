"""Test color jitter against its definition, in float64 and with Python's own color conversions."""

from __future__ import annotations

import colorsys
import random

import numpy as np
import pytest

from raydetr.config import ConfigError, TransformConfig, override
from raydetr.data.transforms.color import ColorJitter, jitter_colors
from raydetr.data.transforms.pixels import Pixels
from raydetr.data.transforms.transform import Transform
from raydetr.recipes import quickstart

LUMA = np.array([0.299, 0.587, 0.114])


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (17, 23, 3), np.uint8)


@pytest.mark.parametrize("factor", [0.0, 0.4, 0.9, 1.3, 2.5])
def test_factors_blend_with_black_the_mean_gray_and_each_pixels_gray(pixels: Pixels, factor: float) -> None:
    gray = (pixels @ LUMA)[..., None]
    others = {"brightness": 0.0, "contrast": gray.mean(), "saturation": gray}
    for name, other in others.items():
        found = jitter_colors(pixels, ColorJitter(**{name: factor}))
        expected = (other + (pixels - other) * factor).clip(0, 255)
        # The gray is rounded to a level before it is used, and the result is truncated to one
        np.testing.assert_allclose(found, expected, atol=1.01 + 0.6 * abs(1 - factor))


@pytest.mark.parametrize("shift", [-0.5, -0.13, 0.07, 0.31])
def test_hue_is_shifted_in_hsv(pixels: Pixels, shift: float) -> None:
    """In 256 steps of the circle and 256 of saturation, like Pillow and torchvision."""
    found = jitter_colors(pixels, ColorJitter(hue=shift)).reshape(-1, 3)
    for before, after in zip(pixels.reshape(-1, 3).tolist(), found.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in before))
        expected = [level * 255 for level in colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)]
        np.testing.assert_allclose(after, expected, atol=12)  # two steps of the hue


def test_changes_are_applied_in_order(pixels: Pixels) -> None:
    dark_first = ColorJitter(brightness=0.2, contrast=3.0, order=(0, 1, 2, 3))
    dark_last = ColorJitter(brightness=0.2, contrast=3.0, order=(1, 0, 2, 3))
    step_by_step = jitter_colors(
        jitter_colors(pixels, ColorJitter(brightness=0.2)), ColorJitter(contrast=3.0)
    )
    np.testing.assert_array_equal(jitter_colors(pixels, dark_first), step_by_step)
    assert (jitter_colors(pixels, dark_last) != step_by_step).any()


def test_neutral_factors_change_nothing_and_the_original_is_kept(pixels: Pixels) -> None:
    before = pixels.copy()
    np.testing.assert_array_equal(jitter_colors(pixels, ColorJitter()), before)
    jitter_colors(pixels, ColorJitter(2.0, 2.0, 2.0, 0.3))
    np.testing.assert_array_equal(pixels, before)


def test_draws_are_uniform_within_the_limits() -> None:
    draws = [ColorJitter.draw(random.Random(i), 0.4, 1.5, 0.2, 0.1) for i in range(4000)]
    limits = {"brightness": (0.6, 1.4), "contrast": (0.0, 2.5), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in limits.items():
        values = np.array([getattr(draw, name) for draw in draws])
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)
    orders = [draw.order for draw in draws]
    assert len(set(orders)) == 24
    assert max(orders.count(order) for order in set(orders)) < 4000 / 24 * 1.5


def test_colors_depend_on_seed_and_position() -> None:
    transform = Transform(TransformConfig(hue=0.5, brightness=1.0))
    first = transform.draw(1, 2, (8, 8)).colors
    assert first == transform.draw(1, 2, (640, 480)).colors
    assert len({transform.draw(1, p, (8, 8)).colors for p in range(50)}) == 50
    assert first != transform.draw(2, 2, (8, 8)).colors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hue": 0.6}, r"train_transform\.hue: .*0\.5.*found 0\.6"),
        ({"brightness": -0.1}, r"train_transform\.brightness"),
        ({"mosaic_probability": 1.5}, r"train_transform\.mosaic_probability"),
        ({"lsj_size": 0}, r"train_transform\.lsj_size"),
        ({"lsj_size": 64, "lsj_min_scale": 3.0}, r"lsj_min_scale 3\.0 exceeds lsj_max_scale 2\.0"),
        ({"lsj_min_scale": 0.5}, r"lsj_min_scale 0\.5 has no effect without lsj_size"),
        ({"lsj_size": 64, "short_sides": [96]}, r"short_sides \(96,\) has no effect with lsj_size"),
        ({"lsj_size": 64, "crop_probability": 0.5}, r"crop_probability 0\.5 has no effect with lsj_size"),
        ({"max_side": 200}, r"max_side 200 has no effect without short_sides"),
        ({"crop_short_sides": [64]}, r"crop_short_sides \(64,\) has no effect without crop_probability"),
        ({"crop_min_side": 64}, r"crop_min_side 64 has no effect without crop_probability"),
        ({"scale_per": "step"}, r"scale_per=step has no effect with short_sides \[\]"),
        ({"scale_per": "step", "short_sides": [96]}, r"scale_per=step has no effect with short_sides \[96\]"),
        ({"scale_per": "epoch", "short_sides": [96, 128]}, r"train_transform\.scale_per"),
    ],
)  # fmt: skip
def test_invalid_settings_and_those_without_effect_are_rejected(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        override(quickstart(), {f"data.train_transform.{name}": value for name, value in changes.items()})


@pytest.mark.parametrize(
    "changes",
    [{"horizontal_flip": 0.5}, {"crop_probability": 0.1}, {"hue": 0.1}, {"mosaic_probability": 0.1},
     {"lsj_size": 64}, {"scale_per": "step", "short_sides": [64, 96]}],
)  # fmt: skip
def test_evaluation_is_not_augmented(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"val_transform\.\w+ \S+ is augmentation"):
        override(quickstart(), {f"data.val_transform.{name}": value for name, value in changes.items()})
