"""Run the tests that need a GPU, with pytest alone: the second stage of `make gpu`.

The settings of pyproject.toml need plugins of pytest, and the files conftest.py need packages, that may not be there:
neither are used. A file of tests whose imports are not installed is left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1].resolve()
SETTINGS = """[pytest]
addopts = --import-mode=importlib --noconftest -p no:cacheprovider -v -rfE --tb=short --durations=10
pythonpath = {root}/platform {root}/models {root}/tests/support
filterwarnings =
    error::RuntimeWarning
faulthandler_timeout = 60
markers =
    gpu: needs a CUDA device
    slow: takes longer than CI should
"""
SLOW_SECONDS = 5.0


class Recorder:
    """A plugin of pytest that writes what matters after every test, since the run may be ended."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self._rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: in its call, or in the phase that ends it."""
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        if not report.passed or report.duration > SLOW_SECONDS:
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
            self._rows.append({**row, "message": _last_line(report)})
        if self._path is not None:
            total = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items())
            rows = [{"test": "all", "outcome": total}, *self._rows]
            self._path.write_text(json.dumps(rows, indent=1) + "\n")


def _last_line(report: pytest.TestReport) -> str:
    return (report.longreprtext.splitlines() or [""])[-1][:200]


def main() -> None:
    """Find the tests and run them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write what failed, was skipped or took long")
    args, rest = parser.parse_known_args()
    files = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "mark.gpu" not in path.read_text():
            continue
        missing = missing_module(path)
        if missing:
            print(f"{path.relative_to(ROOT)} is left out: {missing}", flush=True)
        else:
            files.append(str(path))
    settings = ROOT / "build" / "gpu" / "pytest.ini"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(SETTINGS.format(root=ROOT))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # compute-sanitizer has a stage of its own
    selected = ["-m", "gpu", "-k", "not sanitizer"]
    options = ["-c", str(settings), "--rootdir", str(ROOT), *selected, *rest]
    recorder = Recorder(args.json)
    code = pytest.main([*options, *files], plugins=[recorder])
    sys.exit(int(code) or (0 if recorder.counts["passed"] else "no test has run"))


def missing_module(path: Path) -> str:
    """Return the error of a file of tests that needs a module which is not installed; else nothing."""
    try:
        runpy.run_path(str(path))
    except ModuleNotFoundError as error:
        return str(error)
    except (Exception, pytest.skip.Exception):
        return ""  # pytest will say it
    return ""


if __name__ == "__main__":
    main()
