"""Every import goes down the order of packages, lazy imports and those for type checkers included.

Between the source roots the order is csrc < detrs.ops < detrs < raydetr < jobs, inside raydetr it is PACKAGES.
"""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = (Path("models"), Path("platform"), Path())

# The packages and modules of raydetr, lowest first; each imports itself and what is left of it
PACKAGES = (
    "console", "environment", "locations", "process_pool", "section", "user_files", "visualization", "store", "config",
    "recipes", "shards", "data", "evaluation", "doctor", "training", "inference", "tracking", "clusters", "runs",
    "tune", "submission", "cli",
)  # fmt: skip
LEAVES = PACKAGES[:7]  # they import nothing of raydetr
ROOTS = ("detrs.ops", "detrs", "raydetr", "jobs")

# Which modules may import a library: patterns of dotted names
LIBRARIES = {
    "mlflow": ("raydetr.tracking.*",),
    "webdataset": ("raydetr.shards.*",),
    "obstore": ("raydetr.store.*",),
    "hotcoco": ("raydetr.evaluation.*",),
    "optuna": ("raydetr.tune.samplers",),
    "pycocotools": ("raydetr.evaluation.*",),
    "ray": (
        "raydetr.runs.ray_train",
        "raydetr.runs.ray_cluster",
        "raydetr.runs.ray_address",
        "raydetr.runs.watch",
        "raydetr.runs.fatal_errors",
        "raydetr.clusters.ray_up",
        "raydetr.tune.*",
        "raydetr.submission.*",
        "jobs.*",
    ),
}
IMPORT_FUNCTION = "importlib.import_module"  # stands for __import__ too
DETRS_NEEDS = {"torch", "numpy", "scipy", "jaxtyping", "detrs"}

# From the job that is submitted to the training step, each file calls the next one
READING_PATH = (
    "jobs/train_detector.py",
    "platform/raydetr/cli/main.py",
    "platform/raydetr/runs/run.py",
    "platform/raydetr/runs/ray_train.py",
    "platform/raydetr/runs/session.py",
    "platform/raydetr/training/loop.py",
)


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
    """Return every import in the source roots and jobs/, at any place in a file."""
    folders = (root / "models", root / "platform", root / "jobs")
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return [found for file in files for found in _imports_in(file, root)]


def violations(imports: list[Import]) -> list[str]:
    """Return the imports that go up, and those of a library outside the packages that may import it."""
    return [f"{found}: {reason}" for found in imports if (reason := _reason_against(found))]


def cycles(imports: list[Import]) -> list[list[str]]:
    """Return chains of modules that import each other; a package's __init__ counts as the module it is."""
    modules = {found.importer for found in imports}
    edges: dict[str, set[str]] = {module: set() for module in modules}
    for found in imports:
        target = _module(found.imported, modules)
        if target is not None and target != found.importer:
            edges[found.importer].add(target)
    finished: set[str] = set()
    chains: list[list[str]] = []

    def visit(module: str, chain: list[str]) -> None:
        for target in sorted(edges[module]):
            if target in chain:
                chains.append([*chain[chain.index(target) :], target])
            elif target not in finished:
                visit(target, [*chain, target])
        finished.add(module)

    for module in sorted(modules):
        if module not in finished:
            visit(module, [module])
    return chains


def reaches(imports: list[Import], start: str, library: str) -> list[str]:
    """Return a chain of modules from `start` to one that imports `library`, or nothing."""
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
            target = _module(found.imported, modules)
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
        case ast.Name(id="__import__") | ast.Attribute(attr="import_module"):
            return [IMPORT_FUNCTION]
    return []


def _reason_against(found: Import) -> str | None:
    library = _top(found.imported)
    if found.imported == IMPORT_FUNCTION:
        return "imports are statements, so that their order can be read"
    if library in LIBRARIES and not any(_matches(found.importer, home) for home in LIBRARIES[library]):
        return f"{library} is imported in {', '.join(LIBRARIES[library])} only"
    own, other = _level(found.importer, ROOTS), _level(found.imported, ROOTS)
    if own is not None and other is not None and other > own:
        return f"an import goes only left in {' < '.join(ROOTS)}"
    if _top(found.importer) == "raydetr" and library == "raydetr":
        return _reason_in_raydetr(found)
    if _top(found.importer) == "detrs" and library not in DETRS_NEEDS | set(sys.stdlib_module_names):
        return f"detrs needs {', '.join(sorted(DETRS_NEEDS))} and the standard library only"
    return None


def _reason_in_raydetr(found: Import) -> str | None:
    own, other = _part(found.importer), _part(found.imported)
    for part in (own, other):
        if part and part not in PACKAGES:
            return f"{part} has no place in the order of packages"
    if not own or not other or own == other:
        return None
    if own in LEAVES:
        return f"{own} is a leaf: it imports nothing of raydetr"
    if PACKAGES.index(other) > PACKAGES.index(own):
        return f"an import goes only left in {' < '.join(PACKAGES)}"
    return None


def _part(module: str) -> str:
    """Return the package of raydetr that a module belongs to; empty for raydetr itself."""
    return module.removeprefix("raydetr").strip(".").partition(".")[0]


def _level(module: str, order: tuple[str, ...]) -> int | None:
    return next((level for level, name in enumerate(order) if _matches(module, f"{name}.*")), None)


def _module(imported: str, modules: set[str]) -> str | None:
    return next((name for name in (imported, _parent(imported)) if name in modules), None)


def _matches(module: str, pattern: str) -> bool:
    """`a.*` means the package a and everything in it."""
    return fnmatch(module, pattern) or module == pattern.removesuffix(".*")


def _top(module: str) -> str:
    return module.partition(".")[0]


def _parent(module: str) -> str:
    return module.rpartition(".")[0]


def test_every_import_goes_down_and_libraries_stay_where_they_belong() -> None:
    imports = imports_of(ROOT)
    assert {_top(found.importer) for found in imports} == {"detrs", "raydetr", "jobs"}
    assert violations(imports) == []


def test_no_modules_import_each_other() -> None:
    assert cycles(imports_of(ROOT)) == []


def test_the_order_names_every_package() -> None:
    found = {
        path.stem for path in (ROOT / "platform/raydetr").iterdir() if not path.name.startswith(("_", "py."))
    }
    assert found == set(PACKAGES)
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    order = re.search(r"(store < config < [^`]*?cli)", text)
    assert order is not None, "CONTRIBUTING.md does not give the order of packages"
    assert tuple(order[1].split(" < ")) == PACKAGES[len(LEAVES) :]


def test_training_and_what_it_needs_reach_neither_ray_nor_mlflow() -> None:
    imports = imports_of(ROOT)
    assert "raydetr.training.loop" in {found.importer for found in imports}
    for library in ("ray", "mlflow"):
        assert reaches(imports, "raydetr.training.loop", library) == []
    assert reaches(imports, "raydetr.runs.session", "ray") == []


def test_a_reader_crosses_five_files_from_the_job_to_the_training_step() -> None:
    """Each file of the path imports the next one, and the README names them in this order."""
    imports = imports_of(ROOT)
    assert len(READING_PATH[1:]) <= 5
    for file, following in itertools.pairwise(READING_PATH):
        target = _module_name(Path(following))
        assert any(
            str(found.file) == file and target in (found.imported, _parent(found.imported))
            for found in imports
        ), f"{file} does not import {following}"
    section = (ROOT / "README.md").read_text().partition("## The repository")[2]
    places = [section.rfind(f"`{file}`") for file in READING_PATH]
    assert -1 not in places, "README.md does not name the path of a training run"
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("detrs.zoo", {"ray", "mlflow", "webdataset", "pydantic", "raydetr"}),
        ("raydetr.training.loop", {"ray", "mlflow"}),
        # In processes of Ray's that a run waits for
        ("raydetr.console", {"ray", "torch"}),
        # A process that scores while the training needs memory and cores
        ("raydetr.evaluation.score", {"ray", "torch", "mlflow", "detrs"}),
        ("raydetr.runs.fatal_errors", {"torch", "detrs", "mlflow", "matplotlib"}),
    ],
)
def test_a_fresh_interpreter_loads_no_more_than_the_order_allows(module: str, absent: set[str]) -> None:
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
        ("models/detrs/boxes.py", "from raydetr import config", "only left in detrs.ops"),
        ("models/detrs/ops/native.py", "from detrs import boxes", "only left"),
        (
            "models/detrs/ops/native.py",
            "from ..boxes import area",
            "detrs.ops.native imports detrs.boxes.area",
        ),
        ("models/detrs/ops/__init__.py", "from .. import boxes", "detrs.ops imports detrs.boxes"),
        ("models/detrs/zoo/__init__.py", "from raydetr import *", "only left in detrs.ops"),
        ("models/detrs/zoo/__init__.py", "__import__('mlflow')", "imports are statements"),
        ("platform/raydetr/cli/main.py", "from importlib import import_module", "imports are statements"),
        ("platform/raydetr/cli/main.py", "from jobs import train_detector", "only left"),
        (
            "platform/raydetr/cli/main.py",
            "import mlflow.tracking",
            "mlflow is imported in raydetr.tracking.* only",
        ),
        (
            "platform/raydetr/cli/main.py",
            "import importlib as lib\nlib.import_module('ray.tune')",
            "imports are statements",
        ),
        (
            "platform/raydetr/training/loop.py",
            "if True:\n    from ray import train",
            "raydetr.training.loop imports ray",
        ),
        (
            "platform/raydetr/evaluation/coco_metrics.py",
            "from webdataset import WebLoader",
            "webdataset is imported in",
        ),
        ("jobs/train_detector.py", "import webdataset", "webdataset is imported in"),
        ("platform/raydetr/config/schema.py", "from raydetr.data import stream", "only left in console"),
        ("platform/raydetr/data/stream.py", "def f():\n    from raydetr.training import loop", "only left"),
        (
            "platform/raydetr/shards/reader.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from raydetr.data.order import SampleOrder",
            "raydetr.shards.reader imports raydetr.data.order.SampleOrder",
        ),
        ("platform/raydetr/training/loop.py", "from raydetr import tracking", "only left"),
        ("platform/raydetr/visualization/boxes.py", "from raydetr import environment", "is a leaf"),
        ("platform/raydetr/serving/app.py", "from raydetr import config", "serving has no place"),
        ("platform/raydetr/cli/main.py", "from raydetr.utils import x", "utils has no place"),
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
            "platform/raydetr/tracking/mlflow_run.py": "import mlflow\nfrom raydetr.config import RunConfig",
            "platform/raydetr/shards/writer.py": "import webdataset\nfrom raydetr import process_pool",
            "platform/raydetr/data/stream.py": "from raydetr.shards import reader\nfrom detrs import structures",
            "platform/raydetr/runs/ray_train.py": "import ray.train\nfrom .session import Run",
            "platform/raydetr/tune/search.py": "from ray import tune\nimport raydetr.runs.run",
            "jobs/train_detector.py": "import ray\nfrom raydetr.cli import main",
        },
    )
    assert violations(imports_of(tmp_path)) == []


@pytest.mark.parametrize(
    "files",
    [
        {"runs/a.py": "from raydetr.runs.b import x", "runs/b.py": "def f():\n    from .a import y"},
        {
            "data/a.py": "from raydetr.data import b",
            "data/b.py": "import raydetr.data.c",
            "data/c.py": "from . import a",
        },
    ],
)
def test_modules_that_import_each_other_are_found(tmp_path: Path, files: dict[str, str]) -> None:
    _plant(tmp_path, {f"platform/raydetr/{name}": code for name, code in files.items()})
    (chain,) = cycles(imports_of(tmp_path))
    assert len(chain) == len(files) + 1
    assert chain[0] == chain[-1]


def test_ray_behind_two_modules_is_found(tmp_path: Path) -> None:
    _plant(
        tmp_path,
        {
            "platform/raydetr/training/loop.py": "from raydetr.training.optim import step\nimport raydetr.config",
            "platform/raydetr/training/optim.py": "def step():\n    from .launch import launch",
            "platform/raydetr/training/launch.py": "import ray.train",
            "platform/raydetr/config.py": "import yaml",
        },
    )
    chain = reaches(imports_of(tmp_path), "raydetr.training.loop", "ray")
    assert chain == [
        "raydetr.training.loop",
        "raydetr.training.optim",
        "raydetr.training.launch",
        "ray.train",
    ]
    assert reaches(imports_of(tmp_path), "raydetr.config", "ray") == []


def _plant(root: Path, files: dict[str, str]) -> None:
    for name, code in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(code)
