"""The rings: csrc < detrs.ops < detrs < raydetr < jobs. An import goes only leftwards, lazy ones included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = (Path("models"), Path("platform"), Path())

# Which modules may import one of these: patterns of dotted names
HOMES = {
    "mlflow": ("raydetr.tracking.mlflow_run",),
    "webdataset": ("raydetr.data.*",),
    "ray": ("raydetr.runs.ray_train", "raydetr.runs.ray_train", "raydetr.tune.*", "raydetr.jobs", "jobs.*"),
}
DETRS_NEEDS = {"torch", "numpy", "scipy", "jaxtyping", "detrs"}
RINGS = ("detrs.ops", "detrs", "raydetr", "jobs")


@dataclass(frozen=True)
class Import:
    """One imported module, and where it is imported."""

    file: Path
    line: int
    importer: str
    imported: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.importer} imports {self.imported}"


def imports_of(root: Path) -> list[Import]:
    """Every import under the source roots and jobs/, wherever in a file it stands."""
    folders = (root / "models", root / "platform", root / "jobs")
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return [found for file in files for found in _imports_in(file, root)]


def violations(imports: list[Import]) -> list[str]:
    """The imports that the rings or the homes of a library do not allow."""
    return [f"{found}: {reason}" for found in imports if (reason := _reason_against(found))]


def reaches(imports: list[Import], start: str, library: str) -> list[str]:
    """A chain of modules from `start` to one that imports `library`, or nothing."""
    modules = {found.importer for found in imports}
    chains = [[start]]
    seen = {start}
    while chains:
        chain = chains.pop()
        for found in imports:
            if found.importer != chain[-1]:
                continue
            if _top(found.imported) == library:
                return [*chain, found.imported]
            target = next(
                (name for name in (found.imported, _parent(found.imported)) if name in modules), None
            )
            if target and target not in seen:
                seen.add(target)
                chains.append([*chain, target])
    return []


def _imports_in(file: Path, root: Path) -> Iterator[Import]:
    relative = file.relative_to(root)
    importer = _module_name(relative)
    package = importer if file.name == "__init__.py" else _parent(importer)
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        for imported in _imported_by(node, package):
            yield Import(relative, getattr(node, "lineno", 0), importer, imported)


def _module_name(relative: Path) -> str:
    source_root = next(candidate for candidate in SOURCE_ROOTS if relative.is_relative_to(candidate))
    parts = relative.relative_to(source_root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported_by(node: ast.AST, package: str) -> list[str]:
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            ancestors = package.split(".")
            base = ".".join(ancestors[: len(ancestors) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            return [f"{origin}.{alias.name}" for alias in node.names]
        case ast.Call(func=ast.Name(id="__import__"), args=[ast.Constant(value=str(name)), *_]):
            return [name]
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
            return [name]
    return []


def _reason_against(found: Import) -> str | None:
    library = _top(found.imported)
    if library in HOMES and not any(_matches(found.importer, home) for home in HOMES[library]):
        return f"{library} is imported in {', '.join(HOMES[library])} only"
    own, other = _ring(found.importer), _ring(found.imported)
    if own is not None and other is not None and other > own:
        return f"an import goes only leftwards in {' < '.join(RINGS)}"
    if _top(found.importer) == "detrs" and library not in DETRS_NEEDS | set(sys.stdlib_module_names):
        return f"detrs needs {', '.join(sorted(DETRS_NEEDS))} and the standard library only"
    return None


def _ring(module: str) -> int | None:
    return next((ring for ring, name in enumerate(RINGS) if _matches(module, f"{name}.*")), None)


def _matches(module: str, pattern: str) -> bool:
    """`a.*` means the package a and everything below it."""
    return fnmatch(module, pattern) or module == pattern.removesuffix(".*")


def _top(module: str) -> str:
    return module.partition(".")[0]


def _parent(module: str) -> str:
    return module.rpartition(".")[0]


def test_every_import_goes_leftwards_and_stays_at_home() -> None:
    imports = imports_of(ROOT)
    assert {_top(found.importer) for found in imports} == {"detrs", "raydetr", "jobs"}
    assert violations(imports) == []


def test_the_training_loop_reaches_no_ray() -> None:
    imports = imports_of(ROOT)
    assert "raydetr.training.loop" in {found.importer for found in imports}
    assert reaches(imports, "raydetr.training.loop", "ray") == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("detrs.zoo", {"ray", "mlflow", "webdataset", "pydantic", "raydetr"}),
        ("raydetr.training.loop", {"ray"}),
    ],
)
def test_a_fresh_interpreter_loads_no_more_than_the_ring_allows(module: str, absent: set[str]) -> None:
    program = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    path = f"import sys; sys.path[:0] = [{str(ROOT / 'models')!r}, {str(ROOT / 'platform')!r}]; "
    result = subprocess.run(
        [sys.executable, "-c", path + program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert absent & set(result.stdout.split()) == set()


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("models/detrs/boxes.py", "import ray", "ray is imported in"),
        ("models/detrs/boxes.py", "import pydantic", "detrs needs"),
        (
            "models/detrs/boxes.py",
            "def f():\n    import torchvision.ops",
            "detrs.boxes imports torchvision.ops",
        ),
        ("models/detrs/boxes.py", "from raydetr import config", "leftwards"),
        ("models/detrs/ops/native.py", "from detrs import boxes", "leftwards"),
        (
            "models/detrs/ops/native.py",
            "from ..boxes import area",
            "detrs.ops.native imports detrs.boxes.area",
        ),
        ("models/detrs/ops/__init__.py", "from .. import boxes", "detrs.ops imports detrs.boxes"),
        ("models/detrs/zoo/__init__.py", "__import__('mlflow')", "mlflow is imported in"),
        ("platform/raydetr/cli.py", "from jobs import train_detector", "leftwards"),
        (
            "platform/raydetr/cli.py",
            "import mlflow.tracking",
            "mlflow is imported in raydetr.tracking.mlflow_run only",
        ),
        (
            "platform/raydetr/cli.py",
            "import importlib\nimportlib.import_module('ray.tune')",
            "ray is imported in",
        ),
        (
            "platform/raydetr/train/loop.py",
            "if True:\n    from ray import train",
            "raydetr.training.loop imports ray",
        ),
        (
            "platform/raydetr/evaluate/coco_ap.py",
            "from webdataset import WebLoader",
            "webdataset is imported in",
        ),
        ("jobs/train_detector.py", "import webdataset", "webdataset is imported in"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, code: str, expected: str) -> None:
    _plant(tmp_path, {file: code})
    (found,) = violations(imports_of(tmp_path))
    assert expected in found
    assert found.startswith(f"{file}:")


def test_allowed_imports_are_not_found(tmp_path: Path) -> None:
    _plant(
        tmp_path,
        {
            "models/detrs/ops/native.py": "import ctypes\nimport torch\nfrom . import reference",
            "models/detrs/attention.py": "from detrs.ops import deform_attn\nimport scipy.optimize",
            "platform/raydetr/track.py": "import mlflow",
            "platform/raydetr/data/stream.py": "import webdataset\nfrom detrs.structures import Images",
            "platform/raydetr/train/launch.py": "import ray.train",
            "platform/raydetr/tune/search.py": "from ray import tune",
            "platform/raydetr/jobs.py": "def submit():\n    import ray.job_submission",
            "jobs/train_detector.py": "import ray\nfrom raydetr import cli",
        },
    )
    assert violations(imports_of(tmp_path)) == []


def test_ray_behind_two_modules_is_found(tmp_path: Path) -> None:
    _plant(
        tmp_path,
        {
            "platform/raydetr/train/loop.py": "from raydetr.training.optim import step\nimport raydetr.config",
            "platform/raydetr/train/optim.py": "def step():\n    from .launch import launch",
            "platform/raydetr/train/launch.py": "import ray.train",
            "platform/raydetr/config.py": "import yaml",
        },
    )
    chain = reaches(imports_of(tmp_path), "raydetr.training.loop", "ray")
    assert chain == ["raydetr.training.loop", "raydetr.training.optim", "raydetr.runs.ray_train", "ray.train"]
    assert reaches(imports_of(tmp_path), "raydetr.config", "ray") == []


def _plant(root: Path, files: dict[str, str]) -> None:
    for name, code in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(code)
