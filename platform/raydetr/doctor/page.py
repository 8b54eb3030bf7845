"""Write the report as one self-contained HTML file: findings with images, charts and classes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from importlib import resources

import numpy as np

from raydetr.doctor.box_checks import SMALL
from raydetr.doctor.findings import Example, Finding, Place
from raydetr.doctor.report import ClassRow, Histogram, Report, summary_rows
from raydetr.doctor.scan import ScannedSplit, as_record, is_box, read_unchecked
from raydetr.shards.images import ImageError, decode_image
from raydetr.visualization.boxes import coco_boxes, draw_boxes

COLORS = ("#3366cc", "#e07b39", "#2a9d6f", "#9b4dca", "#b8a000", "#666666")  # Of the splits
GALLERY_SIZE = 8  # Images of each split
CHARTS = (
    ("objects_per_image", "Objects per image", "objects"),
    ("shorter_side", "Shorter side of an object", "pixels after the resize"),
    ("aspect", "Shape of the images", "width / height"),
)


def to_html(report: Report) -> str:
    """Render the page; its images are read from the shards again."""
    names = [statistics.name for statistics in report.statistics]
    style = resources.files("raydetr.doctor").joinpath("page.css").read_text()
    body = [
        "<h1>raydetr doctor</h1>",
        f'<p class="verdict {_verdict_class(report)}">{escape(report.verdict())}</p>',
        f'<p class="target">{escape(_target_text(report))}</p>',
    ]
    if names:
        body.append(_summary(report))
    body.append("<h2>Findings</h2>")
    body += [_finding(report, finding) for finding in report.findings] or ["<p>Nothing was found.</p>"]
    if names:
        body += ["<h2>Distributions</h2>", _legend(names), _charts(report, names)]
        body += ["<h2>Classes</h2>", _classes(report, names)]
        body += [_gallery(scanned) for scanned in report.scanned]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>raydetr doctor: {escape(', '.join(names))}</title><style>{style}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


# --- Verdict and findings ---


def _verdict_class(report: Report) -> str:
    levels = {finding.level for finding in report.findings}
    return "bad" if "error" in levels else "fair" if "warning" in levels else "good"


def _target_text(report: Report) -> str:
    target = report.target
    source = f"recipe {target.recipe}" if target.recipe else "no recipe was named"
    return f"Small objects are judged {target.describe_resize()} ({source})."


def _summary(report: Report) -> str:
    head, *rows = summary_rows(report)
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for name, *cells in rows:
        kind = ' class="inner"' if name.startswith("  ") else ""
        columns = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr><th{kind}>{escape(name.strip())}</th>{columns}</tr>")
    return f'<table class="summary">{"".join(lines)}</table>'


def _finding(report: Report, finding: Finding) -> str:
    examples = "".join(_example(report, example) for example in finding.examples)
    splits = escape(", ".join(finding.splits))
    return (
        f'<section class="finding {finding.level}">'
        f'<p class="text"><code>{finding.code}</code><b>{finding.level}</b> {splits}: {escape(finding.text)}</p>'
        f'<p class="remedy">{escape(finding.remedy)}</p>'
        + (f'<div class="examples">{examples}</div>' if examples else "")
        + "</section>"
    )


def _example(report: Report, example: Example) -> str:
    by_name = {scanned.name: scanned for scanned in report.scanned}
    is_pair = len(example.places) > 1
    figures = "".join(_figure(by_name[place.split], place, is_pair=is_pair) for place in example.places)
    detail = f"<p>{escape(example.detail)}</p>" if example.detail else ""
    kind = "pair" if is_pair else "single"
    return f'<div class="example {kind}"><div class="images">{figures}</div>{detail}</div>'


# --- Images: small JPEGs with boxes, inside the HTML ---

IMAGE_SIDE = 340  # Pixels of the long side
JPEG_QUALITY = 82


def _gallery(scanned: ScannedSplit) -> str:
    """Show some images, spread evenly over the split."""
    numbers = np.linspace(0, scanned.split.shards.num_samples - 1, GALLERY_SIZE).round().astype(int)
    places = [scanned.split.place(sample) for sample in np.unique(numbers).tolist()]
    figures = "".join(_figure(scanned, place, is_pair=False) for place in places)
    return (
        f"<h2>Some images of {escape(scanned.name)}</h2>"
        f'<p class="target">Are the boxes on their objects?</p><div class="gallery">{figures}</div>'
    )


def _figure(scanned: ScannedSplit, place: Place, *, is_pair: bool) -> str:
    if not is_pair and not place.annotations:
        # The finding is about the image: all its boxes show whether they are where they should be
        num_annotations = int(scanned.split.shards.samples["num_annotations"][place.sample])
        place = replace(place, annotations=tuple(range(num_annotations)))
    source = _image_url(scanned, place)
    caption = f"{place.split} {place}" if is_pair else str(place)
    shown = (
        f'<img src="{source}" alt="{escape(caption)}">'
        if source
        else '<div class="unreadable">not readable</div>'
    )
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def _image_url(scanned: ScannedSplit, place: Place) -> str | None:
    """Return the image with the boxes of the place as a data URL; None where it cannot be read."""
    raw = read_unchecked(scanned.split.shards, place.sample)
    if raw is None:
        return None
    try:
        image = decode_image(raw.image)
    except ImageError:
        return None
    names = {c["id"]: c["name"] for c in scanned.split.shards.manifest.categories}
    records = [as_record(raw.annotations[number]) for number in place.annotations]
    boxes = coco_boxes([record for record in records if is_box(record.get("bbox"))], names)
    buffer = io.BytesIO()
    draw_boxes(image, boxes, IMAGE_SIDE).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- Charts: SVG with the bars of several splits side by side ---

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 350, 190, 34, 24, 10


def _legend(names: Sequence[str]) -> str:
    items = (
        f'<span><i style="background:{COLORS[number % len(COLORS)]}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(items)}</p>'


def _charts(report: Report, names: list[str]) -> str:
    charts = (
        histogram_chart(title, unit, [statistics.histograms[key] for statistics in report.statistics], names)
        for key, title, unit in CHARTS
    )
    return f'<div class="charts">{"".join(charts)}</div>'


def histogram_chart(title: str, unit: str, histograms: Sequence[Histogram], names: Sequence[str]) -> str:
    """Draw the fraction of the values of each split in each bin.

    Args:
        title: above the chart.
        unit: of the values.
        histograms: with the same edges, one for each split.
        names: of the splits.
    """
    totals = [max(1, sum(histogram.counts)) for histogram in histograms]
    fractions = [
        [count / total for count in histogram.counts]
        for histogram, total in zip(histograms, totals, strict=True)
    ]
    top = max(0.05, *(fraction for row in fractions for fraction in row))
    edges = histograms[0].edges
    slot = (_WIDTH - _LEFT) / len(edges)
    plot = _HEIGHT - _BOTTOM - _TOP
    parts = [_grid(top, plot)]
    for number, (row, histogram) in enumerate(zip(fractions, histograms, strict=True)):
        bar = slot * 0.8 / len(fractions)
        for position, fraction in enumerate(row):
            height = plot * fraction / top
            x, y = _LEFT + slot * (position + 0.1) + bar * number, _TOP + plot - height
            count = f"{histogram.counts[position]:,} ({fraction:.1%})"
            tip = f"{names[number]}, {_bin_name(edges, position)} {unit}: {count}"
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


def _grid(top: float, plot: float) -> str:
    lines = []
    for level in (0.0, 0.5, 1.0):
        y = _TOP + plot * (1 - level)
        lines.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{top * level:.0%}</text>'
        )
    return "".join(lines)


def _bin_name(edges: Sequence[float], position: int) -> str:
    if position + 1 == len(edges):
        return f"{edges[position]:g} and more"
    return f"{edges[position]:g} to under {edges[position + 1]:g}"


# --- Classes ---


def _classes(report: Report, names: list[str]) -> str:
    """Tabulate the classes by id, the splits side by side; splits with different categories fit too."""
    tables = [{(row.id, row.name): row for row in statistics.categories} for statistics in report.statistics]
    keys = sorted({key for rows in tables for key in rows})
    most = max((row.objects for rows in tables for row in rows.values()), default=0)
    head = "<th>id</th><th>class</th>" + "".join(
        f'<th>{escape(name)}: images</th><th>objects</th><th class="barred"></th><th>under {SMALL} px</th>'
        for name in names
    )
    lines = (
        f"<tr><td>{key[0]}</td><th>{escape(key[1])}</th>"
        + "".join(_class_cells(rows.get(key), most, COLORS[n % len(COLORS)]) for n, rows in enumerate(tables))
        + "</tr>"
        for key in keys
    )
    return (
        '<p class="target">The bars are logarithmic.</p>'
        f'<div class="scroll"><table class="classes"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _class_cells(row: ClassRow | None, most: int, color: str) -> str:
    if row is None:
        return '<td class="absent" colspan="4">not in this list</td>'
    length = math.log1p(row.objects) / math.log1p(most) if most else 0.0
    bar = f'<i style="width:{length:.1%};background:{color}"></i>'
    small = f"{row.small / row.objects:.0%}" if row.objects else "-"
    kind = ' class="absent"' if not row.objects else ""
    return (
        f"<td{kind}>{row.images:,}</td><td{kind}>{row.objects:,}</td>"
        f'<td class="barred">{bar}</td><td>{small}</td>'
    )
