"""Make batches in loader processes: torch's DataLoader runs the processes, shared memory carries the pixels."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from multiprocessing.context import BaseContext
from types import ModuleType

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from raydetr.data.batch import Batch, Canvas
from raydetr.data.loader.ring import Failure, LoaderError, Message, Receiver, Ring, Sender
from raydetr.process_pool import exit_with_parent
from raydetr.store.store import uses_stores

Out = Callable[[tuple[int, int, int, int]], Canvas]  # the `out` of `collate`
# Yields batches `worker`, `worker + num_workers`, ... of all, collated into arrays from `out`
Source = Callable[[int, int, Out | None], Iterator[Batch | None]]


def load(source: Source, num_workers: int) -> Iterator[Batch | None]:
    """Yield the batches of a source in order.

    Args:
        source: called with (worker, num_workers, out) in each loader process, to which it is copied.
        num_workers: loader processes; 0 makes the batches in this process.

    Raises:
        LoaderError: a loader process died, or there is no memory for its batches.
        Exception: any exception of the source, with its type and message.
    """
    if num_workers == 0:
        yield from source(0, 1, None)
        return
    ring = Ring(num_workers)
    loader = DataLoader(
        _SenderDataset(source, ring),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=exit_with_parent,  # also before it gets work, when the DataLoader's watchdog waits forever
        generator=torch.Generator(),  # otherwise the DataLoader draws its seed from the global generator
        multiprocessing_context=_start_method(),
        in_order=True,
    )
    receiver = Receiver(ring)
    # Closing ends the processes now; a held traceback would keep them running
    with closing(_messages(loader)) as messages:
        for message in messages:
            if isinstance(message, Failure):
                raise message.error()
            yield None if message is None else receiver.batch(message)


def _messages(loader: DataLoader[Message | Failure | None]) -> Generator[Message | Failure | None]:
    try:
        yield from loader
    except RuntimeError as error:  # the DataLoader's error for a dead process
        raise LoaderError(
            f"{error} A loader process died: killed, or out of memory (see `dmesg`). If it was memory, "
            "lower data.num_loader_workers or the images of a batch."
        ) from error.with_traceback(None)


class _SenderDataset(IterableDataset[Message | Failure | None]):
    def __init__(self, source: Source, ring: Ring) -> None:
        self.source, self.ring = source, ring
        self.environment = dict(os.environ)

    def __iter__(self) -> Iterator[Message | Failure | None]:
        info = get_worker_info()
        assert info is not None
        # A fork server has that of its start, perhaps without credentials
        os.environ.update(self.environment)
        sender = Sender(self.ring, info.id)
        try:
            for batch in self.source(info.id, info.num_workers, sender.canvas):
                yield None if batch is None else sender.message(batch)
        except Exception as error:
            yield Failure.of(error, info.id)


def _start_method() -> BaseContext | None:
    """Return a context that forks in the main thread and uses a fork server elsewhere; None: the program's own.

    A process that has used a store never forks: its child would hang at its first use of a store.

    Outside the main thread the process belongs to a framework such as Ray Train. Its threads may hold a lock of the
    interpreter at the moment of a fork, and the child would wait for it forever.
    """
    # Only the program itself sets these; "fork" may be the platform's default
    if multiprocessing.get_start_method(allow_none=True) in ("spawn", "forkserver"):
        return None
    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread and sys.platform == "linux" and not uses_stores():
        return multiprocessing.get_context("fork")
    # Every child imports the main module again: the server preloads its imports once for all
    main = vars(sys.modules["__main__"]).values()
    modules = {value.__name__ for value in main if isinstance(value, ModuleType)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["raydetr.data.stream", *sorted(modules)])
    return context
