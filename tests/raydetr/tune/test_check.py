"""What `train` would refuse is refused when a search starts, not trial by trial."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from raydetr import recipes
from raydetr.config import ConfigError, RunConfig, override
from raydetr.runs import run
from raydetr.runs.resolve import resolve
from raydetr.tune.check import check_configurations, check_population, check_space
from raydetr.tune.default_space import default_space
from raydetr.tune.space import read_space


def check(folder: Path, config: RunConfig, text: str) -> None:
    (folder / "space.yaml").write_text(text)
    space = read_space(folder / "space.yaml", config, folder)
    resolved, splits = resolve(config)
    check_space(space, resolved, splits)
    drawn = [space.draw_random(random.Random(number)) for number in range(20)]
    check_configurations(space, resolved, splits, drawn)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("data.batch_size: {choice: [1, 4]}", ["data.batch_size=1", "without an image", "batch norm"]),
        ("model.hidden_dim: {choice: [64, 65]}", ["model.hidden_dim=65", "num_heads"]),
        ("model.hidden_dim: {randint: [64, 65]}", ["model.hidden_dim=65", "num_heads"]),
        ("optim.precision: {choice: [fp32, fp16]}", ["optim.precision='fp16'", "is for GPUs"]),
        ("model.num_classes: {choice: [4, 7]}", ["model.num_classes=7", "4 classes"]),
        ("init.checkpoint: {choice: [nowhere, null]}", ["init.checkpoint=", "nowhere", "no such folder"]),
        ("data.train: {choice: [nowhere, other]}", ["nowhere"]),
        (
            "optim.lr_backbone: {uniform: [0.1, 0.2]}",
            ["optim.lr_backbone has no effect", "backbone is trained"],
        ),
        (
            "data.train_transform.crop_min_side: {choice: [500, 700]}\n"
            "data.train_transform.crop_max_side: {choice: [600, 800]}",
            ["crop_min_side", "crop_max_side"],
        ),
    ],
)
def test_a_value_that_cannot_be_trained_is_refused(
    tiny_run: RunConfig, tmp_path: Path, text: str, parts: list[str]
) -> None:
    config = override(tiny_run, {"cluster.num_workers": 2})
    if "lr_backbone" in text:
        config = override(config, {"model.backbone.num_frozen_stages": 5, "model.backbone.norm": "frozen"})
    if "crop" in text:
        config = override(config, {"data.train_transform.crop_probability": 0.5})
    with pytest.raises((ConfigError, OSError, ValueError)) as refused:
        check(tmp_path, config, text)
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "model.hidden_dim: {choice: [60, 64]}\nmodel.num_heads: {choice: [4, 16]}",
            "hidden_dim=60, .*num_heads=16",
        ),
        ("data.batch_size: {choice: [1, 8]}\nmodel.backbone.norm: {choice: [frozen, batch]}", "leaves 1 of"),
    ],
)
def test_values_that_only_together_cannot_be_trained_are_refused(
    tiny_run: RunConfig, tmp_path: Path, text: str, reason: str
) -> None:
    config = override(
        tiny_run, {"cluster.num_workers": 2, "model.num_heads": 4, "model.backbone.norm": "frozen"}
    )
    with pytest.raises(ConfigError, match=rf"trial \d+ would have .*{reason}"):
        check(tmp_path, config, text)


@pytest.mark.slow
def test_the_default_space_of_a_fine_tuning_fits_its_checkpoint(tiny_run: RunConfig, tmp_path: Path) -> None:
    """The queries of a checkpoint have a number of their own."""
    trained = run.start(override(tiny_run, {"optim.epochs": 1}), local=True, name="trained")
    config = override(tiny_run, {"init.checkpoint": str(trained.folder)})
    check(tmp_path, config, default_space(config))


def test_what_can_be_trained_passes(tiny_run: RunConfig, tmp_path: Path) -> None:
    check(
        tmp_path,
        tiny_run,
        "data.batch_size: {choice: [7, 16]}\noptim.epochs: {choice: [2, 4]}\noptim.lr: {loguniform: [1.0e-5, 1.0e-2]}",
    )


def test_values_that_contradict_each_other_are_named_with_the_remedy(
    tiny_run: RunConfig, tmp_path: Path
) -> None:
    config = override(tiny_run, {"data.train_transform.crop_probability": 0.5})
    text = (
        "data.train_transform.crop_min_side: {choice: [300, 590]}\n"
        "data.train_transform.crop_max_side: {choice: [500, 800]}\n"
    )
    with pytest.raises(
        ConfigError,
        match=r"trial \d+ would have .*crop_min_side=590, .*crop_max_side=500: .* exceeds .* with `when`",
    ):
        check(tmp_path, config, text)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("model.num_queries: {choice: [10, 20]}", "model.num_queries cannot change while a run is trained"),
        ("data.batch_size: {choice: [10, 20]}", "data.batch_size cannot change"),
        ("optim.epochs: {choice: [10, 20]}", "optim.epochs cannot change"),
        ("model.loss.kind: {choice: [mal, focal]}", "model.loss.kind cannot change"),
        (
            "optim.clip_max_norm: {choice: [1, 2]}\noptim.lr: {uniform: [0.1, 1], when: {optim.clip_max_norm: 1}}",
            "a population has no conditions",
        ),
    ],
)
def test_a_population_changes_only_what_can_change_in_a_run(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "space.yaml").write_text(line)
    with pytest.raises(ConfigError, match=reason):
        check_population(read_space(tmp_path / "space.yaml", recipes.quickstart()))


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_the_default_space_of_every_recipe_is_valid_and_can_be_drawn(
    recipe: type[RunConfig], tmp_path: Path
) -> None:
    config = recipe()
    (tmp_path / "space.yaml").write_text(default_space(config))
    space = read_space(tmp_path / "space.yaml", config)
    for number in range(5):
        override(config, space.draw_random(random.Random(number)))
    assert {"optim.lr", "model.loss.class_weight"} <= space.distributions.keys()
    assert ("model.num_queries" in space.distributions) == (config.init.checkpoint is None)
    has_sampling = config.model.architecture in ("conditional_detr", "deformable_detr", "dino")
    assert ("optim.lr_sampling" in space.distributions) == has_sampling
