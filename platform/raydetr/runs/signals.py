"""Turn the first signal to end into a request to stop after a step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RunStopped(Exception):
    """A run was stopped by a signal before its end; the message says how to continue. `code` is for `sys.exit`."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class StopSignals:
    """Handles Ctrl-C, SIGTERM (`ray job stop`, schedulers) and SIGHUP (a closed terminal) while the block runs.

    The first signal sets `signal`, and the run stops after the current step; the second raises KeyboardInterrupt.
    Outside the main thread, which alone gets signals, it does nothing.

    Args:
        or_if: another reason to stop.
    """

    def __init__(self, or_if: Callable[[], bool] = lambda: False) -> None:
        self._or_if = or_if
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def install(self) -> None:
        """Set the handlers, again if something else, such as `ray.init`, has replaced them."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:  # by `nohup`, or a shell's `&`
                continue
            before = signal.signal(number, self._handle)
            self._before.setdefault(number, before)

    def is_set(self) -> bool:
        """Return whether the run is to stop."""
        return self.signal is not None or self._or_if()

    def sleep(self, seconds: float) -> None:
        """Sleep, but not longer than until the run is to stop."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.is_set():
            time.sleep(min(left, 0.2))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        line = f"{self.signal.name}: stopping after this step, with a checkpoint (once more: at once)\n"
        with suppress(OSError):  # a closed terminal; the run stops with a checkpoint all the same
            os.write(2, line.encode())  # the signal may have interrupted a write to sys.stderr: not reentrant
