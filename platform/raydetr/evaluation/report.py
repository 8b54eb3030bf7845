"""Explain an evaluation: from ground truth and detections to numbers, pictures and a page.

This module loads neither torch nor Ray: a scoring process imports it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from raydetr.evaluation.analysis import Report as Report
from raydetr.evaluation.analysis import analyze as analyze
from raydetr.evaluation.report_images import loss_images, mistake_images
from raydetr.evaluation.report_page import page, pictures, plots
from raydetr.shards.images import ReadImage

PAGE = "report.html"
NUMBERS = "report.json"


def write_report(
    report: Report,
    folder: Path,
    read_image: ReadImage | None,
    *,
    title: str = "Evaluation",
    about: Mapping[str, str] | None = None,
) -> None:
    """Write the files of a report into a folder; see `report_files`.

    Args:
        report: to write.
        folder: made if it is not there; files of the same names are replaced.
        read_image: returns an image by its id, None if it cannot be read; None: there are no images.
        title: of the page.
        about: facts that the page names first, such as the checkpoint.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in report_files(report, read_image, title=title, about=about).items():
        (folder / name).write_bytes(content)


def report_files(
    report: Report,
    read_image: ReadImage | None,
    *,
    title: str = "Evaluation",
    about: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """Return the files of a report: report.json, report.html, plots as PNG, images as JPEG.

    Args:
        report: to write.
        read_image: returns an image by its id, None if it cannot be read; None: there are no images.
        title: of the page.
        about: facts that the page names first, such as the checkpoint.
    """
    read = read_image or (lambda _: None)
    mistakes, losses = list(mistake_images(report, read)), list(loss_images(report, read))
    files = plots(report)
    text = page(
        report,
        files,
        mistakes,
        losses,
        has_images=read_image is not None,
        title=title,
        about=about or {},
    )
    numbers = json.dumps(report.to_dict(), indent=1, allow_nan=False)
    return {**files, **pictures(mistakes, losses), NUMBERS: numbers.encode(), PAGE: text.encode()}
