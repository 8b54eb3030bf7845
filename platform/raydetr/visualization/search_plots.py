"""Plot the trials of a search: AP over samples, parallel coordinates, importance, a Pareto front. Avoids pyplot."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

BLUE, ORANGE, GRAY = "#3366cc", "#e07b39", "0.6"
MAX_TICKS = 8  # choices with a label on an axis
MAX_LABEL = 18  # letters of a label


@dataclass(frozen=True)
class TrialCurve:
    """AP of a trial; `points` are (samples seen, AP)."""

    number: int
    status: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A path of a search space: its distribution, and the value of each trial, None if it has none."""

    path: str
    kind: str  # uniform, loguniform, randint or choice
    values: Sequence[Any]  # the two ends of a range, or the choices
    drawn: Sequence[Any]


def plot_curves(curves: Sequence[TrialCurve]) -> Figure:
    """Plot AP over samples, a line per trial: the color is its last AP; trials that did not finish are dashed."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    panel = figure.subplots()
    panel.set(title="AP of the trials", xlabel="samples seen", ylabel="AP")
    panel.grid(alpha=0.3)
    drawn = [curve for curve in curves if curve.points]
    colors = _colors([curve.points[-1][1] for curve in drawn])
    for curve in drawn:
        x, y = zip(*curve.points, strict=True)
        style = "-" if curve.status == "finished" else "--"
        panel.plot(x, y, style, color=_color(colors, y[-1]), marker=".")
        panel.annotate(
            str(curve.number), (x[-1], y[-1]), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    figure.colorbar(colors, ax=panel, label="last AP")
    return figure


def plot_parallel(axes: Sequence[Axis], scores: Sequence[float | None]) -> Figure:
    """Plot parallel coordinates: an axis per path and one for AP, a line per trial, the best ones on top.

    Args:
        axes: of the space.
        scores: AP of each trial; trials without are left out.
    """
    figure = Figure(figsize=(max(5.0, 2.0 * (len(axes) + 1)), 5), layout="constrained")
    panel = figure.subplots()
    rated = sorted((score, index) for index, score in enumerate(scores) if score is not None)
    colors = _colors([score for score, _ in rated])
    low, high = _span([score for score, _ in rated])
    for score, index in rated:
        heights = [_height(axis, axis.drawn[index]) for axis in axes] + [(score - low) / (high - low)]
        places = [
            (x, y) for x, y in enumerate(heights) if y is not None
        ]  # a path that the trial does not have
        panel.plot(*zip(*places, strict=True), color=_color(colors, score), alpha=0.8)
    for x, axis in enumerate(axes):
        panel.axvline(x, color="0.5", linewidth=0.8)
        for value, y in _ticks(axis):
            panel.annotate(_label(value), (x, y), (4, 0), textcoords="offset points", fontsize=8, va="center")
    panel.axvline(len(axes), color="0.5", linewidth=0.8)
    for y in (0.0, 1.0):
        panel.annotate(
            f"{low + y * (high - low):.3f}", (len(axes), y), (4, 0), textcoords="offset points", fontsize=8
        )
    names = [axis.path.replace(".", ".\n") for axis in axes]
    panel.set_xticks(range(len(axes) + 1), [*names, "AP"], fontsize=9)
    panel.set_yticks([])
    panel.set(title="trials", xlim=(-0.1, len(axes) + 0.35), ylim=(-0.05, 1.05))
    for side in panel.spines.values():
        side.set_visible(False)
    figure.colorbar(colors, ax=panel, label="AP")
    return figure


def plot_importance(shares: Mapping[str, float], samples: int) -> Figure:
    """Plot the share of each path in the variance of AP after `samples` samples as bars, the largest at the top."""
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(shares)), layout="constrained")
    panel = figure.subplots()
    names = list(shares)[::-1]
    bars = panel.barh(names, [shares[name] for name in names], color=BLUE)
    panel.bar_label(bars, [f"{shares[name]:.0%}" for name in names], padding=3, fontsize=9)
    panel.set(
        title=f"importance: share in the variance of AP after {samples:,} samples",
        xlim=(0, 1.1),
        xlabel="fANOVA",
    )
    return figure


def plot_front(
    points: Sequence[tuple[int, float | None, float | None]], front: Collection[int], objective: str
) -> Figure:
    """Plot AP over an objective that is minimized, and the trials that no other surpasses in both.

    Args:
        points: number, objective and AP of each trial.
        front: numbers of those trials.
        objective: its name.
    """
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    panel = figure.subplots()
    panel.set(title=f"AP against {objective}", xlabel=objective, ylabel="AP")
    panel.grid(alpha=0.3)
    known = sorted((x, y, number) for number, x, y in points if x is not None and y is not None)
    best = [(x, y) for x, y, number in known if number in front]
    panel.step(*zip(*best, strict=True), where="post", color=ORANGE, label="Pareto front")
    for x, y, number in known:
        panel.plot(x, y, "o", color=ORANGE if number in front else GRAY)
        panel.annotate(str(number), (x, y), (5, 3), textcoords="offset points", fontsize=8)
    panel.legend()
    return figure


def _colors(scores: Sequence[float]) -> ScalarMappable:
    # Without the brightest colors, which are hard to see on white
    colors = ListedColormap(colormaps["viridis_r"](np.linspace(0.15, 1, 256)))
    return ScalarMappable(Normalize(*_span(scores)), colors)


def _color(colors: ScalarMappable, score: float) -> Any:
    low, high = colors.get_clim()
    assert low is not None
    assert high is not None
    return colors.cmap((score - low) / (high - low))


def _span(scores: Sequence[float]) -> tuple[float, float]:
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    return low, high if high > low else low + 1e-3


def _choices(axis: Axis) -> list[Any]:
    """Return the choices in the order of their axis: numbers ascend."""
    are_numbers = all(isinstance(value, int | float) for value in axis.values)
    return sorted(axis.values) if are_numbers else list(axis.values)


def _height(axis: Axis, value: Any) -> float | None:
    """Return the height of a value on its axis, from 0 to 1; None if it is not on it."""
    if axis.kind == "choice":
        choices = _choices(axis)
        return None if value not in choices else choices.index(value) / max(1, len(choices) - 1)
    if value is None:
        return None
    low, high = axis.values
    if axis.kind == "loguniform":
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low))


def _ticks(axis: Axis) -> list[tuple[Any, float]]:
    values = _choices(axis)[:MAX_TICKS] if axis.kind == "choice" else axis.values
    return [(value, height) for value in values if (height := _height(axis, value)) is not None]


def _label(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"
