"""Load the cluster files of the repository, and change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
AWS = ROOT / "ray_cluster.yaml"
GCP = ROOT / "clusters/gcp.yaml"
KUBERAY = ROOT / "clusters/kuberay.yaml"
REMOVED = object()
OF_ANY_KIND: tuple[Any, ...] = (None, [], {}, "text", -3, 2.5, True, [{"a": [1]}], [[]], {"name": ["a"]})


def load(file: Path) -> dict[str, Any]:
    """Return the first document of a file."""
    content: dict[str, Any] = next(yaml.safe_load_all(file.read_text()))
    return content


def paths(content: Any, prefix: str = "") -> list[str]:
    """Return the dotted paths of all values."""
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    below = [(f"{prefix}{key}", value) for key, value in items]
    return [path for name, value in below for path in (name, *paths(value, f"{name}."))]


def change(content: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path, in which a number is a place in a list; REMOVED removes it."""
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    node: Any = content
    for key in parents:
        node = node[key]
    if value is REMOVED:
        del node[last]
    else:
        node[last] = value
