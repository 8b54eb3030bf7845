"""Count the parameters and the multiply-adds of a model, part by part, without its weights and without computing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detrs import zoo
from detrs.detector import Detector
from detrs.explain import recorded
from detrs.query_position import QueryPosition
from detrs.structures import Images, Memory, Queries
from detrs.zoo import ModelConfig

HEADS = "decoder.heads"


@dataclass(frozen=True)
class Part:
    """A part of a detector. Multiply-adds are those of one image, of convolutions and matrix products."""

    name: str
    output: str  # shape, without the batch
    num_parameters: int
    multiply_adds: int


def summarize(config: ModelConfig, height: int, width: int) -> list[Part]:
    """Return the parts of a model in the order in which they run; a parameter that is shared is of the first.

    Multiply-adds are counted by torch for an image without padding, as half of its "flops". Not counted are sums,
    products of elements, norms, and the reading of values by deformable attention. In training, denoising queries are
    added to those of the decoder.

    Args:
        config: with the number of classes.
        height, width: of the image, in pixels.

    Raises:
        ValueError: a setting that cannot be built; the message names it.
    """
    config = replace(config, backbone=replace(config.backbone, weights=None))
    with torch.device("meta"):  # shapes without memory
        # torch's counter fails with no_grad
        detector = zoo.build(config).detector.eval().requires_grad_(False)
        images = Images(torch.empty(1, 3, height, width), torch.empty(1, height, width, dtype=torch.bool))
    parts = _parts(detector)
    names = {module: f"Detector.{name}" for name, module in detector.named_modules()}
    with FlopCounterMode(display=False) as counter, recorded(m for _, ms in parts for m in ms) as calls:
        detector(images)
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    flops_of = {name: sum(flops.get(names[module], 0) for module in modules) for name, modules in parts}
    # The rest of the decoder: heads that are shared with the encoder have its flops too
    inside = sum(count for name, count in flops_of.items() if name.startswith("decoder") and name != HEADS)
    flops_of[HEADS] = flops["Detector.decoder"] - inside
    found, seen = [], set[nn.Parameter]()
    for name, modules in parts:
        own = set(nn.ModuleList(modules).parameters()) - seen
        seen |= own
        shown = modules if name == HEADS else modules[-1:]
        shapes = dict.fromkeys(_shape(calls[module][-1][1]) for module in shown if calls[module])
        num_parameters = sum(parameter.numel() for parameter in own)
        found.append(Part(name, ", ".join(shapes) or "-", num_parameters, flops_of[name] // 2))
    return found


def _parts(detector: Detector) -> list[tuple[str, list[nn.Module]]]:
    """Return names and modules, which together have all parameters; the last module computes the part's output."""
    backbone, decoder, layers = detector.backbone, detector.decoder, detector.encoder.layers
    norms = [] if decoder.norm is None else [decoder.norm]
    parts: list[tuple[str, list[nn.Module]]] = [
        ("backbone.stem", [backbone.conv1, backbone.bn1, backbone.pool]),
        *((f"backbone.layer{i}", [getattr(backbone, f"layer{i}")]) for i in range(1, 5)),
        ("neck", [detector.neck]),
        (_layers("encoder", len(layers)), [detector.encoder]),
        ("queries", [detector.queries]),
        ("decoder.query_position", [decoder.query_position]),
        (_layers("decoder", len(decoder.layers)), [*norms, *decoder.layers]),
        (HEADS, [*decoder.class_heads, *decoder.box_heads]),
    ]
    if detector.denoising is not None:
        parts.append(("denoising", [detector.denoising]))
    return parts


def _layers(name: str, number: int) -> str:
    return f"{name}, {number} {'layer' if number == 1 else 'layers'}"


def _shape(output: Any) -> str:
    """Return the shape of an output, without the batch; of a structure, that of its content or its tokens."""
    match output:
        case (Queries(content=tensor), _) | Memory(tokens=tensor) | QueryPosition(pos=tensor):
            return _shape(tensor)
        case Tensor():
            return " x ".join(map(str, output.shape[1:]))
    return "-"
