"""Test the errors for wrong arguments: they name the argument, what was found and what is expected."""

from __future__ import annotations

import pytest
import torch

from detrs.ops import deform_attn
from sampling import random_inputs

SHAPES = ((3, 4), (2, 1))


@pytest.fixture
def inputs():
    return dict(
        zip(("value", "locations", "weights"), random_inputs(SHAPES, dtype=torch.float32), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("value", lambda v: v[0], r"value: found shape \[14, 3, 8\], expected \[N, S, M, D\]"),
        (
            "value",
            lambda v: v[:, 1:],
            r"value: found 13 tokens, expected 14, the area of \(\(3, 4\), \(2, 1\)\)",
        ),
        ("locations", lambda x: x[..., 0], r"locations: found shape .*, expected \[N, Q, M, L, P, 2\]"),
        ("locations", lambda x: x[:1], r"locations: found shape \[1, 5, .*expected \[2, 5, 3, 2, 2, 2\]"),
        ("locations", lambda x: x[:, :, :2], r"locations: found shape .*, expected \[2, 5, 3, 2, 2, 2\]"),
        ("locations", lambda x: x[:, :, :, :1], r"locations: found shape .*, expected \[2, 5, 3, 2, 2, 2\]"),
        ("locations", lambda x: x[..., :1], r"locations: found shape .*, expected \[2, 5, 3, 2, 2, 2\]"),
        (
            "weights",
            lambda w: w[..., :1],
            r"weights: found shape \[2, 5, 3, 2, 1\], expected \[2, 5, 3, 2, 2\]",
        ),
        (
            "weights",
            lambda w: w.double(),
            r"weights: found dtype torch.float64, expected torch.float64 for all",
        ),
        (
            "value",
            lambda v: v.double(),
            r"locations: found dtype torch.float32, expected torch.float64 for all",
        ),
        ("value", lambda v: v.int(), r"value: found dtype torch.int32, expected one of torch.float32, "),
        ("weights", lambda w: w.long(), r"weights: found dtype torch.int64, expected one of torch.float32, "),
        ("weights", lambda w: w.to("meta"), r"weights: found device meta, expected cpu, the device of value"),
    ],
)
def test_wrong_tensors_are_named(inputs, name, change, words):
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=words):
        deform_attn(shapes=SHAPES, **inputs)


@pytest.mark.parametrize("shapes", [(), ((3, 4), (2, 0)), ((3, 4), (-2, -1))])
def test_wrong_shapes_are_named(inputs, shapes):
    with pytest.raises(ValueError, match=r"shapes: found .*, expected a \(height, width\), each at least 1"):
        deform_attn(shapes=shapes, **inputs)
