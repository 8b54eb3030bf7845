"""Write and read the evaluations in the folder of a run.

    evaluations/ground-truth-FINGERPRINT.json    COCO dict without segmentations, once per set of shards
    evaluations/POSITION/detections/RANK.npz     packed arrays of one rank
    evaluations/POSITION/detections/complete.json    written after them: by how many ranks, of which shards, ...
    evaluations/POSITION/evaluation.json         written after the scoring: metrics, AP by class, speed
    evaluations/POSITION/report/                 what explains the AP: numbers, plots, images, a page

The folder detections/ is removed with the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from raydetr.evaluation.detections import PackedDetections
from raydetr.store.folders import Folder, remove_folder, write_file

EVALUATIONS = "evaluations"
DETECTIONS = "detections"
COMPLETE = "complete.json"  # in DETECTIONS
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Evaluated:
    """What is known of an evaluation before it is scored: content of complete.json."""

    position: int
    step: int
    epoch: int
    num_ranks: int
    fingerprint: str  # of the shards
    metrics: dict[str, Any]  # for the checkpoint's metrics.json


_EVALUATED = TypeAdapter(Evaluated)


def folder_of(run: Folder, position: int) -> Folder:
    """Return the folder of the evaluation at a position of a run."""
    return run / EVALUATIONS / str(position)


def detections_file(folder: Folder, rank: int) -> Folder:
    """Return the file of one rank in the folder of an evaluation."""
    return folder / DETECTIONS / f"{rank:05d}.npz"


def mark_complete(folder: Folder, evaluated: Evaluated) -> None:
    """Write down that all ranks have written their arrays.

    Raises:
        OSError: it cannot be written.
    """
    write_file(
        folder / DETECTIONS / COMPLETE, json.dumps(asdict(evaluated), indent=1, allow_nan=False).encode()
    )


def discard(folder: Folder) -> None:
    """Take back that an evaluation is complete, before it is made again.

    Raises:
        OSError: a file cannot be removed.
    """
    (folder / EVALUATION).unlink(missing_ok=True)
    (folder / DETECTIONS / COMPLETE).unlink(missing_ok=True)


def read_evaluated(folder: Folder) -> Evaluated | None:
    """Return what is known of an evaluation whose arrays are complete; None if they are not.

    Raises:
        OSError: the storage cannot be reached.
    """
    try:
        return _EVALUATED.validate_json((folder / DETECTIONS / COMPLETE).read_text())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def complete_evaluations(run: Folder) -> list[Evaluated]:
    """Return the evaluations of a run whose arrays are complete, the oldest first.

    Raises:
        OSError: the storage cannot be reached.
    """
    files = (run / EVALUATIONS).glob(f"*/{DETECTIONS}/{COMPLETE}")
    found = (read_evaluated(file.parent.parent) for file in files)
    return sorted((each for each in found if each is not None), key=lambda each: each.position)


def read_detections(folder: Folder) -> PackedDetections:
    """Read the arrays of all ranks of an evaluation.

    Raises:
        ValueError: they are not complete, or corrupt.
        OSError: they cannot be read.
    """
    evaluated = read_evaluated(folder)
    if evaluated is None:
        raise ValueError(
            f"{folder}: the arrays of this evaluation are not complete, or were removed with its checkpoint"
        )
    return read_arrays(folder, evaluated.num_ranks)


def read_parts(folder: Folder, num_ranks: int) -> Iterator[PackedDetections]:
    """Read the arrays of an evaluation by `num_ranks` ranks, one rank after the other.

    Raises:
        ValueError: a file is corrupt.
        OSError: a file is missing, or cannot be read.
    """
    for rank in range(num_ranks):
        file = detections_file(folder, rank)
        yield PackedDetections.from_npz(file if isinstance(file, Path) else file.read_bytes())


def read_arrays(folder: Folder, num_ranks: int, image_ids: Iterable[int] | None = None) -> PackedDetections:
    """Read and join the arrays of an evaluation; with `image_ids`, keep only those of these images.

    Raises:
        ValueError, OSError: see `read_parts`.
    """
    parts = read_parts(folder, num_ranks)
    if image_ids is None:
        return PackedDetections.concatenate(parts)
    wanted = list(image_ids)
    return PackedDetections.concatenate(part.of_images(wanted) for part in parts)


def read_evaluation(folder: Folder) -> Mapping[str, Any] | None:
    """Return the content of evaluation.json; None before the evaluation is scored.

    Raises:
        OSError: the storage cannot be reached.
    """
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        content: dict[str, Any] = json.loads((folder / EVALUATION).read_text())
        return content
    return None


def remove_arrays_except(run: Folder, kept: Collection[int]) -> None:
    """Remove the arrays of evaluations, but for those at some positions; what was computed from them stays.

    Raises:
        OSError: they cannot be removed.
    """
    found = {file.parent.parent for file in (run / EVALUATIONS).glob(f"*/{DETECTIONS}/*.npz")}
    for folder in found:
        if folder.name.isdecimal() and int(folder.name) not in kept:
            (folder / DETECTIONS / COMPLETE).unlink(missing_ok=True)
            remove_folder(folder / DETECTIONS)
