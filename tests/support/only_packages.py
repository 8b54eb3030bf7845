"""Run Python as if only some packages were installed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CODE = """\
import sys

HIDDEN = frozenset({hidden!r})


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def hide_others(folder: Path, packages: Iterable[str]) -> Path:
    """Write a module into `folder` that hides all packages but these, what they need, and ours; return the folder.

    A Python that is started with the folder in PYTHONPATH imports it first.
    """
    needed = _with_requirements(packages) | {"raydetr"}
    hidden = [
        module
        for module, distributions in packages_distributions().items()
        if not needed & {canonicalize_name(name) for name in distributions}
    ]
    (folder / "sitecustomize.py").write_text(CODE.format(hidden=sorted(hidden)))
    return folder


def _with_requirements(packages: Iterable[str]) -> set[str]:
    waiting, needed = [canonicalize_name(name) for name in packages], set()
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # of another platform
            continue
        found = map(Requirement, lines)
        waiting += [
            canonicalize_name(requirement.name)
            for requirement in found
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ]
    return needed
