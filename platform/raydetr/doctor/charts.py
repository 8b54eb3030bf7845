"""Charts for the page, as SVG that needs nothing else: bars of several splits side by side."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from raydetr.doctor.statistics import Histogram

COLORS = ("#3366cc", "#e07b39", "#2a9d6f", "#9b4dca", "#b8a000", "#666666")  # of the splits

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 350, 190, 34, 24, 10


def histogram_chart(title: str, unit: str, histograms: Sequence[Histogram], names: Sequence[str]) -> str:
    """The shares of the values of each split, bin by bin.

    Args:
        title: above the chart.
        unit: of the values, below it.
        histograms: with the same edges, one for each split.
        names: of the splits.
    """
    totals = [max(1, sum(histogram.counts)) for histogram in histograms]
    shares = [
        [count / total for count in histogram.counts]
        for histogram, total in zip(histograms, totals, strict=True)
    ]
    top = max(0.05, *(share for row in shares for share in row))
    edges = histograms[0].edges
    slot = (_WIDTH - _LEFT) / len(edges)
    plot = _HEIGHT - _BOTTOM - _TOP
    parts = [_grid(top, plot)]
    for number, (row, histogram) in enumerate(zip(shares, histograms, strict=True)):
        bar = slot * 0.8 / len(shares)
        for position, share in enumerate(row):
            height = plot * share / top
            x, y = _LEFT + slot * (position + 0.1) + bar * number, _TOP + plot - height
            tip = f"{names[number]}, {_bin(edges, position)} {unit}: {histogram.counts[position]:,} ({share:.1%})"
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(bar - 0.5, 1):.1f}" height="{height:.1f}" '
                f'fill="{COLORS[number % len(COLORS)]}"><title>{escape(tip)}</title></rect>'
            )
    parts += [
        f'<text x="{_LEFT + slot * position:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{edge:g}</text>'
        for position, edge in enumerate(edges)
    ]
    return (
        f'<figure><figcaption>{escape(title)} <span class="unit">{escape(unit)}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def legend(names: Sequence[str]) -> str:
    """Which colour is which split."""
    items = (
        f'<span><i style="background:{COLORS[number % len(COLORS)]}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(items)}</p>'


def _grid(top: float, plot: float) -> str:
    lines = []
    for part in (0.0, 0.5, 1.0):
        y = _TOP + plot * (1 - part)
        lines.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{top * part:.0%}</text>'
        )
    return "".join(lines)


def _bin(edges: Sequence[float], position: int) -> str:
    if position + 1 == len(edges):
        return f"{edges[position]:g} and more"
    return f"{edges[position]:g} to under {edges[position + 1]:g}"
