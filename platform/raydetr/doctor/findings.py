"""What the doctor says: findings with a level, the places they were seen at, and a remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
