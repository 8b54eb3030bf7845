"""Plot what explains an evaluation. Avoids pyplot and its global state."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from numpy.typing import NDArray

BLUE, ORANGE, GREEN, GRAY = "#3366cc", "#e07b39", "#2a9d6f", "0.6"
MAX_NAME = 24  # letters of a class name in a plot
MAX_NAMED_CURVES = 10
MAX_BARS = 30
MAX_NUMBERED = 20  # classes of a confusion matrix up to which its cells have numbers


def plot_precision_recall(
    recalls: NDArray[np.float64],
    means: Mapping[str, NDArray[np.float64]],
    classes: Sequence[tuple[str, NDArray[np.float64]]],
) -> Figure:
    """Plot precision over recall: means over the classes for some IoU thresholds, and single classes at IoU 0.5.

    Args:
        recalls: [r].
        means: IoU threshold -> precision, [r].
        classes: name and precision of each class. With many, the best and the worst ones have a color and a name.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for panel, title in ((left, "mean over the classes"), (right, "classes, at IoU 0.50")):
        panel.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    if not means:
        for panel in (left, right):
            panel.text(0.5, 0.5, "no objects", ha="center", va="center", transform=panel.transAxes)
        return figure
    for (name, values), color in zip(means.items(), (BLUE, ORANGE, "black"), strict=False):
        left.plot(recalls, values, color=color, label=f"IoU {name}: AP {values.mean():.3f}")
    left.legend(fontsize=9, loc="best")
    ranked = sorted(classes, key=lambda row: -row[1].mean())
    half = MAX_NAMED_CURVES // 2
    named = ranked if len(ranked) <= MAX_NAMED_CURVES else [*ranked[:half], *ranked[-half:]]
    for _, values in ranked:
        right.plot(recalls, values, color="0.85", linewidth=0.7, zorder=1)
    for name, values in named:
        right.plot(recalls, values, linewidth=1.4, label=f"{printable(name)}: {values.mean():.3f}")
    title = "AP50" if named is ranked else f"AP50: best and worst {half}"
    right.legend(fontsize=8, title=title, title_fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def plot_classes(rows: Sequence[tuple[str, float, Sequence[float | None]]]) -> Figure:
    """Plot AP by class as bars, the lowest at the top, with marks for small, medium and large objects.

    Args:
        rows: name, AP, and AP of small, medium and large objects, None where there are none. The lowest are drawn.
    """
    drawn = sorted(rows, key=lambda row: row[1])[:MAX_BARS]
    figure = Figure(figsize=(7.5, max(2.2, 0.9 + 0.26 * len(drawn))), layout="constrained")
    panel = figure.subplots()
    places = np.arange(len(drawn))
    panel.barh(places, [row[1] for row in drawn], color=BLUE, alpha=0.35, height=0.72, label="all")
    sizes = (("small", "v", ORANGE), ("medium", "o", GREEN), ("large", "^", "black"))
    for column, (name, marker, color) in enumerate(sizes):
        values = [row[2][column] for row in drawn]
        known = [(value, place) for value, place in zip(values, places, strict=True) if value is not None]
        if known:
            x, y = zip(*known, strict=True)
            panel.scatter(x, y, marker=marker, color=color, s=26, label=name, zorder=3, clip_on=False)
    panel.set_yticks(places, [printable(row[0]) for row in drawn], fontsize=8)
    panel.set_ylim(len(drawn) - 0.4, -0.6)
    limited = f" (the lowest {MAX_BARS} of {len(rows)} classes)" if len(rows) > len(drawn) else ""
    panel.set(xlim=(0, 1), xlabel="AP" + limited)
    panel.grid(axis="x", alpha=0.3)
    panel.legend(
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        frameon=False,
        title="objects",
        title_fontsize=8,
    )
    return figure


def plot_errors(deltas: Mapping[str, float], counts: Mapping[str, int]) -> Figure:
    """Plot TIDE's errors: how much AP50 would rise without each, and how many there are."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(deltas))
    for panel, values, text, color, label in (
        (left, list(deltas.values()), "{:.3f}", ORANGE, "AP50 that is lost"),
        (right, list(counts.values()), "{:,}", BLUE, "number of errors"),
    ):
        bars = panel.barh(places, values, color=color, alpha=0.8)
        panel.bar_label(bars, [text.format(value) for value in values], padding=3, fontsize=9)
        panel.set(xlabel=label, xlim=(0, 1.2 * max([*values, 1e-3])))
        panel.grid(axis="x", alpha=0.3)
    left.set_yticks(places, list(deltas))
    left.invert_yaxis()
    return figure


def plot_calibration(
    edges: Sequence[float], accuracies: Sequence[float | None], counts: Sequence[int], ece: float
) -> Figure:
    """Plot the fraction of correct detections over the score (a reliability diagram), and the number of detections.

    Args:
        edges: of the bins of scores, one more than bins.
        accuracies: of the bins; None for empty ones.
        counts: detections of the bins.
        ece: expected calibration error.
    """
    figure = Figure(figsize=(5.2, 5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    lefts, widths = np.array(edges[:-1]), np.diff(edges)
    heights = [0.0 if value is None else value for value in accuracies]
    above.bar(lefts, heights, widths, align="edge", color=BLUE, alpha=0.75, edgecolor="white")
    above.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfectly calibrated")
    above.set(
        ylabel="fraction that is correct",
        xlim=(0, 1),
        ylim=(0, 1),
        title=f"expected calibration error {ece:.3f}",
    )
    above.legend(fontsize=9, loc="upper left")
    above.grid(alpha=0.3)
    below.bar(lefts, counts, widths, align="edge", color=GRAY, edgecolor="white")
    below.set(xlabel="score", ylabel="detections")
    if max(counts, default=0) > 0:
        below.set_yscale("log")
        below.set_ylim(bottom=0.7)  # below a single detection
    below.grid(alpha=0.3)
    return figure


def plot_confusion(names: Sequence[str], counts: NDArray[np.int64]) -> Figure:
    """Plot a confusion matrix with the objects' classes as rows; the color is the fraction of a row's objects.

    Args:
        names: of the classes.
        counts: [k + 1, k + 1]; the last row and column are background.
    """
    labels = [*map(printable, names), "background"]
    side = max(4.2, 1.9 + 0.34 * len(labels))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    panel = figure.subplots()
    fractions = row_fractions(counts)
    image = panel.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    places = np.arange(len(labels))
    panel.set_xticks(places, labels, rotation=90, fontsize=8)
    panel.set_yticks(places, labels, fontsize=8)
    panel.set(xlabel="detected", ylabel="object")
    if len(names) <= MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if fractions[row, column] > 0.6 else "black"
                panel.text(column, row, f"{count:,}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=panel, shrink=0.7, label="fraction of the row")
    return figure


def row_fractions(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Divide each row by its sum; rows without a count are 0."""
    fractions: NDArray[np.float64] = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return fractions


def printable(name: str) -> str:
    """Return a class name as a plot can show it: short, in letters of the font, and without formulas."""
    text = "".join(letter if _is_in_font(letter) else "\N{REPLACEMENT CHARACTER}" for letter in name)
    text = text if len(text) <= MAX_NAME else text[: MAX_NAME - 1].rstrip() + "…"
    # matplotlib takes what is between two dollars for a formula, and omits labels that begin with an underscore
    text = text.replace("\\", "\N{REPLACEMENT CHARACTER}").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _is_in_font(letter: str) -> bool:
    return not unicodedata.category(letter).startswith("C") and ord(letter) in _letters()


@lru_cache
def _letters() -> Mapping[int, Any]:
    return font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
