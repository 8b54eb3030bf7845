"""Check what the configurations of several papers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from detrs.criterion import LossConfig


def require_num_classes(num_classes: int | None) -> int:
    """Return the number of classes.

    Raises:
        ValueError: it is missing, or less than 1.
    """
    if num_classes is None or num_classes < 1:
        raise ValueError(
            f"model.num_classes: {num_classes}; give the number of classes of the data, at least 1"
        )
    return num_classes


def require_sizes(config: Any) -> None:
    """Check the sizes of an architecture: positive numbers, and a width that can be divided.

    Raises:
        ValueError: a number is not positive, or the width cannot be divided among the heads and among the coordinates
            of a sine encoding.
    """
    for name in ("num_heads", "num_decoder_layers", "num_queries"):
        if getattr(config, name) < 1:
            raise ValueError(f"model.{name}: {getattr(config, name)} is not positive")
    if config.hidden_dim % config.num_heads or config.hidden_dim % 4:
        raise ValueError(
            f"model.hidden_dim: {config.hidden_dim} is not a multiple of 4 and of num_heads, {config.num_heads}"
        )


def require_loss(loss: LossConfig, *kinds: str) -> None:
    """Check that the class loss fits the class head, and that no setting of another loss is set.

    Raises:
        ValueError: it does not, or a setting has no effect.
    """
    if loss.kind not in kinds:
        head = "has a no-object class" if "cross_entropy" in kinds else "has no no-object class"
        raise ValueError(
            f"model.loss.kind: {loss.kind!r}, but the class head {head}: use {' or '.join(kinds)}"
        )
    ignored = ("alpha", "gamma") if loss.kind == "cross_entropy" else ("no_object_weight",)
    require_default(loss, ignored, f"with model.loss.kind={loss.kind}", prefix="model.loss")


def require_default(config: Any, names: Sequence[str], where: str, prefix: str = "model") -> None:
    """Check that settings have their default where they have no effect.

    Args:
        config: a dataclass.
        names: of its fields.
        where: when they have no effect, for the message.
        prefix: of the names, for the message.

    Raises:
        ValueError: one has another value.
    """
    defaults = {field.name: field.default for field in fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"{prefix}.{name}: {getattr(config, name)!r} has no effect {where}: omit it")
