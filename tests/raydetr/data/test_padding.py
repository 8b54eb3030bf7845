"""Test how much of a batch is padding: with and without the sample order, with a scale per image and per step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from raydetr.data.order import SampleOrder
from raydetr.data.transforms.geometry import resized_size
from raydetr.data.transforms.transform import Transform
from raydetr.recipes.coco import official_training_transform

NUM_IMAGES, BATCH, RANKS = 12_000, 4, 2

# (width, height) of images of COCO 2017, and how many of 160 have it; a fifth of the images has rare sizes
COMMON = {
    (640, 480): 34, (640, 427): 21, (480, 640): 17, (640, 426): 10, (640, 428): 6, (500, 375): 6, (500, 333): 4,
    (640, 424): 3, (426, 640): 3, (640, 425): 2, (640, 429): 2, (427, 640): 2, (428, 640): 2, (500, 374): 2,
    (640, 449): 2, (425, 640): 2,
}  # fmt: skip
RARE = [
    (640, 433), (640, 512), (500, 346), (640, 421), (640, 498), (640, 483), (640, 383), (359, 640), (640, 409),
    (640, 359), (449, 640), (213, 140), (333, 500), (389, 500), (448, 336), (400, 302), (450, 600), (600, 593),
    (640, 418), (469, 469), (640, 457), (500, 486), (358, 640), (640, 368), (640, 444), (478, 640), (640, 320),
]  # fmt: skip

OFFICIAL = Transform(official_training_transform())
PER_STEP = Transform(OFFICIAL.config.model_copy(update={"scale_per": "step"}))
UNCROPPED = Transform(OFFICIAL.config.model_copy(update={"crop_probability": 0.0}))
UNCROPPED_PER_STEP = Transform(PER_STEP.config.model_copy(update={"crop_probability": 0.0}))


def coco_sizes() -> list[tuple[int, int]]:
    """Draw sizes distributed like COCO's, with further aspect ratios among the rare ones."""
    rng = np.random.default_rng(0)
    common, counts = list(COMMON), np.array(list(COMMON.values()))
    sizes = [common[i] for i in rng.choice(len(common), NUM_IMAGES * 4 // 5, p=counts / counts.sum())]
    for i in rng.integers(len(RARE), size=NUM_IMAGES - len(sizes)):
        width, height = RARE[i]
        sizes.append((width, max(100, min(640, round(height * rng.uniform(0.9, 1.1))))))
    return [sizes[i] for i in rng.permutation(NUM_IMAGES)]


SIZES = coco_sizes()


def padded_fraction(transform: Transform, order: np.ndarray) -> float:
    """Return the fraction of all pixels of an epoch's batches that show no image."""
    seen = drawn = 0
    for start in range(0, NUM_IMAGES - NUM_IMAGES % (RANKS * BATCH), RANKS * BATCH):
        short_side = transform.step_short_side(7, start)
        for own in (start, start + BATCH):  # first position of each rank
            sizes = []
            for position in range(own, own + BATCH):
                params = transform.draw(7, position, SIZES[order[position]], short_side)
                crop = params.crop
                size = (crop.width, crop.height) if crop else SIZES[order[position]]
                assert params.short_side is not None
                sizes.append(resized_size(*size, params.short_side, transform.config.max_side))
            seen += sum(width * height for width, height in sizes)
            drawn += BATCH * max(width for width, _ in sizes) * max(height for _, height in sizes)
    return 1 - seen / drawn


@pytest.fixture(scope="module")
def order() -> np.ndarray:
    widths, heights = np.array(SIZES).T
    return SampleOrder(np.arange(NUM_IMAGES) // 1000, widths / heights, "padding", 3).order(0)


@pytest.mark.parametrize("transform", [PER_STEP, UNCROPPED_PER_STEP])
def test_less_than_3_percent_of_a_batch_is_padding_with_a_scale_per_step(
    order: np.ndarray, transform: Transform
) -> None:
    assert padded_fraction(transform, order) < 0.01
    assert 0.22 < padded_fraction(transform, np.arange(NUM_IMAGES)) < 0.32  # without aspect groups


def test_a_scale_per_image_needs_more_padding(order: np.ndarray) -> None:
    assert 0.2 < padded_fraction(UNCROPPED, order) < padded_fraction(OFFICIAL, order) < 0.35


def test_the_scale_of_a_step_is_uniform_and_known_to_all_ranks() -> None:
    """Another copy of the transform draws the same; steps and seeds are independent."""
    sides = [PER_STEP.step_short_side(7, start) for start in range(0, 33_000, 3)]
    again = Transform(PER_STEP.config)
    assert sides == [again.step_short_side(7, start) for start in range(0, 33_000, 3)]
    assert sides != [again.step_short_side(8, start) for start in range(0, 33_000, 3)]
    for side in OFFICIAL.config.short_sides:
        assert abs(sides.count(side) / len(sides) - 1 / 11) < 0.012
    repeated = np.mean([one == other for one, other in itertools.pairwise(sides)])
    assert abs(repeated - 1 / 11) < 0.012
    assert OFFICIAL.step_short_side(7, 0) is None


def test_a_scale_per_step_changes_no_other_draw() -> None:
    """Flips, and which images are cropped, are those of a scale per image; crops keep the aspect ratio."""
    size, num_crops = (640, 427), 0
    for position in range(500):
        per_image, per_step = (t.draw(1, position, size, s) for t, s in ((OFFICIAL, None), (PER_STEP, 544)))
        assert per_step.short_side == 544
        assert (per_image.flip, per_image.crop is None) == (per_step.flip, per_step.crop is None)
        if per_image.crop is not None and per_step.crop is not None:
            num_crops += 1
            assert per_step.crop.width / per_step.crop.height == pytest.approx(640 / 427, rel=0.004)
            area = per_image.crop.width * per_image.crop.height
            assert per_step.crop.width * per_step.crop.height == pytest.approx(area, rel=0.01)
    assert 200 < num_crops < 300
