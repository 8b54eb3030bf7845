"""The quick part of the doctor: `train` warns of problems of its data before it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import planted_shards as made
from drawn_shards import write_drawn_shards
from planted_shards import Split
from raydetr import recipes
from raydetr.config import RunConfig, override
from raydetr.doctor import examine as quick
from raydetr.doctor.findings import TrainingTarget
from raydetr.runs import run
from raydetr.runs.overfit import overfit
from raydetr.runs.resolve import resolve
from raydetr.shards.manifest import SAMPLE_DTYPE
from raydetr.shards.reader import Shards, open_shards

TARGET = TrainingTarget(recipe="test", num_queries=20, batch_size=8)


def opened(folder: Path, *splits: Split) -> list[Shards]:
    names = ("train", "val")
    return [open_shards(made.write(split, folder / name)) for name, split in zip(names, splits, strict=True)]


def warnings(folder: Path, train: Split, val: Split) -> list[str]:
    return quick.quick_warnings(*opened(folder, train, val), TARGET)


def test_healthy_data_has_no_warnings(tmp_path: Path) -> None:
    assert warnings(tmp_path, made.healthy(30, 1), made.healthy(20, 2)) == []


def test_synthetic_data_has_no_warnings(tmp_path: Path) -> None:
    write_drawn_shards(tmp_path, 24, 12)
    shards = [open_shards(tmp_path / split) for split in ("train", "val")]
    quick.check_may_train(shards[0], shards[1])
    assert quick.quick_warnings(shards[0], shards[1], TrainingTarget.from_config(recipes.quickstart())) == []


def test_each_problem_is_one_line(tmp_path: Path) -> None:
    train, val = made.healthy(30, 1), made.healthy(20, 2)
    val.samples[4], val.samples[7] = train.samples[10], train.samples[11]
    for split in (train, val):
        split.categories.append({"id": 3, "name": "Dog"})
    train.samples[0].annotations = [
        {**train.samples[0].annotations[0], "id": number} for number in range(1, 22)
    ]
    lines = warnings(tmp_path, train, val)
    assert [line.split(": ")[0] for line in lines] == ["train", "train", "train", "train, val"]
    for line, words in zip(
        lines,
        ("'dog' and 'Dog'", "more objects than test has queries (20)", "1 class of 3 without any object: Dog",
         "2 images of val (10.0%) are also in train"),
        strict=True,
    ):  # fmt: skip
        assert words in line
        assert "\n" not in line


def test_identical_splits_are_reported_once(tmp_path: Path) -> None:
    shards = open_shards(made.write(made.healthy(30, 1), tmp_path / "train"))
    (line,) = quick.quick_warnings(shards, shards, TARGET)
    assert "exactly the same samples" in line


def test_fewer_images_than_a_batch_are_reported(tmp_path: Path) -> None:
    (line,) = warnings(tmp_path, made.healthy(5, 1), made.healthy(20, 2))
    assert "5 images are fewer than a batch has (8)" in line


def test_errors_stop_training(tmp_path: Path) -> None:
    train, val = made.healthy(30, 1), made.healthy(20, 2)
    for sample in train.samples:
        sample.annotations.clear()
    val.categories[0]["name"] = "wolf"
    with pytest.raises(ValueError, match=r"different categories.*'wolf'.*; train: not one object to find"):
        quick.check_may_train(*opened(tmp_path, train, val))


def test_a_corrupt_sample_is_left_to_the_stream(tmp_path: Path) -> None:
    """`data.on_corrupt` decides whether it stops the run."""
    train = made.healthy(30, 1)
    train.samples[3].annotations[0]["bbox"] = None
    assert warnings(tmp_path, train, made.healthy(20, 2)) == []


def test_shared_images_are_found_in_splits_of_the_size_of_coco(tmp_path: Path) -> None:
    shards = open_shards(made.write(made.healthy(3, 1), tmp_path / "train"))
    rng = np.random.default_rng(0)
    splits = []
    for count in (118_287, 5_000):
        samples = np.zeros(count, SAMPLE_DTYPE)
        samples["crc32"], samples["length"] = rng.integers(0, 2**32, count), rng.integers(0, 400_000, count)
        samples["num_annotations"] = rng.integers(0, 20, count)
        splits.append(dataclasses.replace(shards, samples=samples, fingerprint=str(count)))
    splits[1].samples[:7] = splits[0].samples[90_000:90_007]
    quick.check_may_train(splits[0], splits[1])
    (line,) = quick.quick_warnings(splits[0], splits[1], TARGET)
    assert "7 images of" in line
    assert "(0.1%) are also in" in line


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Return the configuration of a short run in one process on generated shards."""
    for name, seed in (("train", 1), ("val", 2)):
        made.write(made.healthy(16, seed), tmp_path / name)
    return override(
        recipes.quickstart(),
        {"data.train": str(tmp_path / "train"), "data.val": str(tmp_path / "val"), "data.synthetic": None,
         "data.batch_size": 8, "optim.epochs": 1, "cluster.num_workers": 1,
         "storage.path": str(tmp_path / "runs")},
    )  # fmt: skip


def test_a_run_warns_and_continues(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = override(config, {"data.val": config.data.train})
    resolved, splits = resolve(config)
    run.print_warnings(resolved, *splits)
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.startswith("warning: ")
    assert "they hold exactly the same samples" in printed


def test_a_run_on_healthy_data_prints_no_warning(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved, splits = resolve(config)
    run.print_warnings(resolved, *splits)
    assert capsys.readouterr().err == ""


def test_a_run_with_an_error_does_not_start(config: RunConfig, tmp_path: Path) -> None:
    empty = made.healthy(16, 3)
    for sample in empty.samples:
        sample.annotations.clear()
    made.write(empty, tmp_path / "empty")
    with pytest.raises(ValueError, match="there is nothing to learn"):
        run.start(override(config, {"data.train": str(tmp_path / "empty")}), local=True)
    assert not (tmp_path / "runs").exists()


class Started(Exception):
    """Raised in place of the training."""


@pytest.mark.parametrize("kind", ["train", "overfit"])
def test_a_training_warns_and_overfitting_does_not(
    config: RunConfig, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Overfitting trains and evaluates on the same images on purpose."""

    def start(_: RunConfig, categories: Sequence[str]) -> list[str]:
        raise Started

    monkeypatch.setattr(run.init_weights, "summarize", start)
    same = override(config, {"data.val": config.data.train})
    train = {
        "train": lambda: run.start(same, local=True),
        "overfit": lambda: overfit(
            config, None, num_images=4, num_steps=1, long_side=64, out=Path(config.storage.path)
        ),
    }[kind]
    with pytest.raises(Started):
        train()
    printed = " ".join(capsys.readouterr().err.split())
    assert ("exactly the same samples" in printed) == (kind == "train")
    assert ("warning" in printed) == (kind == "train")
