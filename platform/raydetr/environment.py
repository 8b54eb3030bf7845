"""Describe the environment of a run: versions, git revision, processor, GPUs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

GIT_VARIABLE = "RAYDETR_GIT"  # of a job that runs a copy of a checkout: its `git_state`, as JSON


def describe_environment() -> dict[str, Any]:
    """Return the environment as plain values for JSON; `git` is that of `own_git_state`."""
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "num_cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "git": own_git_state(),
        "packages": dict(sorted((d.name, d.version) for d in metadata.distributions())),
    }


def own_git_state() -> dict[str, Any] | None:
    """Return revision and dirty flag of this package's checkout, or of that from which this job was submitted.

    None if this package is not in a checkout.
    """
    submitted = os.environ.get(GIT_VARIABLE)
    return git_state(Path(__file__).parent) if submitted is None else json.loads(submitted)


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return revision and dirty flag of the checkout that tracks `folder`; None if there is none."""
    # A virtual environment may be inside the checkout of another project: only tracked files count
    if not _git(folder, "ls-files", "."):
        return None
    revision = _git(folder, "rev-parse", "HEAD")
    return {"revision": revision, "dirty": bool(_git(folder, "status", "--porcelain"))} if revision else None


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name() -> str:
    """Return the processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
