"""What the doctor says: findings with a level, the places they were seen at, and a remedy.

What the data is to be trained with, as far as it matters to the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from raydetr.config import LabelMapKind, RunConfig
from raydetr.data.corrupt import default_max_corrupt

Level = Literal["fault", "warning", "note"]

LEVELS: tuple[Level, ...] = ("fault", "warning", "note")  # a fault: training must not start
MAX_EXAMPLES = 4


@dataclass(frozen=True)
class Place:
    """A sample, and which of its annotations are meant."""

    split: str
    sample: int  # number in its split
    image_id: int
    file_name: str  # "" where the sample cannot be read
    annotations: tuple[int, ...] = ()  # their positions in the sample

    def __str__(self) -> str:
        return f"image {self.image_id}" + (f" ({self.file_name})" if self.file_name else "")


@dataclass(frozen=True)
class Example:
    """One place, or a pair of them, and what is seen there."""

    places: tuple[Place, ...]
    detail: str = ""

    def __str__(self) -> str:
        if len(self.places) == 1:
            where = str(self.places[0])
        else:
            where = " and ".join(f"{place.split} {place}" for place in self.places)
        return f"{where}: {self.detail}" if self.detail else where


@dataclass(frozen=True)
class Finding:
    """Something that the user of the data should know before it is trained on."""

    code: str  # a stable name
    level: Level
    splits: tuple[str, ...]
    text: str  # what was found, with numbers
    remedy: str
    count: int  # how often
    examples: tuple[Example, ...] = ()

    def line(self) -> str:
        """The finding in one line, without examples."""
        return f"{', '.join(self.splits)}: {self.text}: {self.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "code": self.code,
            "level": self.level,
            "splits": list(self.splits),
            "count": self.count,
            "text": self.text,
            "remedy": self.remedy,
            "examples": [
                {
                    "detail": example.detail,
                    "places": [
                        {"split": place.split, "sample": place.sample, "image_id": place.image_id,
                         "file_name": place.file_name, "annotations": list(place.annotations)}
                        for place in example.places
                    ],
                }
                for example in self.examples
            ],
        }  # fmt: skip


def may_start(findings: Iterable[Finding]) -> bool:
    """Whether training may start: nothing found is a fault."""
    return all(finding.level != "fault" for finding in findings)


def by_level(findings: Iterable[Finding]) -> list[Finding]:
    """The gravest first; in each level as found."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def counted(count: int, singular: str, plural: str | None = None) -> str:
    """`1 image`, `1,204 images`."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def listed(words: Sequence[object], most: int = 8) -> str:
    """`a, b, c and 4 more`."""
    shown = ", ".join(map(str, words[:most]))
    return f"{shown} and {len(words) - most} more" if len(words) > most else shown


Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Target:
    """The resize of the evaluation, the number of queries, the batch. By default that of the official recipes."""

    short_side: int | None = 800  # pixels; None: images keep their size
    max_side: int = 1333  # pixels
    recipe: str | None = None  # None: nothing is known but the scale
    num_queries: int | None = None
    batch_size: int | None = None
    label_map: LabelMapKind | None = None
    max_corrupt: int | None = 0  # samples in all splits that may be damaged; None: as the training has it

    @staticmethod
    def of(config: RunConfig) -> Target:
        """What a run's configuration says."""
        resize = config.data.val_transform
        return Target(
            short_side=resize.short_sides[0] if resize.short_sides else None,
            max_side=resize.max_side,
            recipe=config.recipe,
            num_queries=config.model.num_queries,
            batch_size=config.data.batch_size,
            label_map=config.data.label_map,
            max_corrupt=0 if config.data.on_corrupt == "raise" else config.data.max_corrupt,
        )

    def factors(self, widths: Floats, heights: Floats) -> Floats:
        """By how much images of these sizes, each [n] in pixels, are enlarged."""
        if self.short_side is None:
            return np.ones(len(widths))
        short, long = np.minimum(widths, heights), np.maximum(widths, heights)
        return np.minimum(self.short_side / short, self.max_side / long)

    def tolerates(self, num_corrupt: int, num_samples: int) -> bool:
        """Whether a training on so many samples goes on with so many damaged ones."""
        limit = default_max_corrupt(num_samples) if self.max_corrupt is None else self.max_corrupt
        return num_corrupt <= limit

    def scale(self) -> str:
        """The resize in words."""
        if self.short_side is None:
            return "at the images' own size"
        return f"at a short side of {self.short_side} pixels, at most {self.max_side}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"recipe": self.recipe, "short_side": self.short_side, "max_side": self.max_side,
                "num_queries": self.num_queries, "batch_size": self.batch_size,
                "label_map": self.label_map, "max_corrupt": self.max_corrupt}  # fmt: skip
