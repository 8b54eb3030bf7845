"""Names and places in the repository that would break it, or its users' Python."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = {"platform": "raydetr", "models": "detrs"}


def misplaced(root: Path) -> list[str]:
    """Files and folders that may not be where they are, each with the reason."""
    found = []
    for name, package in SOURCE_ROOTS.items():
        # With platform/__init__.py a program started here gets it instead of the standard library's platform
        extras = _extras(root / name, package)
        found += [f"{name}/{extra}: {name}/ holds {package}/ and nothing else" for extra in extras]
    for file in sorted((root / "tests").rglob("__init__.py")):
        found.append(f"{file.relative_to(root)}: pytest would import the tests by the name of their folder")
    if (root / "tests/platform").exists():
        found.append("tests/platform: shadows the standard library's platform; tests/raydetr is the place")
    return found


def shadowing(root: Path, taken: frozenset[str]) -> list[str]:
    """Modules that Ray, pytest or Python put before the module of the same name in `taken`.

    Ray's workers search the root of the working directory first; a program searches its own folder first.
    """
    own = set(SOURCE_ROOTS.values())
    found = []
    for folder in (root, root / "jobs", root / "benchmarks", root / "tests/support"):
        for name in sorted(_modules_in(folder)):
            if name in taken - own:
                found.append(f"{(folder / name).relative_to(root)}: shadows the module {name}")
    return found


def taken_names() -> frozenset[str]:
    """Every top-level module of the standard library and of what is installed."""
    return frozenset(sys.stdlib_module_names) | frozenset(packages_distributions())


def _extras(folder: Path, package: str) -> list[str]:
    allowed = (package, "__pycache__", ".*", "*.egg-info")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in allowed)]


def _modules_in(folder: Path) -> set[str]:
    files = {file.stem for file in folder.glob("*.py")}
    return files | {file.parent.name for file in folder.glob("*/__init__.py")}


def test_nothing_is_misplaced() -> None:
    assert (ROOT / "platform/raydetr/__init__.py").is_file()
    assert (ROOT / "models/detrs/__init__.py").is_file()
    assert misplaced(ROOT) == []


def test_no_file_shadows_a_module() -> None:
    assert _modules_in(ROOT / "jobs") != set()
    assert shadowing(ROOT, taken_names()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "platform/__init__.py",
        "models/__init__.py",
        "platform/tool.py",
        "tests/__init__.py",
        "tests/raydetr/data/__init__.py",
        "tests/platform/test_cli.py",
    ],
)
def test_a_planted_file_is_misplaced(tmp_path: Path, planted: str) -> None:
    _plant(tmp_path, "platform/raydetr/__init__.py", "models/detrs/__init__.py", "tests/raydetr/test_cli.py")
    assert misplaced(tmp_path) == []
    _plant(tmp_path, planted)
    (found,) = misplaced(tmp_path)
    assert planted.startswith(found.partition(":")[0])


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("jobs/queue.py", "queue"),
        ("jobs/torch.py", "torch"),
        ("benchmarks/operator.py", "operator"),
        ("jobs/mlflow/__init__.py", "mlflow"),
        ("tests/support/yaml.py", "yaml"),
        ("code.py", "code"),
        ("ray/__init__.py", "ray"),
    ],
)
def test_a_planted_module_shadows(tmp_path: Path, planted: str, name: str) -> None:
    _plant(tmp_path, "jobs/train_detector.py", "setup.py")
    assert shadowing(tmp_path, taken_names()) == []
    _plant(tmp_path, planted)
    (found,) = shadowing(tmp_path, taken_names())
    assert found.endswith(f"shadows the module {name}")


def _plant(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
