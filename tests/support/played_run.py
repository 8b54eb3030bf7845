"""A process that holds a run's lease and writes its events as a driver does, and can be killed. It does not train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from raydetr.store.folders import Folder, write_file
from raydetr.tracking.events import EventLog

SAMPLES, STEPS, EPOCHS = 100, 20, 4  # of an epoch, of the run, of the run

PROGRAM = """
import json, sys
from raydetr.runs.lease import Lease
from raydetr.store.folders import open_folder
from raydetr.tracking.events import EventLog
run = open_folder(sys.argv[1])
with Lease(run):
    log = EventLog(run)
    print("ready", flush=True)
    for line in sys.stdin:
        log.append(**json.loads(line))
        log.flush()
        print("written", flush=True)
"""


class PlayedRun:
    """The process; it ends, and gives the lease back, when its input ends."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        write_file(folder / "config.yaml", b"recipe: played\n")
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready")

    def log(self, kind: str, **fields: Any) -> None:
        """Append an event, and wait until it is written."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"kind": kind, **fields}) + "\n")
        self._process.stdin.flush()
        self._expect("written")

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        self._process.communicate()

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == word


def started(position: int = 0, workers: int = 1) -> dict[str, Any]:
    """Return the fields of an event `started` or `resumed`."""
    step = position * STEPS // (SAMPLES * EPOCHS)
    return {"step": step, "position": position, "workers": workers,
            "total_steps": STEPS, "samples_per_epoch": SAMPLES, "epochs": EPOCHS}  # fmt: skip


def step(number: int, **metrics: float) -> dict[str, Any]:
    """Return the fields of an event `step`."""
    position = number * SAMPLES * EPOCHS // STEPS
    return {
        "step": number,
        "position": position,
        "metrics": {"loss": 2.0, "images_per_second": 10.0} | metrics,
    }


def evaluation(epoch: int, ap: float) -> dict[str, Any]:
    """Return the fields of an event `evaluation`."""
    return {
        "step": epoch * STEPS // EPOCHS, "position": epoch * SAMPLES, "metrics": {"AP": ap, "epoch": epoch}
    }  # fmt: skip


def write_run(folder: Path | Folder, *events: tuple[str, dict[str, Any]]) -> Folder:
    """Write the folder of a run that nobody drives."""
    write_file(folder / "config.yaml", b"recipe: played\n")
    log = EventLog(folder)
    for kind, fields in events:
        log.append(kind, **fields)
    assert log.flush()
    return folder
