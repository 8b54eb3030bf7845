"""Refuse a second driver of a run: `lease.json` in the run's folder names the one that drives it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from raydetr.console import print_status

LEASE = "lease.json"
BEAT_SECONDS = 10.0
LOOK_SECONDS = 1.0  # between two looks at the lease of another machine
DEAD_SECONDS = 60.0  # without a beat, after which the driver of another machine counts as dead


class LeaseError(RuntimeError):
    """Another process drives the run; the message names it."""


class Lease:
    """Holds a run while the block runs. A lease whose process has died is taken over.

    The process of this machine is dead if there is none with its id and start time; one of another machine if the file
    was not touched for DEAD_SECONDS.

    Args:
        run: folder of the run.
        waits: wait until it is known whether a process of another machine lives: at most for DEAD_SECONDS.

    Raises:
        LeaseError: (when the block is entered) another process that lives holds the run.
    """

    def __init__(self, run: Path, *, waits: bool = False) -> None:
        self._path = run / LEASE
        self._waits = waits
        self._seen: tuple[str, float] | None = None  # the other machine's lease, at the first look
        process = psutil.Process()
        self._own = {
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": process.create_time(),
            "token": os.urandom(8).hex(),
        }
        self._done = threading.Event()

    def __enter__(self) -> Lease:
        while not self._create():
            held = self._read()
            if held is None:
                continue
            if _is_alive(held, self._path):
                if self._waits_for(held):
                    continue
                raise LeaseError(
                    f"{self._path.parent}: process {held['pid']} on {held['host']} is driving this run: wait for its "
                    f"end, or stop it; a dead one is noticed after {DEAD_SECONDS:.0f} s without {LEASE} being touched"
                )
            self._take_from(held)
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        held = self._read()
        if held is not None and held["token"] == self._own["token"]:
            self._path.unlink(missing_ok=True)

    def _waits_for(self, held: dict[str, Any]) -> bool:
        """Wait a moment, unless the process is known to live; return whether to look again."""
        if not self._waits or held["host"] == socket.gethostname():
            return False
        try:
            found = (str(held["token"]), self._path.stat().st_mtime)
        except FileNotFoundError:
            return True
        if self._seen is None:
            self._seen = found
            print_status(
                f"process {held['pid']} on {held['host']} was driving this run: waiting to see whether it lives, at "
                f"most {DEAD_SECONDS:.0f} s"
            )
        time.sleep(LOOK_SECONDS)
        return found == self._seen

    def _create(self) -> bool:
        """Create the file; return whether it did not exist. It appears with its content, by a link."""
        temporary = self._path.with_name(f"{LEASE}.{self._own['token']}.tmp")
        temporary.write_text(json.dumps(self._own))
        try:
            os.link(temporary, self._path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def _take_from(self, dead: dict[str, Any]) -> None:
        """Remove the lease of a dead process; of several that want to, each removes at most this one."""
        grave = self._path.with_name(f"{LEASE}.{self._own['token']}.dead")
        try:
            self._path.rename(grave)
        except FileNotFoundError:
            return
        taken = json.loads(grave.read_text())
        if taken["token"] != dead["token"]:  # somebody was faster, and this is their lease
            grave.rename(self._path)
        else:
            grave.unlink()

    def _read(self) -> dict[str, Any] | None:
        try:
            held: dict[str, Any] = json.loads(self._path.read_text())
        except FileNotFoundError:
            return None
        return held

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            try:
                os.utime(self._path)
            except OSError:  # a hiccup of the storage; the next beat follows
                continue


def _is_alive(held: dict[str, Any], path: Path) -> bool:
    if held["host"] == socket.gethostname():
        try:
            return bool(psutil.Process(held["pid"]).create_time() == held["started"])
        except psutil.NoSuchProcess:
            return False
    try:
        return time.time() - path.stat().st_mtime < DEAD_SECONDS
    except FileNotFoundError:
        return False
