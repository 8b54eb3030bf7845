"""Plot learning curves: losses and learning rates over steps, AP over epochs. Avoids pyplot and its global state."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Curves = Mapping[str, Sequence[tuple[float, float]]]  # name -> (x, value), by x

MAX_LEGEND = 12
# Different dashes keep curves that coincide, such as equal learning rates, visible
_LINES: tuple[Literal["--", "-", "-."], ...] = ("--", "-", "-.")


def learning_curves(losses: Curves, rates: Curves, precision: Curves) -> Figure:
    """Plot losses, learning rates and precision in three panels of one figure.

    Args:
        losses: over steps; `loss` is thick, terms of single decoder layers (`..._0`, `..._1`) are faint.
        rates: learning rates over steps.
        precision: AP, AP50, ... over epochs.
    """
    figure = Figure(figsize=(15, 5), dpi=100, layout="constrained")
    loss_panel, rate_panel, precision_panel = figure.subplots(1, 3)
    _plot(loss_panel, losses, "loss", "step")
    _plot(rate_panel, rates, "learning rate", "step")
    _plot(precision_panel, precision, "average precision", "epoch", marker="o")
    if any(value > 0 for points in losses.values() for _, value in points):
        loss_panel.set_yscale("log")
    rate_panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    precision_panel.set_ylim(0, 1)
    precision_panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _plot(panel: Axes, curves: Curves, title: str, x_label: str, marker: str = "") -> None:
    panel.set_title(title)
    panel.set_xlabel(x_label)
    panel.grid(alpha=0.3)
    drawn = {name: points for name, points in curves.items() if points}
    if not drawn:
        panel.text(0.5, 0.5, "no values yet", ha="center", va="center", transform=panel.transAxes)
        return
    num_named = 0
    for name, points in sorted(drawn.items(), key=lambda curve: (_is_layer(curve[0]), curve[0])):
        x, values = zip(*points, strict=True)
        if _is_layer(name) or num_named == MAX_LEGEND:
            panel.plot(x, values, color="0.75", linewidth=0.6, zorder=1)
            continue
        num_named += 1
        # A single value would be an invisible line
        (line,) = panel.plot(x, values, label=name, marker=marker or ("." if len(points) == 1 else ""))
        if name == "loss":
            line.set(color="black", linewidth=2.5)
        line.set_linestyle(_LINES[num_named % len(_LINES)])
    # Outside, where it covers no curve
    panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)


def _is_layer(name: str) -> bool:
    return re.search(r"_\d+$", name) is not None and not name.startswith("lr")
