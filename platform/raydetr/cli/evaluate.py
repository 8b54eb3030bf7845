"""Run `raydetr evaluate`: evaluate a checkpoint, or the results of another tool."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydetr.config import ConfigError, parse_assignments
from raydetr.console import print_status
from raydetr.locations import is_remote
from raydetr.store.output_folder import atomic_folder, check_out_file, check_out_folder

if TYPE_CHECKING:
    from raydetr.evaluation.coco_metrics import ApTable
    from raydetr.evaluation.report import Report
    from raydetr.shards.images import ReadImage


@dataclass(frozen=True)
class Options:
    """Options of the command; None where one is not given."""

    data: str | None = None
    results: Path | None = None
    images: Path | None = None
    html: Path | None = None
    report: Path | None = None
    out: Path | None = None
    local: bool = False

    @property
    def explains(self) -> bool:
        """Whether the page or the folder of the report is asked for."""
        return self.html is not None or self.report is not None


def run(checkpoint: str | None, overrides: list[str], options: Options) -> str:
    """Evaluate, write the files that the options name, and return the tables as text.

    Raises:
        ConfigError: options contradict each other, or have no effect.
        ValueError, OSError: the results or the data cannot be used, or a file cannot be written.
        Exception: see `runs.evaluate.evaluate`.
    """
    for path in (options.out, options.html):
        if path is not None:
            check_out_file(path)
    if options.report is not None:
        check_out_folder(options.report)
    if options.results is not None:
        return _evaluate_results(checkpoint, options.results, options)
    if checkpoint is None:
        raise ConfigError("name a run or a checkpoint to evaluate, or give --results FILE of another tool")
    if options.images is not None:
        raise ConfigError("--images has no effect without --results: the shards have the images")
    return _evaluate_checkpoint(checkpoint, overrides, options)


def _evaluate_checkpoint(checkpoint: str, overrides: list[str], options: Options) -> str:
    from raydetr.runs.evaluate import evaluate

    assignments = parse_assignments(overrides)
    data = options.data
    if data is not None and assignments.setdefault("data.val", data) != data:
        raise ConfigError(f"--data {data} and data.val={assignments['data.val']} are given: keep one")
    found = evaluate(checkpoint, assignments, local=options.local, with_losses=options.explains)
    table = found.table()
    if options.explains:
        from raydetr.evaluation.read_images import from_shards
        from raydetr.evaluation.report import analyze

        results, losses = found.detections.results(), found.detections.image_losses()
        report = analyze(found.ground_truth.coco, results, losses=losses, speed=found.speed)
        about = {"checkpoint": str(found.checkpoint), "data": found.shards.location}
        _write_report(options, report, from_shards(found.shards), checkpoint, about)
    return _finish(table, options)


def _evaluate_results(checkpoint: str | None, results: Path, options: Options) -> str:
    if checkpoint is not None:
        raise ConfigError(f"{checkpoint} has no effect with --results, which has the detections: omit it")
    if options.local:
        raise ConfigError("--local has no effect with --results: nothing runs on Ray; omit it")
    if options.data is None:
        raise ConfigError("--results needs the ground truth: add --data SHARDS, or --data instances.json")
    if options.images is not None and not options.explains:
        raise ConfigError("--images has no effect without --html or --report, which show them")
    from raydetr.evaluation.report import analyze
    from raydetr.evaluation.results_file import read_results

    truth, read_image = _ground_truth(options.data, options.images)
    found, warnings = read_results(results, truth)
    for line in warnings:
        print_status(f"warning: {line}")
    report = analyze(truth, found)
    if options.explains:
        about = {"results": str(results.absolute()), "data": options.data}
        _write_report(options, report, read_image, results, about)
    return _finish(report.table, options)


def _ground_truth(data: str, images: Path | None) -> tuple[dict[str, Any], ReadImage | None]:
    """Return the ground truth in shards or a COCO file, and how to read its images; None if they are not given."""
    from raydetr.evaluation.ground_truth import ground_truth
    from raydetr.evaluation.read_images import from_folder, from_shards
    from raydetr.shards.coco import load_coco
    from raydetr.shards.reader import open_shards

    if not data.endswith(".json"):
        if images is not None:
            raise ConfigError(f"--images has no effect with shards, which have the images ({data}): omit it")
        shards = open_shards(data)
        return ground_truth(shards, "raise").coco, from_shards(shards)
    if is_remote(data):
        raise ConfigError(f"--data {data}: a COCO file is read from this machine: download it first")
    dataset = load_coco(Path(data))
    truth = {
        "images": dataset.images,
        "annotations": [record for records in dataset.annotations.values() for record in records],
        "categories": dataset.categories,
    }
    if images is None:
        return truth, None
    if not images.is_dir():
        raise ConfigError(f"--images {images}: there is no such folder")
    if dataset.images and not any((images / image["file_name"]).is_file() for image in dataset.images):
        raise ConfigError(
            f"--images {images}: has none of the images of {data}, such as {dataset.images[0]['file_name']}"
        )
    return truth, from_folder(images, truth)


def _write_report(
    options: Options, report: Report, read_image: ReadImage | None, name: object, about: Mapping[str, str]
) -> None:
    """Write the page of --html, and the folder of --report."""
    from raydetr.evaluation.report import PAGE, report_files

    files = report_files(report, read_image, title=f"Evaluation of {name}", about=about)
    if options.html is not None:
        options.html.write_bytes(files[PAGE])
        print_status(f"wrote {options.html}")
    if options.report is not None:
        with atomic_folder(options.report, last=PAGE) as folder:
            for file, content in files.items():
                (folder / file).write_bytes(content)
        print_status(f"wrote {options.report}")


def _finish(table: ApTable, options: Options) -> str:
    if options.out is not None:
        options.out.write_text(json.dumps(table.to_dict(), indent=1, allow_nan=False))
    return table.to_text()
