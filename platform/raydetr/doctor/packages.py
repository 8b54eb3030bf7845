"""Installed packages against what this one needs, as its metadata says (from pyproject.toml)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement


@dataclass(frozen=True)
class Package:
    """A requirement and what there is; `installed` None: nothing."""

    requirement: Requirement
    installed: str | None

    @property
    def fits(self) -> bool:
        """Whether it is installed in a version that will do."""
        return self.installed is not None and self.requirement.specifier.contains(
            self.installed, prereleases=True
        )

    def problem(self) -> str:
        """What does not fit, in words."""
        needed = f"{self.requirement.name}{self.requirement.specifier}"
        return f"{needed} is needed, {self.installed or 'nothing'} is installed"


def needed_packages(distribution: str = "raydetr") -> list[Package]:
    """Everything that must be there to train; what only extras need is left out.

    Raises:
        ValueError: the distribution itself is not installed.
    """
    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"{distribution} is not installed: pip install -e . in its folder") from error
    requirements = [Requirement(line) for line in lines]
    return examine(
        requirement
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    )


def examine(requirements: Iterable[Requirement]) -> list[Package]:
    """Look up what is installed for each."""
    return [Package(requirement, installed_version(requirement.name)) for requirement in requirements]


def installed_version(name: str) -> str | None:
    """None where the package is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
