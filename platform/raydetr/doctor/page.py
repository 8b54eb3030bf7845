"""The report as one HTML file that needs nothing else: numbers, findings with pictures, charts, classes."""

from __future__ import annotations

import math
from html import escape

from raydetr.doctor.charts import COLORS, histogram_chart, legend
from raydetr.doctor.findings import Example, Finding, Place
from raydetr.doctor.pictures import gallery_places, thumbnail, with_all_boxes
from raydetr.doctor.report import Report, summary_rows
from raydetr.doctor.scale import SMALL
from raydetr.doctor.statistics import ClassRow
from raydetr.doctor.style import STYLE

GALLERY = 8  # images of each split

CHARTS = (
    ("objects_per_image", "Objects in an image", "objects"),
    ("smaller_side", "Smaller side of an object", "pixels after the resize"),
    ("aspect", "Shape of the images", "width / height"),
)


def to_html(report: Report) -> str:
    """The whole page; pictures are read from the shards once more."""
    names = [statistics.name for statistics in report.statistics]
    body = [
        "<h1>raydetr doctor</h1>",
        f'<p class="verdict {_color(report)}">{escape(report.verdict())}</p>',
        f'<p class="target">{escape(_target_text(report))}</p>',
    ]
    if names:
        body.append(_summary(report))
    body.append("<h2>Findings</h2>")
    body += [_finding(report, finding) for finding in report.findings] or ["<p>Nothing was found.</p>"]
    if names:
        body += ["<h2>Distributions</h2>", legend(names), _charts(report, names)]
        body += ["<h2>Classes</h2>", _classes(report, names)]
        body += [_gallery(report, number) for number in range(len(names))]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>raydetr doctor: {escape(', '.join(names))}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _color(report: Report) -> str:
    levels = {finding.level for finding in report.findings}
    return "bad" if "fault" in levels else "fair" if "warning" in levels else "good"


def _target_text(report: Report) -> str:
    target = report.target
    whose = f"recipe {target.recipe}" if target.recipe else "no recipe was named"
    return f"Small objects are judged {target.scale()} ({whose})."


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
        f'<p class="what"><code>{finding.code}</code><b>{finding.level}</b> {splits}: {escape(finding.text)}</p>'
        f'<p class="remedy">{escape(finding.remedy)}</p>'
        + (f'<div class="examples">{examples}</div>' if examples else "")
        + "</section>"
    )


def _example(report: Report, example: Example) -> str:
    cells = "".join(_picture(report, place, is_pair=len(example.places) > 1) for place in example.places)
    detail = f"<p>{escape(example.detail)}</p>" if example.detail else ""
    kind = "pair" if len(example.places) > 1 else "single"
    return f'<div class="example {kind}"><div class="pictures">{cells}</div>{detail}</div>'


def _picture(report: Report, place: Place, *, is_pair: bool) -> str:
    by_name = {examined.name: examined for examined in report.examined}
    examined = by_name[place.split]
    if (
        not is_pair and not place.annotations
    ):  # it is about the whole image: are the boxes where they should be?
        place = with_all_boxes(examined, place)
    source = thumbnail(examined, place)
    caption = f"{place.split} {place}" if is_pair else str(place)
    shown = (
        f'<img src="{source}" alt="{escape(caption)}">' if source else '<div class="none">not readable</div>'
    )
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def _charts(report: Report, names: list[str]) -> str:
    charts = (
        histogram_chart(title, unit, [numbers.histograms[key] for numbers in report.statistics], names)
        for key, title, unit in CHARTS
    )
    return f'<div class="charts">{"".join(charts)}</div>'


def _classes(report: Report, names: list[str]) -> str:
    """A row for each class, the splits side by side; by id, so that splits with other lists fit too."""
    tables = [{(row.id, row.name): row for row in numbers.categories} for numbers in report.statistics]
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
    share = math.log1p(row.objects) / math.log1p(most) if most else 0.0
    bar = f'<i style="width:{share:.1%};background:{color}"></i>'
    small = f"{row.small / row.objects:.0%}" if row.objects else "-"
    kind = ' class="absent"' if not row.objects else ""
    return (
        f"<td{kind}>{row.images:,}</td><td{kind}>{row.objects:,}</td>"
        f'<td class="barred">{bar}</td><td>{small}</td>'
    )


def _gallery(report: Report, number: int) -> str:
    examined = report.examined[number]
    pictures = "".join(_picture(report, place, is_pair=False) for place in gallery_places(examined, GALLERY))
    return (
        f"<h2>Some images of {escape(examined.name)}</h2>"
        f'<p class="target">Are the boxes on their objects?</p><div class="gallery">{pictures}</div>'
    )
