"""Test backbones: torchvision's names, weights from files, frozen stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import goldens
from detrs.backbone import BackboneConfig, ResNet, build_backbone

NUM_PARAMETERS = {
    "resnet18": 11_176_512,
    "resnet34": 21_284_672,
    "resnet50": 23_508_032,
    "resnet101": 42_500_160,
}


def torchvision_state(backbone: ResNet) -> dict[str, torch.Tensor]:
    state = {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in backbone.state_dict().items()
    }
    return state | {
        "fc.weight": torch.zeros(1000, 2048),
        "fc.bias": torch.zeros(1000),
        "bn1.num_batches_tracked": torch.tensor(3),
    }


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_parameter_counts_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        backbone = ResNet(BackboneConfig(name, norm="batch"))
    assert sum(p.numel() for p in backbone.parameters()) == NUM_PARAMETERS[name]


def test_names_and_shapes_are_torchvisions() -> None:
    expected = goldens.read("backbone_params").manifest["params"]
    with torch.device("meta"):
        backbone = ResNet(BackboneConfig())
    found = {f"backbone.0.body.{name}": list(value.shape) for name, value in backbone.state_dict().items()}
    assert found == {name: shape for name, (shape, *_) in expected.items()}


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_weights_from_a_file(norm: str, tmp_path: Path) -> None:
    state = torchvision_state(ResNet(BackboneConfig("resnet18", norm="batch")))
    torch.save(state, tmp_path / "weights.pth")
    backbone = build_backbone(BackboneConfig("resnet18", norm, weights=str(tmp_path / "weights.pth")))
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    state = torchvision_state(ResNet(BackboneConfig("resnet18")))
    del state["layer1.0.conv1.weight"]
    state["layer9.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "weights.pth")
    config = BackboneConfig("resnet18", weights=str(tmp_path / "weights.pth"))
    with pytest.raises(
        ValueError, match=r"missing 1 \(layer1.0.conv1.weight\); unexpected 1 \(layer9.weight\)"
    ):
        build_backbone(config)


def test_missing_weights_file() -> None:
    with pytest.raises(ValueError, match=r"no file 'nowhere.pth'"):
        build_backbone(BackboneConfig("resnet18", weights="nowhere.pth"))


def test_no_state_dict(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="not a state dict"):
        build_backbone(BackboneConfig("resnet18", weights=str(tmp_path / "weights.pth")))


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_frozen_stages(number: int) -> None:
    backbone = build_backbone(BackboneConfig("resnet18", num_frozen_stages=number))
    trained = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == set(["conv1", "layer1", "layer2", "layer3", "layer4"][number:])


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "small"])
def test_strides_and_widths(name: str) -> None:
    config = BackboneConfig(name)
    with torch.no_grad():
        features = build_backbone(config)(torch.randn(1, 3, 64, 96))
    assert [f.shape[1:] for f in features] == [
        (width, 64 // stride, 96 // stride)
        for width, stride in zip(config.widths, (4, 8, 16, 32), strict=True)
    ]


def test_dilation_keeps_the_resolution() -> None:
    with torch.no_grad():
        *_, third, fourth = build_backbone(BackboneConfig(dilation=True))(torch.randn(1, 3, 64, 64))
    assert third.shape[2:] == fourth.shape[2:] == (4, 4)
    with torch.no_grad():
        *_, third, fourth = build_backbone(BackboneConfig("small", dilation=True))(torch.randn(1, 3, 64, 64))
    assert third.shape[2:] == fourth.shape[2:] == (4, 4)
    with pytest.raises(ValueError, match="dilation"):
        build_backbone(BackboneConfig("resnet18", dilation=True))
