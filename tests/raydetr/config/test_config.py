"""The configuration: what it accepts and refuses, and its error messages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raydetr import recipes
from raydetr.config import (
    ConfigError,
    absolute_paths,
    flatten,
    from_dict,
    from_yaml,
    override,
    parse_assignments,
    to_dict,
    to_yaml,
)


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda recipe: recipe.__name__)
def test_every_recipe_survives_yaml(recipe, tmp_path: Path) -> None:
    config = recipe()
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert from_yaml(file) == config
    assert config.recipe == recipe.__name__
    assert recipes.find(recipe.__name__) == config
    assert len(recipes.summary(recipe)) > 20


def test_override_changes_only_what_it_names() -> None:
    before = flatten(to_dict(recipes.quickstart()))
    changes = parse_assignments(
        ["optim.lr=2e-4", "cluster.num_workers=4", "data.train_transform.short_sides=[3, 5]"]
    )
    after = flatten(to_dict(override(recipes.quickstart(), changes)))
    different = {path: after[path] for path in after if after[path] != before[path]}
    assert different == {
        "optim.lr": 2e-4,
        "cluster.num_workers": 4,
        "data.train_transform.short_sides": [3, 5],
    }
    assert after.keys() == before.keys()


def test_the_model_is_overridden_by_the_same_paths() -> None:
    config = override(recipes.quickstart(), {"model.num_queries": 17, "model.backbone.weights": "r.pth"})
    assert (config.model.num_queries, config.model.backbone.weights) == (17, "r.pth")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("optim.lrr=1e-3", ["optim.lrr", "no such setting", "optim.lr?"]),
        ("optm.lr=1e-3", ["optm.lr", "optim.lr?"]),
        ("lr=1e-3", ["lr", "no such setting"]),
        ("model.num_querys=3", ["model.num_querys", "model.num_queries?"]),
        ("optim=3", ["optim", "section", "lr"]),
        ("optim.lr.x=3", ["optim.lr.x", "no such setting"]),
        ("optim.lr=fast", ["optim.lr", "number", "'fast'"]),
        ("optim.lr=-1", ["optim.lr", "greater than 0", "-1"]),
        ("optim.epochs=2.5", ["optim.epochs", "integer", "2.5"]),
        ("data.label_map=raw", ["data.label_map", "'contiguous'", "'raw'"]),
        ("model.num_queries=many", ["model.num_queries", "integer", "'many'"]),
        ("optim.lr_drop_epochs=[3]", ["optim: lr_drop_epochs [3] has no effect with schedule=cosine"]),
        ("optim.schedule=step", ["optim: min_lr_ratio 0.02 has no effect with schedule=step"]),
        ("optim.lr", ["optim.lr", "path=value"]),
        ("optim.lr=[1", ["optim.lr", "YAML"]),
    ],
)
def test_a_bad_override_names_path_value_and_remedy(argument: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        override(recipes.quickstart(), parse_assignments([argument]))
    for word in words:
        assert word in str(caught.value)


def test_setting_a_path_twice_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr is set twice"):
        parse_assignments(["optim.lr=1", "optim.lr=2"])


def test_unknown_keys_in_a_file_name_file_path_and_nearest(tmp_path: Path) -> None:
    values = to_dict(recipes.quickstart())
    values["optim"]["leaning_rate"] = 1.0
    values["model"]["backbone"]["weigths"] = "x"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as caught:
        from_yaml(file)
    message = str(caught.value)
    assert str(file) in message
    assert "optim.leaning_rate: no such setting" in message
    assert "model.backbone.weigths: no such setting; did you mean model.backbone.weights?" in message


def test_missing_keys_are_named() -> None:
    values = to_dict(recipes.quickstart())
    del values["data"]["train"]
    with pytest.raises(ConfigError, match=r"data\.train: missing"):
        from_dict(values)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words"])
def test_a_file_that_is_not_a_mapping_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        from_yaml(file)
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        from_yaml(tmp_path / "missing.yaml")


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_numbers_come_through_the_command_line_exactly(value: float) -> None:
    assert parse_assignments([f"optim.lr={value!r}"]) == {"optim.lr": value}


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        recipes.find("quikstart")


def test_a_config_is_frozen() -> None:
    config = recipes.quickstart()
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.val_transform.short_sides": [480, 512]}, "AP would be random: give one"),
        (
            {"optim.schedule": "step", "optim.min_lr_ratio": 0, "optim.lr_drop_epochs": [2, 2]},
            "must ascend, each epoch once",
        ),
        ({"optim.schedule": "step", "optim.min_lr_ratio": 0, "optim.lr_drop_epochs": [3, 2]}, "must ascend"),
    ],
)
def test_settings_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(recipes.quickstart(), changes)


def test_numbers_are_finite() -> None:
    """A checkpoint could not be written, because JSON has no other numbers."""
    config = recipes.find("dino_r50_4scale_12ep")
    paths = [path for path, value in flatten(to_dict(config)).items() if isinstance(value, float)]
    assert len(paths) > 40
    for path in [*paths, "optim.ema_decay"]:
        for value in (math.inf, -math.inf, math.nan):
            with pytest.raises(ConfigError, match=r"finite number|greater than|less than"):
                override(config, {path: value})
    remote = {"data.train": "s3://a/b", "data.remote.options": {"a": math.nan}}
    with pytest.raises(ConfigError, match=r"data\.remote\.options\.a.*finite number"):
        override(config, remote)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tracking.uri": "mlruns"}, "/base/mlruns"),
        ({"tracking.uri": "file:mlruns"}, "/base/mlruns"),
        ({"tracking.uri": "sqlite:///a.db"}, "sqlite:////base/a.db"),
        ({"tracking.uri": "http://host:5000"}, "http://host:5000"),
        ({"tracking.uri": "databricks"}, "databricks"),
    ],
)
def test_tracking_uris_are_made_absolute(changes: dict[str, Any], expected: str) -> None:
    config = absolute_paths(override(recipes.quickstart(), changes), Path("/base"))
    assert config.tracking.uri == expected


def test_runs_may_be_at_a_url_but_not_on_a_web_server() -> None:
    config = override(recipes.quickstart(), {"storage.path": "s3://bucket/runs/"})
    assert absolute_paths(config, Path("/base")).storage.path == "s3://bucket/runs"
    with pytest.raises(
        ConfigError, match=r"storage.path: https://host/runs: runs cannot be written to a web server"
    ):
        override(recipes.quickstart(), {"storage.path": "https://host/runs"})


def test_a_url_is_no_folder_for_data_of_this_machine() -> None:
    remote = {
        "data.remote.cache_dir": "s3://bucket/cache",
        "data.remote.cache_gb": 1,
        "data.train": "s3://bucket/train",
    }
    config = override(recipes.quickstart(), {**remote, "data.synthetic": None})
    with pytest.raises(
        ConfigError, match=r"cache_dir s3:/bucket/cache: is a URL; this must be a file or folder"
    ):
        absolute_paths(config, Path("/base"))
