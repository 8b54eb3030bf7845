"""Make an environment with all dependencies of this one, in which `raydetr` is not installed."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path


def bare_environment(folder: Path, wheel: Path | None = None) -> Path:
    """Create a virtual environment, with `wheel` as the only package of its own; return its interpreter.

    The packages of this environment are on its path. Their own .pth files are not read from there, and so the editable
    install of `raydetr` is not found.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin/python"
    if wheel is not None:
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-index", str(wheel)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def build_wheel(checkout: Path, folder: Path) -> Path:
    """Build the wheel of a checkout."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(checkout)], check=True)
    (wheel,) = folder.glob("raydetr-*.whl")
    return wheel


def can_import(python: Path, module: str, folder: Path) -> bool:
    """Return whether an interpreter can import a module, when it is started in a folder."""
    done = subprocess.run(
        [str(python), "-c", f"import {module}"], cwd=folder, capture_output=True, check=False
    )
    return done.returncode == 0
