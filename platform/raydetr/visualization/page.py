"""Write HTML pages that are one file: they share a look, and their images and plots are inside.

A page needs no server and runs no script. Its template extends `skeleton.html`, which has the style, and fills the
blocks `title`, `main` and, for its own rules, `style`.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JPEG_QUALITY = 82
PLOT_DPI = 160  # sharp on screens with two pixels per point, at about 100 points per inch


def render(package: str, template: str, **values: Any) -> str:
    """Render a template; values are escaped.

    Args:
        package: dotted name of the package that has the template as a file, such as "raydetr.doctor".
        template: name of the file.
        values: names that the template uses. One that is missing is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(package, ""), jinja2.PackageLoader("raydetr.visualization", "")]
        ),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)


def jpeg_url(image: Image.Image) -> str:
    """Return an image as a data URL: the source of an `img`."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
    return _url("image/jpeg", buffer.getvalue())


def plot_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PLOT_DPI)
    # Without the alpha channel, and compressed more: two thirds of the size
    image = Image.open(buffer).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def png_url(png: bytes) -> str:
    """Return the content of a PNG file as a data URL."""
    return _url("image/png", png)


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64," + base64.b64encode(content).decode()
