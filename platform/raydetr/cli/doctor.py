"""What `raydetr doctor` does with its arguments."""

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
from raydetr.doctor.findings import Target
from raydetr.doctor.machine import environment_report
from raydetr.doctor.page import to_html
from raydetr.shards.reader import Shards, open_shards
from raydetr.store.output_folder import check_out_file


@dataclass(frozen=True)
class Settings:
    """The options; None where one is not given."""

    recipe: str | None = None
    config: Path | None = None
    short_side: int | None = None  # pixels
    max_side: int | None = None  # pixels
    json: Path | None = None
    html: Path | None = None
    workers: int | None = None  # processes; None: as many as there are CPUs


def run(data: list[str], settings: Settings) -> tuple[str, bool]:
    """Examine the data, or this machine if there is none; returns the text and whether training may start.

    Raises:
        ConfigError: options contradict each other, or have no effect.
        ValueError: there is no folder for a result.
        OSError: a result cannot be written.
    """
    return _examine_data(data, settings) if data else _examine_machine(settings)


def _examine_machine(settings: Settings) -> tuple[str, bool]:
    idle = [f.name for f in fields(settings) if f.name != "json" and getattr(settings, f.name) is not None]
    if idle:
        raise ConfigError(f"--{idle[0].replace('_', '-')} is about data: name a folder of shards too")
    report = environment_report()
    if settings.json is not None:
        check_out_file(settings.json)
    _write_json(settings.json, report.to_dict())
    return report.to_text(), report.can_train


def _examine_data(data: list[str], settings: Settings) -> tuple[str, bool]:
    config = _config(settings)
    target = _target(config, settings)
    for path in (settings.json, settings.html):
        if path is not None:
            check_out_file(path)
    with progress_bar("images") as progress:
        report = examine(
            data,
            target,
            open_location=partial(_open, config),
            progress=progress,
            num_processes=settings.workers,
        )
    lines = [report.to_text()]
    _write_json(settings.json, report.to_dict())
    if settings.html is not None:
        settings.html.write_text(to_html(report), encoding="utf-8")
        lines.append(f"pictures: {settings.html}")
    return "\n".join(lines), report.may_start


def _config(settings: Settings) -> RunConfig | None:
    if settings.recipe is not None and settings.config is not None:
        raise ConfigError(f"--recipe {settings.recipe} and --config {settings.config} are given: keep one")
    if settings.recipe is not None:
        return recipes.find(settings.recipe)
    return None if settings.config is None else from_yaml(settings.config)


def _open(config: RunConfig | None, location: str) -> Shards:
    if config is None:
        return open_shards(location)
    return open_shards(location, label_map=config.data.label_map, remote=config.data.remote)


def _target(config: RunConfig | None, settings: Settings) -> Target:
    target = Target() if config is None else Target.of(config)
    if settings.short_side is not None:
        target = replace(target, short_side=settings.short_side)
    if settings.max_side is not None:
        if target.short_side is None:
            raise ConfigError(
                f"--max-side {settings.max_side} has no effect: {target.recipe} does not resize; add --short-side"
            )
        target = replace(target, max_side=settings.max_side)
    return target


def _write_json(path: Path | None, values: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
