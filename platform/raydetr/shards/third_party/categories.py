"""The categories of shards that others wrote: from a file, or the labels that occur."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from raydetr.shards.coco import Problems, Record


def read_categories(path: Path) -> list[Record]:
    """COCO's records of the categories in a file, in the order of their ids.

    Args:
        path: a COCO file, a JSON list of {"id", "name"}, or one of names, numbered from 0.

    Raises:
        ValueError: it holds none.
    """
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    records: Any = data.get("categories") if isinstance(data, dict) else data
    if isinstance(records, list) and records and all(isinstance(name, str) for name in records):
        records = [{"id": number, "name": name} for number, name in enumerate(records)]
    records = records if isinstance(records, list) else []
    good = (
        bool(records)
        and all(isinstance(record, dict) for record in records)
        and all(type(record.get("id")) is int and record["id"] >= 0 for record in records)
        and all(isinstance(record.get("name"), str) for record in records)
    )
    if not good or any(len({record[key] for record in records}) < len(records) for key in ("id", "name")):
        raise ValueError(
            f"{path}: holds no categories: a COCO file, a list of objects with id and name (each used once), or a "
            "list of names is needed"
        )
    return sorted(records, key=lambda record: int(record["id"]))


def categories_of(found: Counter[int | str], known: list[Record] | None, problems: Problems) -> list[Record]:
    """The categories, in the order of their ids; each label is an id or a name of one.

    Args:
        found: how often each label occurs.
        known: the categories of a file; None: those that occur, names in alphabetical order from 1.
        problems: where labels that fit none are noted.
    """
    if known is not None:
        usable = {value for record in known for value in (record["id"], record["name"])}
        for label in sorted(set(found) - usable, key=str):
            problems.add(
                f"the label {label!r} ({found[label]} objects) is not in the file of categories: add it"
            )
        return known
    names = sorted(label for label in found if isinstance(label, str))
    ids = sorted(label for label in found if isinstance(label, int))
    if names and ids:
        problems.add(
            f"labels are numbers ({ids[0]}, ...) and names ({names[0]!r}, ...): name all with --categories"
        )
    if ids and ids[0] < 0:
        problems.add(f"the label {ids[0]} is negative: number the categories from 0 or 1")
    return [{"id": number, "name": name} for number, name in enumerate(names, 1)] or [
        {"id": number, "name": str(number)} for number in ids
    ]
