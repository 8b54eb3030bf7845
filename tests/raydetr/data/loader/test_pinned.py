"""Test page-locked slots: with a fake CUDA that keeps count, and on a GPU if there is one."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from raydetr.data.batch import to_model
from raydetr.data.loader.ring import Receiver, Ring, Sender
from ring_messages import SHAPE, make_batch, send


@dataclass
class FakeCuda:
    """Records page-locks; copies end when the test sets `copies_have_ended`."""

    locked: dict[int, int] = field(default_factory=dict)
    copies_have_ended: bool = False
    refuses: bool = False

    def cudart(self) -> FakeCuda:
        return self

    def Event(self) -> FakeCuda:
        return self

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.copies_have_ended

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if self.refuses:
            return 304
        assert not any(at < address + num_bytes and address < at + n for at, n in self.locked.items())
        self.locked[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("cudart", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr("raydetr.data.loader.pinned._clear_cuda_error", lambda: None)
    return fake


@pytest.fixture
def ring() -> Ring:
    return Ring(1, num_slots=3, slot_bytes=1 << 16)


def test_a_slot_is_not_free_while_a_gpu_reads_it(cuda: FakeCuda, ring: Ring) -> None:
    sender, receiver = Sender(ring, 0), Receiver(ring)
    receiver.batch(send(sender, 1))
    gc.collect()
    assert ring.states[0].tolist() == [1, 0, 0]
    receiver.batch(send(sender, 2))  # checks whether the first copy has ended
    assert ring.states[0].tolist() == [1, 1, 0]
    cuda.copies_have_ended = True
    receiver.batch(send(sender, 3))
    assert ring.states[0].tolist() == [0, 0, 1]


def test_slots_are_locked_once_and_again_when_they_grow(cuda: FakeCuda, ring: Ring) -> None:
    sender, receiver = Sender(ring, 0), Receiver(ring)
    cuda.copies_have_ended = True
    addresses = []
    for side in (10, 8, 10, 60, 20):
        batch = receiver.batch(send(sender, 5, (1, side, side, 3)))
        addresses.append(batch.pixels.data_ptr())
        assert cuda.locked[addresses[-1]] >= side * side * 3
        del batch
    assert len(cuda.locked) == len(set(addresses)) <= 2
    del receiver
    gc.collect()
    assert not cuda.locked


def test_memory_stays_locked_as_long_as_a_batch_lives(cuda: FakeCuda, ring: Ring) -> None:
    receiver = Receiver(ring)
    batch = receiver.batch(send(Sender(ring, 0), 5))
    del receiver
    gc.collect()
    assert cuda.locked
    del batch
    gc.collect()
    assert not cuda.locked


def test_a_failure_is_logged_once(cuda: FakeCuda, ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    cuda.refuses = True
    sender, receiver = Sender(ring, 0), Receiver(ring)
    for _ in range(3):
        receiver.batch(send(sender, 1))
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "batches are copied to the GPU from memory that is not page-locked: CUDA error 304"
    ]
    assert not ring.states.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_reach_a_gpu_intact() -> None:
    """Loaders refill slots as soon as they are free, while copies from others are running."""
    torch.zeros(1, device="cuda")
    ring = Ring(1)
    sender, receiver = Sender(ring, 0), Receiver(ring)
    images = []
    for value in range(40):
        canvas = sender.canvas((4, 800, 1088, 3))
        canvas[...] = value
        batch = receiver.batch(sender.message(make_batch(canvas)))
        assert batch.pixels.is_pinned()
        images.append(batch.pixels.to("cuda", non_blocking=True))
        del batch, canvas
    torch.cuda.synchronize()
    assert [image.unique().tolist() for image in images] == [[value] for value in range(40)]
    assert to_model(make_batch(np.zeros(SHAPE, np.uint8)), "cuda")[0].pixels.is_cuda
