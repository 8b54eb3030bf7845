"""The lease of a run: one driver at a time, on a disk and at a URL."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from raydetr.runs import lease as lease_module
from raydetr.runs.lease import LEASE, Lease, LeaseError
from raydetr.store.folders import Folder, open_folder, write_file


def held(run: Folder) -> dict[str, Any]:
    (file,) = (run / LEASE).glob("*.json")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def leave(run: Folder, **changed: Any) -> None:
    """Leave the lease of a process that did not release it."""
    with Lease(run):
        content = held(run) | changed
    write_file(run / LEASE / "000001.json", json.dumps(content).encode())


def test_a_second_driver_is_refused(run_folder: Folder) -> None:
    with Lease(run_folder):
        with pytest.raises(LeaseError, match=rf"process {os.getpid()} on .* is driving this run"):
            Lease(run_folder).__enter__()
        assert held(run_folder)["pid"] == os.getpid()
    assert list((run_folder / LEASE).glob("*")) == []
    with Lease(run_folder):
        pass


def test_a_process_of_this_machine_that_died_is_replaced_at_once(run_folder: Folder) -> None:
    # Killed, and its id belongs to another process now
    leave(run_folder, started=1.0, token="dead")
    with Lease(run_folder):
        assert held(run_folder)["token"] != "dead"


def test_a_process_of_another_machine_that_gives_no_sign_is_replaced(
    run_folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease_module, "DEAD_SECONDS", 1.5)
    monkeypatch.setattr(lease_module, "LOOK_SECONDS", 0.1)
    leave(run_folder, machine="elsewhere", host="elsewhere", token="dead")
    began = time.monotonic()
    with Lease(run_folder):
        assert held(run_folder)["token"] != "dead"
    assert time.monotonic() - began >= 1.5
    assert "whether process" in " ".join(capsys.readouterr().err.split())


def test_a_process_of_another_machine_that_lives_is_not_replaced(
    run_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lease_module, "DEAD_SECONDS", 20.0)
    monkeypatch.setattr(lease_module, "LOOK_SECONDS", 0.1)
    with Lease(run_folder) as lease:
        monkeypatch.setattr(
            lease_module, "_machine", lambda: "another container, with process ids of its own"
        )
        with pytest.raises(LeaseError, match="is driving this run"):
            Lease(run_folder).__enter__()
        assert not lease.is_lost()


def test_a_driver_that_was_taken_for_dead_notices_it(
    run_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(Lease, "_is_alive", lambda *arguments: False)
    with Lease(run_folder) as first, Lease(run_folder) as second:
        deadline = time.monotonic() + 20
        while not first.is_lost():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not second.is_lost()


def take_lease(location: str, results: Path) -> None:
    try:
        with Lease(open_folder(location)):
            (results / f"got-{os.getpid()}").touch()
            time.sleep(3)
    except LeaseError:
        (results / f"refused-{os.getpid()}").touch()


def test_of_several_drivers_that_replace_a_dead_one_one_drives(run_folder: Folder, tmp_path: Path) -> None:
    assert not psutil.pid_exists(2**22)
    leave(run_folder, pid=2**22)
    results = tmp_path / "results"
    results.mkdir()
    context = multiprocessing.get_context("spawn")  # a process that has used a store is not to be forked
    drivers = [context.Process(target=take_lease, args=(str(run_folder), results)) for _ in range(4)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(60)
    assert len(list(results.glob("got-*"))) == 1
    assert len(list(results.glob("refused-*"))) == 3
