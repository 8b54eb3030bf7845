"""Generate a synthetic detection data set that a small model learns on two CPU cores in minutes.

Textured discs, rings, squares and triangles on cluttered backgrounds, 96x96 JPEG, COCO layout. In the ordinary variant
80% of the objects have a hue that is typical of their class. The hard variant has five classes, no color cue and a
wider range of sizes. Image i depends only on (seed, split, i).
"""

from __future__ import annotations

import colorsys
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from raydetr.process_pool import Progress
from raydetr.store.output_folder import atomic_folder

SIDE = 96
SPLITS = ("train", "val")

FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]

_rows, _columns = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


@dataclass(frozen=True)
class Variant:
    """Parameters that differ between the ordinary and the hard data set."""

    class_names: tuple[str, ...]
    min_side: int  # pixels, of the square in which an object is drawn before it is rotated
    max_side: int
    hue_fraction: float  # fraction of the objects with a hue typical of their class


ORDINARY = Variant(("disc", "ring", "square", "triangle"), 19, 52, hue_fraction=0.8)
HARD = Variant(("disc", "ring", "square", "triangle", "cross"), 11, 60, hue_fraction=0.0)


@dataclass(frozen=True)
class Shape:
    """An object before it is painted: its class and the pixels that it covers."""

    label: int
    u: FloatArray  # local coordinates [SIDE, SIDE]; the shape lies within [-1, 1]
    v: FloatArray
    cover: FloatArray  # [SIDE, SIDE] in [0, 1]; fractional at the edge

    @property
    def mask(self) -> BoolArray:
        """Pixels of the object, including those that another object hides."""
        return self.cover > 0.5


def write_synthetic_data(
    out: Path,
    *,
    hard: bool = False,
    seed: int = 0,
    num_train: int = 2400,
    num_val: int = 500,
    progress: Progress | None = None,
) -> None:
    """Write `annotations/instances_{train,val}.json`, `train/` and `val/` below `out`.

    Args:
        out: output folder; missing or empty.
        hard: write the hard variant (five classes, no color cue, objects of 11 to 60 pixels).
        seed: seed of the images.
        num_train: number of training images.
        num_val: number of validation images.
        progress: called with (images written, total images).

    Raises:
        ValueError: `out` is not empty.
        OSError: writing failed; nothing is left behind.
    """
    variant = HARD if hard else ORDINARY
    categories = [{"id": label, "name": name} for label, name in enumerate(variant.class_names, 1)]
    done, total = 0, num_train + num_val
    with atomic_folder(out, last="annotations") as folder:
        (folder / "annotations").mkdir()
        for split, count in zip(SPLITS, (num_train, num_val), strict=True):
            (folder / split).mkdir()
            images: list[Any] = []
            annotations: list[Any] = []
            for index in range(count):
                image, shapes = draw_image(variant, seed, split, index)
                file_name = f"{index:06d}.jpg"
                image.save(folder / split / file_name, quality=85)
                images.append({"id": index + 1, "file_name": file_name, "width": SIDE, "height": SIDE})
                for shape in shapes:
                    record = {"id": len(annotations) + 1, "image_id": index + 1, **_annotation(shape)}
                    annotations.append(record)
                done += 1
                if progress:
                    progress(done, total)
            info = {"description": "raydetr synthetic data: procedural shapes"}
            records = {"images": images, "annotations": annotations, "categories": categories}
            path = folder / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps({"info": info, **records}, allow_nan=False))


def draw_image(variant: Variant, seed: int, split: str, index: int) -> tuple[Image.Image, list[Shape]]:
    """Return image number `index` of a split and its objects, from the farthest to the nearest."""
    rng = np.random.default_rng([seed, SPLITS.index(split), len(variant.class_names), index])
    canvas = _background(rng)
    shapes = _arrange(variant, rng)
    for shape in shapes:
        _paint(canvas, shape, variant, rng)
    canvas += np.float32(rng.uniform(1.0, 7.0)) * rng.standard_normal(canvas.shape, np.float32)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    blur = rng.uniform(0.0, 1.6) - 0.8  # half of the images stay sharp
    return (image.filter(ImageFilter.GaussianBlur(blur)) if blur > 0 else image), shapes


def _arrange(variant: Variant, rng: np.random.Generator) -> list[Shape]:
    """Draw one to four random objects, each of which stays at least half visible."""
    shapes: list[Shape] = []
    for _ in range(int(rng.integers(1, 5))):
        for _attempt in range(8):
            candidate = _random_shape(variant, rng)
            if _leaves_half_visible(shapes, candidate):
                shapes.append(candidate)
                break
    return shapes


def _leaves_half_visible(shapes: list[Shape], candidate: Shape) -> bool:
    hidden = candidate.mask.copy()
    for shape in reversed(shapes):
        if (shape.mask & ~hidden).sum() * 2 < shape.mask.sum():
            return False
        hidden |= shape.mask
    return True


def _random_shape(variant: Variant, rng: np.random.Generator) -> Shape:
    label = int(rng.integers(len(variant.class_names)))
    side = np.exp(rng.uniform(np.log(variant.min_side), np.log(variant.max_side)))
    stretch = np.exp(rng.uniform(-0.2, 0.2))
    half_width, half_height = side / 2 * stretch, side / 2 / stretch
    center_x, center_y = rng.uniform(side * 0.45, SIDE - side * 0.45, 2)
    angle = rng.uniform(0.0, 2 * np.pi)
    dx, dy = _columns - np.float32(center_x), _rows - np.float32(center_y)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u = (cos * dx + sin * dy) / np.float32(half_width)
    v = (cos * dy - sin * dx) / np.float32(half_height)
    inside = _inside(variant.class_names[label], u, v) * np.float32(min(half_width, half_height))
    return Shape(label, u, v, np.clip(inside + np.float32(0.5), 0, 1))


def _inside(name: str, u: FloatArray, v: FloatArray) -> FloatArray:
    """Return the signed distance to the outline in local units, positive inside the shape."""
    if name == "square":
        return 0.9 - np.maximum(np.abs(u), np.abs(v))
    if name == "triangle":
        return 0.55 - np.maximum(0.866 * np.abs(u) - 0.5 * v, v)
    if name == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(0.95 - np.maximum(a, b), 0.3 - np.minimum(a, b))
    radius = np.sqrt(u * u + v * v)
    if name == "ring":
        return 0.23 - np.abs(radius - 0.77)
    assert name == "disc", name
    return 1.0 - radius


def _paint(canvas: FloatArray, shape: Shape, variant: Variant, rng: np.random.Generator) -> None:
    """Blend an object onto the canvas in place."""
    if rng.random() < variant.hue_fraction:
        hue = shape.label / len(variant.class_names) + rng.normal(0.0, 0.03)
    else:
        hue = rng.random()
    saturation, value = rng.uniform(0.5, 0.95), rng.uniform(0.6, 1.0)
    first = _rgb(hue, saturation, value)
    second = _rgb(
        hue + rng.normal(0.0, 0.02), saturation * rng.uniform(0.4, 0.9), value * rng.uniform(0.45, 0.75)
    )
    mix = _texture(shape, rng)[..., None]
    rows, columns = np.flatnonzero(shape.cover.any(1)), np.flatnonzero(shape.cover.any(0))
    part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    colors = first + (second - first) * mix[part]
    canvas[part] += shape.cover[part][..., None] * (colors - canvas[part])


def _texture(shape: Shape, rng: np.random.Generator) -> FloatArray:
    """Draw one of four textures: the amount of the second color in each pixel, [SIDE, SIDE] in [0, 1]."""
    kind = int(rng.integers(4))
    frequency, phase = rng.uniform(4.0, 9.0), rng.uniform(0.0, 6.28)
    if kind == 0:  # plain
        return np.full_like(shape.u, 0.15)
    if kind == 1:  # gradient
        return np.asarray(np.clip(0.5 + 0.5 * shape.v, 0, 1))
    pattern: FloatArray = np.sin(frequency * shape.u + phase)  # stripes
    if kind == 3:  # checks
        pattern = pattern * np.sin(frequency * shape.v + phase)
    return (pattern > 0).astype(np.float32)


def _background(rng: np.random.Generator) -> FloatArray:
    """Draw value noise in two octaves under lines, arcs and dots, [SIDE, SIDE, 3] in [0, 255]."""
    base = np.asarray(_rgb(rng.random(), rng.uniform(0.0, 0.5), rng.uniform(0.25, 0.8)))
    canvas = np.zeros((SIDE, SIDE, 3), np.float32) + base
    for cells, strength in ((3, 50.0), (12, 22.0)):
        gray = rng.uniform(-strength, strength, (cells, cells, 1))
        tint = rng.uniform(-strength / 2, strength / 2, (cells, cells, 3))
        noise = np.clip(128 + gray + tint, 0, 255).astype(np.uint8)
        smooth = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        canvas += np.asarray(smooth, np.float32) - 128
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    _draw_distractors(ImageDraw.Draw(image), rng)
    return np.asarray(image, np.float32).copy()


def _draw_distractors(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Draw clutter: lines, arcs and dots, all thinner or smaller than any object."""
    for kind in rng.integers(0, 3, int(rng.integers(2, 9))):
        color = tuple(int(c) for c in _rgb(rng.random(), rng.uniform(0.1, 0.8), rng.uniform(0.2, 1.0)))
        x, y, dx, dy = rng.uniform(0, SIDE, 2).tolist() + rng.uniform(-40, 40, 2).tolist()
        width = int(rng.integers(1, 3))
        if kind == 0:
            draw.line((x, y, x + dx, y + dy), fill=color, width=width)
        elif kind == 1:
            start, length, radius = rng.uniform(0, 360), rng.uniform(40, 160), rng.uniform(5, 25)
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.arc(box, start, start + length, fill=color, width=width)
        else:
            radius = rng.uniform(1.0, 3.5)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _rgb(hue: float, saturation: float, value: float) -> FloatArray:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32) * 255


def _annotation(shape: Shape) -> dict[str, object]:
    """Return fields of the COCO annotation; its box encloses the object inside the image, including hidden parts."""
    columns, rows = np.flatnonzero(shape.mask.any(0)), np.flatnonzero(shape.mask.any(1))
    x, y = int(columns[0]), int(rows[0])
    return {
        "category_id": shape.label + 1,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(shape.mask.sum()),
        "iscrowd": 0,
    }
