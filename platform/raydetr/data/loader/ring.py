"""From loader processes to the trainer: pixels in shared memory that is used again and again, the rest in messages.

A loader collates into a free *slot* of anonymous shared memory and sends a message of a few hundred bytes; the
trainer sees the slot as a tensor, without a copy. The slot is free again when nothing refers to that memory any
more, neither in Python nor, where it is pinned, a copy to a GPU that is still under way: what a consumer holds
never changes. A consumer that holds more batches than a process has slots gets the next ones inside the message,
slower, and waits for nothing.

The memory is a file without a name: it is gone with the last process that has it open, however that one ends, and
/dev/shm may be as small as it likes. A slot is a gigabyte of address space; what the largest batch in it has filled
is all the memory that it takes.
"""

from __future__ import annotations

import mmap
import os
import pickle
import sys
import tempfile
import traceback
import weakref
from dataclasses import dataclass, fields
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch

from raydetr.data.batch import Batch, Canvas
from raydetr.data.loader.pinned import Pinned

SLOTS = 8  # of a process: two that are loaded ahead, two that a trainer holds, and as many again
SLOT_BYTES = 1 << 30
FREE, TAKEN = 0, 1


class LoaderError(RuntimeError):
    """The loader processes cannot go on, through no fault of the data."""


@dataclass(frozen=True)
class Message:
    """A batch as it is sent."""

    slot: int | None  # holds the pixels; None: `rest` does
    shape: tuple[int, ...]  # of the pixels, [b, h, w, 3]
    rest: bytes  # the other fields, pickled, tensors as arrays


@dataclass(frozen=True)
class Failure:
    """An exception as it is sent, so that its type and message stay what they are."""

    pickled: bytes

    @staticmethod
    def of(error: Exception, worker: int) -> Failure:
        """Raises `error` itself if it cannot be sent."""
        error.add_note(f"in loader process {worker}:\n{''.join(traceback.format_tb(error.__traceback__))}")
        try:
            failure = Failure(pickle.dumps(error))
            failure.error()
        except Exception:
            raise error from None
        return failure

    def error(self) -> Exception:
        """The exception."""
        error: Exception = pickle.loads(self.pickled)
        return error


class Ring:
    """The slots of some loader processes. It is made before they start, by the process that receives.

    Args:
        num_workers: number of loader processes.
        slots: of each.
        slot_bytes: a multiple of the page size; batches above it are sent inside the message.

    Raises:
        LoaderError: there is no such memory.
    """

    def __init__(self, num_workers: int, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> None:
        try:
            descriptor = _nameless_file(mmap.PAGESIZE * num_workers + num_workers * slots * slot_bytes)
            self._attach(descriptor, num_workers, slots, slot_bytes)
        except OSError as error:
            raise LoaderError(
                f"no shared memory for the batches of {num_workers} loader processes ({error}): raise the limits "
                "of files and of address space (ulimit -n, -v), or set data.num_loader_workers=0"
            ) from error

    def _attach(self, descriptor: int, num_workers: int, slots: int, slot_bytes: int) -> None:
        self._descriptor, self.num_workers, self.slots, self.slot_bytes = (
            descriptor, num_workers, slots, slot_bytes
        )  # fmt: skip
        self._memory = mmap.mmap(descriptor, 0)
        assert slots <= mmap.PAGESIZE
        # A byte for each slot: its loader writes TAKEN, the receiver writes FREE.
        self.states = np.ndarray((num_workers, mmap.PAGESIZE), np.uint8, self._memory)[:, :slots]

    def array(self, slot: int, shape: tuple[int, ...]) -> Canvas:
        """The beginning of a slot's memory, as an array whose lifetime is that of all views of it."""
        at = mmap.PAGESIZE * self.num_workers + slot * self.slot_bytes
        return np.ndarray(
            shape, np.uint8, self._memory, at
        )  # its base is no array: views keep the array itself

    def reserve(self, slot: int, num_bytes: int) -> None:
        """Take memory now, or say that there is none: writing would end the process.

        Raises:
            LoaderError: there is none.
        """
        if sys.platform != "linux":
            return
        at = mmap.PAGESIZE * self.num_workers + slot * self.slot_bytes
        try:
            os.posix_fallocate(self._descriptor, at, num_bytes)
        except OSError as error:
            raise LoaderError(
                f"no shared memory for a batch of {num_bytes / 2**20:.0f} MiB ({error}): lower the images of a "
                "batch (data.batch_size, data.eval_batch_size) or data.num_loader_workers"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return _attached, (DupFd(self._descriptor), self.num_workers, self.slots, self.slot_bytes)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class Sender:
    """A loader process's side of a ring."""

    def __init__(self, ring: Ring, worker: int) -> None:
        self.ring, self.worker = ring, worker
        self._states = ring.states[worker]
        self._reserved = [0] * ring.slots  # bytes
        self._taken: tuple[int, Canvas] | None = None

    def canvas(self, shape: tuple[int, int, int, int]) -> Canvas:
        """Memory for the pixels of the next batch: `collate`'s `out`.

        Raises:
            LoaderError: there is none.
        """
        if self._taken is not None:  # and not sent
            self._states[self._taken[0]] = FREE
            self._taken = None
        num_bytes = int(np.prod(shape))
        free = np.flatnonzero(self._states == FREE).tolist()
        if not free or num_bytes > self.ring.slot_bytes:
            return np.empty(shape, np.uint8)
        slot = free[0]  # the lowest: those beyond what the consumer needs never take memory
        number = self.worker * self.ring.slots + slot
        if num_bytes > self._reserved[slot]:
            self.ring.reserve(number, num_bytes)
            self._reserved[slot] = num_bytes
        self._states[slot] = TAKEN
        self._taken = slot, self.ring.array(number, shape)
        return self._taken[1]

    def message(self, batch: Batch) -> Message:
        """What to send for a batch, which the sender must not touch again."""
        pixels = batch.pixels.permute(0, 2, 3, 1).numpy()
        rest = {field.name: getattr(batch, field.name) for field in fields(batch)}
        slot = None
        if self._taken is None:
            rest["pixels"] = pixels
        else:
            slot = self.worker * self.ring.slots + self._taken[0]
            assert pixels.ctypes.data == self._taken[1].ctypes.data, (
                "pixels that were not collated into the canvas"
            )
            del rest["pixels"]
            self._taken = None
        plain = {
            name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in rest.items()
        }
        return Message(slot, pixels.shape, pickle.dumps(plain, protocol=5))


class Receiver:
    """The trainer's side of a ring."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self._states = ring.states
        self._owner = os.getpid()
        self._pinned = Pinned()

    def batch(self, message: Message) -> Batch:
        """The batch that was sent. Its pixels are the slot's memory, which is free when they are gone."""
        rest = pickle.loads(message.rest)
        if message.slot is None:
            pixels = rest.pop("pixels")
        else:
            pixels = self.ring.array(message.slot, message.shape)
            self._pinned.pin(message.slot, pixels)
            # holds this receiver, and so the pinned memory, as long as the pixels live
            weakref.finalize(pixels, self._release, message.slot).atexit = False
        for slot in self._pinned.copied():
            self._free(slot)
        tensors: dict[str, Any] = {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in rest.items()
        }
        tensors["pixels"] = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return Batch(**tensors)

    def _release(self, slot: int) -> None:
        # a forked process has copies of the pixels; what becomes of them there says nothing
        if os.getpid() == self._owner and not self._pinned.is_copying(slot):
            self._free(slot)

    def _free(self, slot: int) -> None:
        self._states[divmod(slot, self.ring.slots)] = FREE


def _attached(duplicate: Any, num_workers: int, slots: int, slot_bytes: int) -> Ring:
    ring = Ring.__new__(Ring)
    ring._attach(duplicate.detach(), num_workers, slots, slot_bytes)
    return ring


def _nameless_file(num_bytes: int) -> int:
    if sys.platform == "linux":
        descriptor = os.memfd_create("raydetr-batches")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, num_bytes)
    return descriptor
