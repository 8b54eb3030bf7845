"""Run a real MLflow server on loopback that a test can freeze, kill and restart."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path


class MlflowServer:
    """`mlflow server` with one worker, its database and artifacts in `folder`.

    Other options replace these; in them, PORT stands for the port.
    """

    def __init__(self, folder: Path, options: Sequence[str] | None = None) -> None:
        self.folder = folder
        self.port = _free_port()
        self._options = options
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = 150.0) -> None:
        options = self._options or [
            *("--host", "127.0.0.1", "--port", "PORT", "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
        ]
        command = [sys.executable, "-m", "mlflow", "server"]
        command += [option.replace("PORT", str(self.port)) for option in options]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
                cwd=self.folder,
            )
        deadline = time.monotonic() + timeout_s
        while not self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"no MLflow server:\n{(self.folder / 'server.log').read_text()[-3000:]}")
            time.sleep(0.2)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the server and its workers, which are one process group."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(timeout=10)
            self._process = None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as response:
                return bool(response.status == 200)
        except OSError:
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
