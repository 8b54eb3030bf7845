"""Page-lock memory, so that a GPU can copy from it while the program continues.

Does nothing in a process that has not initialized CUDA.

The slots themselves are locked, by `cudaHostRegister`, each once. The DataLoader's `pin_memory=True` would copy every
batch to page-locked memory of its own, in one more thread of the trainer.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from raydetr.data.batch import Canvas

log = logging.getLogger(__name__)


class PinnedMemory:
    """The parts of some shared memory that CUDA has page-locked for this process."""

    def __init__(self) -> None:
        self._locked: dict[int, tuple[int, int]] = {}  # slot -> address and bytes
        self._copying: list[tuple[torch.cuda.Event, int]] = []
        self._owner_pid = os.getpid()
        self._has_failed = False

    def pin(self, slot: int, pixels: Canvas) -> None:
        """Page-lock the memory of a slot's pixels; nothing else may refer to it."""
        if self._has_failed or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return
        address, num_bytes = pixels.ctypes.data, pixels.nbytes
        locked = self._locked.get(slot)
        if locked is not None and locked[1] >= num_bytes:
            return
        if locked is not None:
            self._unlock(slot)  # CUDA refuses to lock a range that overlaps a locked one
        code = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)  # type: ignore[no-untyped-call]
        if int(code) == 0:
            self._locked[slot] = address, num_bytes
        else:
            # For good: the cause, such as a limit of locked memory or a driver without support, will not go away
            # during a run, and each attempt would take time and leave an error that must be cleared
            self._has_failed = True
            _clear_cuda_error()
            log.warning(
                "batches are copied to the GPU from memory that is not page-locked: CUDA error %s", code
            )

    def defer_release(self, slot: int) -> bool:
        """Return whether a copy from a slot without references may still run; `pop_finished` reports its end.

        Only copies on the current stream of the current GPU are waited for.
        """
        if slot not in self._locked:
            return False
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # `to_model` enqueues its copies on this stream: the platform uses one per process, and Ray Train makes the
        # worker's GPU the current one. A stream runs in order, and a slot without references gets no more copies: when
        # the event has happened, all of them have ended
        event.record()
        self._copying.append((event, slot))
        return True

    def pop_finished(self) -> list[int]:
        """Return the slots whose copies have ended since the last call."""
        done = [slot for event, slot in self._copying if event.query()]  # type: ignore[no-untyped-call]
        self._copying = [(event, slot) for event, slot in self._copying if slot not in done]
        return done

    def __del__(self) -> None:
        # A forked child has no CUDA context, and the locks are the parent's
        if os.getpid() == self._owner_pid:
            for slot in list(self._locked):
                self._unlock(slot)

    def _unlock(self, slot: int) -> None:
        address, _ = self._locked.pop(slot)
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _clear_cuda_error() -> None:
    """Launch a kernel: CUDA reports its last error again to the next launch, which should not be the model's."""
    try:
        torch.zeros((), device="cuda").add_(1)
    except RuntimeError as error:
        log.info("page-locking failed: %s", error)
