"""Write and read checkpoints: folders with `state.pt` (the state) and `meta.json` (its description).

`meta.json` is written last, by a rename, and has the size and checksum of `state.pt`: an interrupted write or an
incomplete copy is never taken for a complete checkpoint. Nothing is flushed to the disk: after a power failure the
checksum is wrong, and the checkpoint before it is used.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from detrs import zoo
from detrs.checkpoints import UNREADABLE, require_finite, to_state_dict, unreadable_because
from raydetr.config import ConfigError, RunConfig, flatten, from_dict, to_dict
from raydetr.data.corrupt import CorruptSampleLog
from raydetr.data.order import ORDER_VERSION
from raydetr.shards.manifest import LabelMap, make_label_map
from raydetr.shards.reader import Shards
from raydetr.shards.validation import check_categories
from raydetr.training.loop import Training
from raydetr.user_files import read_file

FORMAT = 1
Writer = Callable[[Path], None]  # writes a checkpoint into a given folder


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the folder and the problem."""


@dataclass(frozen=True)
class Meta:
    """Content of `meta.json`: configuration, data and progress of a checkpoint, and how to verify its state."""

    config: dict[str, Any]
    categories: list[dict[str, Any]]  # COCO categories of the training data
    fingerprint: str  # of the training data
    epoch: int
    position: int
    metrics: dict[str, Any]  # AP, ... and the table by class
    state_bytes: int
    state_crc32: int
    format: int = FORMAT
    order: int = 1  # version of the order of samples; missing in the first checkpoints


_META = TypeAdapter(Meta)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its trained weights (the EMA if there is one), in eval mode."""

    config: RunConfig
    model: zoo.Model
    label_map: LabelMap


def save(folder: Path, training: Training, shards: Shards, epoch: int, metrics: Mapping[str, float]) -> None:
    """Write the state of `training`, trained on `shards`, into `folder`, which is new or empty.

    Raises:
        OSError, RuntimeError: the files cannot be written; torch raises RuntimeError for a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ema = training.ema
    state = {
        "model": training.detector.state_dict(),
        "ema": None if ema is None else ema.model.state_dict(),
        "ema_updates": 0 if ema is None else ema.num_updates,
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "skipped_steps": training.skipped_steps,
        "corrupt_samples": training.corrupt_log.to_dicts(),
        # Schedule, order and random draws are functions of these two: no generator states are needed
        "position": training.position,
        "seed": training.config.seed,
    }
    meta = {
        "config": to_dict(training.config),
        "categories": shards.manifest.categories,
        "fingerprint": shards.fingerprint,
        "epoch": epoch,
        "position": training.position,
        "metrics": dict(metrics),
        "order": ORDER_VERSION,
    }
    write(folder, state, meta)


def write(folder: Path, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write `state` and its description into `folder`; `meta` has the fields of Meta without size and checksum.

    Raises:
        OSError, RuntimeError: the files cannot be written; torch raises RuntimeError for a full disk.
    """
    # The order makes the write atomic: the state first, then meta.json under its final name. A process that is killed
    # in between leaves a folder without meta.json, which is no checkpoint. The size and the checksum detect what the
    # order cannot: a state that was truncated or changed later, for example by an incomplete copy.
    path = folder / "state.pt"
    torch.save(state, path)
    complete = Meta(**meta, state_bytes=path.stat().st_size, state_crc32=_crc32(path))
    partial = folder / "meta.json.partial"
    partial.write_text(json.dumps(asdict(complete), indent=1, allow_nan=False))
    partial.rename(folder / "meta.json")


def read_meta(folder: Path) -> Meta:
    """Read the description of the checkpoint in `folder`, and verify that the checkpoint is complete.

    Raises:
        CheckpointError: the folder holds no checkpoint of this program, or one that is incomplete or corrupt.
    """
    try:
        meta = _META.validate_json(read_file(folder / "meta.json"), strict=True)
        check_categories(meta.categories)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no checkpoint (meta.json is missing: writing was "
            "interrupted, or this is not a checkpoint folder, such as RUN/attempt-01/epoch-0003)"
        ) from None
    except (OSError, ValueError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3]) or error
        raise CheckpointError(f"{folder}/meta.json: not the description of a checkpoint ({reason})") from None
    if meta.format != FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {meta.format}; this version reads format {FORMAT}"
        )
    state = folder / "state.pt"
    size = state.stat().st_size if state.exists() else 0
    if size != meta.state_bytes:
        raise CheckpointError(f"{state}: {size} bytes, expected {meta.state_bytes}: the copy is incomplete")
    if _crc32(state) != meta.state_crc32:
        raise CheckpointError(f"{state}: checksum differs from meta.json: the file is corrupt")
    return meta


def check_compatible(folder: Path, config: RunConfig, shards: Shards) -> Meta:
    """Check that a run of `config` on `shards` can resume from a checkpoint; return its description.

    Raises:
        CheckpointError: it is corrupt, or was made by another model, with other settings, or on other data.
    """
    meta = read_meta(folder)
    source = run_config(folder, meta)
    differences = model_differences(source, config, ignored=("backbone.weights",))
    if differences:
        raise CheckpointError(f"{folder}: made by another model: {', '.join(differences)}")
    if meta.fingerprint != shards.fingerprint:
        raise CheckpointError(
            f"{folder}: made on other data (fingerprint {meta.fingerprint}); data.train {config.data.train} "
            f"has {shards.fingerprint}. Resume on the same shards, or start a new run."
        )
    if meta.order != ORDER_VERSION:
        raise CheckpointError(
            f"{folder}: its position {meta.position} counts samples in version {meta.order} of the order of samples; "
            f"this program has version {ORDER_VERSION} and would repeat some samples and omit others. Start a new run "
            f"from its weights (init.checkpoint={folder}), or resume it with the program that made it."
        )
    if source.seed != config.seed:
        raise CheckpointError(f"{folder}: made with seed {source.seed}, the run has {config.seed}")
    before, now = source.optim.ema_decay, config.optim.ema_decay
    if (before is None) != (now is None):
        raise CheckpointError(f"{folder}: optim.ema_decay was {before}, the run has {now}")
    return meta


def run_config(folder: Path, meta: Meta) -> RunConfig:
    """Return the configuration of a checkpoint; settings that were added since then have their default.

    Raises:
        CheckpointError: this version cannot read it.
    """
    try:
        return from_dict(meta.config)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: its configuration is not one of this version: {error}") from None


def model_differences(source: RunConfig, config: RunConfig, ignored: tuple[str, ...] = ()) -> list[str]:
    """Return a phrase for each setting of the model that differs between a checkpoint and a run.

    Args:
        source: configuration of the checkpoint.
        config: of the run.
        ignored: prefixes of the names of settings that may differ.
    """
    before, now = (flatten(to_dict(each)["model"]) for each in (source, config))
    return [
        f"model.{name} is {before.get(name)!r} in the checkpoint and {now.get(name)!r} in the run"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name) and not name.startswith(ignored)
    ]


def restore(folder: Path, training: Training, shards: Shards) -> Meta:
    """Load a checkpoint into `training`, which then resumes at its position.

    Raises:
        CheckpointError: see `check_compatible`.
    """
    meta = check_compatible(folder, training.config, shards)
    state = _load_state(folder, training.world.device)
    _load_weights(training.detector, state["model"], folder)
    training.optimizer.load_state_dict(state["optimizer"])
    if training.ema is not None:
        training.ema.model.load_state_dict(state["ema"])
        training.ema.num_updates = state["ema_updates"]
    if state["scaler"] and training.scaler.is_enabled():  # a run may resume in another precision
        training.scaler.load_state_dict(state["scaler"])
    training.skipped_steps = state["skipped_steps"]
    training.corrupt_log = CorruptSampleLog.from_dicts(state["corrupt_samples"])
    training.position = state["position"]
    return meta


def load_for_inference(folder: Path, device: torch.device | None = None) -> LoadedModel:
    """Load the trained model of a checkpoint, ready to predict.

    Raises:
        CheckpointError: the folder holds no usable checkpoint.
    """
    meta = read_meta(folder)
    config = run_config(folder, meta)
    device = device or torch.device("cpu")
    # The checkpoint has all weights: download nothing for the backbone
    backbone = replace(config.model.backbone, weights=None)
    model = zoo.build(replace(config.model, backbone=backbone))
    state = _load_state(folder, device)
    averaged = state.get("ema")
    _load_weights(model.detector, state["model"] if averaged is None else averaged, folder)
    model.detector.to(device).eval()
    return LoadedModel(config, model, make_label_map(meta.categories, config.data.label_map))


def newest_complete(folders: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """Return the complete checkpoint with the highest position, and one message for each unusable checkpoint."""
    complete: list[tuple[int, Path]] = []
    errors: list[str] = []
    for folder in folders:
        try:
            complete.append((read_meta(folder).position, folder))
        except CheckpointError as error:
            errors.append(str(error))
    return (max(complete)[1] if complete else None), errors


def _load_state(folder: Path, device: torch.device) -> dict[str, Any]:
    path = folder / "state.pt"
    try:
        # weights_only: unpickling anything else could run code from the file
        state = torch.load(path, map_location=device, weights_only=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path}: not the state of a checkpoint ({unreadable_because(error)})"
        ) from None
    if not isinstance(state, dict) or "model" not in state:
        raise CheckpointError(f"{path}: not the state of a checkpoint: it has no 'model'")
    return state


def _load_weights(detector: nn.Module, weights: Any, folder: Path) -> None:
    try:
        state = to_state_dict(weights, folder, "under 'model' or 'ema'")
        require_finite(state, folder)
        detector.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: the weights do not fit the model of its configuration: {' '.join(str(error).split())[:500]}"
        ) from None


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
