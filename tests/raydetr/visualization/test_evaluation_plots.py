"""Plots of an evaluation: names of all kinds, and marks at the right places."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from raydetr.visualization.evaluation_plots import (
    MAX_NAME,
    plot_calibration,
    plot_classes,
    plot_confusion,
    plot_errors,
    plot_precision_recall,
    printable,
)
from raydetr.visualization.page import plot_png

pytestmark = pytest.mark.filterwarnings("error")  # of glyphs that the font lacks

HARD = [
    "日本",
    "$x^2$",
    "$",
    r"\frac{",
    "_a",
    "",
    "a" * 300,
    "line\nbreak",
    "e\N{COMBINING ACUTE ACCENT}",
    "😀",
]


def texts(figure: Figure) -> list[str]:
    return [
        label.get_text()
        for panel in figure.axes
        for label in (*panel.get_yticklabels(), *panel.get_xticklabels())
    ]


def test_names_that_fonts_and_formulas_would_break() -> None:
    assert printable("traffic light") == "traffic light"
    assert printable("日a本") == "\N{REPLACEMENT CHARACTER}a\N{REPLACEMENT CHARACTER}"
    assert printable("$x$") == r"\$x\$"
    assert not printable("_a").startswith("_")
    assert len(printable("a" * 300)) == MAX_NAME
    assert "\n" not in printable("line\nbreak")
    curve = np.linspace(1, 0, 101)
    recalls = np.linspace(0, 1, 101)
    for figure in (
        plot_precision_recall(recalls, {"0.50": curve}, [(name, curve) for name in HARD]),
        plot_classes([(name, 0.5, (0.1, None, 0.7)) for name in HARD]),
        plot_confusion(HARD, np.eye(len(HARD) + 1, dtype=np.int64)),
    ):
        assert plot_png(figure).startswith(b"\x89PNG")


def test_a_formula_is_drawn_as_its_letters() -> None:
    figure = plot_classes([("$x^2$", 0.5, (None, None, None))])
    plain = plot_classes([("?x?2?", 0.5, (None, None, None))])
    figure.draw_without_rendering()
    plain.draw_without_rendering()
    (label,), (other,) = figure.axes[0].get_yticklabels(), plain.axes[0].get_yticklabels()
    # With its dollars and its caret: as high as plain text, and no narrower
    assert label.get_window_extent().width > 0.9 * other.get_window_extent().width


def test_the_lowest_classes_come_first_and_the_axis_says_how_many() -> None:
    rows = [(f"class {n}", n / 100, (None, n / 100, None)) for n in range(100)]
    figure = plot_classes(rows[::-1])
    (panel,) = figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()][:2] == ["class 0", "class 1"]
    assert panel.get_xlabel() == "AP (the lowest 30 of 100 classes)"
    assert panel.yaxis_inverted()


def test_bars_have_the_heights_of_the_values() -> None:
    figure = plot_calibration([0, 0.5, 1], [None, 0.25], [0, 7], 0.1)
    above, below = figure.axes
    assert [bar.get_height() for bar in above.patches] == [0, 0.25]
    assert [bar.get_height() for bar in below.patches] == [0, 7]
    errors = plot_errors({"both": 0.25, "missed": 0.0}, {"both": 3, "missed": 0})
    assert [bar.get_width() for bar in errors.axes[0].patches] == [0.25, 0.0]
    assert [text.get_text() for text in errors.axes[0].texts] == ["0.250", "0.000"]


def test_cells_of_the_confusion_matrix_are_fractions_of_rows() -> None:
    counts = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 0]])
    figure = plot_confusion(["a", "b"], counts)
    (image,) = figure.axes[0].images
    assert image.get_array().tolist() == [[0.75, 0.25, 0], [0, 0, 0], [1, 0, 0]]
    assert texts(figure)[:3] == ["a", "b", "background"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["3", "1", "2"]
