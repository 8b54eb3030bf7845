"""Line charts as SVG: every point is at its place, and labels are round numbers."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from raydetr.visualization.charts import (
    BOTTOM,
    COLORS,
    HEIGHT,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    line_chart,
)


def lines(svg: str) -> list[list[tuple[float, float]]]:
    found = ElementTree.fromstring(svg).findall("polyline")
    return [[tuple(map(float, pair.split(","))) for pair in one.attrib["points"].split()] for one in found]  # type: ignore[misc]


def labels(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).findall("text")]


def test_points_are_where_the_axes_say() -> None:
    svg = line_chart([Curve("a", [(0.0, 0.0), (50.0, 0.5), (100.0, 1.0)])], "step")
    assert lines(svg) == [[
        (LEFT, HEIGHT - BOTTOM),
        ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2),
        (WIDTH - RIGHT, TOP),
    ]]  # fmt: skip
    assert labels(svg) == ["0", "0.25", "0.5", "0.75", "1", "0", "25", "50", "75", "100", "step"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.33, 0.48, ["0.3", "0.35", "0.4", "0.45", "0.5"]), (12.0, 26.0, ["10", "15", "20", "25", "30"])],
)
def test_the_value_axis_has_few_round_numbers(low: float, high: float, expected: list[str]) -> None:
    assert labels(line_chart([Curve("a", [(0.0, low), (1.0, high)])], "x"))[: len(expected)] == expected


def test_curves_have_the_color_of_their_number_and_single_points_are_visible() -> None:
    svg = line_chart([Curve("a", []), Curve("b & c", [(3.0, 0.25)])], "<x>")
    circle = ElementTree.fromstring(svg).find("circle")
    assert circle is not None
    assert circle.attrib["fill"] == COLORS[1]
    assert circle.findtext("title") == "b & c: 0.25 at 3"
    assert labels(svg)[-1] == "<x>"


def test_long_curves_are_averaged() -> None:
    points = [(float(x), float(x % 2)) for x in range(1000)]
    (line,) = lines(line_chart([Curve("a", points)], "x"))
    assert len(line) <= MAX_POINTS
    heights = {round(y) for _, y in line[:-1]}
    assert len(heights) <= 2  # near 0.5 everywhere


def test_equal_values_and_values_of_zero_have_an_axis() -> None:
    for value in (0.0, 0.5, 1e-9, -3.0):
        svg = line_chart([Curve("a", [(0.0, value), (0.0, value)])], "x")
        assert len(lines(svg)[0]) == 2
        assert not re.search("nan|inf", svg)
