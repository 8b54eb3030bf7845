"""Initial weights from a checkpoint: which are kept, reinitialized, reported and refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import small_models
from detrs.zoo import BackboneConfig, ModelConfig, build
from raydetr.config import ConfigError, RunConfig, override, to_dict
from raydetr.runs import run
from raydetr.runs.resolve import resolve
from raydetr.shards.manifest import LabelMap, make_label_map
from raydetr.training import init_weights
from raydetr.training.checkpoint import CheckpointError, load_for_inference, write

CLASSES = [{"id": i + 1, "name": name} for i, name in enumerate(("circle", "square", "triangle", "star"))]


def with_model(config: RunConfig, model: ModelConfig, checkpoint: Path | None) -> RunConfig:
    checked = config.model_copy(update={"model": model})
    return override(checked, {"init.checkpoint": None if checkpoint is None else str(checkpoint)})


def checkpoint_of(
    config: RunConfig, model: ModelConfig, folder: Path, *, averaged: bool = False
) -> dict[str, Tensor]:
    """Write a checkpoint of a new model; return the weights that a run should load from it."""
    torch.manual_seed(5)
    state, other = (build(model).detector.state_dict() for _ in range(2))
    description: dict[str, Any] = {
        "config": to_dict(with_model(config, model, None)),
        "categories": CLASSES[: model.num_classes],
        "fingerprint": "",
        "epoch": 3,
        "position": 30,
    }
    folder.mkdir()
    write(folder, {"model": other if averaged else state, "ema": state if averaged else None}, description)
    return state


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name in a if a[name].shape != b[name].shape or not torch.equal(a[name], b[name])}


def labels_of(names: Sequence[str]) -> LabelMap:
    return make_label_map([{"id": 3 * i, "name": name} for i, name in enumerate(names)], "contiguous")


NOWHERE = labels_of(["circle"])
MODELS = ["detr", "conditional", "dab", "deformable_two_stage", "dino"]


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_taken_by_the_names_of_the_classes(name: str, tiny_run: RunConfig, tmp_path: Path) -> None:
    """Other numbers and another order of the classes: each keeps its weights, new ones start at random."""
    model = small_models.CONFIGS[name]
    assert model.num_classes == 4
    weights = checkpoint_of(tiny_run, model, tmp_path / "old")
    names = ["moon", "triangle", "circle", "sun", "star", "square", "comet"]
    there = {"circle": 0, "square": 1, "triangle": 2, "star": 3}
    config = with_model(tiny_run, replace(model, num_classes=7), tmp_path / "old")
    torch.manual_seed(6)
    detector = build(config.model).detector
    new = {key: value.clone() for key, value in detector.state_dict().items()}
    init_weights.load(detector, config, labels_of(names))
    loaded = dict(detector.state_dict())
    per_class = differing(loaded, weights)
    assert per_class == {key for key in new if new[key].shape != weights[key].shape}
    assert {"decoder.class_heads.0.weight", "decoder.class_heads.0.bias"} <= per_class
    for key in per_class:
        for label, word in enumerate(names):
            expected = weights[key][there[word]] if word in there else new[key][label]
            assert torch.equal(loaded[key][label], expected), (key, word)
        assert torch.equal(
            loaded[key][7:], weights[key][4:]
        )  # "no object", and the label that is not a class


@pytest.mark.parametrize(("start", "name"), [("detr", "detr_focal"), ("detr_focal", "detr")])
def test_class_heads_with_and_without_a_no_object_class(
    start: str, name: str, tiny_run: RunConfig, tmp_path: Path
) -> None:
    given = replace(small_models.CONFIGS[start], position_encoding="sine", activation="relu")
    model = replace(small_models.CONFIGS[name], position_encoding="sine", activation="relu")
    weights = checkpoint_of(tiny_run, given, tmp_path / "old")
    config = with_model(tiny_run, model, tmp_path / "old")
    (line,) = (line for line in init_weights.summarize(config, NOWHERE) if "other settings" in line)
    assert "loss.kind is" in line
    torch.manual_seed(6)
    detector = build(model).detector
    new = detector.state_dict()["decoder.class_heads.0.bias"].clone()
    init_weights.load(detector, config, labels_of([category["name"] for category in CLASSES]))
    bias = detector.state_dict()["decoder.class_heads.0.bias"]
    assert torch.equal(bias[:4], weights["decoder.class_heads.0.bias"][:4])
    assert torch.equal(bias[4:], new[4:])


def test_ids_with_a_gap_do_not_move_the_labels(tiny_run: RunConfig, tmp_path: Path) -> None:
    """The same names in the same order under other ids, as from another export of the data."""
    model = small_models.CONFIGS["dino"]
    weights = checkpoint_of(tiny_run, model, tmp_path / "old")  # ids 1, 2, 3, 4
    categories = [{"id": i, "name": c["name"]} for i, c in zip((0, 1, 3, 7), CLASSES, strict=True)]
    here = make_label_map(categories, "category_id")
    config = with_model(tiny_run, replace(model, num_classes=here.num_classes), tmp_path / "old")
    detector = build(config.model).detector
    init_weights.load(detector, config, here)
    bias = detector.state_dict()["decoder.class_heads.0.bias"]
    assert torch.equal(bias[[0, 1, 3, 7]], weights["decoder.class_heads.0.bias"])


def test_the_table_of_classes(tiny_run: RunConfig, tmp_path: Path) -> None:
    model = small_models.CONFIGS["dino"]
    checkpoint_of(tiny_run, model, tmp_path / "old")
    names = ["star", "moon", "circle"]
    config = with_model(tiny_run, replace(model, num_classes=len(names)), tmp_path / "old")
    lines = init_weights.summarize(config, labels_of(names))
    assert lines[0] == f"starting from {tmp_path / 'old'}"
    there = [category["name"] for category in CLASSES]
    kept = sum(name in there for name in names)
    assert any(line.startswith(f"classes: {kept} of {len(names)} are taken") for line in lines) == (
        names != there
    )
    for label, name in enumerate(names):
        source = str(there.index(name)) if name in there else "new"
        assert any(line.split() == [str(label), source, name] for line in lines)


def test_with_the_same_classes_all_weights_are_kept_and_averaged_ones_are_preferred(
    tiny_run: RunConfig, tmp_path: Path
) -> None:
    model = small_models.CONFIGS["dino"]
    weights = checkpoint_of(tiny_run, model, tmp_path / "old", averaged=True)
    detector = build(model).detector
    here = labels_of([category["name"] for category in CLASSES])
    init_weights.load(detector, with_model(tiny_run, model, tmp_path / "old"), here)
    assert differing(dict(detector.state_dict()), weights) == set()
    assert init_weights._describe_rows(here, here) == [
        "classes: all 4 are taken from it, with the same labels"
    ]


def test_weights_that_are_not_numbers_are_refused(tiny_run: RunConfig, tmp_path: Path) -> None:
    model = small_models.CONFIGS["dino"]
    weights = checkpoint_of(tiny_run, model, tmp_path / "old")
    meta = json.loads((tmp_path / "old/meta.json").read_text())
    weights["decoder.class_heads.0.bias"][2] = float("nan")
    fields = {key: value for key, value in meta.items() if not key.startswith("state_")}
    write(tmp_path / "old", {"model": weights, "ema": None}, fields)
    message = (
        r"old: 1 of the 4 values of decoder.class_heads.0.bias are NaN or infinite: use an earlier checkpoint"
    )
    with pytest.raises(CheckpointError, match=message):
        load_for_inference(tmp_path / "old")
    with pytest.raises(CheckpointError, match=message):
        init_weights.load(
            build(model).detector, with_model(tiny_run, model, tmp_path / "old"), labels_of(["circle"] * 1)
        )


def test_without_a_checkpoint_nothing_is_changed_or_reported(tiny_run: RunConfig) -> None:
    config = with_model(tiny_run, small_models.CONFIGS["dino"], None)
    detector = build(config.model).detector
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    init_weights.load(detector, config, labels_of(["circle"]))
    assert differing(dict(detector.state_dict()), before) == set()
    assert init_weights.summarize(config, NOWHERE) == []


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("detr", {}, ["holds weights of detr", "the run trains dino"]),
        (
            "dino",
            {"num_queries": 11},
            ["another dino model", "num_queries is 11 in the checkpoint and 10 in the run"],
        ),
        (
            "dino",
            {"num_encoder_layers": 2},
            ["num_encoder_layers is 2 in the checkpoint and 1 in the run", "encoder.layers.1"],
        ),
        (
            "dino",
            {"num_classes": 3, "hidden_dim": 64},
            ["hidden_dim is 64 in the checkpoint and 32 in the run"],
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_the_run_starts(
    name: str, changes: dict[str, Any], words: list[str], tiny_run: RunConfig, tmp_path: Path
) -> None:
    checkpoint_of(tiny_run, replace(small_models.CONFIGS[name], **changes), tmp_path / "old")
    config = with_model(tiny_run, small_models.CONFIGS["dino"], tmp_path / "old")
    with pytest.raises(ConfigError) as caught:
        run.start(config, local=True)
    for word in [str(tmp_path / "old"), *words]:
        assert word in str(caught.value)
    assert not Path(config.storage.path).exists()


def test_a_folder_that_is_no_checkpoint_is_refused(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = with_model(tiny_run, small_models.CONFIGS["dino"], tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"nowhere: no such folder; .*raydetr import-checkpoint"):
        run.start(config, local=True)
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(CheckpointError, match="nowhere: no checkpoint"):
        run.start(config, local=True)


def test_settings_that_change_the_meaning_of_weights_are_reported(
    tiny_run: RunConfig, tmp_path: Path
) -> None:
    old = small_models.CONFIGS["detr"]
    checkpoint_of(tiny_run, replace(old, dropout=0.3), tmp_path / "old")
    frozen = replace(old, backbone=replace(old.backbone, num_frozen_stages=1))
    lines = init_weights.summarize(with_model(tiny_run, frozen, tmp_path / "old"), NOWHERE)
    assert not [line for line in lines if "num_frozen" in line or "dropout" in line]
    heads = replace(old, num_heads=2)
    lines = init_weights.summarize(with_model(tiny_run, heads, tmp_path / "old"), NOWHERE)
    (line,) = (line for line in lines if "other settings" in line)
    assert "num_heads is 4 in the checkpoint and 2 in the run" in line
    assert "dropout" not in line


def test_a_frozen_backbone_without_weights_is_reported(tiny_run: RunConfig) -> None:
    model = replace(small_models.CONFIGS["dino"], backbone=BackboneConfig("resnet18"))
    (line,) = init_weights.summarize(with_model(tiny_run, model, None), NOWHERE)
    assert "starts from random numbers" in line
    assert "resnet18-f37072fd.pth" in line


def test_a_run_is_trained_from_the_weights_of_another(
    tiny_run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate near zero the weights stay those of the checkpoint."""
    config, _ = resolve(tiny_run)
    five = replace(config.model, num_classes=5)
    weights = checkpoint_of(config, five, tmp_path / "old")
    still = {"optim.lr": 1e-12, "optim.lr_backbone": 1e-12, "optim.lr_sampling": 1e-12, "optim.epochs": 1,
             "optim.weight_decay": 0, "init.checkpoint": str(tmp_path / "old"), "data.limit_images": 16}  # fmt: skip
    result = run.start(override(tiny_run, still), local=True)
    assert "of 4 are taken from it, by name; the others start at random" in capsys.readouterr().err
    after = load_for_inference(result.checkpoint).model.detector.state_dict()
    compared = 0
    for name, value in after.items():
        if value.shape == weights[name].shape and "running" not in name and value.is_floating_point():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-8)
            compared += 1
    assert compared > 60


def test_a_backbone_beside_a_checkpoint_is_refused(tiny_run: RunConfig, tmp_path: Path) -> None:
    model = small_models.CONFIGS["dino"]
    checkpoint_of(tiny_run, model, tmp_path / "old")
    backbone = replace(model.backbone, weights=str(tmp_path / "resnet.pth"))
    config = with_model(tiny_run, replace(model, backbone=backbone), tmp_path / "old")
    with pytest.raises(ConfigError, match=r"model.backbone.weights .* has no effect with init.checkpoint"):
        init_weights.summarize(config, NOWHERE)
