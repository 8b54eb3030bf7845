"""Measure the sample order and the hand-off of batches: times, memory, and a simulation of a large world.

Hand-off: a loader process has four images of 800x1088 and sends them to the trainer as a batch, repeatedly. Ours
collates uint8 into recycled shared memory. The first baseline is torch's DataLoader as the official code uses it, with
float32 images, a collate function that pads them, and one target dictionary per image; the second is the same
DataLoader with our samples and our collate function. The trainer touches every page of a batch. Times are CPU times, of
both processes together and of the trainer alone, as medians over alternating rounds. Decoding and augmentation are
excluded from all.

All times are medians. Start-up: 118,287 tiny images in 119 shards; time and memory from opening the shards to the
first batch, without those of the imports.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from raydetr.config import TransformConfig
from raydetr.data.batch import Batch, Sample, collate
from raydetr.data.layout import Layout
from raydetr.data.loader.loader import Out, load
from raydetr.data.order import SampleOrder
from raydetr.data.stream import train_batches
from raydetr.data.transforms.geometry import resized_size
from raydetr.data.transforms.pixels import LazyImage
from raydetr.data.transforms.transform import Transform
from raydetr.shards.manifest import (
    FORMAT_VERSION,
    INDEX,
    SAMPLE_DTYPE,
    Manifest,
    ShardFile,
    data_fingerprint,
    sample_key,
)
from raydetr.shards.reader import open_shards

COCO, MILLION = 118_287, 1_000_000
LATE = 100_000  # epochs
HEIGHT, WIDTH, BATCH = 800, 1088, 4
NUM_OBJECTS = 7  # per image
SCALES = range(480, 801, 32)
Case = dict[str, Any]


def cases(seconds: float) -> list[Case]:
    """Measure all cases, repeated ones for about `seconds` each."""
    torch.set_num_threads(1)
    found = [*hand_off(seconds), *order_times(), padding()]
    with tempfile.TemporaryDirectory() as folder:
        print_status(f"writing {COCO:,} tiny samples")
        write_tiny_shards(Path(folder), COCO)
        found += [*start_up(Path(folder)), resume(Path(folder))]
    return found + simulation()


def print_status(text: str) -> None:
    """Print a line of progress."""
    print(f"    {text}", file=sys.stderr, flush=True)


def limit(case: str, ours: float, unit: str, most: float | None) -> Case:
    """Return a case that is compared with a limit, if it has one."""
    return {"case": case, "ours": ours, "baseline": None, "ratio": None, "unit": unit, "target": most}


# --- Hand-off ---


class RepeatedBatch:
    """A source for our loaders: the same four images, repeatedly."""

    def __init__(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (BATCH, HEIGHT, WIDTH, 3), np.uint8)
        labels, boxes = np.zeros(NUM_OBJECTS, np.int64), np.tile([10.0, 10, 90, 90], (NUM_OBJECTS, 1))
        self.samples = [Sample(LazyImage.unresized(image), labels, boxes, 1, (600, 800)) for image in pixels]

    def batches(self, worker: int, num_workers: int, out: Out | None) -> Iterator[Batch]:
        """Yield batches indefinitely."""
        while True:
            yield collate(self.samples, 0, out=out)


class FloatImages(IterableDataset[tuple[Tensor, dict[str, Tensor]]]):
    """Samples like those of the official code's data set: a float32 image and its target."""

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        image = torch.rand(3, HEIGHT, WIDTH)
        target = {
            "boxes": torch.rand(NUM_OBJECTS, 4),
            "labels": torch.zeros(NUM_OBJECTS, dtype=torch.long),
            "image_id": torch.tensor([1]),
            "area": torch.rand(NUM_OBJECTS),
            "iscrowd": torch.zeros(NUM_OBJECTS, dtype=torch.long),
            "orig_size": torch.tensor([600, 800]),
            "size": torch.tensor([HEIGHT, WIDTH]),
        }
        while True:
            yield image, {name: value.clone() for name, value in target.items()}


class UInt8Images(IterableDataset[Sample]):
    """The samples of `RepeatedBatch`, one by one."""

    def __iter__(self) -> Iterator[Sample]:
        samples = RepeatedBatch().samples
        while True:
            yield from samples


def uint8_collate(samples: list[Sample]) -> Batch:
    """Make the batch that our loaders make."""
    return collate(samples, 0)


def float_collate(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, Tensor, list[Any]]:
    """Pad float32 images, with a mask."""
    images = [image for image, _ in samples]
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixels = torch.zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for image, canvas, padding in zip(images, pixels, mask, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]].copy_(image)
        padding[: image.shape[1], : image.shape[2]] = False
    return pixels, mask, [target for _, target in samples]


def hand_off(seconds: float) -> list[Case]:
    """Measure the CPU time of a batch of 4x3x800x1088."""
    print_status("hand-off")
    streams: dict[str, Callable[[], Iterator[Any]]] = {
        "ours": lambda: load(RepeatedBatch().batches, 1),
        "float32": lambda: stock_batches(FloatImages(), float_collate),
        "uint8": lambda: stock_batches(UInt8Images(), uint8_collate),
    }
    # Only one stream has a loader at a time, so that the child's CPU time belongs to it
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in streams}
    for number in range(6):
        for name in sorted(streams, reverse=bool(number % 2)):
            rounds[name].append(cpu_milliseconds(streams[name](), seconds / 6))
    both, alone = (
        {name: statistics.median(times[part] for times in rounds[name]) for name in rounds} for part in (0, 1)
    )
    case = "hand-off with collate, 4x3x800x1088"
    return [
        faster(f"{case}, both processes", both, "float32", 5.0),
        faster(f"{case}, the trainer", alone, "float32", 5.0),
        faster(f"{case}, both processes, against uint8", both, "uint8", None),
        faster(f"{case}, the trainer, against uint8", alone, "uint8", None),
    ]


def stock_batches(dataset: IterableDataset[Any], collate_fn: Callable[[list[Any]], Any]) -> Iterator[Any]:
    """Return the batches of torch's DataLoader with one loader process."""
    return iter(DataLoader(dataset, batch_size=BATCH, num_workers=1, collate_fn=collate_fn))


def faster(case: str, times: dict[str, float], baseline: str, target: float | None) -> Case:
    """Return a case in CPU milliseconds."""
    ours, other = times["ours"], times[baseline]
    return {
        "case": case,
        "ours": ours,
        "baseline": other,
        "ratio": other / ours,
        "unit": "CPU ms",
        "target": target,
    }


def cpu_milliseconds(stream: Iterator[Any], seconds: float) -> tuple[float, float]:
    """Measure the CPU time per batch: of trainer and loader, and of the trainer alone."""
    for _ in range(10):
        touch(next(stream))
    (loader,) = psutil.Process().children()
    processes = [psutil.Process(), loader]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    end, count = time.perf_counter() + max(seconds, 1.0), 0
    while time.perf_counter() < end:
        touch(next(stream))
        count += 1
    took = [sum(process.cpu_times()[:2]) - start for process, start in zip(processes, before, strict=True)]
    del stream
    psutil.wait_procs([loader], timeout=20)
    return 1e3 * sum(took) / count, 1e3 * took[0] / count


def touch(batch: Any) -> int:
    """Read from every page of the pixels."""
    pixels = batch.pixels.permute(0, 2, 3, 1) if isinstance(batch, Batch) else batch[0]
    flat = pixels.view(-1)
    return int(flat[:: 4096 // flat.element_size()].sum())


# --- Sample order ---


def make_order(num_samples: int, samples_per_shard: int) -> SampleOrder:
    """Make the order of a generated data set."""
    aspects = np.random.default_rng(0).choice([0.67, 0.75, 1, 1.33, 1.5], num_samples)
    return SampleOrder(np.arange(num_samples) // samples_per_shard, aspects, "made", 0)


def order_times() -> list[Case]:
    """Measure the order of an epoch, and of the first samples of a late one."""
    found = []
    for num_samples, samples_per_shard in ((COCO, 1000), (MILLION, 100)):
        print_status(f"order of {num_samples:,} samples")
        late = LATE * num_samples
        asked = {"an epoch": (3 * num_samples, num_samples), "late": (late + 4, 1), "across": (late - 2, 4)}
        times: dict[str, list[float]] = {name: [] for name in asked}
        for _ in range(5):
            for name, (position, count) in asked.items():
                order = make_order(num_samples, samples_per_shard)  # without cached windows
                start = time.process_time()
                order.samples(position, count)
                times[name].append(time.process_time() - start)
        took = {name: statistics.median(seconds) for name, seconds in times.items()}
        size = f"{num_samples:,} samples"
        found += [
            limit(f"order of an epoch, {size}", took["an epoch"], "CPU s", 0.5),
            limit(f"order of one sample of epoch {LATE:,}, {size}", 1e3 * took["late"], "CPU ms", 50),
            limit(f"order of four across its beginning, {size}", 1e3 * took["across"], "CPU ms", 50),
        ]
    return found


def padding() -> Case:
    """Measure the padding of a batch of 4, at one scale per step; the baseline's batches are in random order."""
    print_status("padding")
    sizes = coco_sizes()
    order = SampleOrder(np.arange(COCO) // 1000, sizes[:, 0] / sizes[:, 1], "made", 0)
    permutations = order.samples(COCO // 4 * 4 + 4, COCO), np.random.default_rng(0).permutation(COCO)
    ours, baseline = (100 * padded_fraction(sizes[indices]) for indices in permutations)
    return limit("padding at per-worker batch 4, one scale per step", ours, "%", 3.0) | {"baseline": baseline}


def coco_sizes() -> np.ndarray:
    """Draw the [n, 2] widths and heights of COCO's number of images, from real ones if available."""
    folder = os.environ.get("RAYDETR_COCO_TINY")
    known = [(640, 480)] * 34 + [(640, 427)] * 21 + [(480, 640)] * 17 + [(640, 426)] * 10 + [(500, 375)] * 6
    known += [(427, 640)] * 6 + [(640, 640)] * 3 + [(500, 333)] * 4 + [(375, 500)] * 3 + [(640, 360)] * 3
    if folder:
        files = sorted((Path(folder) / "annotations").glob("instances_*.json"))
        images = [image for file in files for image in json.loads(file.read_text())["images"]]
        known = [(image["width"], image["height"]) for image in images]
    return np.array(known)[np.random.default_rng(0).integers(0, len(known), COCO)]


def padded_fraction(sizes: np.ndarray) -> float:
    """Return the fraction of padding in batches of 4 in this order."""
    rng = np.random.default_rng(0)
    filled = total = 0
    for four in sizes[: len(sizes) // 4 * 4].reshape(-1, 4, 2)[::10]:
        side = int(rng.choice(SCALES))
        resized = np.array([resized_size(*size, side, 1333) for size in four.tolist()])
        filled += int(resized.prod(1).sum())
        total += 4 * int(resized.max(0).prod())
    return 1 - filled / total


# --- Start-up and resume ---


def write_tiny_shards(folder: Path, num_samples: int, samples_per_shard: int = 1000) -> None:
    """Write shards of 8x8 images, like `write_source`, without an image file for each."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 50)).save(buffer, "JPEG")
    categories = [{"id": 1, "name": "square"}]
    samples, files = np.zeros(num_samples, SAMPLE_DTYPE), []
    for number, first in enumerate(range(0, num_samples, samples_per_shard)):
        content, shard = bytearray(), range(first, min(first + samples_per_shard, num_samples))
        for index in shard:
            text = json.dumps(tiny_record(index)).encode()
            image = tar_member(f"{sample_key(index)}.jpg", buffer.getvalue())
            raw = image + tar_member(f"{sample_key(index)}.json", text)
            at, json_at = len(content), len(image) + tarfile.BLOCKSIZE
            samples[index] = (
                number, at, len(raw), tarfile.BLOCKSIZE, buffer.tell(), json_at, len(text), 8, 8, 1, index,
                zlib.crc32(raw),
            )  # fmt: skip
            content += raw
        content += bytes(2 * tarfile.BLOCKSIZE)
        name = f"shard-{number:05d}.tar"
        (folder / name).write_bytes(content)
        files.append(ShardFile(name, len(shard), len(content), hashlib.sha256(content).hexdigest()))
    np.savez(folder / INDEX, samples=samples)
    Manifest(
        FORMAT_VERSION, data_fingerprint(samples, categories), num_samples, num_samples, {"1": num_samples}, {},
        samples_per_shard, files, categories, {"contiguous": {"1": 0}, "category_id": {"1": 1}},
        {"name": "made", "sha256": ""}, {}, [],
    ).save(folder)  # fmt: skip


def tiny_record(index: int) -> dict[str, Any]:
    """Return the COCO records of a tiny image."""
    box = {
        "id": index + 1,
        "image_id": index,
        "category_id": 1,
        "bbox": [1, 1, 5, 5],
        "area": 25,
        "iscrowd": 0,
    }
    return {"image": {"id": index, "width": 8, "height": 8, "file_name": "x.jpg"}, "annotations": [box]}


def tar_member(name: str, content: bytes) -> bytes:
    """Return a file of a tar."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def start_up(folder: Path) -> list[Case]:
    """Measure the start-up in a new process, with and without loader processes: the median of three."""
    found = []
    for num_workers in (0, 2):
        print_status(f"start-up with {num_workers} loader processes")
        command = [sys.executable, __file__, str(folder), str(num_workers)]
        runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
        seconds, megabytes = (
            statistics.median(run[part] for run in runs) for part in ("seconds", "megabytes")
        )
        case = f"start-up to the first batch, {COCO:,} samples, {num_workers} loaders"
        found += [limit(case, seconds, "s", 1.0), limit(case, megabytes, "MB", 100)]
    return found


def measure_start_up(folder: Path, num_workers: int) -> dict[str, float]:
    """Measure until the first batch; memory is the trainer's peak plus its loaders' private pages."""
    import raydetr.training.loop  # noqa: F401  the imports of a trainer

    itself = psutil.Process()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which the imports may have set
    before, start = peak_megabytes(itself), time.perf_counter()
    stream = tiny_stream(folder, 0, num_workers)
    next(stream)
    took = time.perf_counter() - start
    loaders = sum(private_megabytes(process) for process in itself.children())
    return {"seconds": took, "megabytes": peak_megabytes(itself) - before + loaders}


def tiny_stream(folder: Path, position: int, num_workers: int) -> Iterator[Batch]:
    """Return the stream of the first of 8 ranks."""
    return train_batches(
        open_shards(folder), seed=0, position=position, layout=Layout(32, 8),
        transform=Transform(TransformConfig()), num_workers=num_workers,
    )  # fmt: skip


def peak_megabytes(process: psutil.Process) -> float:
    """Return the peak resident memory of a process."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def private_megabytes(process: psutil.Process) -> float:
    """Return the memory that a process does not share."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def resume(folder: Path) -> Case:
    """Measure the first batch after a resume: make the order, find one sample, read, decode and batch it."""
    print_status("resume")
    shards, times = open_shards(folder), []
    for _ in range(5):
        stream = train_batches(
            shards,
            seed=0,
            position=LATE * COCO + 17,
            layout=Layout(1),
            transform=Transform(TransformConfig()),
        )
        start = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - start)
    return limit(f"resume at epoch {LATE:,}: first sample, decoded", 1e3 * statistics.median(times), "ms", 50)


# --- A large world ---


@dataclasses.dataclass(frozen=True)
class World:
    """Results of a simulation of one epoch."""

    wrong: int  # samples that did not come exactly once
    imbalance: int  # samples of the rank with most, minus those of the rank with fewest
    # Bytes of the chunks that a node or rank reads, divided by those of its samples; of the worst one
    node_amplification: float
    rank_amplification: float


def simulate(
    num_ranks: int, ranks_per_node: int, num_samples: int, num_shards: int, epoch: int = 1, batch: int = 4
) -> World:
    """Run an epoch without data: every rank gets the indices of its batches, and reads complete chunks."""
    order = make_order(num_samples, num_samples // num_shards)
    lengths = np.random.default_rng(1).lognormal(np.log(150e3), 0.5, num_samples).astype(np.int64)
    chunk = np.searchsorted(order.chunks, np.arange(num_samples), side="right") - 1
    chunk_bytes = np.bincount(chunk, lengths)
    first, last = epoch * num_samples, (epoch + 1) * num_samples
    step_samples = num_ranks * batch
    steps = range(first // step_samples, -(-last // step_samples))
    times_seen = np.zeros(num_samples, np.int64)
    counts, amplifications = [], []
    node_chunks = np.zeros(len(chunk_bytes), np.bool_)
    node_samples: list[np.ndarray] = []
    node_amplifications = []
    for rank in range(num_ranks):
        starts = [step * step_samples + rank * batch for step in steps]
        inside = [(max(at, first), min(at + batch, last)) for at in starts]
        own = np.concatenate([order.samples(low, max(high - low, 0)) for low, high in inside])
        times_seen += np.bincount(own, minlength=num_samples)
        counts.append(len(own))
        touched = np.unique(chunk[own])
        amplifications.append(chunk_bytes[touched].sum() / lengths[own].sum())
        node_chunks[touched] = True
        node_samples.append(own)
        if len(node_samples) == ranks_per_node:
            sample_bytes = lengths[np.concatenate(node_samples)].sum()
            node_amplifications.append(chunk_bytes[node_chunks].sum() / sample_bytes)
            node_chunks[:] = False
            node_samples = []
    return World(
        int((times_seen != 1).sum()), max(counts) - min(counts), max(node_amplifications), max(amplifications)
    )


def simulation() -> list[Case]:
    """Simulate 1,024 ranks on nodes of 8 with 1,000,000 samples in 10,000 shards, and small clusters with COCO's."""
    print_status("simulation of 1,024 ranks")
    world = simulate(1024, 8, MILLION, 10_000)
    name = "1,024 ranks, 1,000,000 samples, 10,000 shards"
    found = [
        limit(f"{name}: not exactly once", world.wrong, "samples", 0),
        limit(f"{name}: between the ranks", world.imbalance, "samples", 4),
        limit(f"{name}: bytes read per byte used, of a node", world.node_amplification, "", 1.1),
        limit(f"{name}: bytes read per byte used, of a rank", world.rank_amplification, "", 1.1),
    ]
    # Nodes of one GPU. The recipes' 16 images a step divide an aspect group of 4 between 2 or 4 of them
    for num_ranks, batch, most in ((8, 4, 1.1), (16, 4, 1.1), (8, 2, None), (16, 1, None)):
        world = simulate(num_ranks, 1, COCO, 118, batch=batch)
        name = f"{num_ranks} nodes with one GPU, {num_ranks * batch} images a step, {COCO:,} samples"
        found += [
            limit(f"{name}: not exactly once", world.wrong, "samples", 0),
            limit(f"{name}: bytes read per byte used", world.node_amplification, "", most),
        ]
    return found


if __name__ == "__main__":
    print(json.dumps(measure_start_up(Path(sys.argv[1]), int(sys.argv[2]))))
