"""Checkpoints: a folder with `state.pt` (tensors) and `meta.json` (what they belong to).

`meta.json` is written last and carries the size and checksum of `state.pt`, so that a checkpoint
that was cut off is never taken for a whole one.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detrs import zoo
from raydetr.config import ConfigError, RunConfig, flatten, from_dict, to_dict
from raydetr.data.corrupt import CorruptSampleLog
from raydetr.data.order import ORDER_VERSION
from raydetr.shards.manifest import LabelMap, make_label_map
from raydetr.shards.reader import Shards
from raydetr.training.loop import Training

FORMAT = 1
Writer = Callable[[Path], None]  # writes a checkpoint into the folder it is given


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the folder and what is wrong."""


@dataclass(frozen=True)
class Meta:
    """What a checkpoint belongs to."""

    config: dict[str, Any]
    categories: list[dict[str, Any]]  # COCO categories of the training data
    fingerprint: str  # of the training data
    epoch: int
    position: int
    metrics: dict[str, float]
    state_bytes: int
    state_crc32: int
    format: int = FORMAT
    order: int = 1  # version of the order of samples; the first checkpoints did not say


@dataclass(frozen=True)
class Loaded:
    """A model with its trained weights (the moving average where there is one), in eval mode."""

    config: RunConfig
    model: zoo.Model
    label_map: LabelMap


def save(folder: Path, training: Training, shards: Shards, epoch: int, metrics: Mapping[str, float]) -> None:
    """Write the state of `training`, trained on `shards`, into the (new or empty) `folder`."""
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
        # schedule, data order and random draws are functions of these two
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
    """Write `state`, and the fields of Meta but those about the file, into `folder`, the description last."""
    path = folder / "state.pt"
    torch.save(state, path)
    whole = Meta(**meta, state_bytes=path.stat().st_size, state_crc32=_crc32(path))
    partial = folder / "meta.json.partial"
    partial.write_text(json.dumps(asdict(whole), indent=1))
    partial.rename(folder / "meta.json")


def read_meta(folder: Path) -> Meta:
    """What the checkpoint in `folder` belongs to, after checking that it is whole.

    Raises:
        CheckpointError: the folder is no checkpoint of ours, was cut off, or is damaged.
    """
    try:
        values = json.loads((folder / "meta.json").read_text())
        meta = Meta(**values)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no checkpoint (meta.json is missing: not a checkpoint folder, or cut off while writing)"
        ) from None
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder}/meta.json: not a checkpoint's description ({error})") from None
    if meta.format != FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {meta.format}; this version reads format {FORMAT}"
        )
    state = folder / "state.pt"
    size = state.stat().st_size if state.exists() else 0
    if size != meta.state_bytes:
        raise CheckpointError(f"{state}: {size} bytes, expected {meta.state_bytes}: the copy is incomplete")
    if _crc32(state) != meta.state_crc32:
        raise CheckpointError(f"{state}: checksum differs from meta.json: the file is damaged")
    return meta


def check_fits(folder: Path, config: RunConfig, shards: Shards) -> Meta:
    """Make sure that a run of `config` on `shards` can go on from a checkpoint.

    Raises:
        CheckpointError: it is damaged, or was made by another model, with other settings, or on other data.
    """
    meta = read_meta(folder)
    theirs = run_config(folder, meta)
    differences = model_differences(theirs, config, ignored=("backbone.weights",))
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
    if theirs.seed != config.seed:
        raise CheckpointError(f"{folder}: made with seed {theirs.seed}, the run has {config.seed}")
    before, now = theirs.optim.ema_decay, config.optim.ema_decay
    if (before is None) != (now is None):
        raise CheckpointError(f"{folder}: optim.ema_decay was {before}, the run has {now}")
    return meta


def run_config(folder: Path, meta: Meta) -> RunConfig:
    """Return the configuration of a checkpoint; settings that were added since then have their default.

    Raises:
        CheckpointError: it is not a configuration of this version.
    """
    try:
        return from_dict(meta.config)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: its configuration is not one of this version: {error}") from None


def model_differences(theirs: RunConfig, ours: RunConfig, ignored: tuple[str, ...] = ()) -> list[str]:
    """Return a phrase for each setting of the model that differs; `ignored` are beginnings of settings' names."""
    there, here = (flatten(to_dict(config)["model"]) for config in (theirs, ours))
    return [
        f"model.{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name) and not name.startswith(ignored)
    ]


def restore(folder: Path, training: Training, shards: Shards) -> Meta:
    """Load a checkpoint into `training`, which goes on where it stopped.

    Raises:
        CheckpointError: as `check_fits`.
    """
    meta = check_fits(folder, training.config, shards)
    state = _load_state(folder, training.world.device)
    training.detector.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    if training.ema is not None:
        training.ema.model.load_state_dict(state["ema"])
        training.ema.num_updates = state["ema_updates"]
    if state["scaler"] and training.scaler.is_enabled():  # a resumed run may have another precision
        training.scaler.load_state_dict(state["scaler"])
    training.skipped_steps = state["skipped_steps"]
    training.corrupt_log = CorruptSampleLog.from_dicts(state["corrupt_samples"])
    training.position = state["position"]
    return meta


def load_for_inference(folder: Path, device: torch.device | None = None) -> Loaded:
    """The trained model of a checkpoint, ready to predict.

    Raises:
        CheckpointError: the folder holds no usable checkpoint.
    """
    meta = read_meta(folder)
    config = run_config(folder, meta)
    device = device or torch.device("cpu")
    # the weights come from the checkpoint: nothing is fetched for the backbone
    backbone = replace(config.model.backbone, weights=None)
    model = zoo.build(replace(config.model, backbone=backbone))
    state = _load_state(folder, device)
    _load_weights(model.detector, state["ema"] or state["model"], folder)
    model.detector.to(device).eval()
    return Loaded(config, model, make_label_map(meta.categories, config.data.label_map))


def newest(folders: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The whole checkpoint with the highest position, and what is wrong with those that are not whole."""
    whole: list[tuple[int, Path]] = []
    faults: list[str] = []
    for folder in folders:
        try:
            whole.append((read_meta(folder).position, folder))
        except CheckpointError as error:
            faults.append(str(error))
    return (max(whole)[1] if whole else None), faults


def _load_state(folder: Path, device: torch.device) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "state.pt", map_location=device, weights_only=True)
    return state


def _load_weights(detector: nn.Module, weights: Mapping[str, Any], folder: Path) -> None:
    try:
        detector.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: the weights do not fit the model of its configuration: {error}"
        ) from None


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
