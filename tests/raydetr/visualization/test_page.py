"""The look that pages share: files are inside, values are escaped, what is missing is an error."""

from __future__ import annotations

import base64
from io import BytesIO

import jinja2
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from raydetr.visualization.page import jpeg_url, plot_png, png_url, render


def opened(url: str, kind: str) -> Image.Image:
    start, _, content = url.partition(",")
    assert start == f"data:image/{kind};base64"
    return Image.open(BytesIO(base64.b64decode(content)))


def test_an_image_is_inside_its_url() -> None:
    image = Image.fromarray(np.full((20, 30, 3), (200, 40, 10), np.uint8))
    back = opened(jpeg_url(image), "jpeg")
    assert back.size == (30, 20)
    assert np.abs(np.asarray(back).astype(int) - (200, 40, 10)).max() < 8
    assert opened(jpeg_url(image.convert("RGBA")), "jpeg").mode == "RGB"


def test_a_plot_keeps_its_size_and_colors() -> None:
    figure = Figure(figsize=(3, 2))
    panel = figure.subplots()
    wanted = [f"#{hue:02x}{255 - hue:02x}80" for hue in range(0, 256, 17)]
    panel.bar(range(len(wanted)), 1, color=wanted)
    back = opened(png_url(plot_png(figure)), "png").convert("RGB")
    assert back.size == (480, 320)
    colors = {f"#{red:02x}{green:02x}{blue:02x}" for _, (red, green, blue) in back.getcolors(2**24) or []}
    assert {*wanted, "#ffffff"} <= colors


def test_a_template_without_a_value_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="undefined"):
        render("raydetr.evaluation", "page.html", title="x")
    with pytest.raises(jinja2.TemplateNotFound):
        render("raydetr.visualization", "none.html")
