"""What `make chaos` counts."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[3] / "benchmarks" / "chaos.py"


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("started step step", 0),
        ("started step resumed step evaluation resumed evaluation step", 2),
        ("started step resumed resumed step", 1),
        ("started step restart resumed", 0),
        ("started started step", 1),
    ],
)
def test_a_recovery_is_a_restart_that_a_step_follows(kinds: str, expected: int) -> None:
    events = [{"time": float(number), "kind": kind} for number, kind in enumerate(kinds.split())]
    assert runpy.run_path(str(CHAOS))["recoveries"](events[::-1]) == expected
