"""Time training steps that the loader feeds, against steps on the same batches from memory, for bench_step.py."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from step_models import Loss, Step

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

import detrs
from detrs.structures import Images, Targets
from detrs.zoo import ModelConfig
from drawn_shards import write_drawn_shards
from raydetr.config import TransformConfig
from raydetr.data.batch import Batch, to_model
from raydetr.data.layout import Layout
from raydetr.data.stream import train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.shards.reader import Shards, open_shards
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source

BATCHES = 4  # of one image, in a round
TRANSFORM = TransformConfig(short_sides=(320,), max_side=533, horizontal_flip=0.5)


def time_loader(config: ModelConfig, num_workers: int, seconds: float) -> list[list[float]]:
    """Return seconds per step with the loader, and from memory, of rounds that take turns. Uses one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        shards = _shards(Path(folder))
        current: list[tuple[Images, Targets]] = []
        step = _step(config, current)
        stored = [to_model(batch, "cpu") for batch in islice(_batches(shards, num_workers), 1 + BATCHES)]

        def from_memory() -> float:
            return _timed(step, current, iter(stored[1:]))

        def with_loader() -> float:
            batches = (to_model(batch, "cpu") for batch in _batches(shards, num_workers))
            # The first one starts the processes. After a fork, the first step copies each page that it changes: once
            _timed(step, current, islice(batches, 1))
            return _timed(step, current, islice(batches, BATCHES))

        from_memory()
        times: list[list[float]] = [[], []]
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[0]) < 3:
            times[0].append(with_loader())
            times[1].append(from_memory())
    return times


def _timed(
    step: Step, current: list[tuple[Images, Targets]], batches: Iterator[tuple[Images, Targets]]
) -> float:
    """Return the mean wall time of a step, with what it takes to get its batch."""
    start = time.perf_counter()
    for batch in batches:
        current[:] = [batch]
        step()
    return (time.perf_counter() - start) / BATCHES


def _step(config: ModelConfig, current: list[tuple[Images, Targets]]) -> Step:
    model = detrs.build(config)

    def forward() -> Loss:
        ((images, targets),) = current
        outputs = model.detector(images, targets)
        losses = model.criterion(outputs, targets, float(max(1, len(targets.labels))))
        return Loss(losses.total, outputs.predictions.logits.shape[2], frozenset(losses.terms))

    return Step(model.detector, forward)


def _batches(shards: Shards, num_workers: int) -> Iterator[Batch]:
    return train_batches(
        shards, seed=0, position=0, layout=Layout(1), transform=Transform(TRANSFORM), num_workers=num_workers
    )


def _shards(folder: Path) -> Shards:
    """Write shards of photographs, or of drawn images."""
    photographs = os.environ.get("RAYDETR_COCO_TINY")
    if not photographs:
        write_drawn_shards(folder, 32, 1)
        return open_shards(folder / "train")
    coco = Path(photographs)
    write_source(
        coco_source(coco / "train2017", coco / "annotations" / "instances_train2017.json"), folder / "shards"
    )
    return open_shards(folder / "shards", label_map="category_id")
