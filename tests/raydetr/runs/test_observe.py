"""`raydetr watch` follows a run that another process drives, on a disk and at a URL, and reads only what is new."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest

from command_line import CommandLine
from faulty_proxy import Fault, FaultyProxy
from played_run import PlayedRun, evaluation, started, step, write_run
from raydetr.runs import lease
from raydetr.runs import observe as observe_module
from raydetr.runs.observe import observe
from raydetr.store.folders import Folder, open_folder, write_file
from raydetr.tracking.events import EventLog, EventReader


@pytest.fixture
def played(run_folder: Folder) -> Iterator[PlayedRun]:
    run = PlayedRun(run_folder)
    yield run
    run.close()


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Watching:
    """A process of `raydetr watch`, which looks ten times as often."""

    def __init__(self, folder: Folder, output: Path) -> None:
        code = (
            "import signal, sys\n"
            "from raydetr.runs import observe\n"
            "observe.POLL_SECONDS, observe.ALIVE_SECONDS = 0.1, 0.5\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"sys.argv = ['raydetr', 'watch', {str(folder)!r}]\n"
            "from raydetr.cli.main import main\n"
            "main()"
        )
        self._output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=file, stderr=file)

    @property
    def text(self) -> str:
        return self._output.read_text()

    def wait(self) -> int:
        return self.process.wait(60)


def test_a_run_is_followed_to_its_end(played: PlayedRun, tmp_path: Path) -> None:
    played.log("started", **started(workers=2))
    played.log("step", **step(5))
    played.log("evaluation", **evaluation(1, 0.25))
    watching = Watching(played.folder, tmp_path / "output")
    wait_for(lambda: "AP 0.250, the best so far" in watching.text)
    for kind, fields, expected in (
        ("step", step(8), "step 8/20"),
        ("checkpoint", {"position": 160, "seconds": 0.5, "bytes": 7_000_000}, "at epoch 1.60: 7 MB in 0.5 s"),
        ("checkpoint_failed", {"position": 170, "seconds": 1, "error": "full"}, "no checkpoint at epoch 1.70: full"),
        ("corrupt", {"position": 170, "sample": "a.jpg is cut off"}, "warning: corrupt: a.jpg is cut off"),
        ("stalled", {"reason": "no progress for 60 minutes"}, "stalled: no progress for 60 minutes"),
        ("stack", {"worker": "rank-1", "stack": "Thread 1\n  File a\n  File b\n"}, "worker rank-1 was at: File b"),
        ("restart", {"reason": "worker 1 died", "position": 160}, "restart 1, from epoch 1.60: worker 1 died"),
        ("layout", {"workers": 1, "reason": "a node is missing"}, "goes on with 1 worker: a node is missing"),
        ("resumed", started(160), "training goes on from epoch 1.60, 1 worker"),
        ("evaluation", evaluation(2, 0.125), "evaluated at epoch 2.00: AP 0.125\n"),
        ("finished", {"position": 400, "AP": 0.125}, ""),
    ):  # fmt: skip
        played.log(kind, **fields)
        wait_for(lambda expected=expected: expected in watching.text)
    assert watching.process.poll() is None  # its driver holds the lease yet
    played.close()
    assert watching.wait() == 0
    assert re.search(
        r"^finished; trained for 0:\d\d; 1 restart; AP 0.125, best 0.250$", watching.text, re.MULTILINE
    )
    assert "\x1b" not in watching.text  # no terminal


def test_a_run_whose_driver_is_killed_is_lost(played: PlayedRun, tmp_path: Path) -> None:
    played.log("started", **started())
    played.log("checkpoint", position=0, seconds=1.0, bytes=10)
    watching = Watching(played.folder, tmp_path / "output")
    wait_for(lambda: "training starts, 1 worker" in watching.text)
    played.kill()
    assert watching.wait() == 4
    last = watching.text.splitlines()[-1]
    assert last.startswith("lost")
    assert last.endswith(
        f"its driver gives no sign of life; continue with `raydetr train --resume {played.folder}`"
    )


@pytest.mark.parametrize(("kind", "code"), [("finished", 0), ("failed", 1), ("stopped", 3)])
def test_the_exit_code_is_how_the_run_ended(tmp_path: Path, kind: str, code: int) -> None:
    run = write_run(tmp_path / "run", ("started", started()), (kind, {"reason": "because of that"}))
    stream = StringIO()
    assert observe(run, stream) == code
    assert "because of that" in stream.getvalue()


def test_ctrl_c_leaves_and_the_run_goes_on(tmp_path: Path) -> None:
    played = PlayedRun(tmp_path / "run")
    played.log("started", **started())
    watching = Watching(played.folder, tmp_path / "output")
    wait_for(lambda: "training starts" in watching.text)
    watching.process.send_signal(signal.SIGINT)
    assert watching.wait() == 130
    assert f"left: run goes on; `raydetr watch {tmp_path}/run` follows it again" in watching.text
    played.log("step", **step(5))
    played.close()


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    played = PlayedRun(tmp_path / "run")
    played.log("started", **started())
    played.log("step", **step(10))
    reader, terminal = pty.openpty()
    code = f"from raydetr.cli.main import main\nimport sys\nsys.argv = ['raydetr', 'watch', '{tmp_path}/run']\nmain()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "COLUMNS": "150", "TERM": "xterm"},
    )
    os.close(terminal)
    shown = ""
    while "step 10/20" not in shown:
        shown += os.read(reader, 4096).decode()
    assert "━━━━━━━━━━╌╌╌╌╌╌╌╌╌╌  training  epoch 2.00/4" in shown
    played.log("finished", position=400, AP=None)
    played.close()
    assert process.wait(60) == 0
    shown = os.read(reader, 100_000).decode()
    assert "finished" in shown.splitlines()[-1]
    os.close(reader)


def test_an_outage_of_the_storage_is_told_once_and_waited_for(
    s3_proxy: FaultyProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(observe_module, "RETRY_SECONDS", 0.5)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.5)  # how long the driver's sign of life is tried to be read
    run = write_run(
        open_folder(s3_url) / "run", ("started", started()), ("finished", {"position": 400, "AP": 0.5})
    )
    refused = 0

    def refuse(request: object) -> Fault | None:
        nonlocal refused
        refused += 1
        return Fault("refuse") if 8 < refused < 30 else None

    s3_proxy.faults = refuse
    stream = StringIO()
    monkeypatch.setattr(
        observe_module.DriverWatch,
        "is_alive",
        lambda self: len(self._folder.store.names("")) > -1 and refused < 40,
    )
    monkeypatch.setattr(observe_module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(observe_module, "ALIVE_SECONDS", 0.05)
    assert observe(run, stream) == 0
    assert stream.getvalue().count("trying again for 10 minutes") >= 1


def test_only_new_events_are_read(run_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    log, reader = EventLog(run_folder), EventReader(run_folder)
    read: list[int] = []
    from raydetr.tracking import events

    original = events.read_part

    def read_part(path: Folder, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return original(path, start, stop)

    monkeypatch.setattr(events, "read_part", read_part)
    for number in range(1, 30):
        log.append("step", **step(number))
    assert log.flush()
    assert [event["step"] for event in reader.read()] == list(range(1, 30))
    assert reader.read() == []
    before = sum(read)
    log.append("step", **step(30))
    assert log.flush()
    assert [event["step"] for event in reader.read()] == [30]
    assert sum(read) - before < 200 < before


def test_a_line_that_is_written_in_two_parts_is_one_event(tmp_path: Path) -> None:
    reader = EventReader(tmp_path)
    write_file(tmp_path / "events" / "000001.jsonl", b'{"time": 1, "kind": "a"}\n{"time": 2, "ki')
    assert [event["kind"] for event in reader.read()] == ["a"]
    assert reader.read() == []
    with (tmp_path / "events" / "000001.jsonl").open("ab") as file:
        file.write(b'nd": "b"}')
    assert reader.read() == []
    with (tmp_path / "events" / "000001.jsonl").open("ab") as file:
        file.write(b'\n{"time": 3, "kind": "c"}\n')
    assert [event["kind"] for event in reader.read()] == ["b", "c"]


def test_without_all_steps_only_the_last_step_of_a_segment_is_read(tmp_path: Path) -> None:
    steps = [("step", step(number)) for number in (6, 7)]
    run = write_run(
        tmp_path,
        ("started", started()),
        ("step", step(1)),
        ("evaluation", evaluation(1, 0.5)),
        *steps,
        ("finished", {}),
    )
    kinds = [(event["kind"], event.get("step")) for event in EventReader(run, all_steps=False).read()]
    assert kinds == [("started", 0), ("evaluation", 5), ("step", 7), ("finished", None)]


def test_what_cannot_be_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = CommandLine(monkeypatch, capsys)
    gone = command("watch", "gone")
    assert gone.code == 1
    assert gone.err.startswith("error: gone: is not the folder or URL of a run")
    search = write_run(tmp_path / "search")
    (tmp_path / "search" / "space.yaml").write_text("")
    assert f"{search}: is a search" in command("watch", "search").err
    assert [path.name for path in tmp_path.iterdir()] == ["search"]
