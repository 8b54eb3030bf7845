"""Compare the content of a YAML file with the fields that are known: names, types, required ones, choices.

The known fields are YAML too (`fields_*.yaml`), where a value stands for what is allowed in its place:

    name: string               also integer, number, boolean, any; quantity: a number, or a string such as 500m
    name!: string              a required field
    name: one of a, b          a string with these choices
    name: [T]                  a list of T
    name: {a: T, b: T}         a mapping with these fields
    name: {"*": T}             a mapping with any keys
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from raydetr.config import nearest
from raydetr.user_files import parse_yaml

ONE_OF = "one of "
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "quantity": (int, float, str),
}
_LONGEST = 60  # characters of a value in a message


@cache
def load(name: str) -> Any:
    """Return the fields in `fields_NAME.yaml`."""
    return parse_yaml((files("raydetr.clusters") / f"fields_{name}.yaml").read_bytes())


def mismatches(value: Any, known: Any, path: str) -> list[str]:
    """Return a line for each place in `value` that is not as the known fields say; lines start with the path."""
    if known == "any":
        return []
    if isinstance(known, list):
        if not isinstance(value, list):
            return [f"{path}: {show(value)} where a list is expected"]
        return [line for i, item in enumerate(value) for line in mismatches(item, known[0], f"{path}[{i}]")]
    if isinstance(known, Mapping):
        return _in_mapping(value, known, path)
    return _in_scalar(value, known, path)


def show(value: Any) -> str:
    """Return a value as a short text for a message."""
    text = "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def join(path: str, key: object) -> str:
    """Return the dotted path of a key."""
    return f"{path}.{key}" if path else str(key)


# --- Values of any kind, where another one may be expected ---


def mapping(value: Any) -> Mapping[str, Any]:
    """Return the value; an empty mapping if it is none."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> Sequence[Any]:
    """Return the value; an empty list if it is none."""
    return value if isinstance(value, list) else []


def integer(values: Mapping[str, Any], key: str, default: int) -> int:
    """Return the integer of a key; the default if it is missing or no integer."""
    value = values.get(key, default)
    return value if isinstance(value, int) else default


# --- Helpers of `mismatches` ---


def _in_mapping(value: Any, known: Mapping[str, Any], path: str) -> list[str]:
    if not isinstance(value, Mapping):
        names = ", ".join(name.removesuffix("!") for name in known if name != "*")
        expected = f"a mapping with {names}" if names else "a mapping"
        if len(expected) > 2 * _LONGEST:
            expected = "a mapping"
        return [f"{path}: {show(value)} where {expected} is expected"]
    by_name = {name.removesuffix("!"): below for name, below in known.items() if name != "*"}
    found = []
    for key, below in value.items():
        if key in by_name or "*" in known:
            found += mismatches(below, by_name.get(key, known.get("*")), join(path, key))
        else:
            found.append(f"{join(path, key)}: no such key{nearest(str(key), by_name)}")
    missing = [name[:-1] for name in known if name.endswith("!") and name[:-1] not in value]
    return found + [f"{join(path, name)}: is missing" for name in missing]


def _in_scalar(value: Any, known: str, path: str) -> list[str]:
    if known.startswith(ONE_OF):
        choices = known.removeprefix(ONE_OF).split(", ")
        if value in choices:
            return []
        hint = nearest(value, choices) if isinstance(value, str) else ""
        return [f"{path}: {show(value)} where {known} is expected{hint}"]
    # In Python True is an int
    if isinstance(value, _TYPES[known]) and (known == "boolean" or not isinstance(value, bool)):
        return []
    quotes = "; put it in quotes" if known == "string" and isinstance(value, int | float) else ""
    article = "an" if known == "integer" else "a"
    return [f"{path}: {show(value)} where {article} {known} is expected{quotes}"]
