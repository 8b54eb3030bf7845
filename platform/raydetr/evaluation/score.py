"""Score an evaluation in a process of its own: from files of this machine to files of this machine.

    python -m raydetr.evaluation.score REQUEST.json

The process loads neither torch nor Ray, and leaves the cores to the training. REQUEST.json has the fields of `Request`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raydetr.evaluation.coco_metrics import ApTable, coco_ap
from raydetr.evaluation.detections import PackedDetections

if TYPE_CHECKING:
    from raydetr.config import Engine

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
    is_report: bool = False  # write what `explain` returns, instead of `score`


def score(
    ground_truth: dict[str, Any],
    parts: Iterable[PackedDetections],
    engine: Engine,
    evaluation: dict[str, Any],
) -> dict[str, bytes]:
    """Score an evaluation; return the files of its folder, {name: content}, evaluation.json as the last one.

    Raises:
        ValueError: a detection is not finite, or of an image that the ground truth lacks.
    """
    detections = PackedDetections.concatenate(parts)
    table, times = coco_ap(ground_truth, detections.results(), engine), speed(detections)
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


def speed(detections: PackedDetections) -> dict[str, float]:
    """Return how long an image took in the process that evaluated it, in milliseconds; empty without images.

    An image takes its share of its batch, from the pixels on the host to the detections on the host. The first batch of
    a process, which warms up, is in the 95th percentile, not in the median.
    """
    if not len(detections.seconds):
        return {}
    median, high = np.percentile(detections.seconds, [50, 95])
    return {"median_ms": 1e3 * float(median), "p95_ms": 1e3 * float(high)}


def explain(
    ground_truth: dict[str, Any], parts: Iterable[PackedDetections], evaluation: dict[str, Any]
) -> dict[str, bytes]:
    """Return the files of an evaluation's report, {name: content}, without images of the data.

    Raises:
        ValueError: as `score`.
    """
    # Plots take a second to import, and the process that trains imports this module too
    from raydetr.evaluation.report import analyze, report_files

    detections = PackedDetections.concatenate(parts)
    facts = ("step", "epoch", "position", "fingerprint")
    about = {name: str(evaluation[name]) for name in facts if name in evaluation}
    report = analyze(ground_truth, detections.results(), speed=speed(detections))
    return {f"{REPORT}/{name}": content for name, content in report_files(report, None, about=about).items()}


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
        if request.is_report:
            files = explain(ground_truth, parts, request.evaluation)
        else:
            files = score(ground_truth, parts, request.engine, request.evaluation)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(INVALID)
    for name, content in files.items():
        path = Path(request.out) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_request(request: Request, file: Path) -> None:
    """Write REQUEST.json."""
    file.write_bytes(_json(asdict(request)))


if __name__ == "__main__":
    main()
