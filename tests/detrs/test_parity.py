"""The models against the official ones: same weights in, same numbers out.

Every setting is read from the goldens' manifests, so that other goldens of the format pass too.
"""

from __future__ import annotations

import pytest
import torch

import goldens
import parity
from parity import Run


@parity.DTYPES
@pytest.mark.parametrize("name", goldens.names("model"))
def test_model(name: str, dtype: torch.dtype) -> None:
    this, tolerance = run(name, dtype), parity.TOLERANCES[dtype]
    assert torch.equal(this.images.padding, this.golden.tensor("mask"))
    parity.check_outputs(this, tolerance)
    parity.check_losses(this.losses, this.golden.manifest, tolerance)
    parity.check_matches(this)
    parity.check_detections(this, tolerance)
    parity.check_gradients(this, tolerance)


def run(name: str, dtype: torch.dtype) -> Run:
    golden = goldens.read(name)
    config = goldens.config_of(golden.manifest["args"], golden.paper, golden.manifest["constructor_options"])
    model = goldens.build_filled(config, dtype)
    images, targets, sizes = goldens.inputs(golden.manifest, dtype)
    draws = goldens.draws(golden)
    model.detector.train(draws is not None)
    outputs = model.detector(images, targets if draws else None, draws)
    losses = model.criterion(outputs, targets, float(sum(targets.counts)))
    losses.total.backward()
    return Run(golden, config, model, images, targets, sizes, outputs, losses)
