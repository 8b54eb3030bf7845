"""Write and read checkpoints: folders, on a disk or at a URL, with `state.pt` (the state) and `meta.json`.

`meta.json`, the description, is written last and at once, and has the size and checksum of `state.pt`: an interrupted
write or an incomplete copy is never taken for a complete checkpoint.

The checkpoints of a run are in `checkpoints/POSITION/` of its folder. After an evaluation at its position, a checkpoint
also has `metrics.json`. `find` accepts a run in place of a checkpoint.
"""

from __future__ import annotations

import errno
import io
import json
import platform
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from detrs import zoo
from detrs.checkpoints import UNREADABLE, require_finite, to_state_dict, unreadable_because
from raydetr.config import ConfigError, RunConfig, flatten, from_dict, to_dict
from raydetr.console import print_status
from raydetr.data.corrupt import CorruptSampleLog
from raydetr.data.order import ORDER_VERSION
from raydetr.shards.manifest import LabelMap, make_label_map
from raydetr.shards.reader import Shards
from raydetr.shards.validation import check_categories
from raydetr.store.folders import Folder, local_file, open_folder, remove_folder, write_file
from raydetr.store.retry import RemoteError
from raydetr.training.loop import Training
from raydetr.user_files import read_file

FORMAT = 2
CHECKPOINTS = "checkpoints"
METRICS = "metrics.json"
BEST, LAST = "best", "last"  # names that stand for a checkpoint of a run: RUN/best

# Errors of network file systems
OUTAGES = (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH)

State = dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the folder and the problem."""


@dataclass(frozen=True)
class Meta:
    """Content of `meta.json`: configuration, data and progress of a checkpoint, and how to verify its state."""

    config: dict[str, Any]
    categories: list[dict[str, Any]]  # COCO categories of the training data
    fingerprint: str  # of the training data
    epoch: int  # completed epochs
    position: int
    state_bytes: int
    state_crc32: int
    format: int = FORMAT
    order: int = 1  # version of the order of samples; missing in the first checkpoints
    versions: dict[str, str] = field(default_factory=dict)  # of the programs that wrote it


_META = TypeAdapter(Meta)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its trained weights (the EMA if there is one), in eval mode."""

    config: RunConfig
    model: zoo.Model
    label_map: LabelMap


def capture(training: Training, shards: Shards) -> tuple[State, dict[str, Any]]:
    """Copy the state of `training`, trained on `shards`, to the memory of the host.

    Returns:
        The arguments `state` and `meta` of `write`. Training may continue before they are written.
    """
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
        "epoch": min(training.position // training.num_samples, training.config.optim.epochs),
        "position": training.position,
        "order": ORDER_VERSION,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    copied: State = tree_map(lambda x: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x, state)
    return copied, meta


def write(folder: Folder, state: Mapping[str, Any], meta: Mapping[str, Any]) -> int:
    """Write `state` and its description into `folder`, and verify them; `meta` has the fields of Meta without size and
    checksum.

    Returns:
        The size of the state in bytes.

    Raises:
        OSError: the files cannot be written, or differ when they are read again.
    """
    # The order makes the write atomic: the state first, then meta.json under its final name. A process that is killed
    # in between leaves a folder without meta.json, which is no checkpoint. The size and the checksum detect what the
    # order cannot: a state that was truncated or changed later, for example by an incomplete copy.
    (folder / "meta.json").unlink(missing_ok=True)
    content = io.BytesIO()
    torch.save(state, content)
    complete = Meta(**meta, state_bytes=content.tell(), state_crc32=zlib.crc32(content.getbuffer()))
    path = folder / "state.pt"
    write_file(path, content.getbuffer())
    if _crc32(path) != complete.state_crc32:
        raise OSError(
            errno.EIO, f"{path}: differs from what was written: the disk or its connection is faulty"
        )
    write_file(folder / "meta.json", json.dumps(asdict(complete), indent=1, allow_nan=False).encode())
    return complete.state_bytes


def folder_of(run: Folder, position: int) -> Folder:
    """Return the folder of the checkpoint of a run at a position."""
    return run / CHECKPOINTS / f"{position:012d}"


def complete_checkpoints(run: Folder) -> list[Folder]:
    """Return the folders of a run's checkpoints, the newest first. They may have been corrupted later."""
    folder = run / CHECKPOINTS
    if isinstance(folder, Path):  # `glob` would take a folder that cannot be read for an empty one
        try:
            found: list[Folder] = [path for path in folder.iterdir() if (path / "meta.json").exists()]
        except FileNotFoundError:
            return []
    else:
        found = [path.parent for path in folder.glob("*/meta.json")]
    return sorted((path for path in found if path.name.isdecimal()), reverse=True)


def print_skipped(message: str) -> None:
    """Print why a checkpoint is passed over."""
    print_status(f"skipped: {message}")


def newest_valid(run: Folder, on_skipped: Callable[[str], None] = print_skipped) -> Folder | None:
    """Return the newest checkpoint of a run whose files are as they were written; None if there is none.

    Restarts, resumes and other commands choose by this function, or by `best_valid`.

    Args:
        run: folder of the run.
        on_skipped: is called with a message for each newer checkpoint that is corrupt.
    """
    return _first_valid(complete_checkpoints(run), on_skipped)


def best_valid(run: Folder) -> Folder | None:
    """Return the checkpoint with the highest AP of those whose files are as they were written; None if there is none.

    A line is printed for each better one that is corrupt.
    """
    return _first_valid(_by_ap(run), print_skipped)


def _first_valid(folders: Iterable[Folder], on_skipped: Callable[[str], None]) -> Folder | None:
    for folder in folders:
        try:
            read_meta(folder)
        except CheckpointError as error:
            on_skipped(str(error))
        else:
            return folder
    return None


def position_of(folder: Folder) -> int:
    """Return the position of a checkpoint of a run."""
    return int(folder.name)


def is_complete(folder: Folder, config: RunConfig) -> bool:
    """Return whether a checkpoint is the last of a run with this configuration, with its evaluation."""
    return has_reached(folder, config.optim.epochs)


def has_reached(folder: Folder, epoch: int) -> bool:
    """Return whether a checkpoint is that of an epoch, or of a later one, with its evaluation."""
    return read_description(folder).epoch >= epoch and bool(read_metrics(folder))


def take_over(run: Path, source: Folder) -> Path:
    """Make a copy of another run's checkpoint the newest one of a run; return its folder.

    The run's own checkpoints at this position and after it are removed. Repeating it changes nothing.

    Raises:
        CheckpointError: the other checkpoint is corrupt, or not there.
        OSError: it cannot be read, or the copy cannot be written.
    """
    read_meta(source)
    # Beside the others, until it is complete: the disk may be full
    copy = run / CHECKPOINTS / "taken-over"
    target = copy.with_name(source.name)
    remove_folder(copy)
    for name in ("state.pt", METRICS, "meta.json"):
        with suppress(FileNotFoundError):  # a checkpoint without an evaluation has no metrics
            write_file(copy / name, (source / name).read_bytes())
    for folder in complete_checkpoints(run):
        if position_of(folder) >= position_of(source):
            remove_folder(folder)
    remove_folder(target)  # of a process that was killed before it was complete
    copy.rename(target)
    return target


def best(run: Folder) -> Folder | None:
    """Return the checkpoint of a run with the highest AP, of equal ones the newest; None without an evaluation.

    Its files are not verified.
    """
    return next(iter(_by_ap(run)), None)


def _by_ap(run: Folder) -> list[Folder]:
    """Return the evaluated checkpoints of a run, the best first, of equal ones the newest."""
    scored = [(read_metrics(folder).get("AP", -1.0), folder) for folder in complete_checkpoints(run)]
    scored.sort(key=lambda pair: pair[0], reverse=True)  # stable: the newest are first
    return [folder for ap, folder in scored if ap >= 0]


def read_metrics(folder: Folder) -> dict[str, Any]:
    """Return the metrics of the evaluation at a checkpoint; empty without one."""
    try:
        metrics: dict[str, Any] = json.loads((folder / METRICS).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return metrics


def find(location: str | Path) -> Folder:
    """Return the folder of a checkpoint that a user names. Of a run, a corrupt one is passed over with a line.

    Args:
        location: folder or URL of a checkpoint; RUN/best or RUN/last; or RUN, which means its best one, or without an
            evaluation its last.

    Raises:
        CheckpointError: there is none.
    """
    path = open_folder(location)
    name, run = (path.name, path.parent) if path.name in (BEST, LAST) else (BEST, path)
    if (path / "meta.json").exists() or not (run / "config.yaml").exists():
        return path
    found = best_valid(run) if name == BEST else None
    found = found or (newest_valid(run) if name == LAST or run == path else None)
    if found is None:
        missing = "evaluated" if name == BEST and run != path else "complete"
        raise CheckpointError(f"{run}: this run has no {missing} checkpoint")
    return found


def read_description(folder: Folder) -> Meta:
    """Read the description of the checkpoint in `folder`, without reading its state.

    Raises:
        CheckpointError: the folder holds no checkpoint of this program.
    """
    try:
        description = folder / "meta.json"
        content = read_file(description) if isinstance(description, Path) else description.read_bytes()
        meta = _META.validate_json(content, strict=True)
        check_categories(meta.categories)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no checkpoint (meta.json is missing: writing was "
            "interrupted, or this is not a checkpoint folder, such as RUN/best or RUN/checkpoints/000000004800)"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and _is_outage(error):
            raise
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3]) or error
        raise CheckpointError(f"{folder}/meta.json: not the description of a checkpoint ({reason})") from None
    if meta.format != FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {meta.format}; this version reads format {FORMAT}"
        )
    return meta


def read_meta(folder: Folder) -> Meta:
    """Read the description of the checkpoint in `folder`, and verify its state by size and checksum.

    Raises:
        CheckpointError: the folder holds no checkpoint of this program, or one that is incomplete or corrupt.
    """
    meta = read_description(folder)
    state = folder / "state.pt"
    try:
        file = local_file(state)
        size = file.stat().st_size
        is_corrupt = size == meta.state_bytes and _crc32(file) != meta.state_crc32
        if is_corrupt and file != state:
            is_corrupt = _crc32(local_file(state, again=True)) != meta.state_crc32
    except FileNotFoundError:
        size, is_corrupt = 0, False
    except OSError as error:
        if error.errno != errno.EIO:  # of a bad sector; others may pass
            raise
        raise CheckpointError(f"{state}: cannot be read ({error.strerror})") from None
    if size != meta.state_bytes:
        raise CheckpointError(f"{state}: {size} bytes, expected {meta.state_bytes}: the copy is incomplete")
    if is_corrupt:
        raise CheckpointError(f"{state}: checksum differs from meta.json: the file is corrupt")
    return meta


def check_compatible(folder: Folder, config: RunConfig, shards: Shards) -> Meta:
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


def run_config(folder: Folder, meta: Meta) -> RunConfig:
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


def restore(folder: Folder, training: Training, shards: Shards) -> Meta:
    """Load a checkpoint into `training`, which then resumes at its position.

    Raises:
        CheckpointError: see `check_compatible`.
    """
    meta = check_compatible(folder, training.config, shards)
    state = _load_state(folder, training.world.device)
    _load_weights(training.detector, state["model"], folder)
    _load_optimizer(training, state["optimizer"], folder)
    if training.ema is not None:
        training.ema.model.load_state_dict(state["ema"])
        training.ema.num_updates = state["ema_updates"]
    if state["scaler"] and training.scaler.is_enabled():  # a run may resume in another precision
        training.scaler.load_state_dict(state["scaler"])
    training.skipped_steps = state["skipped_steps"]
    training.corrupt_log = CorruptSampleLog.from_dicts(state["corrupt_samples"])
    training.position = state["position"]
    # The evaluation came after the checkpoint
    rows = read_metrics(folder).get("corrupt_rows", [])
    training.corrupt_log.add(CorruptSampleLog.from_dicts(rows).rows)
    training.lacks_evaluation = training.is_at_evaluation() and not read_metrics(folder)
    return meta


def load_for_inference(folder: Folder, device: torch.device | None = None) -> LoadedModel:
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


def _load_state(folder: Folder, device: torch.device) -> dict[str, Any]:
    path = folder / "state.pt"
    try:
        # weights_only: unpickling anything else could run code from the file
        state = torch.load(local_file(path), map_location=device, weights_only=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path}: not the state of a checkpoint ({unreadable_because(error)})"
        ) from None
    if not isinstance(state, dict) or "model" not in state:
        raise CheckpointError(f"{path}: not the state of a checkpoint: it has no 'model'")
    return state


def _load_optimizer(training: Training, state: dict[str, Any], folder: Folder) -> None:
    """Load the moments of the optimizer; rates and weight decay are those of the run's configuration."""
    settings = [
        {name: value for name, value in group.items() if name != "params"}
        for group in training.optimizer.param_groups
    ]
    try:
        training.optimizer.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(
            f"{folder}: its optimizer groups the parameters in another way ({error}): optim.decay_norms_and_biases and "
            "model.backbone.num_frozen_stages cannot change when a run is resumed"
        ) from None
    for group, setting in zip(training.optimizer.param_groups, settings, strict=True):
        group.update(setting)


def _load_weights(detector: nn.Module, weights: Any, folder: Folder) -> None:
    try:
        state = to_state_dict(weights, str(folder), "under 'model' or 'ema'")
        require_finite(state, folder)
        detector.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: the weights do not fit the model of its configuration: {' '.join(str(error).split())[:500]}"
        ) from None


def _is_outage(error: OSError) -> bool:
    """Return whether the storage cannot be reached, which says nothing about the file."""
    return isinstance(error, RemoteError) or error.errno in OUTAGES


def _crc32(path: Folder) -> int:
    if not isinstance(path, Path):
        return zlib.crc32(path.read_bytes())
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
