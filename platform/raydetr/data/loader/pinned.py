"""Page-locked memory: what a GPU may copy from by itself, while the program goes on.

Nothing here happens in a process that has not begun to use CUDA.
"""

from __future__ import annotations

import logging
import os

import torch

from raydetr.data.batch import Canvas

log = logging.getLogger(__name__)


class Pinned:
    """The parts of some shared memory that CUDA has page-locked for this process."""

    def __init__(self) -> None:
        self._locked: dict[int, tuple[int, int]] = {}  # slot -> address and bytes
        self._copying: list[tuple[torch.cuda.Event, int]] = []
        self._owner = os.getpid()
        self._is_refused = False

    def pin(self, slot: int, pixels: Canvas) -> None:
        """Page-lock the memory of a slot's pixels, which nothing else refers to."""
        if self._is_refused or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return
        address, num_bytes = pixels.ctypes.data, pixels.nbytes
        locked = self._locked.get(slot)
        if locked is not None and locked[1] >= num_bytes:
            return
        if locked is not None:
            self._unlock(slot)
        code = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)  # type: ignore[no-untyped-call]
        if int(code) == 0:
            self._locked[slot] = address, num_bytes
        else:
            self._is_refused = True
            _forget_error()
            log.warning(
                "batches are copied to the GPU from memory that is not page-locked: CUDA error %s", code
            )

    def is_copying(self, slot: int) -> bool:
        """Whether a copy from a slot that Python has given up may be under way; `copied` tells when it is done."""
        if slot not in self._locked:
            return False
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()  # after all copies from this slot: they were begun on this stream
        self._copying.append((event, slot))
        return True

    def copied(self) -> list[int]:
        """Slots whose copies have ended since the last call."""
        done = [slot for event, slot in self._copying if event.query()]  # type: ignore[no-untyped-call]
        self._copying = [(event, slot) for event, slot in self._copying if slot not in done]
        return done

    def __del__(self) -> None:
        if os.getpid() == self._owner:
            for slot in list(self._locked):
                self._unlock(slot)

    def _unlock(self, slot: int) -> None:
        address, _ = self._locked.pop(slot)
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _forget_error() -> None:
    """CUDA reports its last error once more, to whoever launches the next kernel."""
    try:
        torch.zeros((), device="cuda").add_(1)
    except RuntimeError as error:
        log.info("page-locking failed: %s", error)
