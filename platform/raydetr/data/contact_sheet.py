"""Draw a contact sheet: samples with their boxes, as packed or as augmented in training."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from raydetr import recipes
from raydetr.config import from_yaml, override, parse_assignments
from raydetr.data.samples import decode, load_sample
from raydetr.data.stream import make_order
from raydetr.data.transforms.transform import Transform
from raydetr.process_pool import Progress
from raydetr.shards.reader import Shards
from raydetr.visualization.boxes import AnnotatedImage, Box, coco_boxes, draw_contact_sheet


def contact_sheet(
    shards: Shards,
    num_images: int,
    *,
    seed: int = 0,
    transform: Transform | None = None,
    progress: Progress | None = None,
) -> Image.Image:
    """Draw the first samples of a training with this seed, with boxes, class names and ids.

    Args:
        shards: the data set.
        num_images: how many to draw; limited to the size of the data set.
        seed: of the order and of the augmentation.
        transform: the augmentation to apply, with the draws of a training; None: samples as packed.
        progress: called after each sample with the number done and the total.

    Raises:
        ShardError: a sample is corrupt.
    """
    num_images = min(num_images, shards.num_samples)
    indices = make_order(shards, seed).samples(0, num_images).tolist()
    categories = shards.manifest.categories
    names = {category["id"]: f"{category['id']} {category['name']}" for category in categories}
    images = []
    for position, index in enumerate(indices):
        if transform is None:
            raw = shards.read(index)
            image = Image.fromarray(decode(shards, index, raw).pixels)
            boxes = coco_boxes(raw.annotations, names)
        else:
            image, boxes = _augmented(shards, index, position, transform, seed, names)
        size = f"{image.width}x{image.height}    {len(boxes)} {'box' if len(boxes) == 1 else 'boxes'}"
        title = f"image {shards.samples['image_id'][index]}    {size}"
        images.append(AnnotatedImage(title, image, boxes))
        if progress is not None:
            progress(position + 1, num_images)
    state = "as packed" if transform is None else f"augmented with seed {seed}"
    count = f"{num_images} of {shards.num_samples} images"
    heading = f"{shards.location}: {count}, {state}; boxes with category id and name"
    return draw_contact_sheet(images, heading=heading)


def training_transform(recipe_or_file: str, overrides: list[str]) -> Transform:
    """Return the training augmentation of a recipe or a configuration file (`.yaml`), with `path=value` overrides.

    Raises:
        ConfigError: there is no such recipe or file, or an override does not fit.
    """
    is_file = recipe_or_file.endswith((".yaml", ".yml"))
    config = from_yaml(Path(recipe_or_file)) if is_file else recipes.find(recipe_or_file)
    return Transform(override(config, parse_assignments(overrides)).data.train_transform)


def _augmented(
    shards: Shards, index: int, position: int, transform: Transform, seed: int, names: dict[int, str]
) -> tuple[Image.Image, tuple[Box, ...]]:
    short_side = transform.step_short_side(seed, start=0)  # as if the sheet were one global batch
    sample = load_sample(shards, index, transform, seed=seed, position=position, short_side=short_side)
    category_ids = [shards.label_map.category_ids[label] for label in sample.labels]
    corners = map(tuple, sample.boxes_xyxy.tolist())
    boxes = tuple(Box(number, names[number], box) for number, box in zip(category_ids, corners, strict=True))
    return Image.fromarray(sample.image.pixels()), boxes
