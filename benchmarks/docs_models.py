"""Write the table of all models and variants in docs/models.md: published figures beside our counts.

    make docs-models

A new variant is one more line of ROWS. Counts are those of `raydetr model`, for 91 classes and at two sizes of images.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from race import markdown, put_into_docs

from detrs.summary import summarize
from raydetr import recipes
from raydetr.config import override, parse_assignments
from raydetr.console import progress_bar

PAGE = Path("docs/models.md")
NUM_CLASSES = 91
SIZES = ((800, 1280), (800, 1136))
NONE = "-"


@dataclass(frozen=True)
class Row:
    """A model with its published figures, "-" where there is none. AP is on COCO val2017."""

    option: str
    recipe: str  # with the settings that differ from it, if any
    place: str = NONE  # in the paper
    paper: str = NONE  # AP
    official: str = NONE  # AP of the official repository
    best: str = NONE  # AP of the best re-implementation
    parameters: str = NONE  # million
    multiply_adds: str = NONE  # billion


ROWS: dict[str, tuple[Row, ...]] = {
    "DETR": (
        Row("R50", "detr_r50_500ep", "table 1", "42.0", "42.0", "42.3 (Paddle)", "41", "86"),
        Row("R50, short schedule", "detr_r50_150ep", NONE, NONE, "39.5", NONE, "41", "86"),
        Row("R50, DC5", "detr_r50_dc5_500ep", "table 1", "43.3", "43.3", NONE, "41", "187"),
        Row("R101", "detr_r101_500ep", "table 1", "43.5", "43.5", NONE, "60", "152"),
        Row("R101, DC5", "detr_r101_dc5_500ep", "table 1", "44.9", "44.9", NONE, "60", "253"),
        Row("R50, DC5, 50 epochs", "detr_r50_dc5_50ep", "Deformable DETR, table 1", "35.3", NONE, NONE, "41", "187"),
        Row("R50, DC5+: focal loss, 300 queries", "detr_r50_dc5_plus_50ep", "Deformable DETR, table 1", "36.2", NONE,
            NONE, "41", "187"),
        Row("norms before attention", "detr_r50_500ep model.pre_norm=true"),
        Row("learned position encoding", "detr_r50_500ep model.position_encoding=learned", "table 3"),
    ),
    "Conditional DETR": (
        Row("R50", "conditional_detr_r50_50ep", "table 1", "40.9", "41.0", "41.6 (detrex)", "44", "90"),
        Row("R50, DC5", "conditional_detr_r50_dc5_50ep", "table 1", "43.8", "43.7", NONE, "44", "195"),
        Row("R101", "conditional_detr_r101_50ep", "table 1", "42.8", "42.8", NONE, "63", "156"),
        Row("R101, DC5", "conditional_detr_r101_dc5_50ep", "table 1", "45.0", "45.0", NONE, "63", "262"),
        Row("learned reference points", "conditional_detr_r50_50ep model.reference_point=learned", "3.3"),
    ),
    "DAB-DETR": (
        Row("R50", "dab_detr_r50_50ep", "table 2", "42.2", "42.2", "43.3 (detrex)", "44", "94"),
        Row("R50, 3 patterns", "dab_detr_r50_3patterns_50ep", "table 2", "42.6", "42.6", NONE, "44", "100"),
        Row("R50, DC5", "dab_detr_r50_dc5_50ep", "table 2", "44.5", "44.5", NONE, "44", "202"),
        Row("R50, DC5, 3 patterns", "dab_detr_r50_dc5_3patterns_50ep", "table 2", "45.7", "45.7", NONE,
            "44", "216"),
        Row("R101", "dab_detr_r101_50ep", "table 2", "43.5", NONE, NONE, "63", "174"),
        Row("R101, 3 patterns", "dab_detr_r101_3patterns_50ep", "table 2", "44.1", NONE, NONE, "63"),
        Row("R101, DC5", "dab_detr_r101_dc5_50ep", "table 2", "45.8", NONE, NONE, "63", "282"),
        Row("R101, DC5, 3 patterns", "dab_detr_r101_dc5_3patterns_50ep", "table 2", "46.6", NONE, NONE, "63"),
        Row("without modulated attention", "dab_detr_r50_50ep model.modulate_attention=false", "eq. 6"),
        Row("one scale per query", "dab_detr_r50_50ep model.position_scale=scalar"),
        Row("a learned scale per layer", "dab_detr_r50_50ep model.position_scale=learned"),
        Row("query positions in all layers", "dab_detr_r50_50ep model.keep_query_position=true"),
        Row("a box head per layer", "dab_detr_r50_50ep model.shared_box_heads=false"),
        Row("R50, DC5, random points", "dab_detr_r50_dc5_random_points_50ep", "table 8", "44.7", "44.7", NONE, "44",
            "202"),
        Row("fixed points", "dab_detr_r50_50ep model.random_points=true model.fixed_points=true", "H"),
        Row("without self-attention", "dab_detr_r50_50ep model.decoder_self_attention=false"),
        Row("without refinement", "dab_detr_r50_50ep model.refinement=false"),
        Row("points instead of boxes", "dab_detr_r50_50ep model.anchor=point model.modulate_attention=false"),
    ),
    "Deformable DETR": (
        Row("R50, one scale", "deformable_detr_r50_single_scale_50ep", NONE, NONE, "39.4", NONE, "34", "78"),
        Row("R50, one scale, DC5", "deformable_detr_r50_single_scale_dc5_50ep", NONE, NONE, "41.5", NONE, "34",
            "128"),
        Row("R50", "deformable_detr_r50_50ep", "table 1", "43.8", "44.5", "44.5 (mmdetection)", "40", "173"),
        Row("+ refinement", "deformable_detr_r50_refine_50ep", "A.4, table 1", "45.4", "46.2", "47.0 (detrex)",
            "41", "173"),
        Row("+ two-stage", "deformable_detr_r50_two_stage_50ep", "A.4, table 1", "46.2", "46.9", "48.2 (detrex)",
            "41", "173"),
        Row("two-stage without refinement", "deformable_detr_r50_50ep model.two_stage=true"),
        Row("learned boxes (DAB-Deformable-DETR)", "dab_deformable_detr_r50_50ep", "DAB-DETR, C", NONE, "48.7", NONE,
            "47"),
    ),
    "DINO": (
        Row("R50, 4 scales, 12 epochs", "dino_r50_4scale_12ep", "table 1", "49.0", "49.0", "50.1 (mmdetection)",
            "47", "279"),
        Row("24 epochs", "dino_r50_4scale_24ep", "table 2", "50.4", "50.4", "50.6 (detrex)", "47", "279"),
        Row("36 epochs", "dino_r50_4scale_36ep", "table 2", "50.9", "50.9", NONE, "47", "279"),
        Row("R50, 5 scales, 12 epochs", "dino_r50_5scale_12ep", "table 1", "49.4", "49.4", "49.6", "47", "860"),
        Row("24 epochs", "dino_r50_5scale_24ep", "table 2", "51.3", "51.3", NONE, "47", "860"),
        Row("36 epochs", "dino_r50_5scale_36ep", "table 2", "51.2", "51.2", NONE, "47", "860"),
        Row("R50, 4 scales, settings of detrex", "dino_r50_4scale_12ep_300dn", NONE, NONE, NONE, "49.5 (detrex)"),
        Row("R50, 4 scales, settings of mmdetection", "dino_r50_4scale_12ep_improved", NONE, NONE, NONE,
            "50.1 (mmdetection)"),
        Row("without denoising", "dino_r50_4scale_12ep model.num_denoising=0"),
        Row("denoising without negatives", "dino_r50_4scale_12ep model.contrastive_denoising=false", "3.3"),
        Row("pure query selection", "dino_r50_4scale_12ep model.mixed_selection=false", "3.4"),
        Row("look forward once", "dino_r50_4scale_12ep model.look_forward_twice=false", "3.5"),
        Row("without two-stage", "dino_r50_4scale_12ep model.two_stage=false"),
        Row("a box head per layer", "dino_r50_4scale_12ep model.shared_box_heads=false"),
        Row("a class head per layer", "dino_r50_4scale_12ep model.shared_class_heads=false"),
        Row("heads shared with the encoder",
            "dino_r50_4scale_12ep model.encoder_shares_class_head=true model.encoder_shares_box_head=true"),
    ),
}  # fmt: skip


def main() -> None:
    """Count, and write the table."""
    with progress_bar("models") as progress:
        rows = table_rows(progress)
    put_into_docs("models", markdown(rows), PAGE)
    print(f"wrote {len(rows) - 1} models to {PAGE}")


def table_rows(progress: object = None) -> list[list[str]]:
    """Return the heading and one row per model."""
    heading = [
        "model", "option", "recipe and settings", "in the paper", "paper AP", "official AP", "best other AP",
        "M parameters", "published", *(f"G at {height}x{width}" for height, width in SIZES), "published",
    ]  # fmt: skip
    rows, total, done = [heading], sum(map(len, ROWS.values())), 0
    for model, variants in ROWS.items():
        for row in variants:
            rows.append(cells(model, row))
            done += 1
            if callable(progress):
                progress(done, total)
    return rows


def cells(model: str, row: Row) -> list[str]:
    """Return the cells of a row, with our counts."""
    num_parameters, multiply_adds = count(row.recipe, SIZES)
    return [
        model, row.option, f"`{row.recipe}`", row.place, row.paper, row.official, row.best,
        f"{num_parameters / 1e6:.2f}", row.parameters, *(f"{each / 1e9:.1f}" for each in multiply_adds),
        row.multiply_adds,
    ]  # fmt: skip


def count(recipe: str, sizes: Sequence[tuple[int, int]]) -> tuple[int, list[int]]:
    """Return parameters, and multiply-adds at each size, of a recipe with settings."""
    name, *settings = recipe.split()
    config = override(recipes.find(name), parse_assignments(settings)).model
    config = dataclasses.replace(config, num_classes=NUM_CLASSES)
    counted = [_summarize(config, height, width) for height, width in sizes]
    return sum(part.num_parameters for part in counted[0]), [
        sum(part.multiply_adds for part in parts) for parts in counted
    ]


_summarize = functools.cache(summarize)  # some recipes differ in their schedule only


if __name__ == "__main__":
    main()
