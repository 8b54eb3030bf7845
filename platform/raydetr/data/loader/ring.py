"""Send batches from loader processes to the trainer: pixels in recycled shared memory, the rest in messages.

A loader collates into a free *slot* of anonymous shared memory and sends a message of a few hundred bytes; the
trainer sees the slot as a tensor, without a copy. A slot is free again when nothing refers to its memory any more:
no Python object and, where it is pinned, no copy to a GPU that is still running. A batch that a consumer holds
therefore never changes. A consumer that holds more batches than a process has slots gets the next ones inside the
message, more slowly, and never waits.

The memory is a file without a name: it disappears with the last process that has it open, however that process ends,
and does not count against the size of /dev/shm. A slot is a gigabyte of address space; it uses only as much memory as
the largest batch in it has filled.
"""

from __future__ import annotations

import mmap
import os
import pickle
import sys
import tempfile
import threading
import traceback
import weakref
from dataclasses import dataclass, fields
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch

from raydetr.data.batch import Batch, Canvas
from raydetr.data.loader.pinned import PinnedMemory

NUM_SLOTS = 8  # per process: two are loaded ahead, a trainer holds two; the rest is reserve
SLOT_BYTES = 1 << 30
FREE, TAKEN = 0, 1


class LoaderError(RuntimeError):
    """The loader processes cannot continue, for a reason other than the data."""


@dataclass(frozen=True)
class Message:
    """A batch in transit."""

    slot: int | None  # that holds the pixels; None: `rest` holds them
    shape: tuple[int, ...]  # of the pixels, [b, h, w, 3]
    rest: bytes  # the other fields, pickled, tensors as arrays


@dataclass(frozen=True)
class Failure:
    """An exception in transit, which keeps its type and message."""

    pickled: bytes

    @staticmethod
    def of(error: Exception, worker: int) -> Failure:
        """Wrap an exception; raise it here if it cannot be pickled or unpickled."""
        error.add_note(f"in loader process {worker}:\n{''.join(traceback.format_tb(error.__traceback__))}")
        try:
            failure = Failure(pickle.dumps(error))
            failure.error()
        except Exception:
            raise error from None
        return failure

    def error(self) -> Exception:
        """Return the exception."""
        error: Exception = pickle.loads(self.pickled)
        return error


class Ring:
    """The slots of some loader processes. The receiving process makes it before they start.

    Layout of the memory: one page of slot states per process, then the slots, process after process.

    Args:
        num_workers: number of loader processes.
        num_slots: of each process.
        slot_bytes: a multiple of the page size; larger batches are sent inside the message.
        memory: descriptor of the memory of another process's ring, as it is pickled; None: a new ring.

    Raises:
        LoaderError: the memory cannot be mapped.
    """

    def __init__(
        self, num_workers: int, num_slots: int = NUM_SLOTS, slot_bytes: int = SLOT_BYTES, memory: Any = None
    ) -> None:
        self.num_workers, self.num_slots, self.slot_bytes = num_workers, num_slots, slot_bytes
        num_bytes = num_workers * (mmap.PAGESIZE + num_slots * slot_bytes)
        try:
            self._descriptor = _anonymous_file(num_bytes) if memory is None else memory.detach()
            self._memory = mmap.mmap(self._descriptor, num_bytes)
        except OSError as error:
            raise LoaderError(
                f"no shared memory for the batches of {num_workers} loader processes ({error}): raise the limits "
                "of files and of address space (ulimit -n, -v), or set data.num_loader_workers=0"
            ) from error

        assert num_slots <= mmap.PAGESIZE
        # One byte per slot, without a lock. Two processes never write the same byte at the same time: it belongs to the
        # loader until that has sent the slot, and then to the receiver until it is FREE. Bytes of other slots may be
        # written meanwhile, since writing a byte does not touch its neighbors.
        # The order of accesses matters, too, because ARM reorders them, unlike x86. A message is received after what
        # its loader wrote before it: a queue's locks and the kernel's pipe are between them. Freeing a slot sends no
        # message: see `_free` and `canvas`
        self.states = np.ndarray((num_workers, mmap.PAGESIZE), np.uint8, self._memory)[:, :num_slots]

    def array(self, slot: int, shape: tuple[int, ...]) -> Canvas:
        """Return the beginning of a slot's memory as an array that lives as long as any view of it."""
        # A numpy view refers to the last array in its chain of bases. This array's own base is the mmap, so every view,
        # and every tensor made from one, refers to this object: its finalizer marks the end of the slot's use
        return np.ndarray(shape, np.uint8, self._memory, self._offset(slot))

    def reserve(self, slot: int, num_bytes: int) -> None:
        """Allocate the first pages of a slot.

        The file is sparse. If memory ran out when a page is first written, SIGBUS would end the process; this fails
        with an error instead.

        Raises:
            LoaderError: there is not enough memory.
        """
        if sys.platform != "linux":
            return
        try:
            os.posix_fallocate(self._descriptor, self._offset(slot), num_bytes)
        except OSError as error:
            raise LoaderError(
                f"no shared memory for a batch of {num_bytes / 2**20:.0f} MiB ({error}): lower the images of a "
                "batch (data.batch_size, data.eval_batch_size) or data.num_loader_workers"
            ) from error

    def _offset(self, slot: int) -> int:
        return mmap.PAGESIZE * self.num_workers + slot * self.slot_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        # A nameless file cannot be opened by another process: spawned loaders inherit a duplicate of the descriptor
        return Ring, (self.num_workers, self.num_slots, self.slot_bytes, DupFd(self._descriptor))

    def __del__(self) -> None:
        # Closes the descriptor only. The mapping stays as long as an array refers to it: batches outlive the ring.
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class Sender:
    """A loader process's side of a ring."""

    def __init__(self, ring: Ring, worker: int) -> None:
        self.ring, self.worker = ring, worker
        self._states = ring.states[worker]
        self._reserved = [0] * ring.num_slots  # bytes
        self._taken: tuple[int, Canvas] | None = None  # the slot of the batch that is being made

    def canvas(self, shape: tuple[int, int, int, int]) -> Canvas:
        """Return memory for the pixels of the next batch: the `out` of `collate`.

        Raises:
            LoaderError: there is not enough memory.
        """
        if self._taken is not None:  # the last canvas was never sent, so the receiver will not free it
            self._states[self._taken[0]] = FREE
            self._taken = None
        num_bytes = int(np.prod(shape))
        # No fence is needed after this read: whether and where the slot is written depends on what is read here, and
        # no CPU performs a write before the reads that it depends on
        free = np.flatnonzero(self._states == FREE).tolist()
        if not free or num_bytes > self.ring.slot_bytes:
            return np.empty(shape, np.uint8)
        slot = free[0]  # the lowest, so that slots which the consumer does not need never use memory
        number = self.worker * self.ring.num_slots + slot
        if num_bytes > self._reserved[slot]:
            self.ring.reserve(number, num_bytes)
            self._reserved[slot] = num_bytes
        self._states[slot] = TAKEN
        self._taken = slot, self.ring.array(number, shape)
        return self._taken[1]

    def message(self, batch: Batch) -> Message:
        """Return the message for a batch, whose pixels belong to the receiver from now on."""
        pixels = batch.pixels.permute(0, 2, 3, 1).numpy()
        rest = {field.name: getattr(batch, field.name) for field in fields(batch)}
        slot = None
        if self._taken is None:
            rest["pixels"] = pixels
        else:
            slot = self.worker * self.ring.num_slots + self._taken[0]
            assert pixels.ctypes.data == self._taken[1].ctypes.data, (
                "the pixels were not collated into the canvas"
            )
            del rest["pixels"]
            self._taken = None
        # As arrays, because torch would move every tensor into a shared memory of its own, with a descriptor each
        plain = {
            name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in rest.items()
        }
        return Message(slot, pixels.shape, pickle.dumps(plain, protocol=5))


class Receiver:
    """The trainer's side of a ring."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self._states = ring.states
        self._owner_pid = os.getpid()
        self._pinned = PinnedMemory()

    def batch(self, message: Message) -> Batch:
        """Return the batch that was sent. Its pixels are the slot's memory, which is freed when they are collected.

        Copies to a GPU that still run then are waited for, if they are on the stream that is current then.
        """
        rest = pickle.loads(message.rest)
        if message.slot is None:
            pixels = rest.pop("pixels")
        else:
            pixels = self.ring.array(message.slot, message.shape)
            self._pinned.pin(message.slot, pixels)
            # Runs when the last view of the pixels is gone. The bound method keeps this receiver, and so the pinned
            # memory, until then. Not at exit: the interpreter and CUDA may be half gone, and the file goes anyway.
            weakref.finalize(pixels, self._release, message.slot).atexit = False
        for slot in self._pinned.pop_finished():
            self._free(slot)
        tensors: dict[str, Any] = {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in rest.items()
        }
        tensors["pixels"] = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return Batch(**tensors)

    def _release(self, slot: int) -> None:
        # A forked child inherits the pixels and this finalizer, but its references do not keep the parent's batch
        # alive or end its use: only the parent may free the slot
        if os.getpid() == self._owner_pid and not self._pinned.defer_release(slot):
            self._free(slot)

    def _free(self, slot: int) -> None:
        # Without the fence, an ARM CPU could let the loader see FREE before the last reads of the slot are done, and
        # these would return pixels of the next batch
        _fence()
        self._states[divmod(slot, self.ring.num_slots)] = FREE


def _fence() -> None:
    """Perform all earlier reads and writes of this thread before any later write.

    Python has no function for that, but its locks are made of the two halves: to release one waits for what came
    before, and to acquire one holds back what follows. One lock is not enough, because both may move into it from their
    sides and pass each other there; between a release and the acquisition after it they cannot.
    """
    lock = threading.Lock()  # of this call alone, so that no thread or finalizer ever waits for it
    for _ in range(2):
        with lock:
            pass


def _anonymous_file(num_bytes: int) -> int:
    if sys.platform == "linux":
        descriptor = os.memfd_create("raydetr-batches")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, num_bytes)
    return descriptor
