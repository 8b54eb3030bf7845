"""Settings that name files are found by their type, and all of them are made absolute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest

from detrs.backbone import PathOrUrl
from raydetr import recipes
from raydetr.config import RunConfig, absolute_paths, flatten, known_paths, override, to_dict
from raydetr.config.overrides import path_rule
from raydetr.locations import Location, TrackingUri

BASE = Path("/base")
# Read off the schema by a person; a new one belongs here, too
NAMING_FILES = {
    "data.train": "shards/train",
    "data.val": "shards/val",
    "data.remote.cache_dir": "cache",
    "model.backbone.weights": "resnet50.pth",
    "init.checkpoint": "weights/dino",
    "storage.path": "my runs",
    "tracking.uri": "sqlite:///my/mlflow.db",
}


def relative_config() -> RunConfig:
    # A cache is for remote shards only: one split is remote, the other a folder
    remote = {"data.train": "s3://bucket/shards/train", "data.remote.cache_gb": 1.0}
    return override(recipes.find("quickstart"), {"data.synthetic": None} | NAMING_FILES | remote)


def test_every_setting_that_names_a_file_becomes_absolute() -> None:
    before, after = (
        flatten(to_dict(config)) for config in (relative_config(), absolute_paths(relative_config(), BASE))
    )
    expected = {path: f"/base/{value}" for path, value in NAMING_FILES.items()}
    expected |= {"tracking.uri": "sqlite:////base/my/mlflow.db", "data.train": "s3://bucket/shards/train"}
    assert {path: after[path] for path in expected} == expected
    assert {path: value for path, value in after.items() if path not in expected} == {
        path: value for path, value in before.items() if path not in expected
    }


def test_absolute_paths_home_and_urls() -> None:
    values = {
        "storage.path": "~/runs",
        "init.checkpoint": "/elsewhere/checkpoint",
        "model.backbone.weights": "https://example.org/resnet50.pth",
        "tracking.uri": "http://127.0.0.1:5000",
    }
    after = flatten(to_dict(absolute_paths(override(recipes.find("quickstart"), values), BASE)))
    assert {path: after[path] for path in values} == values | {"storage.path": str(Path.home() / "runs")}
    again = absolute_paths(absolute_paths(recipes.find("quickstart"), BASE), Path("/other"))
    assert again == absolute_paths(recipes.find("quickstart"), BASE)


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda recipe: recipe.__name__)
def test_no_recipe_keeps_a_relative_path(recipe) -> None:
    after = flatten(to_dict(absolute_paths(recipe(), BASE)))
    named = {path: after[path] for path in NAMING_FILES if after.get(path) is not None}
    assert named
    assert all(Path(value.removeprefix("sqlite:///")).is_absolute() for value in named.values())


def test_the_names_of_settings_hint_at_no_forgotten_one() -> None:
    """By name, not by type: what sounds like a file must be one of those above."""
    words = ("path", "dir", "folder", "file", "checkpoint", "weights", "uri", "url")
    numbers = {
        "storage.checkpoint_minutes",
        "storage.checkpoint_steps",
        "storage.max_minutes_without_checkpoint",
    }
    sounding = {
        path for path in known_paths(RunConfig) if set(path.rpartition(".")[2].split("_")) & set(words)
    }
    assert sounding - numbers == set(NAMING_FILES) - {"data.train", "data.val"}


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (Path, "a/b", "/base/a/b"),
        (Path | None, "a", "/base/a"),
        (Location, "s3://bucket/a", "s3://bucket/a"),
        (Location | None, "a", "/base/a"),
        (PathOrUrl | None, "a.pth", "/base/a.pth"),
        (PathOrUrl, "https://example.org/a.pth", "https://example.org/a.pth"),
        (TrackingUri | None, "sqlite:///a.db", "sqlite:////base/a.db"),
        (TrackingUri, "databricks", "databricks"),
    ],
)
def test_types_and_their_rules(annotation: object, value: str, expected: str) -> None:
    rule = path_rule(annotation)
    assert rule is not None
    assert rule(value, BASE) == expected


@pytest.mark.parametrize(
    "annotation", [str, str | None, int, tuple[int, ...], Annotated[str, "path"], dict[str, str]]
)
def test_other_types_name_no_file(annotation: object) -> None:
    assert path_rule(annotation) is None
