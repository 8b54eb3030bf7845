"""Build ResNet backbones with torchvision's parameter names, and a small one for small images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from detrs.layers import call_layer

PathOrUrl = Annotated[str, "path or URL"]  # the platform finds settings that name files by this type


@dataclass(frozen=True)
class BackboneConfig:
    """Settings of the backbone. The default is that of the papers: ResNet-50, frozen norms and first stages."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "small"] = "resnet50"
    norm: Literal["frozen", "batch"] = "frozen"
    num_frozen_stages: int = 2  # 0: none; 1: the stem; 2: the stem and layer1; ...
    dilation: bool = False  # layer4 keeps the resolution of layer3 (DETR's DC5)
    weights: PathOrUrl | None = None  # a torchvision state dict; None: random weights

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels of layer1 to layer4."""
        block, _ = _LAYOUTS[self.name]
        base = (32, 64, 96, 128) if self.name == "small" else (64, 128, 256, 512)
        a, b, c, d = (width * block.expansion for width in base)
        return a, b, c, d


class FrozenBatchNorm(nn.Module):
    """Batch normalization with fixed statistics and affine parameters; it has only buffers."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Scale and shift each channel."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        # One pass over the activations instead of two
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int, dilation: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(width_in, width, 3, stride, dilation), norm(width)
        self.conv2, self.bn2 = _conv(width, width, 3, 1, dilation), norm(width)
        self.downsample = _shortcut(width_in, width, stride, norm)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        """Transform and add to the shortcut."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolutions and a shortcut (ResNet-50 and -101)."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int, dilation: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(width_in, width, 1), norm(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride, dilation), norm(width)
        self.conv3, self.bn3 = _conv(width, width * 4, 1), norm(width * 4)
        self.downsample = _shortcut(width_in, width * 4, stride, norm)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        """Transform and add to the shortcut."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


_LAYOUTS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "small": (BasicBlock, (1, 1, 1, 1)),
}


class ResNet(nn.Module):
    """Features of layer1 to layer4, without the classifier.

    "small" has a 3x3 stem of 16 channels without pooling and one block per stage. Its first stage is strided, so that
    the strides are 4, 8, 16 and 32 like those of the large ones.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        small = config.name == "small"
        norm: type[nn.Module] = FrozenBatchNorm if config.norm == "frozen" else nn.BatchNorm2d
        block, depths = _LAYOUTS[config.name]
        stem = 16 if small else 64
        self.conv1, self.bn1 = _conv(3, stem, 3 if small else 7, 2), norm(stem)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(block, stem, config.widths[0], depths[0], 2 if small else 1, 1, norm)
        self.layer2 = _stage(block, config.widths[0], config.widths[1], depths[1], 2, 1, norm)
        self.layer3 = _stage(block, config.widths[1], config.widths[2], depths[2], 2, 1, norm)
        self.layer4 = _stage(
            block, config.widths[2], config.widths[3], depths[3], 1 if config.dilation else 2,
            2 if config.dilation else 1, norm,
        )  # fmt: skip
        self.dilation, self.activation_checkpointing = config.dilation, False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the outputs of layer1 to layer4, each [b, width, h / stride, w / stride]."""
        x = pixels.contiguous(memory_format=torch.channels_last)
        x = self.layer1(self.pool(F.relu(self.bn1(self.conv1(x)))))
        y = call_layer(self.layer2, x, recompute=self.activation_checkpointing)
        z = call_layer(self.layer3, y, recompute=self.activation_checkpointing)
        return x, y, z, call_layer(self.layer4, z, recompute=self.activation_checkpointing)


def build_backbone(config: BackboneConfig) -> ResNet:
    """Build a ResNet, load its weights and freeze its first stages.

    Raises:
        ValueError: a setting cannot be built, or the weights do not fit; the message names the setting, or the keys
            that are missing and unexpected.
    """
    if config.dilation and config.name in ("resnet18", "resnet34"):
        raise ValueError(
            f"backbone.dilation: not possible with backbone.name={config.name!r}; use resnet50, resnet101 or small"
        )
    if not 0 <= config.num_frozen_stages <= 5:
        raise ValueError(f"backbone.num_frozen_stages: {config.num_frozen_stages} is not between 0 and 5")
    backbone = ResNet(config)
    if config.weights is not None:
        load_torchvision(backbone, read_weights(config.weights), config.weights)
    stem = nn.ModuleList([backbone.conv1, backbone.bn1])
    stages = [stem, backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
    for stage in stages[: config.num_frozen_stages]:
        stage.requires_grad_(False)
    channels_last: ResNet = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return channels_last


def read_weights(source: str) -> dict[str, Tensor]:
    """Read a state dict from a file or a URL (cached by torch.hub).

    Raises:
        ValueError: there is no such file, or it does not hold a state dict.
    """
    if source.startswith(("http://", "https://")):
        state = torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
    elif Path(source).is_file():
        state = torch.load(source, map_location="cpu", weights_only=True)
    else:
        raise ValueError(
            f"backbone.weights: no file {source!r}; give the path or URL of a torchvision state dict"
        )
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{source}: not a state dict (a mapping of names to tensors)")
    return dict(state)


def load_torchvision(backbone: ResNet, state: Mapping[str, Tensor], source: str) -> None:
    """Copy the weights of a torchvision classifier, without its `fc` and batch counters.

    Raises:
        ValueError: names or shapes do not fit; the message names some of them.
    """
    own = backbone.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    given = {
        name: value
        for name, value in state.items()
        if not name.startswith("fc.") and (name in own or not name.endswith("num_batches_tracked"))
    }
    missing = sorted(own.keys() - given.keys() - counters)
    unexpected = sorted(given.keys() - own.keys())
    wrong = sorted(n for n in given.keys() & own.keys() if given[n].shape != own[n].shape)
    if missing or unexpected or wrong:
        raise ValueError(
            f"{source}: weights of another network: missing {_some(missing)}; "
            f"unexpected {_some(unexpected)}; other shape {_some(wrong)}. Check backbone.name."
        )
    backbone.load_state_dict(given, strict=False)


def _some(names: list[str]) -> str:
    return (
        "none" if not names else f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    )


def _conv(width_in: int, width: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, kernel, stride, dilation * (kernel // 2), dilation=dilation, bias=False)


def _shortcut(width_in: int, width: int, stride: int, norm: type[nn.Module]) -> nn.Sequential | None:
    if stride == 1 and width_in == width:
        return None
    return nn.Sequential(_conv(width_in, width, 1, stride), norm(width))


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    width_in: int,
    width: int,
    depth: int,
    stride: int,
    dilation: int,
    norm: type[nn.Module],
) -> nn.Sequential:
    # As in torchvision, the first block is not dilated: its input still has the resolution of the stage before
    inner = width // block.expansion
    blocks: list[nn.Module] = [block(width_in, inner, stride, 1, norm)]
    blocks += [block(width, inner, 1, dilation, norm) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)
