"""Initial weights from a checkpoint: which are kept, reinitialized, reported and refused."""

from __future__ import annotations

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
        "metrics": {},
    }
    folder.mkdir()
    write(folder, {"model": other if averaged else state, "ema": state if averaged else None}, description)
    return state


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name in a if a[name].shape != b[name].shape or not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("name", ["detr", "conditional", "dab", "deformable_two_stage", "dino"])
def test_all_but_the_class_heads_is_kept(name: str, tiny_run: RunConfig, tmp_path: Path) -> None:
    model = small_models.CONFIGS[name]
    assert model.num_classes == 4
    weights = checkpoint_of(tiny_run, model, tmp_path / "old")
    config = with_model(tiny_run, replace(model, num_classes=7), tmp_path / "old")
    torch.manual_seed(6)
    detector = build(config.model).detector
    new = {key: value.clone() for key, value in detector.state_dict().items()}
    init_weights.load(detector, config)
    loaded = dict(detector.state_dict())
    reinitialized = differing(loaded, weights)
    assert reinitialized == {key for key in new if new[key].shape != weights[key].shape}
    assert {"decoder.class_heads.0.weight", "decoder.class_heads.0.bias"} <= reinitialized
    assert all("class_head" in key or key == "denoising.label_embed.weight" for key in reinitialized)
    assert not reinitialized & differing(loaded, new)
    (line,) = (line for line in init_weights.summarize(config, ()) if line.startswith("reinitialized"))
    assert "4 classes and the data 7" in line
    assert set(line.split(": ")[1].split("; ")[0].split(", ")) == reinitialized


def test_with_the_same_number_of_classes_all_weights_are_kept_and_averaged_ones_are_preferred(
    tiny_run: RunConfig, tmp_path: Path
) -> None:
    model = small_models.CONFIGS["dino"]
    weights = checkpoint_of(tiny_run, model, tmp_path / "old", averaged=True)
    config = with_model(tiny_run, model, tmp_path / "old")
    detector = build(model).detector
    init_weights.load(detector, config)
    assert differing(dict(detector.state_dict()), weights) == set()
    lines = init_weights.summarize(config, ())
    assert lines[0] == f"starting from {tmp_path / 'old'}"
    assert not any("reinitialized" in line for line in lines)


def test_other_class_names_are_reported(tiny_run: RunConfig, tmp_path: Path) -> None:
    model = small_models.CONFIGS["dino"]
    checkpoint_of(tiny_run, model, tmp_path / "old")
    config, names = with_model(tiny_run, model, tmp_path / "old"), [category["name"] for category in CLASSES]
    assert not any("other names" in line for line in init_weights.summarize(config, names))
    assert any("other names" in line for line in init_weights.summarize(config, [*names[1:], "another"]))


def test_without_a_checkpoint_nothing_is_changed_or_reported(tiny_run: RunConfig) -> None:
    config = with_model(tiny_run, small_models.CONFIGS["dino"], None)
    detector = build(config.model).detector
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    init_weights.load(detector, config)
    assert differing(dict(detector.state_dict()), before) == set()
    assert init_weights.summarize(config, ()) == []


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("detr", {}, ["holds weights of detr", "the run trains dino"]),
        ("dino", {"num_queries": 11}, ["another dino model", "num_queries is 11 there and 10 here"]),
        ("dino", {"num_encoder_layers": 2}, ["num_encoder_layers is 2 there and 1 here", "encoder.layers.1"]),
        ("dino", {"num_classes": 3, "hidden_dim": 64}, ["hidden_dim is 64 there and 32 here"]),
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
    assert not config.storage.path.exists()


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
    lines = init_weights.summarize(with_model(tiny_run, frozen, tmp_path / "old"), ())
    assert not [line for line in lines if "num_frozen" in line or "dropout" in line]
    heads = replace(old, num_heads=2)
    lines = init_weights.summarize(with_model(tiny_run, heads, tmp_path / "old"), ())
    (line,) = (line for line in lines if "other settings" in line)
    assert "num_heads is 4 there and 2 here" in line
    assert "dropout" not in line


def test_a_frozen_backbone_without_weights_is_reported(tiny_run: RunConfig) -> None:
    model = replace(small_models.CONFIGS["dino"], backbone=BackboneConfig("resnet18"))
    (line,) = init_weights.summarize(with_model(tiny_run, model, None), ())
    assert "starts from random numbers" in line
    assert "resnet18-f37072fd.pth" in line


def test_a_run_is_trained_from_the_weights_of_another(
    tiny_run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate near zero the weights stay those of the checkpoint."""
    config, _ = run.resolve(tiny_run)
    five = replace(config.model, num_classes=5)
    weights = checkpoint_of(config, five, tmp_path / "old")
    still = {"optim.lr": 1e-12, "optim.lr_backbone": 1e-12, "optim.lr_sampling": 1e-12, "optim.epochs": 1,
             "optim.weight_decay": 0, "init.checkpoint": str(tmp_path / "old"), "data.limit_images": 16}  # fmt: skip
    result = run.start(override(tiny_run, still), local=True)
    assert "it has 5 classes and the data 4" in capsys.readouterr().err
    after = load_for_inference(result.checkpoint).model.detector.state_dict()
    compared = 0
    for name, value in after.items():
        if value.shape == weights[name].shape and "running" not in name and value.is_floating_point():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-8)
            compared += 1
    assert compared > 60
