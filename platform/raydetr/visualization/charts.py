"""Draw line charts as SVG for HTML pages: they take their text colors from the page, light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

# Colors that can be told apart by most people, on light and dark backgrounds
COLORS = ("#3366cc", "#e07b39", "#2a9d6f", "#9b4dca", "#b8a000", "#d6336c", "#0e8a9c", "#808080")
WIDTH, HEIGHT = 280, 200  # about the size on the page, so that text is as large as elsewhere
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 36  # margins
MAX_POINTS = 150  # of a curve; more are averaged in groups


@dataclass(frozen=True)
class Curve:
    """A curve; `points` are (x, value) by x."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(curves: Sequence[Curve], x_label: str, *, markers: bool = False) -> str:
    """Return a chart as an `svg` element; the number of a curve is that of its color.

    Args:
        curves: at least one of them has a point.
        x_label: what x is.
        markers: draw the points, whose tooltips have their values.
    """
    drawn = [Curve(curve.name, _averaged(curve.points)) for curve in curves]
    xs = [x for curve in drawn for x, _ in curve.points]
    ys = [y for curve in drawn for _, y in curve.points]
    x_ticks, y_ticks = _ticks(0.0, max(xs)), _ticks(min(ys), max(ys))
    x_end = max(x_ticks[-1], max(xs))
    low, high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = x / (x_end or 1.0)
        up = (y - low) / ((high - low) or 1.0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in y_ticks:
        x, y = place(0, tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, y = place(tick, low)
        anchor = "end" if tick == x_ticks[-1] else "middle"  # inside the chart
        parts.append(f'<text x="{x:.1f}" y="{y + 15:.1f}" text-anchor="{anchor}">{_short(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{HEIGHT - 5}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    for number, curve in enumerate(drawn):
        color = COLORS[number % len(COLORS)]
        places = [place(x, y) for x, y in curve.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if markers or len(places) == 1:  # one point is no line
            for (x, y), (at, value) in zip(places, curve.points, strict=True):
                tip = html.escape(f"{curve.name}: {value:.4g} at {at:.4g}")
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"><title>{tip}</title></circle>'
                )
    return "".join([*parts, "</svg>"])


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]


def _ticks(low: float, high: float) -> list[float]:
    """Return 2 to 6 round numbers that cover a range."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span / 4 * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= 10 * size or (value >= size and value % size == 0):
            return f"{value / size:g}{unit}"
    return f"{value:g}"
