"""Read checkpoint files of other programs, safely and with clear errors, and load official ones."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, _weights_only_unpickler, nn

from detrs.official_names import CLASS_DEPENDENT, from_official, official_names, recognize_architecture
from detrs.zoo import ModelConfig

# Raised by torch.load for files that are truncated or not checkpoints
UNREADABLE = (
    pickle.UnpicklingError,
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    AttributeError,
    TypeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    RecursionError,
    struct.error,
)

# What a weight can be: of the other types none can be computed with on every device
_TYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
MAX_VALUES = (
    2**31
)  # of a state dict; the largest official one has 2e8. A few bytes in a file can declare any number
MAX_NAME = 200  # characters of a parameter's name


@dataclass(frozen=True)
class OfficialFile:
    """The weights in an official checkpoint file."""

    path: Path
    weights: dict[str, Tensor]
    omitted: list[str]  # classes whose objects were not loaded, because they could run code
    ema_model: Any  # as it is in the file; None if it is not

    def ema_weights(self) -> dict[str, Tensor]:
        """Return the exponential moving average of the weights.

        Raises:
            ValueError: there is none, or it is not a state dict.
        """
        return to_state_dict(self.ema_model, self.path, "under 'ema_model'")


class _Omitted:
    """Replaces the class of an object that is not loaded; it accepts any arguments and any state."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_official(path: str | Path) -> OfficialFile:
    """Read the weights from an official checkpoint file, which also holds arguments and optimizer states.

    Only tensors and plain values are loaded. Objects of any other class, such as a path in the arguments, are omitted.

    Raises:
        ValueError: there is no such file, it is not a valid checkpoint, or there is no state dict in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of an official checkpoint")
    omitted: list[str] = []
    try:
        with warnings.catch_warnings(action="ignore"):  # about other versions of the format
            omitted = sorted(_unsafe_classes(path))
            stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
                (type(name.rpartition(".")[2], (_Omitted,), {}), name) for name in omitted
            ]
            with torch.serialization.safe_globals(stand_ins):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if omitted:
            raise ValueError(
                f"{path}: cannot be read without running code ({', '.join(map(_shown, omitted))}): save its weights "
                "alone, as {'model': state_dict}"
            ) from None
        raise ValueError(
            f"{path}: cannot be read as a checkpoint of tensors and plain arguments ({unreadable_because(error)}): "
            "is it a .pth file, and is the download complete?"
        ) from None
    top = content if isinstance(content, Mapping) else {}
    weights = to_state_dict(top.get("model", content), path, "at the top level or under 'model'")
    return OfficialFile(path, weights, omitted, top.get("ema_model"))


def _unsafe_classes(path: Path) -> set[str]:
    """Return the classes and functions in a checkpoint that `torch.load` refuses to use, by their full names."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\3\4":
            return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        # The format before torch 1.6, of many official files: pickles of a magic number, a version, the byte order and
        # the checkpoint, and then the values of the tensors
        file.seek(0)
        found = [_weights_only_unpickler.get_globals_in_pkl(file) for _ in range(4)]
    allowed: set[str] = set(_weights_only_unpickler._get_allowed_globals())
    return set[str]().union(*found) - allowed


def unreadable_because(error: BaseException) -> str:
    """Return the first line of a message of torch, without colors and addresses in memory."""
    if isinstance(error, EOFError):
        return "it ends too early"
    lines = re.sub(r"\x1b\[[0-9;]*m| at 0x[0-9a-f]+", "", str(error)).strip().splitlines()
    return _shown(lines[0]) if lines else type(error).__name__


def to_state_dict(state: Any, path: str | Path, place: str) -> dict[str, Tensor]:
    """Verify that what was found at a place of a file is a state dict of plain tensors; omit the prefix "module.".

    Raises:
        ValueError: it is not; the message has the path, the place and the first wrong name.
    """
    if not isinstance(state, Mapping) or not state:
        found = "it is empty" if isinstance(state, Mapping) else f"found {type(state).__name__}"
        raise ValueError(f"{path}: no state dict in this file {place}: {found}")
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            raise ValueError(
                f"{path}: no state dict in this file {place}: {name!r:.60} is no parameter's name"
            )
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: no state dict in this file {place}: {name!r} is {type(value).__name__}"
            )
        if value.layout != torch.strided or value.dtype not in _TYPES or value.is_nested or value.is_meta:
            raise ValueError(
                f"{path}: {name} is no plain tensor of numbers (type {value.dtype}, layout {value.layout}, device "
                f"{value.device}): save the weights as float32"
            )
    num_values = sum(value.numel() for value in state.values())
    if num_values > MAX_VALUES:
        raise ValueError(f"{path}: {num_values:,} values are more than any of these models has")
    weights = {name.removeprefix("module."): value.detach() for name, value in state.items()}
    if len(weights) < len(state):
        twice = next(name for name in weights if {name, f"module.{name}"} <= state.keys())
        raise ValueError(f"{path}: {twice} occurs twice, with and without 'module.'")
    return weights


def _shown(text: str) -> str:
    """Return text of a file as a part of a sentence."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:MAX_NAME]
    )


def require_finite(weights: Mapping[str, Tensor], source: object) -> None:
    """Check that all weights are finite.

    Raises:
        ValueError: a tensor has NaN or infinite values; the message names it.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            number = int((~value.isfinite()).sum())
            raise ValueError(
                f"{source}: {number} of the {value.numel()} values of {name} are NaN or infinite: use an earlier "
                "checkpoint"
            )


def load_official(detector: nn.Module, config: ModelConfig, path: str | Path) -> list[str]:
    """Load an official checkpoint; return our names of the tensors that were not loaded.

    These are the class heads and the label embedding, if the checkpoint has another number of classes.

    Raises:
        ValueError: the file is not a checkpoint of this model; the message names what was found.
    """
    official, own = read_official(path).weights, detector.state_dict()
    require_finite(official, path)
    architecture = recognize_architecture(official)
    if architecture != config.architecture:
        raise ValueError(
            f"{path}: a checkpoint of {architecture or 'no known architecture'}, not of {config.architecture}"
        )
    names = official_names(config, own)
    heads = [name for name in own if CLASS_DEPENDENT.fullmatch(name)]
    not_loaded = [name for name in heads if _differs(official, names[name], own[name])]
    for name in not_loaded:
        official |= dict.fromkeys(names[name], own[name])
    detector.load_state_dict(from_official(config, official, own))
    return not_loaded


def _differs(official: Mapping[str, Tensor], names: tuple[str, ...], own: Tensor) -> bool:
    """Return whether the tensor of the checkpoint differs only in the number of classes."""
    given = official.get(names[0])
    return given is not None and given.shape != own.shape and given.shape[1:] == own.shape[1:]
