"""Run `raydetr doctor`: examine data or this machine, and write the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from raydetr import recipes
from raydetr.config import ConfigError, RunConfig, from_yaml
from raydetr.console import progress_bar
from raydetr.doctor.examine import examine
from raydetr.doctor.findings import TrainingTarget
from raydetr.doctor.machine import environment_report
from raydetr.shards.reader import Shards, open_shards
from raydetr.store.output_folder import check_out_file


@dataclass(frozen=True)
class Options:
    """Options of the command; None where one is not given."""

    recipe: str | None = None
    config: Path | None = None
    short_side: int | None = None  # pixels
    max_side: int | None = None  # pixels
    json: Path | None = None
    html: Path | None = None
    workers: int | None = None  # processes; None: one per core


def run(data: list[str], options: Options) -> tuple[str, bool]:
    """Examine the data, or this machine if none is given; return the text and whether training may start.

    Raises:
        ConfigError: options contradict each other, or have no effect.
        ValueError: the folder of an output file does not exist.
        OSError: an output file cannot be written.
    """
    return _examine_data(data, options) if data else _examine_machine(options)


def _examine_machine(options: Options) -> tuple[str, bool]:
    unused = [f.name for f in fields(options) if f.name != "json" and getattr(options, f.name) is not None]
    if unused:
        raise ConfigError(f"--{unused[0].replace('_', '-')} needs data: name a folder of shards too")
    report = environment_report()
    if options.json is not None:
        check_out_file(options.json)
    _write_json(options.json, report.to_dict())
    return report.to_text(), report.can_train


def _examine_data(data: list[str], options: Options) -> tuple[str, bool]:
    config = _config(options)
    target = _target(config, options)
    for path in (options.json, options.html):
        if path is not None:
            check_out_file(path)
    with progress_bar("images") as progress:
        report = examine(
            data,
            target,
            open_location=partial(_open, config),
            progress=progress,
            num_processes=options.workers,
        )
    _write_json(options.json, report.to_dict())
    lines = [report.to_text()]
    if options.html is not None:
        options.html.write_text(report.to_html(), encoding="utf-8")
        lines.append(f"page: {options.html}")
    return "\n".join(lines), report.may_start


def _config(options: Options) -> RunConfig | None:
    if options.recipe is not None and options.config is not None:
        raise ConfigError(f"--recipe {options.recipe} and --config {options.config} are given: keep one")
    if options.recipe is not None:
        return recipes.find(options.recipe)
    return None if options.config is None else from_yaml(options.config)


def _open(config: RunConfig | None, location: str) -> Shards:
    if config is None:
        return open_shards(location)
    return open_shards(location, label_map=config.data.label_map, remote=config.data.remote)


def _target(config: RunConfig | None, options: Options) -> TrainingTarget:
    target = TrainingTarget() if config is None else TrainingTarget.from_config(config)
    if options.short_side is not None:
        target = replace(target, short_side=options.short_side)
    if options.max_side is not None:
        if target.short_side is None:
            raise ConfigError(
                f"--max-side {options.max_side} has no effect: {target.recipe} does not resize; add --short-side"
            )
        target = replace(target, max_side=options.max_side)
    return target


def _write_json(path: Path | None, values: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
