"""Define the commands about a model alone; their docstrings are the help texts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import typer

from raydetr.cli.arguments import ConfigFile, RecipeAndOverrides, read_config
from raydetr.config import ConfigError, RunConfig
from raydetr.console import table

NUM_COCO = 91  # labels of the official models: COCO's category ids are below 91
LONG_SIDE = 1.6  # times the short side: 800x1280, a usual size for COCO


def explain(
    checkpoint: Annotated[str, typer.Argument(help="A run or a checkpoint: its folder or URL.")],
    image: Annotated[Path, typer.Argument(help="Image file.")],
    out: Annotated[Path, typer.Option(help="Output folder; must be empty or new.")],
    detections: Annotated[
        int, typer.Option(min=1, help="Number of detections to explain, the best of different queries.")
    ] = 3,
) -> None:
    """Draw what a detector looks at: attention, sampled points, boxes by layer, proposals, denoising queries."""
    from raydetr.inference.explain import explain_image

    pictures = explain_image(checkpoint, image, out, num_detections=detections)
    typer.echo(table([[str(out / picture.name), picture.caption] for picture in pictures]))


def model(
    arguments: RecipeAndOverrides = None,
    config: ConfigFile = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Size of the image in pixels; default: the recipe's."),
    ] = None,
) -> None:
    """Print the parts of a recipe's model: output, parameters, multiply-adds for one image. No data is read."""
    from detrs.summary import summarize

    chosen = read_config(arguments or [], config)
    height, width, about_size = _size_of(chosen) if size is None else (*_parse(size), "--size")
    num_classes, about_classes = _classes_of(chosen)
    parts = summarize(dataclasses.replace(chosen.model, num_classes=num_classes), height, width)
    rows = [["part", "output", "parameters", "multiply-adds"]]
    rows += [[p.name, p.output, f"{p.num_parameters:,}", f"{p.multiply_adds / 1e9:,.3f} G"] for p in parts]
    total = sum(part.multiply_adds for part in parts) / 1e9
    rows.append(["total", "", f"{sum(part.num_parameters for part in parts):,}", f"{total:,.3f} G"])
    typer.echo(table(rows, right=True))
    typer.echo(
        f"\nimage: {height}x{width} ({about_size}); classes: {num_classes} ({about_classes})\n"
        "Multiply-adds of convolutions and matrix products, counted by torch (half its flops)."
    )


def _parse(size: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size)
    if found is None:
        raise ConfigError(f"--size {size}: give height and width in pixels, such as 800x1280")
    return int(found[1]), int(found[2])


def _size_of(config: RunConfig) -> tuple[int, int, str]:
    """Return height and width of an image in evaluation, and where they are from."""
    from raydetr.shards.synthetic import SIDE

    transform = config.data.val_transform
    is_synthetic = config.data.synthetic is not None
    if not transform.short_sides:
        if is_synthetic:
            return SIDE, SIDE, "that of the synthetic data"
        raise ConfigError(
            "data.val_transform.short_sides is empty: images keep their size: add --size 800x1280"
        )
    (short,) = transform.short_sides
    if is_synthetic:
        return short, short, "data.val_transform, square as the synthetic data"
    if transform.max_side < short:
        return transform.max_side, transform.max_side, "data.val_transform"
    long = min(round(LONG_SIDE * short), transform.max_side)
    return short, long, f"data.val_transform, at most {LONG_SIDE:g} times as wide as high"


def _classes_of(config: RunConfig) -> tuple[int, str]:
    """Return the number of classes, and where it is from."""
    from raydetr.shards.synthetic import HARD, ORDINARY

    if config.model.num_classes is not None:
        return config.model.num_classes, "model.num_classes"
    if config.data.synthetic is not None:
        variant = ORDINARY if config.data.synthetic == "easy" else HARD
        return len(variant.class_names), "those of the synthetic data"
    return NUM_COCO, "as the official models for COCO; model.num_classes=N changes it"
