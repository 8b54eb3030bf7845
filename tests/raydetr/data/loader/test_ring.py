"""Test the ring alone: which memory a batch uses, for how long, and what happens when memory runs out."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
from typing import Any

import numpy as np
import pytest
import torch

from fresh_interpreter import run_python
from raydetr.data.batch import Batch
from raydetr.data.loader.ring import FREE, Failure, LoaderError, Receiver, Ring, Sender
from ring_messages import SHAPE, make_batch, send


@pytest.fixture
def ring() -> Ring:
    return Ring(2, num_slots=3, slot_bytes=1 << 16)


def test_a_batch_arrives_as_it_was_sent(ring: Ring) -> None:
    """Every field of `Batch` arrives, with and without a slot."""
    sender, receiver = Sender(ring, 1), Receiver(ring)
    for shape in (SHAPE, (1, 300, 400, 3)):  # the second is larger than a slot
        canvas = sender.canvas(shape)
        canvas[...] = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        sent = make_batch(canvas, 96)
        message = sender.message(sent)
        assert (message.slot is None) == (shape != SHAPE)
        received = receiver.batch(message)
        for field in dataclasses.fields(Batch):
            ours, theirs = getattr(sent, field.name), getattr(received, field.name)
            if isinstance(ours, torch.Tensor):
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs), field.name
            else:
                assert ours == theirs, field.name
        assert received.pixels.stride() == sent.pixels.stride()  # channels last


def test_nothing_is_copied(ring: Ring) -> None:
    message = send(Sender(ring, 0), 1)
    batch = Receiver(ring).batch(message)
    assert message.slot == 0
    assert len(message.rest) < 2000
    ring.array(0, SHAPE)[1, 2, 3] = (9, 8, 7)  # as the loader process would
    assert batch.pixels[1, :, 2, 3].tolist() == [9, 8, 7]


VIEWS: dict[str, Any] = {
    "batch": lambda batch: batch,
    "pixels": lambda batch: batch.pixels,
    "an image": lambda batch: batch.pixels[1],
    "a pixel of an array": lambda batch: batch.pixels.numpy()[1:, :, 3:4, 3:4],
    "an array of an array": lambda batch: np.asarray(batch.pixels[0])[0].T[1:],
    "a replaced batch": lambda batch: dataclasses.replace(batch, position=3),
    "storage": lambda batch: batch.pixels.untyped_storage(),
    "an untaken copy": lambda batch: batch.pixels.to(torch.uint8),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_slot_is_free_when_the_last_view_is_gone(ring: Ring, view: str) -> None:
    sender, receiver = Sender(ring, 1), Receiver(ring)
    batch = receiver.batch(send(sender, 5))
    kept = VIEWS[view](batch)
    del batch
    gc.collect()
    assert ring.states[1].tolist() == [1, 0, 0]
    for value in (6, 7):  # the loader continues in another slot
        receiver.batch(send(sender, value))
    pixels = ring.array(3, SHAPE)
    assert (pixels == 5).all()
    del kept
    gc.collect()
    assert not ring.states.any()


def test_a_consumer_may_keep_all_batches(ring: Ring) -> None:
    sender, receiver = Sender(ring, 0), Receiver(ring)
    messages = [send(sender, value) for value in range(10)]
    assert [message.slot for message in messages] == [0, 1, 2] + [None] * 7
    kept = [receiver.batch(message) for message in messages]
    assert [batch.pixels.unique().tolist() for batch in kept] == [[value] for value in range(10)]
    del kept[1]
    assert send(sender, 11).slot == 1


def test_each_loader_has_its_own_slots(ring: Ring) -> None:
    first, second, receiver = Sender(ring, 0), Sender(ring, 1), Receiver(ring)
    kept = [receiver.batch(send(sender, value)) for value in (1, 2, 3) for sender in (first, second)]
    assert ring.states.all()
    assert [batch.pixels.unique().item() for batch in kept] == [1, 1, 2, 2, 3, 3]


def test_a_canvas_that_was_not_sent_is_reused(ring: Ring) -> None:
    sender = Sender(ring, 0)
    for _ in range(10):
        sender.canvas(SHAPE)
    assert ring.states.sum() == 1


def test_a_slot_may_hold_a_larger_batch_later(ring: Ring) -> None:
    sender, receiver = Sender(ring, 0), Receiver(ring)
    for side in (5, 90, 30, 140):
        batch = receiver.batch(send(sender, side, (1, side, side, 3)))
        assert batch.pixels.shape == (1, 3, side, side)
        assert (batch.pixels == side).all()
        del batch
    assert not ring.states.any()


def test_only_used_slots_take_memory() -> None:
    """Slots are a gigabyte of address space. The lowest free one is used: a consumer that keeps nothing needs one."""
    ring = Ring(4)
    sender, receiver = Sender(ring, 2), Receiver(ring)
    for value in range(50):
        receiver.batch(send(sender, value % 256, (4, 80, 80, 3)))
    taken = os.fstat(ring._descriptor).st_blocks * 512
    assert 4 * 80 * 80 * 3 <= taken <= 4 * 80 * 80 * 3 + 16 * 4096


def test_a_forked_child_does_not_free_slots_of_its_parent(ring: Ring) -> None:
    """Loaders of an evaluation are forked while the trainer holds a training batch."""
    receiver = Receiver(ring)
    kept = [receiver.batch(send(Sender(ring, 0), 5))]
    child = os.fork()
    if child == 0:
        kept.clear()
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ring.states[0, 0] != FREE


def test_batches_outlive_the_ring() -> None:
    ring = Ring(1, slot_bytes=1 << 16)
    batch = Receiver(ring).batch(send(Sender(ring, 0), 42))
    descriptor = ring._descriptor
    del ring
    gc.collect()
    assert (batch.pixels == 42).all()
    del batch
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_out_of_memory_is_an_error_that_names_the_remedy(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        LoaderError, match=r"batch of 0 MiB .*No space left.*data\.batch_size.*num_loader_workers"
    ):
        Sender(ring, 0).canvas(SHAPE)


def test_limits_of_the_process_are_named() -> None:
    """In another process, because a limit cannot be raised again."""
    code = """
import resource
from raydetr.data.loader.ring import LoaderError, Ring
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))
try:
    Ring(4)
except LoaderError as error:
    print(error)
"""
    message = run_python(code).stdout
    assert "no shared memory for the batches of 4 loader processes" in message
    assert "ulimit" in message


class AwkwardError(Exception):
    """Cannot be unpickled: its constructor needs more than its arguments."""

    def __init__(self, message: str, place: int) -> None:
        super().__init__(message)
        self.place = place


def test_an_error_keeps_type_message_and_attributes() -> None:
    error = ValueError("sample 7 is corrupt")
    error.shard = "a.tar"  # type: ignore[attr-defined]
    sent = Failure.of(error, 3).error()
    assert (type(sent), str(sent), sent.shard) == (ValueError, "sample 7 is corrupt", "a.tar")  # type: ignore[attr-defined]
    assert "in loader process 3" in sent.__notes__[0]
    with pytest.raises(AwkwardError, match="cannot be sent"):
        Failure.of(AwkwardError("cannot be sent", 1), 0)
