"""What `train` says of its data before it begins: all that is odd, quickly, and nothing where all is well."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import planted_shards as made
from planted_shards import Split
from raydetr import recipes
from raydetr.config import RunConfig, override
from raydetr.doctor import examine as quick
from raydetr.doctor.findings import Target
from raydetr.runs import run
from raydetr.runs.overfit import overfit
from raydetr.shards.manifest import SAMPLE_DTYPE
from raydetr.shards.reader import Shards, open_shards
from raydetr.shards.synthetic import write_synthetic_data
from raydetr.shards.writer import write_shards

TARGET = Target(recipe="test", num_queries=20, batch_size=8)


def opened(folder: Path, *splits: Split) -> list[Shards]:
    names = ("train", "val")
    return [open_shards(made.write(split, folder / name)) for name, split in zip(names, splits, strict=True)]


def warnings(folder: Path, train: Split, val: Split) -> list[str]:
    return quick.warnings(*opened(folder, train, val), TARGET)


def test_healthy_data_says_nothing(tmp_path: Path) -> None:
    assert warnings(tmp_path, made.healthy(30, 1), made.healthy(20, 2)) == []


def test_sample_data_says_nothing(tmp_path: Path) -> None:
    write_synthetic_data(tmp_path / "coco", num_train=24, num_val=12)
    shards = []
    for split in ("train", "val"):
        annotations = tmp_path / "coco" / "annotations" / f"instances_{split}.json"
        write_shards(tmp_path / "coco" / split, annotations, tmp_path / split)
        shards.append(open_shards(tmp_path / split))
    quick.check_may_train(shards[0], shards[1])
    assert quick.warnings(shards[0], shards[1], Target.of(recipes.quickstart())) == []


def test_odd_data_is_told_in_one_line_each(tmp_path: Path) -> None:
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


def test_one_and_the_same_data_is_told_once(tmp_path: Path) -> None:
    shards = open_shards(made.write(made.healthy(30, 1), tmp_path / "train"))
    (line,) = quick.warnings(shards, shards, TARGET)
    assert "the very same samples" in line


def test_fewer_images_than_a_batch_are_told(tmp_path: Path) -> None:
    (line,) = warnings(tmp_path, made.healthy(5, 1), made.healthy(20, 2))
    assert "5 images are fewer than a batch has (8)" in line


def test_faults_stop(tmp_path: Path) -> None:
    train, val = made.healthy(30, 1), made.healthy(20, 2)
    for sample in train.samples:
        sample.annotations.clear()
    val.categories[0]["name"] = "wolf"
    with pytest.raises(ValueError, match=r"different categories.*'wolf'.*; train: not one object to find"):
        quick.check_may_train(*opened(tmp_path, train, val))


def test_a_damaged_sample_is_left_to_the_stream(tmp_path: Path) -> None:
    """`data.on_corrupt` decides what becomes of it."""
    train = made.healthy(30, 1)
    train.samples[3].annotations[0]["bbox"] = None
    assert warnings(tmp_path, train, made.healthy(20, 2)) == []


def test_shared_images_are_found_among_as_many_as_coco_has(tmp_path: Path) -> None:
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
    (line,) = quick.warnings(splits[0], splits[1], TARGET)
    assert "7 images of" in line
    assert "(0.1%) are also in" in line


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run in one process on made shards, of a few steps."""
    for name, seed in (("train", 1), ("val", 2)):
        made.write(made.healthy(16, seed), tmp_path / name)
    return override(
        recipes.quickstart(),
        {"data.train": str(tmp_path / "train"), "data.val": str(tmp_path / "val"), "data.synthetic": None,
         "data.batch_size": 8, "optim.epochs": 1, "cluster.num_workers": 1,
         "storage.path": str(tmp_path / "runs")},
    )  # fmt: skip


def test_a_run_says_what_is_odd_and_goes_on(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = override(config, {"data.val": config.data.train})
    run.print_warnings(run.resolve(config))
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("warning: ")
    assert "they hold the very same samples" in said


def test_a_run_on_healthy_data_says_nothing(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run.print_warnings(run.resolve(config))
    assert capsys.readouterr().err == ""


def test_a_run_with_a_fault_does_not_begin(config: RunConfig, tmp_path: Path) -> None:
    empty = made.healthy(16, 3)
    for sample in empty.samples:
        sample.annotations.clear()
    made.write(empty, tmp_path / "empty")
    with pytest.raises(ValueError, match="there is nothing to learn"):
        run.start(override(config, {"data.train": str(tmp_path / "empty")}), local=True)
    assert not (tmp_path / "runs").exists()


class Begun(Exception):
    """Raised in place of the training."""


@pytest.mark.parametrize("kind", ["train", "overfit"])
def test_a_training_warns_and_learning_by_heart_does_not(
    config: RunConfig, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a run trains and evaluates on the same images because that is its purpose, nothing is odd."""

    def begin(_: RunConfig) -> list[str]:
        raise Begun

    monkeypatch.setattr(run.init_weights, "describe", begin)
    same = override(config, {"data.val": config.data.train})
    train = {
        "train": lambda: run.start(same, local=True),
        "overfit": lambda: overfit(
            config, None, num_images=4, num_steps=1, long_side=64, out=config.storage.path
        ),
    }[kind]
    with pytest.raises(Begun):
        train()
    said = " ".join(capsys.readouterr().err.split())
    assert ("the very same samples" in said) == (kind == "train")
    assert ("warning" in said) == (kind == "train")
