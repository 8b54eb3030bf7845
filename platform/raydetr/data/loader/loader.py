"""Work in loader processes: torch's DataLoader for the processes, shared memory for what they make."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import parent_process
from multiprocessing.context import BaseContext
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from raydetr.data.batch import Batch, Canvas
from raydetr.data.loader.ring import Failure, LoaderError, Message, Receiver, Ring, Sender

Out = Callable[[tuple[int, int, int, int]], Canvas]  # `collate`'s
DONE = object()
B = TypeVar("B", bound=Batch | None, covariant=True)


class Work(Protocol[B]):
    """Something that makes batches, which several processes can share."""

    def batches(self, worker: int, num_workers: int, out: Out | None) -> Iterator[B]:
        """The batches `worker`, `worker + num_workers`, ... of the work, collated into what `out` gives."""


def load(work: Work[B], num_workers: int) -> Iterator[B]:
    """The batches of some work, in their order.

    Args:
        work: is copied to the loader processes.
        num_workers: loader processes; 0 works in this process.

    Raises:
        LoaderError: a loader process died, or there is no memory for its batches.
        Exception: what the work raises, as it was raised.
    """
    if num_workers == 0:
        yield from work.batches(0, 1, None)
        return
    ring = Ring(num_workers)
    loader = DataLoader(
        _Sending(work, ring),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # else starting the loader would draw from the global one
        multiprocessing_context=_how_to_start(),
        in_order=True,
    )
    receiver, messages = Receiver(ring), iter(loader)
    try:
        while True:
            message = _next(messages)
            if message is DONE:
                return
            if isinstance(message, Failure):
                raise message.error()
            yield cast(B, None if message is None else receiver.batch(message))
    finally:
        del messages  # the processes end with it: at once, not when an exception's traceback is dropped


def _next(messages: Iterator[Any]) -> Any:
    try:
        return next(messages, DONE)
    except RuntimeError as error:  # what the DataLoader says of a process that is gone
        raise LoaderError(
            f"{error} A loader process is gone: killed, or out of memory (`dmesg` tells). If it was memory, "
            "lower data.num_loader_workers or the images of a batch."
        ) from error.with_traceback(None)


class _Sending(IterableDataset[Message | Failure | None]):
    def __init__(self, work: Work[Batch | None], ring: Ring) -> None:
        self.work, self.ring = work, ring

    def __iter__(self) -> Iterator[Message | Failure | None]:
        info = get_worker_info()
        assert info is not None
        threading.Thread(target=_end_with_parent, daemon=True).start()
        sender = Sender(self.ring, info.id)
        try:
            for batch in self.work.batches(info.id, info.num_workers, sender.canvas):
                yield None if batch is None else sender.message(batch)
        except Exception as error:
            yield Failure.of(error, info.id)


def _how_to_start() -> BaseContext | None:
    """Fork in the main thread, which is quick; elsewhere ask a server to fork, unless the program chose a way.

    A thread beside the main one says that the process belongs to somebody else, such as Ray Train. Those threads
    may hold a lock of the interpreter at the moment of a fork, and then the child waits for it for ever.
    """
    if multiprocessing.get_start_method(allow_none=True) in (
        "spawn",
        "forkserver",
    ):  # chosen; "fork" may not be
        return None
    if threading.current_thread() is threading.main_thread() and sys.platform == "linux":
        return multiprocessing.get_context("fork")
    # Every child runs the main module again. What that imports is imported once, by the server.
    main = vars(sys.modules["__main__"]).values()
    modules = {value.__name__ for value in main if isinstance(value, ModuleType)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["raydetr.data.stream", *sorted(modules)])
    return context


def _end_with_parent() -> None:
    """The DataLoader's own watch looks every five seconds, and at nothing if the parent died before it began."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _unchanged(message: Any) -> Any:
    return message
