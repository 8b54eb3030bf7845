"""Compare a small model with its compiled version: `python compare_compiled.py BACKEND NAME`.

This is a separate program, because the type checks that pytest adds to every function cannot be compiled.
"""

from __future__ import annotations

import sys

import torch

import small_models
from detrs.zoo import build


def main(backend: str, name: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build(small_models.CONFIGS[name])
    model.detector.eval()
    images, targets = small_models.batch((2, 1), size=(64, 64))
    # fullgraph: an error if anything falls back to Python
    compiled = torch.compile(model.detector, backend=backend, fullgraph=True)
    results = []
    for detector in (model.detector, compiled):
        outputs = detector(images)
        total = model.criterion(outputs, targets, 3.0).total
        gradients = torch.autograd.grad(total, list(model.detector.parameters()))
        results.append([outputs.predictions.logits, outputs.predictions.boxes, total, *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-4 * max(expected.abs().max().item(), 1)
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
