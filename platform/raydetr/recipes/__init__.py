"""Define recipes: functions that return a complete RunConfig. A variant calls its parent and overrides fields.

`raydetr recipes` prints the first line of a recipe's docstring, which therefore describes the training, not the
function; the other lines have its cost and command. `raydetr train NAME` trains a recipe; docs/recipes.md lists the
settings to fill in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from raydetr.config import ConfigError, RunConfig, nearest
from raydetr.recipes import conditional, dab, deformable, detr, dino, finetune, small
from raydetr.recipes.quickstart import quickstart, quickstart_hard

__all__ = ["RECIPES", "find", "quickstart", "quickstart_hard", "summary"]

RECIPES: tuple[Callable[[], RunConfig], ...] = (
    quickstart,
    quickstart_hard,
    small.small_detr,
    small.small_conditional_detr,
    small.small_dab_detr,
    small.small_deformable_detr,
    small.small_dino,
    finetune.finetune_dino_r50,
    finetune.finetune_deformable_detr_r50,
    finetune.finetune_dab_detr_r50,
    finetune.finetune_conditional_detr_r50,
    finetune.finetune_detr_r50,
    dino.dino_r50_4scale_12ep,
    dino.dino_r50_4scale_24ep,
    dino.dino_r50_4scale_36ep,
    dino.dino_r50_5scale_12ep,
    dino.dino_r50_5scale_24ep,
    dino.dino_r50_5scale_36ep,
    dino.dino_r50_4scale_12ep_300dn,
    dino.dino_r50_4scale_12ep_improved,
    deformable.deformable_detr_r50_50ep,
    deformable.deformable_detr_r50_refine_50ep,
    deformable.deformable_detr_r50_two_stage_50ep,
    deformable.deformable_detr_r50_single_scale_50ep,
    deformable.deformable_detr_r50_single_scale_dc5_50ep,
    deformable.dab_deformable_detr_r50_50ep,
    dab.dab_detr_r50_50ep,
    dab.dab_detr_r50_3patterns_50ep,
    dab.dab_detr_r50_dc5_50ep,
    dab.dab_detr_r50_dc5_3patterns_50ep,
    dab.dab_detr_r50_dc5_random_points_50ep,
    dab.dab_detr_r101_50ep,
    dab.dab_detr_r101_3patterns_50ep,
    dab.dab_detr_r101_dc5_50ep,
    dab.dab_detr_r101_dc5_3patterns_50ep,
    conditional.conditional_detr_r50_50ep,
    conditional.conditional_detr_r50_dc5_50ep,
    conditional.conditional_detr_r101_50ep,
    conditional.conditional_detr_r101_dc5_50ep,
    detr.detr_r50_500ep,
    detr.detr_r50_150ep,
    detr.detr_r50_dc5_500ep,
    detr.detr_r50_dc5_50ep,
    detr.detr_r50_dc5_plus_50ep,
    detr.detr_r101_500ep,
    detr.detr_r101_dc5_500ep,
)


def find(name: str) -> RunConfig:
    """Return the configuration of the recipe with this name.

    Raises:
        ConfigError: there is no such recipe; the message has the nearest name.
    """
    for recipe in RECIPES:
        if recipe.__name__ == name:
            return recipe()
    names = [recipe.__name__ for recipe in RECIPES]
    raise ConfigError(f"no recipe {name!r} (`raydetr recipes` lists them){nearest(name, names)}")


def summary(recipe: Callable[[], RunConfig]) -> str:
    """Return the first line of a recipe's docstring."""
    return (inspect.getdoc(recipe) or "").splitlines()[0]
