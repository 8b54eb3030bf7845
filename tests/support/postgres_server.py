"""Run a real PostgreSQL server on loopback, from Debian's package."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

PASSWORD = "p%40ss/w0rd"  # in the notation of a URI


def find_programs() -> Path | None:
    """Return the folder of PostgreSQL's programs; None where it is not installed."""
    named = shutil.which("initdb")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return Path(named).resolve().parent if named else (found[-1] if found else None)


class PostgresServer:
    """A server with an empty database `mlflow`, whose files are in `folder`. PostgreSQL refuses to run as root."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self._data, self._programs = folder / "data", programs
        self._user = (
            ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        )
        for each in (folder, *folder.parents):  # that user must reach it
            if each.owner() == "root" and each.stat().st_mode & 0o001 == 0:
                each.chmod(each.stat().st_mode | 0o001)
        folder.chmod(0o777)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        (folder / "password").write_text("p@ss/w0rd")
        self._run("initdb", "-D", str(self._data), "-U", "me", "-A", "scram-sha-256", "--pwfile",
                  str(folder / "password"), "--no-sync")  # fmt: skip
        options = (
            f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        )
        self._run("pg_ctl", "-D", str(self._data), "-o", options, "-l", str(folder / "log"), "-w", "start")
        environment = {**os.environ, "PGPASSWORD": "p@ss/w0rd"}
        command = [str(programs / "createdb"), "-h", "127.0.0.1", "-p", str(self._port), "-U", "me", "mlflow"]
        subprocess.run(command, env=environment, check=True, timeout=60)
        self.uri = f"postgresql://me:{PASSWORD}@127.0.0.1:{self._port}/mlflow"

    def stop(self) -> None:
        """Stop the server at once."""
        self._run("pg_ctl", "-D", str(self._data), "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._user, str(self._programs / program), *arguments]
        log = self._data.parent / f"{program}.log"
        with log.open("ab") as output:
            done = subprocess.run(command, timeout=60, stdout=output, stderr=output, cwd="/", check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {log.read_text()}")
