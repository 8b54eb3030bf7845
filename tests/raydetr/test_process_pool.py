from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from made_coco import write_json
from made_tasks import failing, process_of
from raydetr.process_pool import run_tasks
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_tasks_are_created_lazily(workers: int) -> None:
    created: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(20):
            created.append(task)
            yield task

    def progress(done: int, total: int) -> None:
        assert total == 20
        seen.append(done)

    seen: list[int] = []
    processes = set()
    results = run_tasks(process_of, tasks(), workers=workers, progress=progress, total=20)
    for number, (task, process) in enumerate(results):
        assert task == number
        assert len(created) <= number + 1 + 2 * workers
        processes.add(process)
    assert seen == sorted(seen)
    assert seen[-1] == 20
    assert len(processes) <= workers
    assert (os.getpid() in processes) == (workers == 1)


def test_error_of_a_task_ends_the_others() -> None:
    started = time.monotonic()
    with (
        closing(run_tasks(failing, [2, 0, 1, 3], workers=2)) as results,
        pytest.raises(OSError, match="No space left") as caught,
    ):
        list(results)
    assert caught.value.errno == 28
    assert time.monotonic() - started < 4  # each of the others takes five seconds


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)  # a PNG of 270 kB
    Image.fromarray(pixels).save(tmp_path / "a.png", compress_level=0)
    peaks = []
    for num_images in (5, 5, 60):  # the first time, modules are loaded
        size = {"width": 300, "height": 300}
        images = [{"id": number, "file_name": "a.png", **size} for number in range(num_images)]
        data = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
        annotations = write_json(tmp_path / "a.json", data)
        tracemalloc.start()
        write_source(coco_source(tmp_path, annotations), tmp_path / f"out{len(peaks)}", samples_per_shard=20)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 300_000
