"""A contact sheet: samples with their boxes, as they were packed or as the training sees them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from raydetr import recipes
from raydetr.config import from_yaml, override, parse_assignments
from raydetr.data.samples import load_sample
from raydetr.data.stream import make_order
from raydetr.data.transforms.transform import Transform
from raydetr.process_pool import Progress
from raydetr.shards.images import UNREADABLE, decode_rgb
from raydetr.shards.reader import Shards
from raydetr.visualization.boxes import AnnotatedImage, Box, coco_boxes, draw_contact_sheet


def contact_sheet(
    shards: Shards,
    num: int,
    *,
    seed: int = 0,
    transform: Transform | None = None,
    progress: Progress | None = None,
) -> Image.Image:
    """The first samples that a training with this seed meets, with boxes, class names and ids.

    Args:
        shards: the data set.
        num: of samples; fewer are shown where there are fewer.
        seed: of the order and of the augmentation.
        transform: the augmentation that is shown, with the draws of a training; None: samples as they are.
        progress: called after each sample with their number and that of all.

    Raises:
        ShardError: a sample is damaged.
    """
    num = min(num, shards.num_samples)
    indices = make_order(shards, seed).samples(0, num).tolist()
    names = {
        category["id"]: f"{category['id']} {category['name']}" for category in shards.manifest.categories
    }
    pictures = []
    for position, index in enumerate(indices):
        if transform is None:
            pictures.append(_packed(shards, index, names))
        else:
            pictures.append(_augmented(shards, index, position, transform, seed, names))
        if progress is not None:
            progress(position + 1, num)
    what = "as packed" if transform is None else f"augmented with seed {seed}"
    heading = f"{shards.location}: {num} of {shards.num_samples} images, {what}; a box has its category's id and name"
    return draw_contact_sheet(pictures, heading=heading)


def training_transform(recipe_or_file: str, overrides: list[str]) -> Transform:
    """The augmentation of a recipe, or of a configuration file (`.yaml`), with `path=value` overrides.

    Raises:
        ConfigError: there is no such recipe or file, or an override does not fit.
    """
    is_file = recipe_or_file.endswith((".yaml", ".yml"))
    config = from_yaml(Path(recipe_or_file)) if is_file else recipes.find(recipe_or_file)
    return Transform(override(config, parse_assignments(overrides)).data.train_transform)


def _packed(shards: Shards, index: int, names: dict[int, str]) -> AnnotatedImage:
    raw = shards.read(index)
    try:
        image = decode_rgb(raw.image)
    except UNREADABLE as error:
        shards.refuse(index, f"its image cannot be decoded ({error})")
    return _titled(raw.record["id"], image, coco_boxes(raw.annotations, names))


def _augmented(
    shards: Shards, index: int, position: int, transform: Transform, seed: int, names: dict[int, str]
) -> AnnotatedImage:
    short_side = transform.step_short_side(seed, start=0)  # the sheet is the beginning of one global batch
    sample = load_sample(shards, index, transform, seed=seed, position=position, short_side=short_side)
    category_ids = {label: category_id for category_id, label in shards.label_map.labels.items()}
    boxes = []
    for label, (left, top, right, bottom) in zip(
        sample.labels.tolist(), sample.boxes_xyxy.tolist(), strict=True
    ):
        category_id = category_ids[label]
        boxes.append(Box(category_id, names[category_id], (left, top, right, bottom)))
    return _titled(sample.image_id, Image.fromarray(sample.image.pixels()), tuple(boxes))


def _titled(image_id: int, image: Image.Image, boxes: tuple[Box, ...]) -> AnnotatedImage:
    noun = "box" if len(boxes) == 1 else "boxes"
    return AnnotatedImage(
        f"image {image_id}    {image.width}x{image.height}    {len(boxes)} {noun}", image, boxes
    )
