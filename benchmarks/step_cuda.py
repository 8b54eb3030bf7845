"""Run the GPU part of bench_step.py: each model in each precision, in turns with transformers'."""

from __future__ import annotations

import time
from collections.abc import Iterable
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

Row = dict[str, Any]


@dataclass(frozen=True)
class Used:
    """What a step needs: memory beside what was there before, kernels, and how often the host waits for the device."""

    peak_mb: float
    kernels: int
    host_syncs: int


def measure_on_gpu(
    report: Any,
    models: Iterable[str],
    sizes: list[tuple[int, tuple[int, int]]],
    precisions: Iterable[str],
    num_images: int,
    rounds: int,
) -> None:
    """Add a row per precision and model to the report of bench_step; ours first, as the time may end."""
    for precision in precisions:
        for size, shape in sizes:
            for name in models:
                case = {"case": name, "size": size, "precision": precision, "batch": num_images}
                report.add(case, lambda: measure(name, shape, precision, num_images, rounds))  # noqa: B023


def measure(name: str, shape: tuple[int, int], precision: str, num_images: int, rounds: int) -> Row:
    """Measure one model in one precision."""
    set_precision(precision)
    config, batch = MODELS[name], make_batch(*shape, num_images, device="cuda")
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")
    before = torch.cuda.memory_allocated()
    steps = [our_step(config, batch, autocast=autocast)]
    with FlopCounterMode(display=False) as counter:
        steps[0]()
    losses, used = [steps[0]()], [use_of(steps[0], before)]
    if find_transformers() is not None and has_anchor(config):
        before = torch.cuda.memory_allocated()
        steps.append(anchor_step(config, batch, autocast))
        losses.append(steps[1]())
        used.append(use_of(steps[1], before))
        check_same_work(name, *zip(steps, losses, strict=True))
    check_finite(losses)
    times = [[timed(step) for step in steps] for _ in range(rounds)]
    ours = median(round_[0] for round_ in times)
    row: Row = {"ours_ms": 1e3 * ours, "images_per_second": num_images / ours}
    row |= {"peak_mb": used[0].peak_mb, "kernels": used[0].kernels, "host_syncs": used[0].host_syncs}
    row["peak_share"] = counter.get_total_flops() / ours / peak_rate(precision)
    if len(steps) > 1:
        row |= {
            "baseline": "transformers",
            "baseline_ms": 1e3 * median(round_[1] for round_ in times),
            "ratio": median(round_[1] / round_[0] for round_ in times),
            "baseline_peak_mb": used[1].peak_mb,
            "baseline_kernels": used[1].kernels,
            "baseline_host_syncs": used[1].host_syncs,
        }
    return row


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


def check_finite(losses: Iterable[Loss]) -> None:
    """Check that the losses are numbers, so that the steps are those of a training.

    Raises:
        ValueError: one is not.
    """
    for loss in losses:
        if not loss.total.isfinite():
            raise ValueError(f"the loss is {loss.total.item()}")


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
