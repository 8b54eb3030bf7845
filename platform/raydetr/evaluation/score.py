"""Score an evaluation in a process of its own: from files of this machine to files of this machine.

    python -m raydetr.evaluation.score REQUEST.json

The process loads neither torch nor Ray, and leaves the cores to the training. REQUEST.json has the fields of `Request`.

The process cannot read shards, which would load torch. For a report, it prints the ids of the images that it shows as a
line of JSON. Whoever started it writes them into the folder `images`, and then closes its standard input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raydetr.evaluation.coco_metrics import ApTable, coco_ap
from raydetr.evaluation.detections import PackedDetections

if TYPE_CHECKING:
    from raydetr.config import Engine
    from raydetr.shards.images import ReadImage

NICENESS = 19
REPORT = "report"  # folder, in that of an evaluation
INVALID = 3  # exit status: the detections cannot be scored; the last line of standard error is the reason


@dataclass(frozen=True)
class Request:
    """What to score."""

    ground_truth: str  # file
    detections: list[str]  # files, of all ranks
    out: str  # folder for what `score` returns
    engine: Engine
    evaluation: dict[str, Any]  # fields that evaluation.json has besides
    # Write what `explain` returns, with the images in this folder, instead of what `score` returns
    images: str | None = None


def score(
    ground_truth: dict[str, Any],
    parts: Iterable[PackedDetections],
    engine: Engine,
    evaluation: dict[str, Any],
) -> dict[str, bytes]:
    """Score an evaluation; return the files of its folder, {name: content}, evaluation.json as the last one.

    Args:
        ground_truth: a COCO dict.
        parts: arrays of each process.
        engine: what computes AP.
        evaluation: fields that evaluation.json has besides.

    Raises:
        ValueError: a detection is not finite, or of an image that the ground truth lacks.
    """
    detections, times = _joined(parts)
    table = coco_ap(ground_truth, detections.results(), engine)
    content = {
        **evaluation,
        "metrics": dict(table.numbers),
        "table": table.to_dict(),
        "speed": times,
        "num_images": len(detections.evaluated_ids),
        "num_detections": len(detections.scores),
        "engine": engine,
    }
    return {
        "ap.json": _json(table.to_dict()),
        "ap.md": table.to_markdown().encode(),
        "evaluation.json": _json(content),
    }


def _joined(parts: Iterable[PackedDetections]) -> tuple[PackedDetections, dict[str, float]]:
    """Return the arrays of all processes, and `speed`."""
    parts = list(parts)
    return PackedDetections.concatenate(parts), speed(parts)


def speed(parts: Iterable[PackedDetections]) -> dict[str, float]:
    """Return how fast an evaluation was; empty without images.

    `latency_ms` is the median over the images, and `latency_p95_ms` the 95th percentile. An image takes its share of
    its batch in one process, from the pixels on the host to the detections on the host. `images_per_second` are those
    of all processes, as they read, transform and detect them. The first batch of a process, which warms up, does not
    count, unless no process has a second one.

    Args:
        parts: of each process.
    """
    parts = [part for part in parts if len(part.ended)]
    if not parts:
        return {}
    starts = [float(part.ended.min()) for part in parts]
    if all(part.ended.max() == start for part, start in zip(parts, starts, strict=True)):
        starts = [0.0] * len(parts)
    counted = [part.ended > start for part, start in zip(parts, starts, strict=True)]
    times = np.concatenate([part.seconds[rows] for part, rows in zip(parts, counted, strict=True)])
    median, high = np.percentile(times, [50, 95])
    # The slowest process determines when the evaluation ends
    seconds = max(float(part.ended.max()) - start for part, start in zip(parts, starts, strict=True))
    return {
        "latency_ms": 1e3 * float(median),
        "latency_p95_ms": 1e3 * float(high),
        "images_per_second": len(times) / seconds,
    }


def explain(
    ground_truth: dict[str, Any],
    parts: Iterable[PackedDetections],
    evaluation: dict[str, Any],
    ask: Callable[[list[int]], ReadImage | None],
) -> dict[str, bytes]:
    """Return the files of an evaluation's report, {name: content}.

    Args:
        ground_truth: a COCO dict.
        parts: arrays of each process.
        evaluation: fields of evaluation.json.
        ask: takes the ids of the images that the report shows; returns how to read them, None: there are no images.

    Raises:
        ValueError: as `score`.
    """
    # Plots take a second to import, and the process that trains imports this module too
    from raydetr.evaluation.report import analyze, report_files

    detections, times = _joined(parts)
    facts = ("step", "epoch", "position", "fingerprint")
    about = {name: str(evaluation[name]) for name in facts if name in evaluation}
    report = analyze(ground_truth, detections.results(), losses=detections.image_losses(), speed=times)
    files = report_files(report, ask(report.shown_images), about=about)
    return {f"{REPORT}/{name}": content for name, content in files.items()}


def read_table(content: dict[str, Any]) -> ApTable:
    """Return the table of the content of evaluation.json."""
    return ApTable.from_dict(content["table"])


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()


def main() -> None:
    """Score as REQUEST.json says."""
    os.nice(NICENESS)
    request = Request(**json.loads(Path(sys.argv[1]).read_text()))
    ground_truth = json.loads(Path(request.ground_truth).read_text())
    parts = (PackedDetections.from_npz(Path(file)) for file in request.detections)
    try:
        if request.images is not None:
            files = explain(ground_truth, parts, request.evaluation, _ask(Path(request.images)))
        else:
            files = score(ground_truth, parts, request.engine, request.evaluation)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(INVALID)
    for name, content in files.items():
        path = Path(request.out) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _ask(folder: Path) -> Callable[[list[int]], ReadImage]:
    from raydetr.evaluation.report_images import from_encoded  # imports plots

    def ask(image_ids: list[int]) -> ReadImage:
        print(json.dumps(image_ids), flush=True)
        sys.stdin.read()
        return from_encoded(lambda image_id: (folder / str(image_id)).read_bytes())

    return ask


def write_request(request: Request, file: Path) -> None:
    """Write REQUEST.json."""
    file.write_bytes(_json(asdict(request)))


if __name__ == "__main__":
    main()
