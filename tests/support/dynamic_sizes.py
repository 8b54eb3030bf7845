"""Compile and export a small model for images of any size, and compile it in training: `python dynamic_sizes.py NAME`.

This is a separate program, because the type checks that pytest adds to every function cannot be compiled.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

import small_models
from detrs.structures import Images
from detrs.zoo import build

SIZES = ((64, 96), (96, 128), (128, 96), (72, 104), (64, 64), (80, 88), (160, 128))


class Predict(nn.Module):
    """A detector with tensors as input and output."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, pixels: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and boxes."""
        predictions = self.detector(Images(pixels, padding_mask)).predictions
        return predictions.logits, predictions.boxes


def main(name: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    predict = Predict(build(small_models.CONFIGS[name]).detector.eval())
    batches = [small_models.batch((1, 1), size=size)[0] for size in SIZES]
    # Exported before the model has run, when there is nothing in any cache
    sizes = torch.export.Dim.DYNAMIC
    exported = torch.export.export(
        predict,
        (batches[0].pixels, batches[0].padding_mask),
        dynamic_shapes=({2: sizes, 3: sizes}, {1: sizes, 2: sizes}),
    ).module()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(predict, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for images in batches:
            expected = predict(images.pixels, images.padding_mask)
            assert {type(tensor) for tensor in expected} == {Tensor}, (
                "a cache returned a tensor of the export"
            )
            for function in (exported, compiled):
                for one, other in zip(function(images.pixels, images.padding_mask), expected, strict=True):
                    torch.testing.assert_close(one, other)
    check_training(predict.detector)
    print(graphs)


def check_training(detector: nn.Module) -> None:
    """Assert that a step with targets is one graph, except if the detector draws its denoising queries itself."""
    images, targets = small_models.batch((2, 1))
    arguments: list[Any] = [images, targets]
    if detector.denoising is not None:
        assert explain(detector, *arguments).graph_break_count > 0
        arguments += [detector.denoising.draw_by_image(targets.counts, 2, seeds=(0, 1)), 2]
    found = explain(detector, *arguments)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def explain(detector: nn.Module, *arguments: Any) -> Any:
    """Return what torch says of the graphs of a detector in training."""
    torch._dynamo.reset()
    return torch._dynamo.explain(detector.train())(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
