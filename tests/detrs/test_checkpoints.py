"""Test official checkpoints: names, shapes and aliases of the full-size models, round trips, initial values."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import goldens
import small_models
from detrs.checkpoints import load_official, read_official
from detrs.official_names import from_official, official_names, recognize_architecture, to_official
from detrs.zoo import ModelConfig, build

FULL = goldens.names("full")


def full_config(manifest: dict[str, Any]) -> ModelConfig:
    return goldens.config_of(
        manifest["args"], goldens.architecture_of(manifest), manifest["constructor_options"]
    )


def meta_detector(config: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        return build(config).detector


@pytest.mark.parametrize("name", FULL)
def test_every_official_name_is_ours(name: str) -> None:
    manifest = goldens.read(name).manifest
    config = full_config(manifest)
    detector = meta_detector(config)
    official = to_official(config, detector.state_dict())
    assert {key: list(value.shape) for key, value in official.items()} == {
        key: shape for key, (shape, _) in manifest["state_dict"].items()
    }
    assert len(official) == manifest["n_state_dict_entries"]
    groups = official_names(config, detector.state_dict()).values()
    aliases = {first: sorted(others) for first, *others in groups if others}
    assert aliases == {first: sorted(x) for first, x in manifest["aliases_first_name_wins"].items()}
    without = sum(official[key].numel() for key in goldens.without_effect(config))
    assert sum(p.numel() for p in detector.parameters()) + without == manifest["n_params_total"]
    trained = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    assert trained + without == manifest["n_params_trainable"]


@pytest.mark.parametrize("name", FULL)
def test_round_trip_is_lossless(name: str) -> None:
    config = full_config(goldens.read(name).manifest)
    own = meta_detector(config).state_dict(keep_vars=True)
    # One number per tensor stands for its values; expand gives the shape without the memory.
    numbers = {id(value): float(i) for i, value in enumerate(own.values())}
    state = {key: torch.tensor(numbers[id(value)]).expand(value.shape) for key, value in own.items()}
    back = from_official(config, to_official(config, state), own)
    assert back.keys() == state.keys()
    assert all(back[key].flatten()[0] == state[key].flatten()[0] for key in state)


def official_zeros(config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return our state dict without values, and an official one of zeros."""
    own = meta_detector(config).state_dict()
    return own, to_official(config, {key: torch.zeros(()).expand(value.shape) for key, value in own.items()})


def test_misfits_are_named() -> None:
    config = small_models.CONFIGS["detr"]
    own, official = official_zeros(config)
    first = next(iter(official))
    changed = {key: value for key, value in official.items() if key != first}
    changed["somewhere.else"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing 1 .*unexpected 1 \(somewhere.else\)"):
        from_official(config, changed, own)
    with pytest.raises(ValueError, match=r"other shape 1"):
        from_official(config, official | {first: torch.zeros(7, 7, 7)}, own)


def test_names_of_one_tensor_must_agree() -> None:
    config = small_models.CONFIGS["dino"]
    own, official = official_zeros(config)
    alias = "transformer.decoder.class_embed.1.weight"
    with pytest.raises(ValueError, match="are one tensor"):
        from_official(config, official | {alias: torch.ones_like(official[alias])}, own)


# Their parts with initial values of their own are in other variants
SLOW_INITIAL = (
    "full_dab_deformable_detr_3pat", "full_deformable_detr_two_stage_no_refine", "full_dino_encoder_heads_shared_no_dn",
    "full_dino_pure_selection_heads_per_layer",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_INITIAL)) for name in FULL]
)
def test_initial_values_are_distributed_as_the_official_ones(name: str) -> None:
    manifest = goldens.read(name).manifest
    config = full_config(manifest)
    torch.manual_seed(1)
    official = to_official(config, build(config).detector.state_dict())
    compared = 0
    for key, (mean, std, low, high) in manifest["init_stats_seed0"].items():
        if key.startswith("backbone") or key in goldens.without_effect(config):
            continue  # loaded from ImageNet weights
        check_distribution(key, official[key], mean, std, low, high)
        compared += 1
    assert compared > 50


def check_distribution(key: str, value: Tensor, mean: float, std: float, low: float, high: float) -> None:
    number = value.numel()
    if number == 1 and not key.endswith("activation.weight"):
        return  # a random number alone has no distribution
    if std == 0:
        assert value.min().item() == pytest.approx(low, abs=1e-5), key
        assert value.max().item() == pytest.approx(high, abs=1e-5), key
        return
    if "sampling_offsets.bias" in key or (number == 4 and low == -2 and high == 0):
        assert value.min().item() == pytest.approx(low, abs=1e-5), key
        assert value.std(correction=0 if number == 4 else 1).item() == pytest.approx(std, rel=1e-1), key
        return
    # Two samples of one distribution: six standard errors, and more for small tensors.
    assert abs(value.mean().item() - mean) < 6 * std * (2 / number) ** 0.5, key
    if number >= 16:
        assert abs(value.std().item() / std - 1) < 6 * (1 / number) ** 0.5, key
        assert max(abs(value.min().item()), abs(value.max().item())) < 2 * max(abs(low), abs(high)), key


SMALL = [
    "detr", "detr_focal", "conditional", "conditional_learned_points", "dab", "dab_fixed_points", "dab_no_refinement",
    "deformable_two_stage", "deformable_two_stage_only", "deformable_anchors", "dino", "dino_without_two_stage",
    "dino_one_head",
]  # fmt: skip


def save_official(config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """Write a checkpoint file as the official training scripts do."""
    state = build(config).detector.state_dict()
    official = {f"module.{name}": value for name, value in to_official(config, state).items()}
    torch.save({"model": official, "args": argparse.Namespace(lr=1e-4), "epoch": 49}, path)
    return state


@pytest.mark.parametrize("name", SMALL)
def test_an_official_file_loads(name: str, tmp_path: Path) -> None:
    config = small_models.CONFIGS[name]
    state = save_official(config, tmp_path / "checkpoint.pth")
    detector = build(config).detector
    assert load_official(detector, config, tmp_path / "checkpoint.pth") == []
    assert all(torch.equal(value, state[key]) for key, value in detector.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_heads_keep_new_values_for_other_classes(name: str, tmp_path: Path) -> None:
    config = small_models.CONFIGS[name]
    state = save_official(config, tmp_path / "checkpoint.pth")
    other = dataclasses.replace(config, num_classes=7)
    detector = build(other).detector
    new = {key: value.clone() for key, value in detector.state_dict().items()}
    not_loaded = load_official(detector, other, tmp_path / "checkpoint.pth")
    assert {"decoder.class_heads.0.weight", "decoder.class_heads.0.bias"} <= set(not_loaded)
    for key, value in detector.state_dict().items():
        assert torch.equal(value, new[key] if key in not_loaded else state[key]), key
    assert {key for key in state if state[key].shape != new[key].shape} == set(not_loaded)


@pytest.mark.parametrize("name", SMALL)
def test_another_papers_checkpoint_is_recognized(name: str, tmp_path: Path) -> None:
    save_official(small_models.CONFIGS[name], tmp_path / "checkpoint.pth")
    other = small_models.CONFIGS["dino" if name.startswith("dab") else "dab"]
    architecture = small_models.CONFIGS[name].architecture
    with pytest.raises(ValueError, match=f"a checkpoint of {architecture}, not of {other.architecture}"):
        load_official(build(other).detector, other, tmp_path / "checkpoint.pth")


def test_files_that_are_not_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_official(tmp_path / "nothing.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="no state dict"):
        read_official(tmp_path / "empty.pth")


@pytest.mark.parametrize("name", FULL)
def test_full_models_are_recognized(name: str) -> None:
    manifest = goldens.read(name).manifest
    assert recognize_architecture(manifest["state_dict"]) == full_config(manifest).architecture
