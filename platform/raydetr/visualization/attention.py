"""Draw what the queries of a detector look at: attention maps, sampled points, boxes by layer, proposals, denoising.

Places are in pixels of the image. Each function returns a figure; rows and columns are named by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle as Patch
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.floating[Any]]

PANEL = 2.1  # inches; of the longer side of an image
DPI = 110
OBJECT = "#00e676"  # of detections and targets
START = "#ffffff"  # of the reference that a query starts from
MAPS = "inferno"  # color map of attention maps
WEIGHTS = "plasma"  # color map of weights: dark is low, yellow is high
LAYERS = "autumn_r"  # of layers: yellow is the first, red the last
POSITIVE, NEGATIVE = "#40c4ff", "#ff5252"


@dataclass(frozen=True)
class MapRow:
    """Attention maps of a query, drawn side by side."""

    name: str
    box_xyxy: Array  # [4], of the object that the query found
    maps: Array  # [columns, h, w]
    points: Array | None = None  # [columns, 2]: where attention is centered


@dataclass(frozen=True)
class Samples:
    """Points that a query samples, with their weights, around its reference."""

    points: Array  # [n, 2]
    weights: Array  # [n]
    reference: Array  # [2], or [4] xyxy


@dataclass(frozen=True)
class SampleRow:
    """Sampled points of a query, drawn side by side."""

    name: str
    box_xyxy: Array  # [4], of the object that the query found
    columns: tuple[Samples, ...]


@dataclass(frozen=True)
class BoxesByLayer:
    """The boxes of a query after each layer."""

    name: str
    start: Array | None  # [2], or [4] xyxy: the reference of the first layer
    boxes_xyxy: Array  # [layers, 4]


def draw_maps(image: Image.Image, rows: Sequence[MapRow], columns: Sequence[str]) -> Figure:
    """Draw attention over the image in gray: brighter is more attention; each map has its own scale."""
    figure, grid = _grid(image, [row.name for row in rows], columns)
    for row, panels in zip(rows, grid, strict=True):
        for i, (panel, values) in enumerate(zip(panels, row.maps, strict=True)):
            extent = (0, image.width, image.height, 0)
            scaled = values / max(float(values.max()), 1e-12)
            seen = np.clip(1.3 * scaled, 0.0, 0.85)  # the image stays visible where there is no attention
            panel.imshow(
                scaled, cmap=MAPS, vmin=0, vmax=1, alpha=seen, extent=extent, interpolation="bicubic"
            )
            _box(panel, row.box_xyxy, OBJECT, linewidth=1.2)
            if row.points is not None:
                panel.plot(*row.points[i], "+", color=START, markersize=7, markeredgewidth=1.4)
    return figure


def draw_samples(image: Image.Image, rows: Sequence[SampleRow], columns: Sequence[str]) -> Figure:
    """Draw sampled points, colored by weight, with the reference; the scale of a row starts at 0."""
    figure, grid = _grid(image, [row.name for row in rows], columns, extra_width=0.75)
    for row, panels in zip(rows, grid, strict=True):
        highest = max(float(samples.weights.max()) for samples in row.columns)
        points = None
        for panel, samples in zip(panels, row.columns, strict=True):
            order = samples.weights.argsort()  # those with high weights are on top
            x, y = samples.points[order].T
            points = panel.scatter(
                x, y, c=samples.weights[order], s=13, cmap=WEIGHTS, vmin=0, vmax=highest, edgecolors="black",
                linewidths=0.3, zorder=3,
            )  # fmt: skip
            _box(panel, row.box_xyxy, OBJECT, linewidth=1.2)
            _reference(panel, samples.reference)
        assert points is not None
        figure.colorbar(points, ax=list(panels), shrink=0.8, aspect=14, label="weight", pad=0.01)
    return figure


def draw_boxes_by_layer(image: Image.Image, queries: Sequence[BoxesByLayer], num_columns: int = 4) -> Figure:
    """Draw the boxes of each query after every layer, and the reference that it starts from."""
    num_columns = min(num_columns, len(queries))
    num_rows = -(-len(queries) // num_columns)
    figure, grid = _grid(image, [""] * num_rows, [""] * num_columns, extra_height=0.35)
    panels = [panel for panels in grid for panel in panels]
    colors = _layer_colors(len(queries[0].boxes_xyxy))
    for panel, query in zip(panels, queries, strict=False):
        panel.set_title(query.name, fontsize=9)
        if query.start is not None:
            _reference(panel, query.start)
        for box, color in zip(query.boxes_xyxy, colors, strict=True):
            _box(panel, box, color, linewidth=1.6)
    for panel in panels[len(queries) :]:
        panel.remove()
    entries = [Line2D([], [], color=color, label=f"layer {i}") for i, color in enumerate(colors, 1)]
    if queries[0].start is not None:
        is_box = len(queries[0].start) == 4
        style = {"linestyle": "--"} if is_box else {"linestyle": "", "marker": "+", "markersize": 8}
        entries.insert(0, Line2D([], [], color="#999999", label="start", **style))
    figure.legend(
        handles=entries, loc="outside lower center", ncols=min(len(entries), 7), fontsize=8, frameon=False
    )
    return figure


def draw_proposals(
    image: Image.Image, priors_xyxy: Array, boxes_xyxy: Array, scores: Array, levels: NDArray[np.int64]
) -> Figure:
    """Draw the priors of proposals, colored by level, and their boxes, colored by score."""
    figure, ((left, right),) = _grid(
        image, [""], ["priors of the tokens", "boxes and scores"], scale=1.6, extra_height=0.35
    )
    present = sorted(set(levels.tolist()))
    colors = dict(zip(present, matplotlib.colormaps["cool"](np.linspace(0, 1, len(present))), strict=True))
    shown = matplotlib.colormaps[WEIGHTS]
    highest = max(float(scores.max()), 1e-12)
    for prior, box, score, level in reversed(
        list(zip(priors_xyxy, boxes_xyxy, scores, levels.tolist(), strict=True))
    ):
        _box(left, prior, colors[level], linewidth=1.0)
        left.plot(*_center(prior), ".", color=colors[level], markersize=4)
        _box(right, box, shown(score / highest), linewidth=1.4)
        right.text(
            box[0], box[1], f"{score:.2f}", fontsize=6, color="black", va="bottom", clip_on=True,
            bbox={"facecolor": shown(score / highest), "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    entries = [Line2D([], [], color=colors[level], label=f"level {level + 1}") for level in present]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), fontsize=8, frameon=False)
    return figure


def draw_denoising(
    image: Image.Image,
    targets_xyxy: Array,
    blocks: Sequence[tuple[str, Array]],
    denoised_xyxy: Array,
) -> Figure:
    """Draw denoising queries of a group, block by block, and the boxes that the decoder makes of the positives.

    Args:
        image: what the targets are in.
        targets_xyxy: [t, 4].
        blocks: name and boxes [t, 4]; the positives first, then the negatives if there are any.
        denoised_xyxy: [t, 4], after the last layer.
    """
    columns = [name for name, _ in blocks] + ["positives, denoised"]
    figure, (panels,) = _grid(image, [""], columns, scale=1.25)
    colors = [*[POSITIVE, NEGATIVE][: len(blocks)], POSITIVE]
    for panel, boxes, color in zip(panels, [*(b for _, b in blocks), denoised_xyxy], colors, strict=True):
        for target, box in zip(targets_xyxy, boxes, strict=True):
            _box(panel, target, OBJECT, linewidth=1.2, linestyle="--")
            _box(panel, box, color, linewidth=1.4)
    return figure


def draw_mask(mask: NDArray[np.bool_], num_groups: int, group_size: int) -> Figure:
    """Draw the attention mask between queries: blue may attend; lines separate groups, and the matching queries."""
    figure = Figure(figsize=(4.2, 4.2), dpi=DPI, layout="constrained")
    panel = figure.subplots()
    allowed: Colormap = ListedColormap(["#f3d9d9", "#2f5d9b"])
    panel.imshow(
        ~mask, cmap=allowed, vmin=0, vmax=1, interpolation="nearest", extent=(0, len(mask), len(mask), 0)
    )
    for group in range(1, num_groups + 1):
        last = group == num_groups
        for line in (panel.axhline, panel.axvline):
            line(group * group_size, color="black", linewidth=1.4 if last else 0.4)
    num_denoising = num_groups * group_size
    places = [num_denoising / 2, (num_denoising + len(mask)) / 2]
    names = [f"{num_groups} {'group' if num_groups == 1 else 'groups'} of {group_size}", "matching"]
    panel.set_xticks(places, names, fontsize=8)
    panel.set_yticks(places, names, fontsize=8, rotation=90, va="center")
    panel.tick_params(length=0)
    panel.set_xlabel("... may attend to (blue)", fontsize=9)
    panel.set_ylabel("query ...", fontsize=9)
    return figure


def _grid(
    image: Image.Image,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    scale: float = 1.0,
    extra_width: float = 0.0,
    extra_height: float = 0.0,
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with the image, in gray, in every panel."""
    # Of a thin image, the panel is wider than the image: a title has to fit
    width, height = (PANEL * scale * max(side / max(image.size), 0.35) for side in image.size)
    size = (len(columns) * width + 0.3 + extra_width, len(rows) * height + 0.35 + extra_height)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=size, dpi=DPI, layout=layout)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    pixels = np.asarray(image.convert("L"))
    for i, panels in enumerate(grid):
        for j, panel in enumerate(panels):
            extent = (0, image.width, image.height, 0)
            panel.imshow(pixels, cmap="gray", vmin=-30, vmax=300, extent=extent, interpolation="bilinear")
            panel.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[], autoscale_on=False)
            if i == 0:
                panel.set_title(columns[j], fontsize=9)
            if j == 0:
                panel.set_ylabel(rows[i], fontsize=9)
    return figure, [list(panels) for panels in grid]


def _box(panel: Axes, box_xyxy: Array, color: Any, **style: Any) -> None:
    x0, y0, x1, y1 = box_xyxy
    panel.add_patch(Patch((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, **style))


def _reference(panel: Axes, reference: Array) -> None:
    if len(reference) == 4:
        _box(panel, reference, START, linewidth=1.0, linestyle="--")
    x, y = reference if len(reference) == 2 else _center(reference)
    panel.plot(x, y, "+", color=START, markersize=8, markeredgewidth=1.5, zorder=4)


def _center(box_xyxy: Array) -> tuple[float, float]:
    x0, y0, x1, y1 = box_xyxy
    return float((x0 + x1) / 2), float((y0 + y1) / 2)


def _layer_colors(num_layers: int) -> list[Any]:
    return list(matplotlib.colormaps[LAYERS](np.linspace(0, 1, num_layers)))
