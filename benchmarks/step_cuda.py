"""Run the GPU part of bench_step.py: each model in each precision, in turns with transformers'; then the variants."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from step_models import (
    MODELS,
    Loss,
    Step,
    anchor_step,
    check_same_work,
    find_transformers,
    has_anchor,
    make_batch,
    our_step,
)
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from raydetr.training.step_timer import count_cuda_calls

PRECISIONS = ("fp32", "tf32", "bf16")
WARM_UP = 3  # steps: the memory pool grows, and cuDNN chooses its algorithms
SIDE = 8192  # of the matrix product that shows the peak
COMPILE_SECONDS = 120.0  # at most, for a row with a compiled detector
WITHOUT = {"fused": "plain operator", "compiled": "eager"}  # what a step without the option is called

Row = dict[str, Any]
Size = tuple[int, tuple[int, int]]  # its name, and height and width


@dataclass(frozen=True)
class Used:
    """What a step needs: memory beside what was there before, kernels, and how often the host waits for the device."""

    peak_mb: float
    kernels: int
    host_syncs: int


@dataclass(frozen=True)
class Side:
    """A step that has run, with the loss and the seconds of its first run, and what it needs."""

    step: Step
    loss: Loss
    first_s: float
    used: Used


def measure_on_gpu(
    report: Any,
    models: Iterable[str],
    size: Size,
    precisions: Iterable[str],
    num_images: int,
    rounds: int,
) -> None:
    """Add a row per precision and model to the report of bench_step."""
    name_of_size, shape = size
    for precision in precisions:
        for name in models:
            case = {"case": name, "size": name_of_size, "precision": precision, "batch": num_images}
            report.add(case, lambda: measure(name, shape, precision, num_images, rounds))  # noqa: B023


def measure_variants_on_gpu(
    report: Any,
    models: Sequence[str],
    compiled: Collection[str],
    size: Size,
    precision: str,
    num_images: int,
    rounds: int,
) -> None:
    """Add rows of the fused operator against the plain one, then of detectors that are `compiled` against eager."""
    name_of_size, shape = size
    rest = {"size": name_of_size, "precision": precision, "batch": num_images}
    for name in models:
        if MODELS[name].architecture in ("deformable_detr", "dino"):
            report.add(
                {"case": f"{name}, fused operator", **rest},
                lambda: measure_variant(name, shape, precision, num_images, rounds, "fused"),  # noqa: B023
            )
    for name in models:
        if name in compiled:
            report.add(
                {"case": f"{name}, compiled", **rest},
                lambda: measure_variant(name, shape, precision, num_images, rounds, "compiled"),  # noqa: B023
                needs=COMPILE_SECONDS,
            )


def measure(name: str, shape: tuple[int, int], precision: str, num_images: int, rounds: int) -> Row:
    """Measure one model in one precision, in turns with transformers' if it is there and has it."""
    set_precision(precision)
    config, batch = MODELS[name], make_batch(*shape, num_images, device="cuda")
    autocast = autocast_of(precision)
    sides = [run_first(lambda: our_step(config, batch, autocast=autocast))]
    with FlopCounterMode(display=False) as counter:
        sides[0].step()
    if find_transformers() is not None and has_anchor(config):
        sides.append(run_first(lambda: anchor_step(config, batch, autocast)))
        check_same_work(name, *((side.step, side.loss) for side in sides))
    row = compare(sides, num_images, rounds) | ({"baseline": "transformers"} if len(sides) > 1 else {})
    row["peak_share"] = counter.get_total_flops() / (row["ours_ms"] / 1e3) / peak_rate(precision)
    return row


def measure_variant(
    name: str, shape: tuple[int, int], precision: str, num_images: int, rounds: int, option: str
) -> Row:
    """Measure one model with an option of `our_step`, "fused" or "compiled", in turns with the same without it."""
    set_precision(precision)
    batch, autocast = make_batch(*shape, num_images, device="cuda"), autocast_of(precision)
    sides = [
        run_first(lambda: our_step(MODELS[name], batch, autocast=autocast, **{option: chosen}))  # noqa: B023
        for chosen in (True, False)
    ]
    row = compare(sides, num_images, rounds) | {"baseline": WITHOUT[option]}
    return row | ({"compile_s": sides[0].first_s} if option == "compiled" else {})


def run_first(make_step: Callable[[], Step]) -> Side:
    """Make a step and run it until it needs the same each time.

    Raises:
        ValueError: its loss is not a number, so that the steps are not those of a training.
    """
    before = torch.cuda.memory_allocated()
    step = make_step()
    start = time.perf_counter()
    loss = step()
    if not loss.total.isfinite():  # waits for the device
        raise ValueError(f"the loss is {loss.total.item()}")
    return Side(step, loss, time.perf_counter() - start, use_of(step, before))


def compare(sides: Sequence[Side], num_images: int, rounds: int) -> Row:
    """Run the sides in turns; return the medians, what ours, the first, needs, and the same of the second."""
    times = [[timed(side.step) for side in sides] for _ in range(rounds)]
    ours, used = median(round_[0] for round_ in times), sides[0].used
    row: Row = {"ours_ms": 1e3 * ours, "images_per_second": num_images / ours}
    row |= {"peak_mb": used.peak_mb, "kernels": used.kernels, "host_syncs": used.host_syncs}
    if len(sides) > 1:
        other = sides[1].used
        row |= {
            "baseline_ms": 1e3 * median(round_[1] for round_ in times),
            "ratio": median(round_[1] / round_[0] for round_ in times),
            "baseline_peak_mb": other.peak_mb,
            "baseline_kernels": other.kernels,
            "baseline_host_syncs": other.host_syncs,
        }
    return row


def autocast_of(precision: str) -> torch.autocast:
    """Return the context of the forward pass and the criterion."""
    return torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")


def set_precision(precision: str) -> None:
    """Choose how products of float32 are computed."""
    chosen = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = chosen
    torch.backends.cudnn.conv.fp32_precision = chosen


def use_of(step: Step, before: int) -> Used:
    """Run a few steps; return what one needs beside the `before` bytes that were there before the step was made."""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
    calls = count_cuda_calls(event.name for event in recorded.events())
    return Used(peak / 2**20, calls.kernels, calls.host_syncs)


def timed(step: Step) -> float:
    """Return the seconds of a step, until the device has done its work."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_rate(precision: str) -> float:
    """Return the floating-point operations per second of a large matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=dtype) for _ in range(2))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a @ b
    start.record()
    for _ in range(3):
        a @ b
    end.record()
    end.synchronize()
    return 3 * 2 * SIDE**3 / (start.elapsed_time(end) / 1e3)
