"""Send batches through a ring without loader processes."""

from __future__ import annotations

import numpy as np
import torch

from raydetr.data.batch import Batch
from raydetr.data.corrupt import CorruptSample
from raydetr.data.loader.ring import Message, Sender

SHAPE = (2, 30, 40, 3)


def make_batch(pixels: np.ndarray, position: int = 0) -> Batch:
    """Make a batch of these pixels, with content in every other field."""
    size = len(pixels)
    return Batch(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        sizes=torch.full((size, 2), 7),
        labels=torch.arange(3),
        boxes=torch.rand(3, 4),
        counts=(3,) + (0,) * (size - 1),
        image_ids=torch.arange(size) + 2**40,
        original_sizes=torch.full((size, 2), 9),
        positions=tuple(range(position, position + size)),
        position=position,
        corrupt=(CorruptSample(5, "a.tar", "000000000007", 512, "crc", "masked"),),
    )


def send(sender: Sender, value: int, shape: tuple[int, int, int, int] = SHAPE) -> Message:
    """Send a batch whose pixels and position are `value`."""
    canvas = sender.canvas(shape)
    canvas[...] = value
    return sender.message(make_batch(canvas, value))
