"""The recipes, compared with the official settings: models, rates of all parameters, schedules, augmentation."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import goldens
from detrs.official_names import official_names
from detrs.zoo import ModelConfig, build
from raydetr import recipes
from raydetr.config import OptimConfig, RunConfig, flatten, override, to_dict
from raydetr.training.optim import lr_factor, parameter_groups

# Full-size official model -> recipes that train it
TRAINED_BY = {
    "detr": ["detr_r50_500ep", "detr_r50_150ep"],
    "detr_focal_dc5": ["detr_r50_dc5_plus_50ep"],
    "conditional_detr": ["conditional_detr_r50_50ep"],
    "dab_detr": ["dab_detr_r50_50ep"],
    "dab_detr_3pat": ["dab_detr_r50_3patterns_50ep"],
    "deformable_detr": ["deformable_detr_r50_50ep"],
    "deformable_detr_refine": ["deformable_detr_r50_refine_50ep"],
    "deformable_detr_two_stage": ["deformable_detr_r50_two_stage_50ep"],
    "deformable_detr_single_scale": ["deformable_detr_r50_single_scale_50ep"],
    "dab_deformable_detr": ["dab_deformable_detr_r50_50ep"],
    "dino_4scale": ["dino_r50_4scale_12ep", "dino_r50_4scale_24ep", "dino_r50_4scale_36ep"],
    "dino_5scale": ["dino_r50_5scale_12ep", "dino_r50_5scale_24ep", "dino_r50_5scale_36ep"],
}
PAIRS = [(full, recipe) for full, names in TRAINED_BY.items() for recipe in names]

# (epochs, epoch of the drop, images per batch), from the papers and the official instructions
SCHEDULES = {
    "detr_r50_500ep": (500, 400, 64),
    "detr_r50_150ep": (150, 100, 16),
    "detr_r50_dc5_500ep": (500, 400, 64),
    "detr_r50_dc5_50ep": (50, 40, 64),
    "detr_r50_dc5_plus_50ep": (50, 40, 64),
    "detr_r101_500ep": (500, 400, 64),
    "detr_r101_dc5_500ep": (500, 400, 64),
    "conditional_detr_r50_50ep": (50, 40, 16),
    "conditional_detr_r50_dc5_50ep": (50, 40, 8),
    "conditional_detr_r101_50ep": (50, 40, 16),
    "conditional_detr_r101_dc5_50ep": (50, 40, 8),
    "dab_detr_r50_50ep": (50, 40, 16),
    "dab_detr_r50_3patterns_50ep": (50, 40, 16),
    "dab_detr_r50_dc5_50ep": (50, 40, 16),
    "dab_detr_r50_dc5_3patterns_50ep": (50, 40, 16),
    "dab_detr_r50_dc5_random_points_50ep": (50, 40, 16),
    "dab_detr_r101_50ep": (50, 40, 16),
    "dab_detr_r101_3patterns_50ep": (50, 40, 16),
    "dab_detr_r101_dc5_50ep": (50, 40, 16),
    "dab_detr_r101_dc5_3patterns_50ep": (50, 40, 16),
    "deformable_detr_r50_50ep": (50, 40, 32),
    "deformable_detr_r50_refine_50ep": (50, 40, 32),
    "deformable_detr_r50_two_stage_50ep": (50, 40, 32),
    "deformable_detr_r50_single_scale_50ep": (50, 40, 32),
    "deformable_detr_r50_single_scale_dc5_50ep": (50, 40, 32),
    "dab_deformable_detr_r50_50ep": (50, 40, 16),
    "dino_r50_4scale_12ep": (12, 11, 16),
    "dino_r50_4scale_24ep": (24, 20, 16),
    "dino_r50_4scale_36ep": (36, 30, 16),
    "dino_r50_5scale_12ep": (12, 11, 16),
    "dino_r50_5scale_24ep": (24, 20, 16),
    "dino_r50_5scale_36ep": (36, 30, 16),
    "dino_r50_4scale_12ep_300dn": (12, 11, 16),
    "dino_r50_4scale_12ep_improved": (12, 11, 16),
}
ROOT = Path(__file__).parents[2]
FINETUNE = [recipe.__name__ for recipe in recipes.RECIPES if recipe.__name__.startswith("finetune_")]


def manifest_of(full: str) -> dict[str, Any]:
    return goldens.read(f"full_{full}").manifest


def meta_detector(model: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        return build(replace(model, num_classes=91)).detector


def test_all_recipes_are_official_or_fine_tune_or_small() -> None:
    names = {recipe.__name__ for recipe in recipes.RECIPES}
    small = {f"small_{name}" for name in ("detr", "conditional_detr", "dab_detr", "deformable_detr", "dino")}
    assert names == {"quickstart", "quickstart_hard", *small, *FINETUNE, *SCHEDULES}
    assert len(recipes.RECIPES) == len(names)
    assert {recipes.find(name).model.architecture for name in FINETUNE} == set(goldens.ARCHITECTURES.values())


@pytest.mark.parametrize(("full", "recipe"), PAIRS)
def test_the_model_is_the_official_one(full: str, recipe: str) -> None:
    manifest = manifest_of(full)
    architecture = goldens.architecture_of(manifest)
    expected = goldens.config_of(manifest["args"], architecture, manifest["constructor_options"])
    assert replace(recipes.find(recipe).model, num_classes=91) == expected


@pytest.mark.parametrize(("full", "recipe"), [(full, names[0]) for full, names in TRAINED_BY.items()])
def test_every_parameter_has_its_official_rate_and_groups_are_few(full: str, recipe: str) -> None:
    check_rates_of_parameters(full, recipes.find(recipe).model, recipes.find(recipe).optim)


def test_a_learned_position_encoding_has_the_rate_of_the_backbone() -> None:
    """In the official code it is a part of the backbone."""
    recipe = recipes.find("detr_r50_500ep")
    check_rates_of_parameters(
        "detr_learned", replace(recipe.model, position_encoding="learned"), recipe.optim
    )


def check_rates_of_parameters(full: str, model: ModelConfig, optim: OptimConfig) -> None:
    optimizer = manifest_of(full)["optimizer"]
    parameters = dict(meta_detector(model).named_parameters())
    groups = parameter_groups(parameters.items(), optim)
    assert len(groups) <= 3
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    assert len(found) == len(trained) == sum(len(group["params"]) for group in groups)
    names = official_names(model, trained)
    expected = official_rates(optimizer, {name for group in names.values() for name in group})
    for name, parameter in trained.items():
        assert found[id(parameter)] == (expected[names[name][0]], optimizer["weight_decay"]), name
    assert optim.clip_max_norm == optimizer["clip_max_norm"]


def official_rates(optimizer: dict[str, Any], names: set[str]) -> dict[str, float]:
    """The rate of each official parameter, from the groups in the manifest."""
    others, backbone, *slow = optimizer["groups"]
    assert others["names"].startswith("every other trainable parameter")
    rates = {name: float(others["lr"]) for name in names}
    word = backbone["names"].split("contains ")[1].split()[0]
    inside = [name for name in names if word in name]
    assert len(inside) == int(backbone["names"].split("(")[1].split()[0])
    rates |= dict.fromkeys(inside, float(backbone["lr"]))
    for group in slow:
        assert set(group["names"]) <= names
        rates |= dict.fromkeys(group["names"], float(group["lr"]))
    return rates


def test_official_rates_include_the_slow_group() -> None:
    optimizer = manifest_of("deformable_detr")["optimizer"]
    rates = official_rates(optimizer, {name for name in manifest_of("deformable_detr")["state_dict"]
                                       if trains(name)})  # fmt: skip
    assert set(rates.values()) == {2e-4, 2e-5}
    assert rates["transformer.reference_points.weight"] == 2e-5


def trains(name: str) -> bool:
    """True for an official name that is trained: norms, stem and first stage of the backbone are frozen."""
    in_backbone = name.startswith("backbone")
    return not in_backbone or (
        "layer1" not in name and bool(re.search(r"layer\d.*(conv\d|downsample\.0)", name))
    )


@pytest.mark.parametrize("recipe", SCHEDULES)
def test_the_schedule_is_the_official_one(recipe: str) -> None:
    config = recipes.find(recipe)
    optim = config.optim
    assert (optim.epochs, *optim.lr_drop_epochs, config.data.batch_size) == SCHEDULES[recipe]
    assert (optim.schedule, optim.warmup_fraction, optim.weight_decay, optim.ema_decay) == (
        "step",
        0.0,
        1e-4,
        None,
    )
    assert optim.decay_norms_and_biases
    assert config.init.checkpoint is None
    assert re.fullmatch(rf".*_{optim.epochs}ep(_300dn|_improved)?", recipe)


@pytest.mark.parametrize("recipe", ["dino_r50_4scale_12ep", "conditional_detr_r50_50ep", "detr_r50_150ep"])
def test_the_rate_of_every_epoch_is_that_of_torchs_scheduler(recipe: str) -> None:
    """Compare with StepLR, stepped after each epoch as in the official loops; the batch size divides the data."""
    optim = recipes.find(recipe).optim
    (drop,) = optim.lr_drop_epochs
    steps_per_epoch = 7
    expected = torch_rates(optim, lambda o: torch.optim.lr_scheduler.StepLR(o, drop), steps_per_epoch)
    check_rates(optim, expected, steps_per_epoch)


def test_several_drops_are_those_of_torchs_multi_step_scheduler() -> None:
    optim = recipes.find("dino_r50_4scale_36ep").optim.model_copy(update={"lr_drop_epochs": (20, 33)})
    expected = torch_rates(optim, lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [20, 33]), 5)
    check_rates(optim, expected, 5)


def torch_rates(optim: OptimConfig, make_scheduler: Any, steps_per_epoch: int) -> list[float]:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=optim.lr)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(optim.epochs):
        for _ in range(steps_per_epoch):
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return rates


def check_rates(optim: OptimConfig, expected: list[float], steps_per_epoch: int) -> None:
    total = optim.epochs * steps_per_epoch
    found = [optim.lr * lr_factor(optim, step, total) for step in range(total)]
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("recipe", SCHEDULES)
def test_data_and_augmentation_are_the_official_ones(recipe: str) -> None:
    data = recipes.find(recipe).data
    train = data.train_transform
    assert list(train.short_sides) == goldens_data()["train_scales"]
    assert (train.max_side, train.horizontal_flip, train.crop_probability) == (1333, 0.5, 0.5)
    assert (train.crop_short_sides, train.crop_min_side, train.crop_max_side) == ((400, 500, 600), 384, 600)
    val = data.val_transform
    assert (val.short_sides, val.max_side, val.horizontal_flip, val.crop_probability) == (
        (800,),
        1333,
        0.0,
        0.0,
    )
    assert data.label_map == "category_id"
    # DC5 models lose AP where images are padded
    assert data.eval_batch_size == (1 if "dc5" in recipe and "deformable" not in recipe else 2)


def goldens_data() -> dict[str, Any]:
    return goldens.read("data").manifest


@pytest.mark.parametrize("recipe", [*SCHEDULES, *FINETUNE])
def test_names_match_the_settings(recipe: str) -> None:
    model = recipes.find(recipe).model
    assert model.backbone.name == ("resnet101" if "r101" in recipe else "resnet50")
    assert model.backbone.dilation == ("dc5" in recipe)
    assert model.backbone.norm == "frozen"
    name = recipe.removeprefix("finetune_")
    if getattr(model, "anchors", False):
        assert name.startswith("dab_")
        name = name.removeprefix("dab_")
    assert name.startswith(model.architecture)


@pytest.mark.parametrize("recipe", SCHEDULES)
def test_docstrings_have_paper_ap_cost_and_command(recipe: str) -> None:
    (function,) = (function for function in recipes.RECIPES if function.__name__ == recipe)
    text = inspect.getdoc(function) or ""
    assert re.search(r"AP \d\d\.\d\.$", recipes.summary(function)), text
    assert re.search(r"et al\. 20\d\d", recipes.summary(function)), text
    assert "Cost: " in text
    assert f"raydetr train {recipe}" in text


def test_expected_ap_is_that_of_the_table_in_the_documentation() -> None:
    page = (ROOT / "docs/recipes.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*?\| (\d\d\.\d) \|", page, re.MULTILINE))
    expected = {}
    for function in recipes.RECIPES:
        if found := re.search(r"AP (\d\d\.\d)\.$", recipes.summary(function)):
            expected[function.__name__] = found[1]
    assert expected.keys() == SCHEDULES.keys()
    assert rows == expected


PARENTS = {
    "finetune_detr_r50": "detr_r50_500ep",
    "finetune_conditional_detr_r50": "conditional_detr_r50_50ep",
    "finetune_dab_detr_r50": "dab_detr_r50_50ep",
    "finetune_deformable_detr_r50": "deformable_detr_r50_two_stage_50ep",
    "finetune_dino_r50": "dino_r50_4scale_12ep",
}


@pytest.mark.parametrize("recipe", FINETUNE)
def test_fine_tuning_has_lower_rates_than_the_training_it_starts_from(recipe: str) -> None:
    config, parent = recipes.find(recipe), recipes.find(PARENTS[recipe])
    assert config.init.checkpoint == f"weights/{PARENTS[recipe].rpartition('_')[0]}"
    assert config.optim.epochs <= 60
    assert config.data.label_map == "contiguous"
    assert config.optim.ema_decay is not None
    for rate in ("lr", "lr_backbone", "lr_sampling"):
        assert getattr(config.optim, rate) == getattr(parent.optim, rate) / 2
    changed = changes(parent, config) - {"data.train_transform.scale_per"}
    assert not {path for path in changed if path.startswith(("model.", "data.val_tr", "data.train_tr"))}


def changes(before: RunConfig, after: RunConfig) -> set[str]:
    old, new = flatten(to_dict(before)), flatten(to_dict(after))
    return {path for path in new if new[path] != old[path]}


@pytest.mark.parametrize(
    ("parent", "variant", "paths"),
    [
        ("dino_r50_4scale_12ep", "dino_r50_4scale_36ep", {"optim.epochs", "optim.lr_drop_epochs"}),
        ("dino_r50_4scale_12ep", "dino_r50_5scale_12ep", {"model.strides", "model.num_feature_levels"}),
        ("deformable_detr_r50_refine_50ep", "deformable_detr_r50_two_stage_50ep", {"model.two_stage"}),
        ("detr_r50_500ep", "detr_r50_dc5_500ep", {"model.backbone.dilation", "data.eval_batch_size"}),
        ("dab_detr_r50_50ep", "dab_detr_r50_3patterns_50ep", {"model.num_patterns"}),
        ("dab_detr_r50_dc5_50ep", "dab_detr_r50_dc5_random_points_50ep", {"model.random_points"}),
        ("detr_r50_dc5_500ep", "detr_r50_dc5_50ep", {"optim.epochs", "optim.lr_drop_epochs"}),
        (
            "detr_r50_dc5_50ep",
            "detr_r50_dc5_plus_50ep",
            {"model.num_queries", "model.loss.kind", "model.loss.class_weight", "model.loss.class_cost"},
        ),
        (
            "deformable_detr_r50_50ep",
            "deformable_detr_r50_single_scale_50ep",
            {"model.strides", "model.num_feature_levels"},
        ),
        (
            "deformable_detr_r50_single_scale_50ep",
            "deformable_detr_r50_single_scale_dc5_50ep",
            {"model.backbone.dilation"},
        ),
    ],
)
def test_a_variant_changes_only_what_its_name_implies(parent: str, variant: str, paths: set[str]) -> None:
    assert changes(recipes.find(parent), recipes.find(variant)) == {"recipe", *paths}


# Settings of the configurations of detrex (49.5 AP) and mmdetection (50.1 AP) that the official DINO has otherwise
POSITIONS = {"model.position_temperature": 10000.0, "model.position_offset": -0.5}
HEADS = {"model.shared_class_heads": False, "model.shared_box_heads": False}
BETTER = {
    "dino_r50_4scale_12ep_300dn": {
        **POSITIONS,
        **HEADS,
        "model.num_denoising": 300,
        "model.label_noise": 0.2,
        "model.box_noise": 1.0,
        "model.backbone.num_frozen_stages": 1,
    },
    "dino_r50_4scale_12ep_improved": {
        **POSITIONS,
        **HEADS,
        "model.num_denoising": 300,
        "model.box_noise": 1.0,
        "model.backbone.num_frozen_stages": 0,
        "model.loss.class_weight": 2.0,
        "optim.lr": 2e-4,
        "optim.lr_backbone": 2e-5,
        "optim.lr_sampling": 2e-5,
    },
}


@pytest.mark.parametrize("recipe", BETTER)
def test_better_settings_are_those_of_their_source_by_their_dotted_paths(recipe: str) -> None:
    parent = recipes.find("dino_r50_4scale_12ep")
    assert changes(parent, recipes.find(recipe)) == {"recipe", *BETTER[recipe]}
    assert override(parent, {"recipe": recipe, **BETTER[recipe]}) == recipes.find(recipe)


def test_a_tenth_of_the_rate_is_for_sampling_offsets_only() -> None:
    """mmdetection also names reference points, of which DINO has no parameters."""
    config = recipes.find("dino_r50_4scale_12ep_improved")
    detector = meta_detector(config.model)
    groups = parameter_groups(detector.named_parameters(), config.optim)
    assert {group["name"]: group["lr"] for group in groups} == {
        "backbone": 2e-5,
        "sampling": 2e-5,
        "rest": 2e-4,
    }
    names = {id(p): name for name, p in detector.named_parameters()}
    (sampling,) = (group for group in groups if group["name"] == "sampling")
    slow = {names[id(p)] for p in sampling["params"]}
    assert slow == {name for name in names.values() if "sampling_offsets" in name}
    (backbone,) = (group for group in groups if group["name"] == "backbone")
    assert "backbone.conv1.weight" in {names[id(p)] for p in backbone["params"]}


@pytest.mark.parametrize("recipe", [*SCHEDULES, *FINETUNE])
def test_the_documentation_has_scale_per_of_each_recipe(recipe: str) -> None:
    rows = [
        line
        for line in (ROOT / "docs/recipes.md").read_text().splitlines()
        if line.startswith(f"| `{recipe}` |")
    ]
    (row,) = rows
    scale_per = row.strip("| ").split("|")[-1].strip()
    assert (
        scale_per
        == recipes.find(recipe).data.train_transform.scale_per
        == ("step" if recipe in FINETUNE else "image")
    )
