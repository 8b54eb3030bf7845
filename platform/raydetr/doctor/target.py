"""What the data is to be trained with, as far as it matters to the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raydetr.config import RunConfig
from raydetr.data.corrupt_log import default_budget
from raydetr.shards.manifest import LabelMapKind

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
    max_damaged: int | None = 0  # samples in all splits that may be damaged; None: as the training has it

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
            max_damaged=0 if config.data.on_damage == "raise" else config.data.max_damaged,
        )

    def factors(self, widths: Floats, heights: Floats) -> Floats:
        """By how much images of these sizes, each [n] in pixels, are enlarged."""
        if self.short_side is None:
            return np.ones(len(widths))
        short, long = np.minimum(widths, heights), np.maximum(widths, heights)
        return np.minimum(self.short_side / short, self.max_side / long)

    def tolerates(self, num_damaged: int, num_samples: int) -> bool:
        """Whether a training on so many samples goes on with so many damaged ones."""
        limit = default_budget(num_samples) if self.max_damaged is None else self.max_damaged
        return num_damaged <= limit

    def scale(self) -> str:
        """The resize in words."""
        if self.short_side is None:
            return "at the images' own size"
        return f"at a short side of {self.short_side} pixels, at most {self.max_side}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"recipe": self.recipe, "short_side": self.short_side, "max_side": self.max_side,
                "num_queries": self.num_queries, "batch_size": self.batch_size,
                "label_map": self.label_map, "max_damaged": self.max_damaged}  # fmt: skip
