"""Run one function over many tasks in worker processes, with progress. No worker outlives its parent.

Writing, checking, indexing and scanning shards use it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]  # called by a task with the number of units done since its last call
Progress = Callable[[int, int], None]  # called with (units done, total)

POLL_SECONDS = 0.2


class Cancelled(Exception):
    """Raised in a task to end it: its result is no longer needed."""


class _SharedState:
    """State that a worker process shares with its parent; it can be passed only when the process starts."""

    counter: Any
    stop: Any

    def advance(self, count: int) -> None:
        with self.counter.get_lock():
            self.counter.value += count
        if self.stop.is_set():
            raise Cancelled


_SHARED = _SharedState()


def run_tasks(
    function: Callable[[Task, Advance], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    progress: Progress | None = None,
    total: int = 0,
) -> Generator[Result]:
    """Yield `function(task, advance)` for each task, in order; close the iterator to stop early.

    Only a few tasks are in memory at a time. When this process is killed, its workers end too.

    Args:
        function: a module-level function, so that another process can import it.
        tasks: the picklable arguments of the calls.
        workers: number of processes; 1 runs all tasks in this process.
        progress: called with (units done, total).
        total: number of units, for `progress`.

    Raises:
        RuntimeError: a worker process died.
    """
    assert workers >= 1, workers
    report = (lambda done: progress(done, total)) if progress else None
    if workers == 1:
        return _run_here(function, tasks, report)
    return _run_in_processes(function, tasks, workers, report)


def _run_here(
    function: Callable[[Task, Advance], Result],
    tasks: Iterable[Task],
    progress: Callable[[int], None] | None,
) -> Generator[Result]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done)

    for task in tasks:
        yield function(task, advance)


def _run_in_processes(
    function: Callable[[Task, Advance], Result],
    tasks: Iterable[Task],
    workers: int,
    progress: Callable[[int], None] | None,
) -> Generator[Result]:
    context = multiprocessing.get_context("forkserver")
    # The server imports the module of the task, and for example torch, once; the workers are forked from it
    context.set_forkserver_preload([function.__module__])
    counter, stop = context.Value("Q", 0), context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(counter, stop))
    waiting: deque[Future[Result]] = deque()
    remaining = iter(tasks)
    try:
        while True:
            # Two tasks per worker keep all of them busy and bound the memory; tasks are created lazily
            while len(waiting) < 2 * workers and (task := next(remaining, None)) is not None:
                waiting.append(pool.submit(_run, function, task))
            if not waiting:
                break
            while not waiting[0].done():
                wait([waiting[0]], timeout=POLL_SECONDS)
                if progress:
                    progress(counter.value)
            result = waiting.popleft().result()
            if progress:
                progress(counter.value)
            yield result
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process died (killed, or out of memory?): run again, with fewer --workers if memory is short"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _run(function: Callable[[Task, Advance], Result], task: Task) -> Result:
    return function(task, _SHARED.advance)


def _start(counter: Any, stop: Any) -> None:
    """Prepare a worker process: ignore Ctrl-C, which the parent handles, and exit when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _SHARED.counter, _SHARED.stop = counter, stop
    exit_with_parent()


def exit_with_parent(*_: object) -> None:
    """End this process when its parent ends, from a thread that waits for that."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def wait_and_exit() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()
