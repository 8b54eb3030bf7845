"""Run code in a new interpreter, in which no module of the test run is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MODELS = Path(__file__).parents[2] / "models"


def run_python(code: str, *, models: Path = MODELS, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with the packages in `models` and tests/support importable; return the process and its output."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(models), str(Path(__file__).parent)]),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
