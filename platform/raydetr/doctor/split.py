"""One of the data sets that are examined, with what its samples showed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from raydetr.doctor.findings import MAX_EXAMPLES, Example, Place
from raydetr.doctor.reading import as_record, read_anyway
from raydetr.doctor.scan import Facts
from raydetr.shards.reader import Shards

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Split:
    """A data set under its short name. The first of several is that which is trained on."""

    name: str
    shards: Shards
    is_trained_on: bool

    def place(self, sample: int, annotations: tuple[int, ...] = ()) -> Place:
        """Where a sample is, in the user's terms."""
        image_id = int(self.shards.samples["image_id"][sample])
        read = read_anyway(self.shards, sample)
        file_name = str(read.record.get("file_name", "")) if read else ""
        return Place(self.name, sample, image_id, file_name, annotations)

    def example(self, sample: int, detail: str = "") -> Example:
        """One sample as an example."""
        return Example((self.place(int(sample)),), detail)

    @property
    def widths(self) -> Floats:
        """Of the images, [n] in pixels, as their records say."""
        return self.shards.samples["width"].astype(np.float64)

    @property
    def heights(self) -> Floats:
        """Of the images, [n] in pixels, as their records say."""
        return self.shards.samples["height"].astype(np.float64)


@dataclass(frozen=True)
class Examined:
    """A split and what was seen in its samples."""

    split: Split
    facts: Facts

    @property
    def name(self) -> str:
        """Of the split."""
        return self.split.name

    @cached_property
    def sizes(self) -> Floats:
        """Width and height of the image of each object, [m, 2] in pixels."""
        samples = self.facts.objects["sample"]
        return np.stack([self.split.widths[samples], self.split.heights[samples]], axis=1)

    @cached_property
    def visible(self) -> Floats:
        """The sides of the part of each box that its image shows, [m, 2] in pixels; not positive: nothing."""
        boxes = self.facts.objects["box"]
        sides: Floats = np.minimum(boxes[:, :2] + boxes[:, 2:], self.sizes) - np.maximum(boxes[:, :2], 0)
        return sides

    @cached_property
    def is_known(self) -> Flags:
        """Whether each object has a category of the list, [m]."""
        ids = [category["id"] for category in self.split.shards.manifest.categories]
        known: Flags = np.isin(self.facts.objects["category_id"], ids)
        return known

    @cached_property
    def is_usable(self) -> Flags:
        """Whether training uses each object, [m]: no crowd, a known category, a box with area in the image."""
        objects = self.facts.objects
        with np.errstate(invalid="ignore"):
            seen = (self.visible > 0).all(axis=1)
        usable: Flags = objects["is_box"] & ~objects["is_crowd"] & self.is_known & seen
        return usable

    @cached_property
    def objects_per_image(self) -> npt.NDArray[np.int64]:
        """Usable objects of each image, [n]."""
        return np.bincount(
            self.facts.objects["sample"][self.is_usable], minlength=self.split.shards.num_samples
        )

    def examples(
        self, chosen: Sequence[int] | npt.NDArray[np.int64], *, boxes: bool = True
    ) -> tuple[Example, ...]:
        """Some of the images that have the objects with these numbers.

        Args:
            chosen: numbers of objects.
            boxes: tell the boxes of the first object in each image.
        """
        by_sample: dict[int, list[int]] = {}
        for number in chosen:
            by_sample.setdefault(int(self.facts.objects["sample"][number]), []).append(int(number))
            if len(by_sample) > MAX_EXAMPLES:
                break
        found = []
        for sample, numbers in list(by_sample.items())[:MAX_EXAMPLES]:
            positions = tuple(int(self.facts.objects["position"][number]) for number in numbers)
            place = self.split.place(sample, positions)
            found.append(Example((place,), self._box_text(numbers[0]) if boxes else ""))
        return tuple(found)

    def _box_text(self, number: int) -> str:
        row = self.facts.objects[number]
        if not row["is_box"]:
            return f"annotation {row['position']} has the box {self._stated(row)}"
        width, height = self.sizes[number]
        box = ", ".join(f"{side:g}" for side in row["box"].round(2))
        return f"box [{box}] in {width:g}x{height:g}"

    def _stated(self, row: np.void) -> str:
        """What the record has in place of a box."""
        read = read_anyway(self.split.shards, int(row["sample"]))
        record = as_record(read.annotations[row["position"]]) if read else {}
        return f"{record['bbox']!r:.60}" if "bbox" in record else "missing"
