"""Run calls in background threads that, unlike those of concurrent.futures, do not keep a process from exiting."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, ParamSpec, TypeAlias, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Call: TypeAlias = tuple[Future[Any], Callable[[], Any]]
Calls: TypeAlias = "queue.SimpleQueue[Call | None]"  # None ends a thread


class BackgroundThreads:
    """A pool that runs at most `num_threads` calls at a time, first in, first out. Not for use after a fork.

    The threads end when this object is garbage-collected and the submitted calls are done.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._waiting: Calls = queue.SimpleQueue()
        self._num_started, self._num_threads, self._name = 0, num_threads, name
        weakref.finalize(self, _end, self._waiting, num_threads).atexit = False

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call a function in the background and return its future."""
        future: Future[T] = Future()
        self._waiting.put((future, lambda: function(*args, **kwargs)))
        if self._num_started < self._num_threads:
            self._num_started += 1
            # The thread references only the queue, so it does not keep this object alive.
            threading.Thread(target=_work, args=(self._waiting,), name=self._name, daemon=True).start()
        return future

    def call(self, function: Callable[[], T], seconds: float) -> T:
        """Call a function in the background and return its result, waiting for at most `seconds`.

        Raises:
            TimeoutError: it has no result by then; it is not interrupted.
        """
        future = self.submit(function)
        if not wait([future], seconds).done:
            raise TimeoutError(f"{self._name} does not answer within {seconds:g} s")
        return future.result()


def _work(waiting: Calls) -> None:
    while (waited := waiting.get()) is not None:
        future, call = waited
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        del waited, future, call  # They may reference the owner of this pool, which would never be collected.


def _end(waiting: Calls, num_threads: int) -> None:
    for _ in range(num_threads):
        waiting.put(None)
