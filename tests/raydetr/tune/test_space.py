from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest
import yaml

from raydetr import recipes
from raydetr.config import ConfigError, override
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


def test_a_value_that_depends_on_another_is_drawn_only_with_it(tmp_path: Path) -> None:
    space = read(
        tmp_path,
        """
        optim.schedule: {choice: [step, cosine]}
        optim.lr_drop_epochs: {choice: [[3], [5]], when: {optim.schedule: step}, otherwise: []}
        optim.min_lr_ratio: {uniform: [0.01, 0.1], when: {optim.schedule: [cosine]}, otherwise: 0}
        """,
    )
    drawn = [space.draw_random(random.Random(number)) for number in range(40)]
    for each in drawn:
        override(recipes.quickstart(), each)
        is_step = each["optim.schedule"] == "step"
        assert (each["optim.lr_drop_epochs"] in ([3], [5]), each["optim.min_lr_ratio"] == 0) == (
            is_step,
            is_step,
        )
        assert space.is_drawn("optim.min_lr_ratio", each) == (not is_step)
    assert {each["optim.schedule"] for each in drawn} == {"step", "cosine"}


def test_ranges_are_drawn_evenly_and_with_their_ends() -> None:
    generator = random.Random(0)
    integers = [Distribution("randint", (3, 5)).draw(generator) for _ in range(300)]
    assert set(integers) == {3, 4, 5}
    logs = [math.log10(Distribution("loguniform", (1e-4, 1e-2)).draw(generator)) for _ in range(2000)]
    assert statistics.mean(logs) == pytest.approx(-3, abs=0.05)
    assert statistics.pstdev(logs) == pytest.approx(2 / math.sqrt(12), abs=0.03)


def test_paths_of_files_become_absolute_where_the_search_starts(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(
        "init.checkpoint: {choice: [weights/a, /weights/b, 's3://bucket/c', null]}\ndata.train: {choice: [one, two]}\n"
    )
    space = read_space(tmp_path / "space.yaml", recipes.quickstart(), Path("/home/me"))
    expected = ("/home/me/weights/a", "/weights/b", "s3://bucket/c", None)
    assert space.distributions["init.checkpoint"].values == expected
    assert space.distributions["data.train"].values == ("/home/me/one", "/home/me/two")


def test_paths_of_files_in_conditions_become_absolute_too(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(
        "init.checkpoint: {choice: [weights/a, null]}\n"
        "optim.lr: {choice: [0.1, 0.2], when: {init.checkpoint: weights/a}}\n"
        "optim.schedule: {choice: [cosine, step]}\n"
        "model.backbone.weights: {choice: [b, c], when: {optim.schedule: cosine}, otherwise: d}\n"
    )
    config = override(recipes.quickstart(), {"optim.min_lr_ratio": 0.0})
    space = read_space(tmp_path / "space.yaml", config, Path("/home/me"))
    assert space.distributions["optim.lr"].when == ("init.checkpoint", ("/home/me/weights/a",))
    assert space.distributions["model.backbone.weights"].otherwise == ("/home/me/d",)
    drawn = [space.draw_random(random.Random(number)) for number in range(20)]
    assert {("optim.lr" in each) == (each["init.checkpoint"] is not None) for each in drawn} == {True}


def test_a_grid_that_nobody_can_train_is_refused(tmp_path: Path) -> None:
    space = read(tmp_path, "model.num_queries: {randint: [1, 20000]}")
    with pytest.raises(ConfigError, match="the grid has 20,000 combinations"):
        space.grid()


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
        ("evaluation.every_epochs: {choice: [1, 2]}", ["cannot be searched", "the same epochs"]),
        ("data.val: {choice: [a, b]}", ["data.val cannot be searched", "other images"]),
        ("storage.keep_checkpoints: {choice: [1, 2]}", ["cannot be searched", "no effect"]),
        (
            "optim.schedule: {choice: [step, cosine]}",
            ["min_lr_ratio", "no effect with schedule=step", "'step' of choice"],
        ),
        (
            "optim.lr: {choice: [1, 2], when: {optim.schedule: step}}",
            ["when names optim.schedule", "not a path above"],
        ),
        ("optim.lr: {choice: [1, 2], when: [1]}", ["when takes one path and its value"]),
        ("optim.lr: {choice: [1, 2], otherwise: 3}", ["otherwise has no effect without when"]),
        (
            "optim.weight_decay: {uniform: [0, 1]}\noptim.lr: {choice: [1, 2], when: {optim.weight_decay: 0}}",
            ["needs a path with choices", "uniform"],
        ),
        (
            "optim.clip_max_norm: {choice: [1, 2]}\noptim.lr: {choice: [1, 2], when: {optim.clip_max_norm: 3}}",
            ["none of its choices [1, 2]"],
        ),
        (
            "optim.clip_max_norm: {choice: [1, 2]}\noptim.lr: {choice: [1, 2], when: {optim.clip_max_norm: [1, 2]}}",
            ["when has no effect", "every choice"],
        ),
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
