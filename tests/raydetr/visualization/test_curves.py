from __future__ import annotations

import io
import math

from matplotlib._pylab_helpers import Gcf
from PIL import Image

from raydetr.visualization.curves import learning_curves


def named(panel: object) -> list[str]:
    return [text.get_text() for text in panel.get_legend().get_texts()]  # type: ignore[attr-defined]


def test_legends_omit_the_terms_of_single_layers() -> None:
    steps = range(10, 100, 10)
    losses = {
        name: [(step, 5 / step) for step in steps]
        for name in ("loss_ce", "loss", "loss_ce_0", "loss_ce_1", "loss_ce_dn_0", "loss_ce_dn")
    }
    rates = {f"lr/group_{i}": [(step, 10 ** -(4 + i)) for step in steps] for i in range(2)}
    figure = learning_curves(losses, rates, {"AP": [(1, 0.1), (2, 0.2)], "AP50": [(1, 0.2)]})
    loss_panel, rate_panel, precision_panel = figure.axes
    assert named(loss_panel) == ["loss", "loss_ce", "loss_ce_dn"]
    assert len(loss_panel.lines) == 6
    assert loss_panel.get_yscale() == "log"
    assert named(rate_panel) == ["lr/group_0", "lr/group_1"]
    assert named(precision_panel) == ["AP", "AP50"]
    assert list(precision_panel.lines[0].get_xdata()) == [1, 2]
    assert precision_panel.get_ylim() == (0, 1)


def test_renders_without_pyplot_for_any_values() -> None:
    unusual = [(1, math.nan), (2, math.inf), (3, 0.0), (4, -1.0), (5, 2.0)]
    for losses in ({"loss": unusual, "none": []}, {"loss": [(1, math.nan)]}):
        buffer = io.BytesIO()
        learning_curves(losses, {}, {"AP": [(1, 0.5)]}).savefig(buffer, format="png")
        assert Image.open(buffer).size == (1500, 500)
    assert Gcf.figs == {}
