"""The result of an examination, as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raydetr.doctor.findings import LEVELS, Example, Finding, counted, may_start
from raydetr.doctor.scale import SMALL, TINY
from raydetr.doctor.split import Examined
from raydetr.doctor.statistics import Statistics
from raydetr.doctor.target import Target

FORMAT_VERSION = 1
EXAMPLES_IN_TEXT = 3
WIDTH = 110  # characters


@dataclass(frozen=True)
class Report:
    """What was found in the data, the gravest first."""

    target: Target
    examined: tuple[Examined, ...]
    statistics: tuple[Statistics, ...]  # of each
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def may_start(self) -> bool:
        """Whether training may start."""
        return may_start(self.findings)

    def verdict(self) -> str:
        """The result in one line."""
        if not self.findings:
            return "training may start: nothing was found"
        counts = [(level, sum(found.level == level for found in self.findings)) for level in LEVELS]
        listing = ", ".join(counted(count, level) for level, count in counts if count)
        return f"training {'may' if self.may_start else 'must not'} start: {listing}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; docs/data.md tells the fields."""
        return {
            "format_version": FORMAT_VERSION,
            "may_start": self.may_start,
            "seconds": round(self.seconds, 3),
            "target": self.target.to_dict(),
            "splits": [statistics.to_dict() for statistics in self.statistics],
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def to_text(self) -> str:
        """A table of numbers, the findings, the verdict."""
        parts = [table(summary_rows(self))] if self.statistics else []
        parts += [_finding_text(finding) for finding in self.findings]
        return "\n\n".join([*parts, self.verdict()])


def summary_rows(report: Report) -> list[list[str]]:
    """The numbers of the splits, a column for each; the first column says what they are."""
    columns = [_column(statistics) for statistics in report.statistics]
    heads = ["", *(statistics.name for statistics in report.statistics)]
    return [heads, *([name, *(column[name] for column in columns)] for name in columns[0])]


def table(rows: list[list[str]]) -> str:
    """Rows as lines, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _column(numbers: Statistics) -> dict[str, str]:
    per_image, classes = numbers.objects_per_image, numbers.classes
    return {
        "images": f"{numbers.images:,}",
        "  without objects": f"{numbers.empty_images:,}",
        "  that cannot be used": f"{numbers.unusable_images:,}",
        "  width": _spread(numbers.widths),
        "  height": _spread(numbers.heights),
        "objects": f"{numbers.objects:,}",
        "  in an image": f"{per_image['p50']}, 90% {per_image['p90']}, max {per_image['max']}",
        f"  with a side under {TINY} pixels": _percent(numbers.tiny_share),
        f"  with a side under {SMALL} pixels": _percent(numbers.small_share),
        "crowds": f"{numbers.crowds:,}",
        "boxes that are not used": f"{numbers.unusable_boxes:,}",
        "classes": f"{classes['contiguous']}",
        "  with label_map=category_id": "-"
        if classes["category_id"] is None
        else f"{classes['category_id']}",
    }


def _spread(values: dict[str, int]) -> str:
    if values["min"] == values["max"]:
        return str(values["min"])
    return f"{values['min']} to {values['max']}, median {values['median']}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _finding_text(finding: Finding) -> str:
    lines = [f"{finding.level:8} {', '.join(finding.splits)}: {finding.text}"]
    lines += [_shortened(example) for example in finding.examples[:EXAMPLES_IN_TEXT]]
    lines.append(f"do: {finding.remedy}")
    return ("\n" + 9 * " ").join(lines) + f"  [{finding.code}]"


def _shortened(example: Example) -> str:
    text = str(example)
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
