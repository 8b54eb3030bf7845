"""Upload a run to MLflow in a process of its own, which the driver starts: training never waits for MLflow.

Neither does the driver: what MLflow does, or does not do, happens in another process. That reads the events of the run,
or of a search and all its trials. It ends when the driver asks for it, or has ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from raydetr.store.folders import Folder, open_folder

POLL_SECONDS, REMOTE_POLL_SECONDS = 3.0, 20.0  # between two looks at the events, on a disk and at a URL
FIRST_PAUSE, MAX_PAUSE = 3.0, 60.0  # seconds between two tries; the pause doubles
SILENT_SECONDS = 60.0  # without a request that MLflow answered, after which the driver goes on without it
MAX_ERRORS = 2  # of runs, until MLflow is taken for away


class UploadProcess:
    """Uploads the run, or the search, in a folder, until `finish`.

    Args:
        run: the folder.
        uri: the tracking URI; None: that of the run.
        on_problem: is called, in a thread, with what keeps values from MLflow, once for each reason.
    """

    def __init__(self, run: Folder, uri: str | None, on_problem: Callable[[str], None]) -> None:
        self._on_problem = on_problem
        self.problem: str | None = None
        self._told_at = time.monotonic()
        self._is_done = threading.Event()
        self._pending: str | None = "everything"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - `finish` closes it
        # Its imports are those of this process, which may have changed its path
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(run)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the driver, which ends this process in its own time
        )
        self._send({"uri": uri})  # not an argument, which others could see: it may have a password
        self._thread = threading.Thread(target=self._listen, name="upload", daemon=True)
        self._thread.start()

    def finish(self) -> str | None:
        """Wait until everything is uploaded, as long as MLflow answers; return what it lacks, or None."""
        self._send({"finish": True})
        self._told_at = time.monotonic()
        while not self._is_done.wait(0.05):
            if time.monotonic() - self._told_at > SILENT_SECONDS or self._process.poll() is not None:
                break
        self._process.kill()
        self._process.wait()
        self._thread.join()  # it has read all that the process wrote
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # a message that nobody reads any more
                pipe.close()
        problem = self.problem or self._last_error()
        self._errors.close()
        if not self._is_done.is_set() and self._pending is None:
            self._pending = "some values"
        return None if self._pending is None else f"{self._pending}: {problem}"

    def _last_error(self) -> str:
        """Return the last line that the process wrote to its standard error, where Python prints what ended it."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "the process that uploads gives no sign"

    def _send(self, message: dict[str, object]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            self._told_at = 0.0  # it has ended; `finish` tells why

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            self._told_at = time.monotonic() + message.get("grace", 0.0)
            problem = message.get("problem")
            if problem is not None and problem != self.problem:
                self._on_problem(problem)
            self.problem = problem or self.problem
            if "pending" in message:
                self._pending = message["pending"]
            if message.get("done"):
                self._is_done.set()


# --- In the process ---


def upload_all(
    uploaders: dict[str, object], run: Folder, uri: str | None, on_alive: Callable[[float], None]
) -> bool:
    """Upload a run, and the trials in its folder; return whether there was anything new.

    One that fails does not keep the others from being uploaded; after the second one, MLflow is taken for away.

    Args:
        uploaders: those of earlier calls by folder; new ones are added.
        run: folder of a run or a search.
        uri: see `Uploader`.
        on_alive: see `Uploader`.

    Raises:
        OSError, ValueError, TrackingError: see `Uploader.sync`.
    """
    from raydetr.tracking.uploader import Uploader  # mlflow takes seconds to import

    is_new, errors = False, []
    for folder in runs_in(run):
        try:
            uploader = uploaders.get(str(folder)) or Uploader(folder, uri, on_alive)
            assert isinstance(uploader, Uploader)
            uploaders[str(folder)] = uploader
            is_new |= uploader.sync()
        except Exception as error:  # raised below
            errors.append(error)
        if len(errors) == MAX_ERRORS:
            break
    if errors:
        raise errors[0]
    return is_new


def runs_in(folder: Folder) -> list[Folder]:
    """Return a run or search, and the runs in its folder: the trials of a search."""
    below = sorted({path.parent.parent for path in folder.glob("*/events/*.jsonl")})
    return [folder, *below]


class _Commands:
    """The messages of the driver; without a driver, the process ends."""

    def __init__(self, stream: TextIO) -> None:
        self.uri: str | None = json.loads(stream.readline())["uri"]
        self.is_finishing = threading.Event()
        threading.Thread(target=self._listen, args=(stream,), daemon=True).start()

    def _listen(self, stream: TextIO) -> None:
        if stream.readline():
            self.is_finishing.set()
            stream.readline()
        os._exit(0)  # the driver has ended


def main(location: str) -> None:
    """Upload until the driver asks to finish; then once more, and print what MLflow lacks."""
    # Standard output is for messages to the driver, but MLflow, libraries in C and their processes print there
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**message: object) -> None:
        print(json.dumps(message), file=answers, flush=True)

    commands, run = _Commands(sys.stdin), open_folder(location)
    poll = POLL_SECONDS if isinstance(run, Path) else REMOTE_POLL_SECONDS
    uploaders: dict[str, object] = {}
    pause, problem = FIRST_PAUSE, None
    while True:
        is_last = commands.is_finishing.is_set()
        try:
            is_new = upload_all(uploaders, run, commands.uri, lambda seconds: tell(grace=seconds))
            found = None
            pause = FIRST_PAUSE
        except Exception as error:  # whatever it is: the next try may work, and the events are kept
            is_new, found = False, str(error) or type(error).__name__
        if found != problem or is_new:
            problem = found
            tell(problem=problem)
        if is_last and not is_new:
            pending = None if problem is None else _pending(uploaders)
            tell(problem=problem, pending=pending, done=True)
            commands.is_finishing.clear()
            time.sleep(SILENT_SECONDS)  # until the driver ends this process
            return
        if not is_last:
            commands.is_finishing.wait(poll if problem is None else pause)
            pause = pause if problem is None else min(2 * pause, MAX_PAUSE)


def _pending(uploaders: dict[str, object]) -> str:
    waiting = [text for uploader in uploaders.values() if (text := getattr(uploader, "pending", None))]
    return "; ".join(waiting) or "everything"


if __name__ == "__main__":
    main(sys.argv[1])
