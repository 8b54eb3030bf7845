from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from raydetr import recipes
from raydetr.config import ConfigError
from raydetr.tune.space import Distribution, Space, read_space

JOBS = Path(__file__).parents[3] / "jobs"


def read(folder: Path, text: str) -> Space:
    path = folder / "space.yaml"
    path.write_text(text)
    return read_space(path, recipes.quickstart())


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        read(folder, text)
    message = str(refused.value)
    assert message.startswith(f"{folder / 'space.yaml'}: ")
    return message


def test_each_distribution_is_read_with_its_numbers(tmp_path: Path) -> None:
    space = read(
        tmp_path,
        """
        optim.lr: {loguniform: [1e-4, 1e-2]}
        optim.weight_decay: {uniform: [0, 1.0e-3]}
        model.num_queries: {randint: [10, 50]}
        optim.precision: {choice: [fp32, bf16]}
        optim.ema_decay: {choice: [null, 0.99, 9e-1]}
        data.train_transform.short_sides: {choice: [[96], [96, 128]]}
        """,
    )
    assert space.distributions == {
        "optim.lr": Distribution("loguniform", (1e-4, 1e-2)),
        "optim.weight_decay": Distribution("uniform", (0.0, 1e-3)),
        "model.num_queries": Distribution("randint", (10, 50)),
        "optim.precision": Distribution("choice", ("fp32", "bf16")),
        "optim.ema_decay": Distribution("choice", (None, 0.99, 0.9)),
        "data.train_transform.short_sides": Distribution("choice", ([96], [96, 128])),
    }


def test_the_example_fits_the_recipe_it_is_for() -> None:
    space = read_space(JOBS / "space_quickstart.yaml", recipes.quickstart())
    assert set(space.distributions) == set(yaml.safe_load(space.text))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim.lrr: {uniform: [1, 2]}", ["optim.lrr", "did you mean optim.lr?"]),
        ("optim: {choice: [1, 2]}", ["optim is a section", "weight_decay"]),
        ("optim: {lr: {uniform: [1, 2]}}", ["optim", "no distribution 'lr'", "full dotted path"]),
        ("optim.lr: {lognormal: [1, 2]}", ["optim.lr", "'lognormal'", "did you mean loguniform?", "randint"]),
        ("optim.lr: 0.1", ["optim.lr", "0.1", "write it as {loguniform"]),
        ("optim.lr: {uniform: [1, 2], choice: [1, 2]}", ["optim.lr", "uniform, choice"]),
        ("optim.lr: {uniform: 3}", ["optim.lr", "3", "a list"]),
        ("optim.lr: {uniform: [1]}", ["optim.lr", "two numbers", "[1]"]),
        ("optim.lr: {uniform: [1, true]}", ["optim.lr", "two numbers", "True"]),
        ("optim.lr: {uniform: [1, .inf]}", ["optim.lr", "two numbers", "inf"]),
        ("optim.lr: {uniform: [2e-2, 1e-2]}", ["optim.lr", "low below high"]),
        ("optim.lr: {loguniform: [0, 1e-2]}", ["optim.lr", "above 0", "uniform"]),
        ("optim.lr: {uniform: [-1, 1]}", ["optim.lr", "greater than 0", "-1.0"]),
        ("optim.lr: {choice: [0.1]}", ["optim.lr", "two values", "override"]),
        ("optim.lr: {choice: [0.1, 1e-1]}", ["optim.lr", "0.1 twice"]),
        ("optim.precision: {choice: [fp32, fp8]}", ["optim.precision", "'fp8'"]),
        ("model.num_queries: {randint: [1, 2.5]}", ["model.num_queries", "two integers", "2.5"]),
        ("model.num_queries: {uniform: [10, 20]}", ["model.num_queries", "integer", "of uniform"]),
        ("cluster.num_workers: {choice: [1, 2]}", ["cluster.num_workers cannot be searched", "command line"]),
        ("optim.epochs: {randint: [1, 2]}", ["optim.epochs cannot be searched", "same epoch"]),
        ("optim.lr: {choice: [1, 2]}\noptim.lr: {choice: [3, 4]}", ["optim.lr", "twice"]),
        ("- optim.lr", ["no paths to search"]),
        ("", ["no paths to search"]),
        ("optim.lr: {uniform: [1, 2", ["cannot be read", "line 1"]),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_with_the_reason(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    message = refusal(tmp_path, text)
    for part in parts:
        assert part in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        read_space(tmp_path / "nowhere.yaml", recipes.quickstart())
