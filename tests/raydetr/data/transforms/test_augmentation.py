"""Test that boxes stay on their objects: painted rectangles are found in the pixels after any augmentation."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydetr.config import TransformConfig
from raydetr.data.layout import Layout
from raydetr.data.samples import load_sample
from raydetr.data.stream import train_batches
from raydetr.data.transforms.geometry import GRAY, LargeScaleJitter
from raydetr.data.transforms.mosaic import LabeledImage, Mosaic, make_mosaic
from raydetr.data.transforms.pixels import Pixels, size_of
from raydetr.data.transforms.transform import Transform
from raydetr.recipes import RECIPES
from raydetr.shards.reader import ShardError, Shards

# Of objects 0 to 3; the background is black
COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])

CROPPED = Transform(TransformConfig(
    short_sides=(50, 90, 140), max_side=200, horizontal_flip=0.5,
    crop_probability=0.6, crop_short_sides=(40, 80), crop_min_side=20, crop_max_side=70,
))  # fmt: skip
JITTERED = Transform(TransformConfig(horizontal_flip=0.5, lsj_size=96))
COLOR_JITTER = {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.02}
TRANSFORMS = {
    "official": CROPPED,
    "step": Transform(CROPPED.config.model_copy(update={"scale_per": "step"})),
    "jitter": JITTERED,
    "colors": Transform(CROPPED.config.model_copy(update=COLOR_JITTER)),
    "colors and jitter": Transform(JITTERED.config.model_copy(update=COLOR_JITTER)),
}


def painted(number: int, rng: np.random.Generator) -> LabeledImage:
    """Paint a rectangle of the color `number` on a black image."""
    width, height = rng.integers(30, 120, 2).tolist()
    x0, y0 = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
    x1, y1 = int(rng.integers(x0 + 8, width)), int(rng.integers(y0 + 8, height))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y0:y1, x0:x1] = COLORS[number]
    return LabeledImage(pixels, np.array([[x0, y0, x1, y1]], float), np.array([number]))


def extent(pixels: Pixels, number: int) -> list[int] | None:
    """Return left, top, right and bottom of the pixels with at least half of the color `number`."""
    is_own = np.where(COLORS[number] > 0, pixels > 127, pixels < 64)  # not a mix of two others
    rows, columns = np.nonzero(is_own.all(axis=2))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else None


def check(pixels: Pixels, boxes: np.ndarray, labels: np.ndarray, blur: float) -> int:
    """Compare boxes with pixels, to within `blur` pixels; return how many were large enough to compare."""
    assert len(boxes) == len(labels) == len(set(labels.tolist()))
    width, height = size_of(pixels)
    num_compared = 0
    for number in range(4):
        found, box = extent(pixels, number), boxes[labels == number]
        if not len(box):
            assert found is None or min(found[2] - found[0], found[3] - found[1]) <= blur
            continue
        assert (box >= 0).all()
        assert (box <= np.add([width, height, width, height], 1e-9)).all()
        if (box[0, 2:] - box[0, :2] > 2 * blur + 1).all():
            assert found is not None
            np.testing.assert_allclose(found, box[0], atol=blur)
            num_compared += 1
    return num_compared


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("with_mosaic", [False, True])
def test_boxes_stay_on_their_objects(name: str, with_mosaic: bool) -> None:
    transform, compared = TRANSFORMS[name], []

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 2**32))
    def run(seed: int) -> None:
        rng = np.random.default_rng(seed)
        images = [painted(number, rng) for number in range(4)]
        combined = images[0]
        if with_mosaic:
            combined = make_mosaic(Mosaic.draw(random.Random(seed), 9), images)
            check(combined.pixels, combined.boxes_xyxy, combined.labels, 1.5)
        image, boxes, kept = transform(
            combined.pixels, combined.boxes_xyxy, seed=seed, position=3, short_side=None
        )
        # Each resize blurs an edge, and a later enlargement enlarges the blur
        enlarged = max(image.width / combined.pixels.shape[1], image.height / combined.pixels.shape[0], 1.0)
        if name.endswith("jitter"):
            enlarged = 192 / max(size_of(combined.pixels))
        elif transform.config.crop_probability:
            enlarged = max(enlarged, 140 / 20)
        compared.append(check(image.pixels(), boxes, combined.labels[kept], 1.0 + 1.5 * enlarged))

    run()
    assert sum(compared) > 20


def test_boxes_of_a_jittered_image_are_exact() -> None:
    """Sharp edges, enlarged twice or not at all, lie on the box, to the pixel."""
    rng, num_compared = np.random.default_rng(1), 0
    for position in range(300):
        image = painted(position % 4, rng)
        side = max(size_of(image.pixels))
        scale = (1.0, 2.0)[position % 2]
        transform = Transform(
            TransformConfig(lsj_size=side, lsj_min_scale=scale, lsj_max_scale=scale, horizontal_flip=0.5)
        )
        drawn, boxes, kept = transform(image.pixels, image.boxes_xyxy, seed=0, position=position)
        assert drawn.size == (side, side)
        num_compared += check(drawn.pixels(), boxes, image.labels[kept], 0.01 if scale == 1 else 1.01)
    assert num_compared > 150


def test_large_scale_jitter_is_as_published() -> None:
    """Scales are uniform from 0.1 to 2.0 of a square, windows within the image; padding at right and bottom is gray."""
    transform = Transform(TransformConfig(lsj_size=100))
    drawn = [transform.draw(5, position, (64, 48)).jitter for position in range(4000)]
    choices = [choice for choice in drawn if choice is not None]
    assert len(choices) == 4000
    scales = np.array([choice.size[0] / 100 for choice in choices])
    assert (scales.min() < 0.12, scales.max() > 1.98) == (True, True)
    assert abs(scales.mean() - 1.05) < 0.03
    assert abs((scales < 0.575).mean() - 0.25) < 0.03
    for choice in choices:
        assert choice.size[1] == pytest.approx(choice.size[0] * 48 / 64, abs=1)
        assert 0 <= choice.left <= max(0, choice.size[0] - 100)
        assert 0 <= choice.top <= max(0, choice.size[1] - 100)
    places = [choice.left / (choice.size[0] - 100) for choice in choices if choice.size[0] > 150]
    assert abs(np.mean(places) - 0.5) < 0.03

    white = np.full((48, 64, 3), 255, np.uint8)
    small = LargeScaleJitter.draw(random.Random(0), (64, 48), 100, 0.5)
    image, _, _ = transform.apply(
        white, np.zeros((0, 4)), dataclasses.replace(transform.draw(0, 0, (64, 48)), jitter=small)
    )
    assert (small.size, small.left, small.top) == ((50, 38), 0, 0)
    assert (image.pixels()[:38, :50] == 255).all()
    assert (image.pixels()[38:] == GRAY).all()
    assert (image.pixels()[:, 50:] == GRAY).all()


def test_a_mosaic_shows_four_images_in_the_size_of_the_first() -> None:
    """Each quarter is filled with its image's color, and the quarters meet at the drawn center."""
    sizes = [(90, 60), (20, 70), (300, 31), (47, 47)]
    images = [
        LabeledImage(
            np.tile(COLORS[i], (h, w, 1)).astype(np.uint8), np.array([[0.0, 0, w, h]]), np.array([i])
        )
        for i, (w, h) in enumerate(sizes)
    ]
    for seed in range(50):
        mosaic = Mosaic.draw(random.Random(seed), 4)
        combined = make_mosaic(mosaic, images)
        assert size_of(combined.pixels) == (90, 60)
        x, y = round(mosaic.center[0] * 90), round(mosaic.center[1] * 60)
        assert 22 <= x <= 68
        assert 15 <= y <= 45
        expected = [[0, 0, x, y], [x, 0, 90, y], [0, y, x, 60], [x, y, 90, 60]]
        assert [extent(combined.pixels, number) for number in range(4)] == expected
        np.testing.assert_allclose(combined.boxes_xyxy, expected, atol=1e-9)


def test_a_mosaic_drops_the_label_of_a_cropped_object() -> None:
    """Of a wide image with an object at each end, a quarter shows only one, and not always the same."""
    pixels = np.zeros((40, 400, 3), np.uint8)
    pixels[10:30, 5:45], pixels[10:30, 350:395] = COLORS[0], COLORS[1]
    wide = LabeledImage(pixels, np.array([[5.0, 10, 45, 30], [350, 10, 395, 30]]), np.array([0, 1]))
    empty = LabeledImage(np.zeros((60, 60, 3), np.uint8), np.zeros((0, 4)), np.zeros(0, np.int64))
    seen: set[tuple[int, ...]] = set()
    for seed in range(60):
        combined = make_mosaic(Mosaic.draw(random.Random(seed), 4), [empty, wide, empty, empty])
        check(combined.pixels, combined.boxes_xyxy, combined.labels, 1.5)
        seen.add(tuple(combined.labels.tolist()))
    assert {(0,), (1,), ()} <= seen


def test_images_of_one_pixel_make_a_mosaic() -> None:
    images = [
        LabeledImage(np.zeros((1, 1, 3), np.uint8), np.array([[0.0, 0, 1, 1]]), np.array([i]))
        for i in range(4)
    ]
    for seed in range(5):
        assert make_mosaic(Mosaic.draw(random.Random(seed), 4), images).pixels.shape == (1, 1, 3)


def test_partners_depend_on_seed_position_and_image_and_are_uniform() -> None:
    transform = Transform(TransformConfig(mosaic_probability=0.25))
    drawn = [transform.mosaic(7, position, position % 5, 8) for position in range(8000)]
    assert drawn == [transform.mosaic(7, position, position % 5, 8) for position in range(8000)]
    assert drawn != [transform.mosaic(8, position, position % 5, 8) for position in range(8000)]
    assert drawn != [transform.mosaic(7, position, position % 4, 8) for position in range(8000)]
    mosaics = [mosaic for mosaic in drawn if mosaic is not None]
    assert abs(len(mosaics) / 8000 - 0.25) < 0.02
    for place in range(3):
        counts = np.bincount([mosaic.partners[place] for mosaic in mosaics], minlength=8)
        assert (abs(counts / len(mosaics) - 1 / 8) < 0.03).all()
    assert Transform(TransformConfig()).mosaic(7, 0, 0, 8) is None


def test_labels_come_with_the_images_of_a_mosaic(shards: Shards) -> None:
    """Every box that its quarter does not crop has the shape and the label of an object of one of the four."""
    transform = Transform(TransformConfig(mosaic_probability=1.0))
    labels, num_uncropped = shards.label_map.labels, 0
    for index in range(shards.num_samples):
        found = load_sample(shards, index, transform, seed=2, position=index)
        mosaic = transform.mosaic(2, index, index, shards.num_samples)
        assert mosaic is not None
        row = shards.samples[index]
        assert found.image.size == (row["width"], row["height"])
        assert found.image_id == row["image_id"]
        shapes = [
            (labels[a["category_id"]], a["bbox"][2] / a["bbox"][3])
            for i in (index, *mosaic.partners)
            for a in shards.read(i).annotations
            if not a.get("iscrowd")
        ]
        for label, (x0, y0, x1, y1) in zip(found.labels, found.boxes_xyxy, strict=True):
            fits = [own for own, aspect in shapes if np.isclose((x1 - x0) / (y1 - y0), aspect, rtol=0.05)]
            num_uncropped += label in fits
        assert len(found.labels) <= len(shapes)
    assert num_uncropped > 20


def test_a_corrupt_partner_of_a_mosaic_is_named(shards: Shards) -> None:
    """It is never omitted silently; the substitute for the image at the position has other partners."""
    transform, position = Transform(TransformConfig(mosaic_probability=1.0)), 11
    drawn = {i: transform.mosaic(2, position, i, shards.num_samples) for i in range(shards.num_samples)}
    corrupt = next(m.partners[1] for i, m in drawn.items() if m is not None and i not in m.partners)
    samples = shards.samples.copy()
    samples["crc32"][corrupt] ^= 1
    broken, num_refused = dataclasses.replace(shards, samples=samples), 0
    for index, mosaic in drawn.items():
        assert mosaic is not None
        if corrupt in (index, *mosaic.partners):
            num_refused += 1
            with pytest.raises(ShardError, match=f"sample {shards.key(corrupt)} .*crc32"):
                load_sample(broken, index, transform, seed=2, position=position)
        else:
            load_sample(broken, index, transform, seed=2, position=position)
    assert 2 <= num_refused < shards.num_samples / 2


EVERYTHING = Transform(TransformConfig(
    short_sides=(24, 32, 40), max_side=64, horizontal_flip=0.5, crop_probability=0.5, crop_short_sides=(20, 30),
    crop_min_side=10, crop_max_side=30, scale_per="step", mosaic_probability=0.5, **COLOR_JITTER,
))  # fmt: skip


@pytest.mark.parametrize(
    "transform",
    [EVERYTHING, Transform(JITTERED.config.model_copy(update={"mosaic_probability": 0.5, "hue": 0.4}))],
)
def test_augmentation_is_the_same_for_any_number_of_workers(shards: Shards, transform: Transform) -> None:
    def first_batches(num_workers: int) -> list[dict[str, object]]:
        batches = train_batches(
            shards, seed=5, position=40, layout=Layout(6, 2), rank=1, transform=transform,
            num_workers=num_workers,
        )  # fmt: skip
        found = [
            {k: v.tolist() for k, v in vars(next(batches)).items() if hasattr(v, "tolist")} for _ in range(6)
        ]
        batches.close()
        return found

    assert first_batches(0) == first_batches(2)


def test_one_scale_for_a_step_on_all_ranks(shards: Shards) -> None:
    """Images of a step have one short side, where the long side is not limited."""
    transform = Transform(TransformConfig(short_sides=(24, 32, 40), max_side=1000, scale_per="step"))

    def short_sides(rank: int) -> list[set[int]]:
        batches = train_batches(
            shards, seed=5, position=0, layout=Layout(6, 3), rank=rank, transform=transform
        )
        return [set(next(batches).sizes.amin(dim=1).tolist()) for _ in range(12)]

    ranks = [short_sides(rank) for rank in range(3)]
    assert ranks[0] == ranks[1] == ranks[2]
    assert all(len(sides) == 1 for sides in ranks[0])
    assert set.union(*ranks[0]) == {24, 32, 40}


def test_no_augmentation_is_on_by_default() -> None:
    """No mosaic, no jitter, no colors: neither by default nor in a recipe."""
    rng = np.random.default_rng(0)
    pixels, boxes = rng.integers(0, 256, (48, 64, 3), np.uint8), np.array([[3.0, 4, 30, 40]])
    for position in range(50):
        image, kept_boxes, kept = Transform(TransformConfig())(
            pixels, boxes, seed=1, position=position, short_side=None
        )
        assert np.array_equal(image.pixels(), pixels)
        assert np.array_equal(kept_boxes, boxes)
        assert kept.tolist() == [True]
    for recipe in RECIPES:
        names = ("mosaic_probability", "lsj_size", "brightness", "contrast", "saturation", "hue")
        assert recipe().data.train_transform.non_default(names) == []


def params_without_colors(transform: Transform) -> Callable[[int], object]:
    return lambda position: dataclasses.replace(transform.draw(1, position, (64, 48)), colors=None)


def test_colors_change_no_other_draw() -> None:
    plain, jittered = params_without_colors(CROPPED), params_without_colors(TRANSFORMS["colors"])
    assert [plain(position) for position in range(200)] == [jittered(position) for position in range(200)]
