"""constraints.txt pins one version of everything that is needed, and those are the versions under test."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]

# A torch wheel names the exact versions of these itself, and which ones depends on the platform
OF_TORCH = ("nvidia-", "cuda-", "triton")


def read_pins(text: str) -> dict[str, Version]:
    """The pinned version of each package, by its canonical name.

    Raises:
        ValueError: a line is not `name==version`, or names a package for the second time.
    """
    pins: dict[str, Version] = {}
    for line in text.splitlines():
        content = line.partition("#")[0].strip()
        if not content:
            continue
        name, equals, pinned = content.partition("==")
        if not equals:
            raise ValueError(f"{content!r} is not of the form name==version")
        if canonicalize_name(name) in pins:
            raise ValueError(f"{name} is pinned twice")
        pins[canonicalize_name(name)] = Version(pinned)
    return pins


def declared(pyproject: str) -> list[Requirement]:
    """Every requirement of pyproject.toml: to build, to run, and of all extras."""
    content = tomllib.loads(pyproject)
    extras = content["project"].get("optional-dependencies", {}).values()
    lines = [*content["build-system"]["requires"], *content["project"]["dependencies"], *chain(*extras)]
    return [Requirement(line) for line in lines]


def unpinned(requirements: Iterable[Requirement], pins: Mapping[str, Version]) -> list[str]:
    """What is required and has no pin, or one that the requirement itself refuses."""
    found = []
    for requirement in requirements:
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None:
            found.append(f"{requirement.name}: not in constraints.txt")
        elif pin not in requirement.specifier:
            found.append(f"{requirement}: constraints.txt pins {pin}")
    return found


def differing(pins: Mapping[str, Version], installed: Mapping[str, Version]) -> list[str]:
    """Pins that are not what is installed. A local part (2.13.0+cpu) is the platform's, not ours."""
    return [
        f"{name}: {installed[name]} is installed, constraints.txt pins {pin}"
        for name, pin in pins.items()
        if name in installed and installed[name].public != pin.public
    ]


def needed_here(requirements: Iterable[Requirement]) -> list[Requirement]:
    """The requirements, and those of everything they bring along on this platform."""
    waiting, needed, seen = list(requirements), [], set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen or requirement.name.startswith(OF_TORCH):
            continue
        seen.add(str(requirement))
        needed.append(requirement)
        waiting += _brought_along(requirement)
    return needed


def _brought_along(requirement: Requirement) -> list[Requirement]:
    candidates = [Requirement(line) for line in requires(requirement.name) or []]
    extras = ("", *requirement.extras)
    return [
        candidate
        for candidate in candidates
        if candidate.marker is None or any(candidate.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def _installed(names: Iterable[str]) -> dict[str, Version]:
    versions = {}
    for name in names:
        try:
            versions[name] = Version(version(name))
        except PackageNotFoundError:  # of another platform, or not needed to run
            continue
    return versions


@pytest.fixture
def pins() -> dict[str, Version]:
    return read_pins((ROOT / "constraints.txt").read_text())


@pytest.fixture
def requirements() -> list[Requirement]:
    return declared((ROOT / "pyproject.toml").read_text())


def test_every_dependency_and_what_it_needs_is_pinned(
    pins: dict[str, Version], requirements: list[Requirement]
) -> None:
    needed = needed_here(requirements)
    assert len(needed) > len(requirements) > 20
    assert unpinned(needed, pins) == []


def test_the_pinned_versions_are_installed(pins: dict[str, Version], requirements: list[Requirement]) -> None:
    installed = _installed(pins)
    assert {canonicalize_name(requirement.name) for requirement in requirements} <= set(installed)
    assert differing(pins, installed) == []


def test_pins_hold_on_every_platform(pins: dict[str, Version], requirements: list[Requirement]) -> None:
    ours = {canonicalize_name(requirement.name) for requirement in requirements}
    of_torch = [name for name in pins if name.startswith(OF_TORCH) and name not in ours]
    assert of_torch == [name for name, pin in pins.items() if pin.local] == []
    assert str(pins["torch"]) == "2.13.0"


def test_a_missing_or_refused_pin_is_found() -> None:
    pyproject = """
    [build-system]
    requires = ["setuptools>=77"]
    [project]
    dependencies = ["torch>=2.11", "Ray[train]>=2.60"]
    [project.optional-dependencies]
    dev = ["pytest"]
    """
    pins = read_pins("setuptools==76.1  # too old\ntorch==2.13.0\nray==2.60.0\n")
    assert unpinned(declared(pyproject), pins) == [
        "setuptools>=77: constraints.txt pins 76.1",
        "pytest: not in constraints.txt",
    ]


def test_another_installed_version_is_found() -> None:
    pins = read_pins("torch==2.13.0\nray==2.60.0")
    assert differing(pins, {"torch": Version("2.13.0+cpu"), "ray": Version("2.60.0")}) == []
    assert differing(pins, {"torch": Version("2.12.0"), "ray": Version("2.60.0")}) == [
        "torch: 2.12.0 is installed, constraints.txt pins 2.13.0"
    ]


@pytest.mark.parametrize(
    ("text", "message"), [("torch>=2.13", "name==version"), ("PyYAML==6\npyyaml==6", "twice")]
)
def test_a_line_that_pins_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pins(text)
