"""Describe findings: what was found at which level, examples of it, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from raydetr.config import LabelMapKind, RunConfig
from raydetr.data.corrupt import default_max_corrupt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

Level = Literal["error", "warning", "note"]

LEVELS: tuple[Level, ...] = ("error", "warning", "note")  # With an error, training must not start
MAX_EXAMPLES = 4

# --- Findings ---


@dataclass(frozen=True)
class Place:
    """A sample, and those of its annotations that a finding is about."""

    split: str
    sample: int  # Number in its split
    image_id: int
    file_name: str  # "" where the sample cannot be read
    annotations: tuple[int, ...] = ()  # Their positions in the sample

    def __str__(self) -> str:
        return f"image {self.image_id}" + (f" ({self.file_name})" if self.file_name else "")


@dataclass(frozen=True)
class Example:
    """One place, or a pair of places, and what was found there."""

    places: tuple[Place, ...]
    detail: str = ""

    def __str__(self) -> str:
        names = [f"{place.split} {place}" for place in self.places]
        where = " and ".join(names) if len(names) > 1 else str(self.places[0])
        return f"{where}: {self.detail}" if self.detail else where


@dataclass(frozen=True)
class Finding:
    """A problem of the data that its user should know before training."""

    code: str  # A stable name
    level: Level
    splits: tuple[str, ...]
    text: str  # What was found, with numbers
    remedy: str
    count: int = 1  # How often it was found
    examples: tuple[Example, ...] = ()

    def line(self) -> str:
        """Return the finding as one line, without examples."""
        return f"{', '.join(self.splits)}: {self.text}: {self.remedy}"


# --- The training that the data is examined for ---


@dataclass(frozen=True)
class TrainingTarget:
    """The settings of a training that matter to its data. The default is the resize of the official recipes."""

    short_side: int | None = 800  # Pixels after the resize of the evaluation; None: images keep their size
    max_side: int = 1333  # Pixels
    recipe: str | None = None  # None: only the resize is known
    num_queries: int | None = None
    batch_size: int | None = None
    label_map: LabelMapKind | None = None
    max_corrupt: int | None = 0  # Corrupt samples that a run tolerates in all splits; None: the run's default

    @staticmethod
    def from_config(config: RunConfig) -> TrainingTarget:
        """Return the target of a run with this configuration."""
        resize = config.data.val_transform
        return TrainingTarget(
            short_side=resize.short_sides[0] if resize.short_sides else None,
            max_side=resize.max_side,
            recipe=config.recipe,
            num_queries=config.model.num_queries,
            batch_size=config.data.batch_size,
            label_map=config.data.label_map,
            max_corrupt=0 if config.data.on_corrupt == "raise" else config.data.max_corrupt,
        )

    def scale_factors(self, sizes: Floats) -> Floats:
        """Return the factors [n] by which the resize scales images of these sizes, [n, 2] in pixels."""
        if self.short_side is None:
            return np.ones(len(sizes))
        short, long = sizes.min(axis=1), sizes.max(axis=1)
        factors: Floats = np.minimum(self.short_side / short, self.max_side / long)
        return factors

    def tolerates(self, num_corrupt: int, num_samples: int) -> bool:
        """Return whether a run on `num_samples` samples continues with `num_corrupt` corrupt ones."""
        limit = default_max_corrupt(num_samples) if self.max_corrupt is None else self.max_corrupt
        return num_corrupt <= limit

    def describe_resize(self) -> str:
        """Describe the resize in words."""
        if self.short_side is None:
            return "at the images' own size"
        return f"at a short side of {self.short_side} pixels, at most {self.max_side}"
