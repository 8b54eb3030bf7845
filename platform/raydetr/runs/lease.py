"""Refuse a second driver of a run: the newest file in the run's folder `lease` names the one that drives it.

A driver creates the next number, which only one process can do, on disks and on servers. It rewrites its file every few
seconds. Who wants to take over a run first watches that this does not happen. A driver that was taken for dead, such as
one that was suspended, finds the higher number and stops.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from raydetr.console import print_status
from raydetr.store.folders import (
    Folder,
    create_file,
    file_sizes,
    modified,
    with_retry_seconds,
    write_file,
)

log = logging.getLogger(__name__)

LEASE = "lease"
BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0  # without a beat, after which the driver of another machine counts as dead
LONG_DEAD_SECONDS = 3600.0  # without a beat: no two clocks differ by so much
LOOK_SECONDS = 1.0  # between two looks at the beat of another driver


class LeaseError(RuntimeError):
    """Another process drives the run; the message names it."""


class Lease:
    """Holds a run while the block runs. The lease of a process that died is taken over.

    A process of this machine has died if there is none with its id and start time; one of another machine if it does
    not rewrite its file for DEAD_SECONDS, which are waited for.

    Args:
        run: folder of the run.

    Raises:
        LeaseError: (when the block is entered) another process that lives holds the run.
        OSError: the storage cannot be used.
    """

    def __init__(self, run: Folder) -> None:
        self._run, self._folder = run, with_retry_seconds(run, BEAT_SECONDS) / LEASE
        process = psutil.Process()
        self._own: dict[str, Any] = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": process.pid,
            "started": process.create_time(),
            "token": os.urandom(8).hex(),
            "beat": 0,
        }
        self._number = 0
        self._done, self._lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        while True:
            newest = max(self._numbers(), default=0)
            held = self._read(newest)
            if held is not None and self._is_alive(newest, held):
                raise LeaseError(
                    f"{self._run}: process {held['pid']} on {held['host']} is driving this run: wait for its end, or "
                    f"stop it; a dead one is noticed after {DEAD_SECONDS:.0f} s"
                )
            if create_file(self._file(newest + 1), self._content()):
                break
        self._number = newest + 1
        for number in self._numbers():  # of processes that died
            if number < self._number:
                self._file(number).unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(BEAT_SECONDS)  # a beat that is under way would write the file again
        with suppress(
            OSError
        ):  # the storage is away: the result of the run counts; others wait for DEAD_SECONDS
            self._file(self._number).unlink(missing_ok=True)

    def is_lost(self) -> bool:
        """Return whether another process has taken the run over, because this one seemed to have died."""
        return self._lost.is_set()

    def _keep(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            self._own["beat"] += 1
            try:
                if max(self._numbers(), default=0) > self._number:
                    self._lost.set()
                    return
                write_file(self._file(self._number), self._content())
            except Exception as error:  # a hiccup of the storage, of any type; the next beat follows
                log.warning("%s: no sign of life could be written: %s", self._run, error)

    def _is_alive(self, number: int, held: dict[str, Any]) -> bool:
        if held["machine"] == _machine():
            return _lives(held)
        print_status(
            f"{self._run}: looking for at most {DEAD_SECONDS:.0f} s whether process {held['pid']} on {held['host']} "
            "still drives this run"
        )
        until = time.monotonic() + DEAD_SECONDS
        while time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
            began = time.monotonic()
            now = self._read(number)
            if now is None:  # it has ended
                return False
            if now["beat"] != held["beat"]:
                return True
            # The other one could not reach the storage either, while this one waited for it
            until += time.monotonic() - began
        return False

    def _numbers(self) -> list[int]:
        return [int(path.stem) for path in self._folder.glob("*.json") if path.stem.isdecimal()]

    def _file(self, number: int) -> Folder:
        return self._folder / f"{number:06d}.json"

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            held: dict[str, Any] = json.loads(self._file(number).read_text())
        except (FileNotFoundError, ValueError):  # incomplete: its process or machine died while it wrote
            return None
        return held

    def _content(self) -> bytes:
        return json.dumps(self._own).encode()


class DriverWatch:
    """Tells, without writing anything, whether a process drives a run.

    Args:
        run: folder of the run, or of a search.
    """

    def __init__(self, run: Folder) -> None:
        self._folder = with_retry_seconds(run, BEAT_SECONDS) / LEASE
        self._last: bytes | None = None  # content of the lease
        self._beat_at = 0.0  # monotonic time

    def is_alive(self) -> bool:
        """Return whether there is a lease whose process lives; False also means that nobody holds the run.

        A process of another machine gives a sign of life every BEAT_SECONDS. If the newest one seems to be older than
        DEAD_SECONDS, the next one is waited for: the clocks of this machine and of the storage may differ.

        Raises:
            OSError: the storage cannot be read.
        """
        if not self._look():
            return False
        until = time.monotonic() + 2 * BEAT_SECONDS
        while not time.monotonic() - self._beat_at < DEAD_SECONDS:
            if time.monotonic() > until or time.monotonic() - self._beat_at > LONG_DEAD_SECONDS:
                return False
            time.sleep(LOOK_SECONDS)
            if not self._look():
                return False
        return True

    def _look(self) -> bool:
        """Read the lease, and when it was written; return False if there is none, or its process has died."""
        names = [name for name in file_sizes(self._folder) if re.fullmatch(r"\d+\.json", name)]
        try:
            file = self._folder / max(names)
            content = file.read_bytes()
            held = json.loads(content)
            if held["machine"] == _machine():
                self._beat_at = time.monotonic()
                return _lives(held)
            if content != self._last:
                age = 0.0 if self._last is not None else time.time() - modified(file)
                self._last, self._beat_at = content, time.monotonic() - age
        except (
            FileNotFoundError,
            ValueError,
        ):  # there is none; its process has ended, or died while it wrote
            return False
        return True


def _lives(held: dict[str, Any]) -> bool:
    """Return whether the process of a lease, one of this machine, lives."""
    try:
        process = psutil.Process(held["pid"])
        # A process that was killed is a zombie until its parent asks for its exit code
        return bool(process.create_time() == held["started"] and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _machine() -> str:
    """Return what processes with the same process ids have in common: host, boot, and the container's namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()
