"""Run the GPU part of bench_operator.py, against eager `grid_sample` and, if given, the official kernel.

The official kernel, or one with the same interface, is an extension module with the functions `ms_deform_attn_forward`
and `ms_deform_attn_backward`.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from detrs.ops import deform_attn, deform_attn_reference, sampling_locations, sampling_weights

Shapes = tuple[tuple[int, int], ...]
Row = dict[str, object]


@dataclass(frozen=True)
class GpuCase:
    """One size, with the attributes that `make_inputs` of bench_operator reads."""

    name: str
    shapes: Shapes
    num_queries: int | None
    num_images: int
    dtype: torch.dtype
    num_heads: int = 8
    num_channels: int = 32
    num_points: int = 4


def measure_on_gpu(
    shapes: Shapes,
    make_inputs: Callable[[Any], tuple[Tensor, ...]],
    seconds: float,
    official: Path | None,
    show: Callable[[Row], None],
) -> list[Row]:
    """Measure each case in float32 and bfloat16, against both baselines in float32; `threads` is 0 for the GPU."""
    baselines: dict[str, Callable[..., Tensor]] = {"grid_sample": deform_attn_reference}
    if official is not None:
        baselines["official"] = official_function(load_module(official))
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: {bandwidth / 1e9:.0f} GB/s for copies in memory")
    rows: list[Row] = []
    sizes = [(None, 2), (None, 8), (300, 2), (900, 2)]
    for (queries, images), dtype in itertools.product(sizes, (torch.float32, torch.bfloat16)):
        kind = "encoder" if queries is None else f"decoder {queries} on"
        name = f"cuda {kind} 22223 N={images} {str(dtype).removeprefix('torch.')}"
        case = GpuCase(name, shapes, queries, images, dtype)
        for direction, (baseline_name, baseline) in itertools.product(
            ("forward", "forward+backward"), baselines.items()
        ):
            row = measure(case, direction, make_inputs, baseline, seconds)
            rows.append({**row, "case": f"{name} / {baseline_name}"})
            show(rows[-1])
            floor = floor_bytes(case, direction == "forward+backward") / bandwidth * 1e3
            print(f"    {floor / float(str(row['ours_ms'])):.0%} of the memory floor, {floor:.3f} ms")
    return rows


def measure(
    case: GpuCase,
    direction: str,
    make_inputs: Callable[[Any], tuple[Tensor, ...]],
    baseline: Callable[..., Tensor],
    seconds: float,
) -> Row:
    """Measure one row, with interleaved runs and CUDA events."""
    value, reference, offsets, logits = (tensor.cuda() for tensor in make_inputs(case))
    samples = (sampling_locations(case.shapes, reference, offsets), sampling_weights(logits))
    runs = [
        _run(deform_attn, value.to(case.dtype), case.shapes, samples, direction == "forward+backward"),
        _run(baseline, value, case.shapes, samples, direction == "forward+backward"),
    ]
    times: list[list[float]] = [[], []]
    for run in runs:
        run()
    while len(times[0]) < 5 or sum(map(sum, times)) < 1e3 * seconds:
        for run, record in zip(runs, times, strict=True):
            record.append(_milliseconds(run))
    ratio = median(slow / fast for fast, slow in zip(*times, strict=True))
    row: Row = {"case": case.name, "direction": direction, "threads": 0}
    return {**row, "ours_ms": median(times[0]), "baseline_ms": median(times[1]), "ratio": ratio}


def _run(
    function: Callable[..., Tensor], value: Tensor, shapes: Shapes, samples: tuple[Tensor, ...], train: bool
) -> Callable[[], object]:
    leaves = [tensor.detach().clone().requires_grad_(train) for tensor in (value, *samples)]

    def run() -> object:
        out = function(leaves[0], shapes, *leaves[1:])
        return torch.autograd.grad(out, leaves, torch.ones_like(out)) if train else out

    return run


def _milliseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def copy_bandwidth() -> float:
    """Measure the bytes per second, read and written, of a large copy."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    milliseconds = median(_milliseconds(lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.nbytes / milliseconds * 1e3


def floor_bytes(case: GpuCase, train: bool) -> int:
    """Return the bytes that must be read and written at least: inputs and output, in training also their gradients."""
    num_tokens = sum(height * width for height, width in case.shapes)
    num_rows = case.num_images * (case.num_queries or num_tokens) * case.num_heads
    value = case.num_images * num_tokens * case.num_heads * case.num_channels * case.dtype.itemsize
    samples = num_rows * len(case.shapes) * case.num_points * 3 * 4
    out = num_rows * case.num_channels * case.dtype.itemsize
    # The backward pass reads the inputs and the gradient of the output, and writes the gradients of the inputs.
    return (value + samples + out) + (2 * (value + samples) + out if train else 0)


def load_module(path: Path) -> ModuleType:
    """Load an extension module from a file of any name."""
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a Python extension module (.so)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def official_function(module: ModuleType) -> Callable[..., Tensor]:
    """Wrap the official kernel in the interface of our plain form; float32 only."""

    class Official(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor, sizes: Tensor, starts: Tensor, *samples: Tensor) -> Tensor:
            ctx.save_for_backward(value, sizes, starts, *samples)
            out: Tensor = module.ms_deform_attn_forward(value, sizes, starts, *samples, value.shape[0])
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            found = module.ms_deform_attn_backward(*saved, grads[0].contiguous(), saved[0].shape[0])
            return found[0], None, None, found[1], found[2]

    def function(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        sizes = torch.tensor(shapes, device=value.device)
        starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
        out: Tensor = Official.apply(value, sizes, starts, locations, weights)
        return out

    return function
