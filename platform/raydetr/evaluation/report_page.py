"""Render a report: its pictures, and a page in one file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from raydetr.evaluation.analysis import Report
from raydetr.evaluation.coco_metrics import MEANING
from raydetr.evaluation.findings import findings, most_confused
from raydetr.evaluation.report_images import ImageWithCaption
from raydetr.visualization.boxes import AnnotatedImage, draw_contact_sheet
from raydetr.visualization.evaluation_plots import (
    plot_calibration,
    plot_classes,
    plot_confusion,
    plot_errors,
    plot_precision_recall,
    row_fractions,
)
from raydetr.visualization.page import JPEG_QUALITY, PLOT_DPI, plot_png, png_url, render

MISTAKES, LOSSES = "mistakes.jpg", "losses.jpg"
MAX_MATRIX = 20  # classes in the confusion matrix
NUM_PAIRS = 15  # of classes that are confused
SCREEN_DPI = 100

# Bolya et al., 2020, section 2.2
ERROR_MEANINGS = {
    "classification": "The box is right (IoU at least 0.5 with an object), its class is wrong.",
    "localization": "The class is right, the box is not (IoU from 0.1 to 0.5 with an object of the class).",
    "both": "The class is wrong, and so is the box (IoU from 0.1 to 0.5 with an object of another class).",
    "duplicate": "Another detection with a higher score has matched the object.",
    "background": "There is no object (IoU below 0.1 with all of them).",
    "missed": "An object that no detection matches, and that no classification or localization error is about.",
}


def pictures(mistakes: Sequence[ImageWithCaption], losses: Sequence[ImageWithCaption]) -> dict[str, bytes]:
    """Return JPEG files with the images of a report, by name; without those for which there is nothing to show."""
    files = {}
    for name, heading, items in (
        (MISTAKES, "most confident mistakes: solid; objects: dashed", mistakes),
        (LOSSES, "images with the largest losses; detections: solid, objects: dashed", losses),
    ):
        images = [
            AnnotatedImage(item.short_caption, item.image, item.boxes)
            for item in items
            if item.image is not None
        ]
        if images:
            buffer = io.BytesIO()
            sheet = draw_contact_sheet(images, heading=heading, num_columns=3)
            sheet.save(buffer, "JPEG", quality=JPEG_QUALITY)
            files[name] = buffer.getvalue()
    return files


def plots(report: Report) -> dict[str, bytes]:
    """Return the plots of a report as PNG files, by name."""
    names = report.names
    figures = {
        "precision_recall.png": plot_precision_recall(
            report.curves.recalls,
            report.curves.means,
            [(names[category_id], values) for category_id, values in report.curves.classes.items()],
        )
    }
    measured = [
        (row.name, row.ap, (row.ap_small, row.ap_medium, row.ap_large))
        for row in report.classes
        if row.ap is not None
    ]
    if measured:
        figures["classes.png"] = plot_classes(measured)
    if report.tide is not None:
        figures["tide.png"] = plot_errors(report.tide.delta_ap, report.tide.counts)
    if report.calibration is not None:
        found = report.calibration
        figures["calibration.png"] = plot_calibration(found.edges, found.accuracies, found.counts, found.ece)
    if report.confusion is not None:
        shown = _shown_classes(report)
        figures["confusion.png"] = plot_confusion(
            [report.classes[row].name for row in shown], _shown_counts(report, shown)
        )
    return {name: plot_png(figure) for name, figure in figures.items()}


def page(
    report: Report,
    files: Mapping[str, bytes],
    mistakes: Sequence[ImageWithCaption],
    losses: Sequence[ImageWithCaption],
    *,
    has_images: bool,
    title: str,
    about: Mapping[str, str],
) -> str:
    """Render a report as a page in one file.

    Args:
        report: to render.
        files: its plots.
        mistakes: images of its mistakes.
        losses: images with the largest losses.
        has_images: whether images were given at all.
        title: of the page.
        about: facts that the page names first.
    """
    sections = [
        ("summary", "Summary"),
        *([("errors", "Where AP is lost")] if report.tide else []),
        ("classes", "Classes"),
        ("curves", "Precision and recall"),
        *([("confusion", "Confusions")] if report.confusion is not None else []),
        ("calibration", "Calibration"),
        ("mistakes", "Mistakes"),
        *([("losses", "Losses")] if losses else []),
    ]
    return render(
        "raydetr.evaluation",
        "page.html",
        title=title,
        about=about,
        sections=sections,
        has_images=has_images,
        report=report,
        findings=findings(report),
        numbers=[
            (name, None if value < 0 else value, MEANING[name])
            for name, value in report.table.numbers.items()
        ],
        counts=_counts(report),
        speed=_speed(report.speed),
        meanings=ERROR_MEANINGS,
        classes=sorted(report.classes, key=lambda row: (row.ap is None, row.ap or 0.0)),
        matrix=None if report.confusion is None else _matrix(report),
        uncalibrated="There are no detections."
        if not report.counts["detections_that_count"]
        else "The scores are not in [0, 1]: they are no probabilities, which could be calibrated.",
        mistakes=[item.for_page() for item in mistakes],
        losses=[item.for_page() for item in losses],
        plots={name: png_url(content) for name, content in files.items()},
        widths={name: _screen_width(content) for name, content in files.items()},
    )


def _screen_width(png: bytes) -> int:
    return round(Image.open(io.BytesIO(png)).width * SCREEN_DPI / PLOT_DPI)


def _counts(report: Report) -> str:
    counts = report.counts
    crowds = f" and {counts['crowds']:,} crowds, which do not count" if counts["crowds"] else ""
    return (
        f"{counts['images']:,} images ({counts['images_without_objects']:,} without objects, "
        f"{counts['images_without_detections']:,} without detections), {counts['objects']:,} objects of "
        f"{counts['classes']:,} classes{crowds}. Of {counts['detections']:,} detections, "
        f"{counts['detections_that_count']:,} count (the first 100 of a class in an image, not on crowds), and "
        f"{counts['correct_detections']:,} match an object at IoU 0.5."
    )


def _speed(speed: Mapping[str, float]) -> str:
    texts = {
        "latency_ms": "{:.1f} ms for an image (median)",
        "latency_p95_ms": "{:.1f} ms at the 95th percentile",
        "images_per_second": "{:.1f} images per second",
    }
    parts = [text.format(speed[name]) for name, text in texts.items() if name in speed]
    return f"Speed: {', '.join(parts)}." if parts else ""


# --- Confusions ---


def _shown_classes(report: Report) -> list[int]:
    """Return the rows of the classes in the confusion matrix: those that are confused most, in the order of the ids."""
    assert report.confusion is not None
    between = report.confusion[:-1, :-1] * (1 - np.eye(len(report.classes), dtype=np.int64))
    errors = between.sum(0) + between.sum(1)
    with_background = report.confusion[-1, :-1] + report.confusion[:-1, -1]
    order = np.lexsort((with_background, errors))[::-1]
    return sorted(order[:MAX_MATRIX].tolist())


def _shown_counts(report: Report, shown: list[int]) -> Any:
    assert report.confusion is not None
    rows = [*shown, len(report.classes)]
    return report.confusion[np.ix_(rows, rows)]


def _matrix(report: Report) -> dict[str, Any]:
    assert report.confusion is not None
    shown = _shown_classes(report)
    counts, names = _shown_counts(report, shown), [*(report.classes[row].name for row in shown), "background"]
    # Of all objects of a class, also those detected as a class that is not shown
    fractions = row_fractions(report.confusion)[np.ix_([*shown, -1], [*shown, -1])]
    rows = [
        (
            name,
            [
                (
                    int(count),
                    float(fraction),
                    f"{name} detected as {other}: {count:,} ({fraction:.1%} of the row)",
                )
                for count, fraction, other in zip(row, row_fraction, names, strict=True)
            ],
        )
        for name, row, row_fraction in zip(names, counts, fractions, strict=True)
    ]
    limited = ""
    if len(shown) < len(report.classes):
        limited = (
            f"Shown are the {len(shown)} of {len(report.classes)} classes that are confused most with others; "
            "report.json has all."
        )
    return {"names": names, "rows": rows, "limited": limited, "pairs": most_confused(report, NUM_PAIRS)}
