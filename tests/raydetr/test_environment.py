"""The description of a run's environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from raydetr.environment import GIT_VARIABLE, describe_environment, git_state


def test_versions_and_hardware_are_plain_values() -> None:
    environment = json.loads(json.dumps(describe_environment()))
    assert torch.__version__.startswith(environment["packages"]["torch"].partition("+")[0])
    assert {"mlflow", "numpy", "pycocotools", "ray"} <= environment["packages"].keys()
    assert environment["num_cpus"] >= 1
    assert environment["cpu"]
    assert len(environment["gpus"]) == torch.cuda.device_count()


def test_the_git_state_has_revision_and_dirty_flag(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    assert git_state(package) is None
    git("init", "-q")
    (package / "file.txt").write_text("1")
    assert git_state(package) is None  # Inside a checkout that does not track it
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert git_state(package) == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (package / "file.txt").write_text("2")
    state = git_state(package)
    assert state is not None
    assert state["dirty"] is True


def test_a_job_has_the_git_state_of_the_checkout_it_was_submitted_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = {"revision": "0123abcd", "dirty": True}
    monkeypatch.setenv(GIT_VARIABLE, json.dumps(state))
    assert describe_environment()["git"] == state
