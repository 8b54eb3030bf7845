"""Test the source of the CUDA kernels, run on the CPU lane by lane, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import emulated
from emulated_cases import PYRAMID, all_cases, assert_right, make_case

pytestmark = emulated.needs_compiler


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("emulation"))


def test_both_forms_equal_the_reference_in_every_dtype_and_size(program):
    cases = all_cases()
    for case, result in zip(cases, emulated.run(program, cases), strict=True):
        assert_right(case, result)


def test_the_gradient_of_the_reference_is_optional(program):
    case = replace(make_case(PYRAMID, reference_size=4), wants_reference_grad=False)
    (result,) = emulated.run(program, [case])
    assert result.reference is None
    assert_right(case, result)


@pytest.mark.parametrize("dtype", emulated.STORAGES)
def test_the_order_of_the_lanes_changes_only_the_order_of_atomics(program, dtype):
    """All results except grad_value are equal bit by bit: a missing barrier would show here too."""
    case = make_case(PYRAMID, dtype=dtype, reference_size=4, num_queries=33, num_points=12, num_channels=32)
    results = emulated.run(program, [replace(case, order=order) for order in (0, 1, 2, 99)])
    for result in results[1:]:
        for name in ("out", "reference", "locations", "weights"):
            assert torch.equal(getattr(result, name), getattr(results[0], name)), name
        torch.testing.assert_close(result.value, results[0].value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_locations_outside_read_zero_and_have_no_gradient(program, dtype):
    """NaN and infinity count as outside, as on the CPU."""
    case = make_case(PYRAMID, dtype=dtype, num_queries=9)
    wild, weights = case.locations.clone(), case.weights.clone()
    far = torch.tensor([-1, 2, 1e9, -1e30, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    wild[:, 1:8, ..., 0] = far[:, None, None, None]
    wild[:, 8, ..., 1] = torch.nan
    weights[:, 1:9] = 0
    found, expected = emulated.run(program, [replace(case, locations=wild), replace(case, weights=weights)])
    torch.testing.assert_close(found.out, expected.out)
    torch.testing.assert_close(found.value, expected.value)
    assert torch.count_nonzero(found.out[:, 1:9]) == 0
    assert torch.count_nonzero(found.locations[:, 1:9]) == 0
    assert torch.count_nonzero(found.weights[:, 1:9]) == 0


def test_a_nan_logit_is_not_hidden(program):
    case = make_case(PYRAMID, reference_size=2)
    logits = case.weights.clone()
    logits[0, 1, 2, 0, 1] = torch.nan
    (result,) = emulated.run(program, [replace(case, weights=logits)])
    out = result.out.reshape(2, 5, 3, 8)
    assert out[0, 1, 2].isnan().all()
    assert out.isnan().sum() == 8
