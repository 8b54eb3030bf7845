"""Write a search space for a recipe, to begin with: what matters most in training a detector of its family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from detrs import zoo
from raydetr.config import RunConfig
from raydetr.training.optim import parameter_groups


def default_space(config: RunConfig) -> str:
    """Return a search space as YAML: ranges around the values of a configuration, with comments."""
    lines = [
        f"# A search space for {config.recipe}: delete what you do not want to vary. Few paths need few trials.",
        "# loguniform, uniform: [low, high]; randint: [low, high], both included; choice: [value, ...]",
        *_entries(config),
    ]
    return "\n".join(lines) + "\n"


def _entries(config: RunConfig) -> Iterator[str]:
    optim, model = config.optim, config.model
    groups = _groups(config)
    yield "# The learning rate matters most, then that of the pretrained backbone"
    yield _loguniform("optim.lr", optim.lr, 4)
    if "backbone" in groups:
        yield _loguniform("optim.lr_backbone", optim.lr_backbone, 4)
    if "sampling" in groups:
        yield _loguniform("optim.lr_sampling", optim.lr_sampling, 4)
    if optim.weight_decay > 0:
        yield _loguniform("optim.weight_decay", optim.weight_decay, 10)
    if optim.clip_max_norm is not None:
        yield f"optim.clip_max_norm: {{choice: [{optim.clip_max_norm:g}, {10 * optim.clip_max_norm:g}, null]}}"
    queries = model.num_queries
    if config.init.checkpoint is None:  # it has queries of its own
        yield "# More queries find more objects of crowded images, and cost time"
        yield f"model.num_queries: {{choice: [{max(1, queries // 2)}, {queries}, {2 * queries}]}}"
    yield "# The weights of the losses: class, L1 of the box, GIoU"
    for name in ("class_weight", "box_weight", "giou_weight"):
        value = getattr(model.loss, name)
        yield f"model.loss.{name}: {{uniform: [{value / 2:g}, {2 * value:g}]}}"
    if isinstance(model, zoo.DinoConfig) and model.num_denoising > 0:
        yield "# Denoising: its queries, and the noise of their boxes"
        values = [max(1, model.num_denoising // 2), model.num_denoising, 2 * model.num_denoising]
        yield f"model.num_denoising: {{choice: {values}}}"
        yield f"model.box_noise: {{uniform: [{model.box_noise / 2:g}, {model.box_noise * 1.5:g}]}}"
    yield "# Small data sets overfit less with dropout"
    yield f"model.dropout: {{choice: {sorted({0.0, 0.1, float(model.dropout)})}}}"


def _loguniform(path: str, value: float, factor: float) -> str:
    # YAML reads a number with an exponent as a number only if it has a decimal point
    low, high = (f"{bound:.1e}" for bound in (value / factor, value * factor))
    return f"{path}: {{loguniform: [{low}, {high}]}}"


def _groups(config: RunConfig) -> set[str]:
    """Return the groups of parameters that have a learning rate of their own in this model."""
    model = replace(config.model, num_classes=config.model.num_classes or 1)
    with torch.device("meta"):
        built = zoo.build(replace(model, backbone=replace(model.backbone, weights=None)))
    return {group["name"] for group in parameter_groups(built.detector.named_parameters(), config.optim)}
