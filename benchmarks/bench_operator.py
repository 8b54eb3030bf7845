"""Benchmark deformable attention: our operator against eager `grid_sample`, interleaved in one process.

The fused form is compared with our plain form, including softmax and location arithmetic.

    make bench-operator                      all cases
    make bench-operator ARGS="--only decoder --seconds 2"
    make bench-operator ARGS="--device cuda --official PATH"    only the GPU, also against the official kernel

It prints a table and writes build/bench/operator.json, a list of {case, direction, threads, ours_ms, baseline_ms,
ratio}, and build/bench/operator_memory.json, a list of {case, ours_mb, baseline_mb, ratio}; the rows of a GPU alone go
to operator_gpu.json. Ratios are medians over pairs of consecutive runs, so that a busy machine slows both. Times are
CPU time for one thread, wall time for several, and the device's on a GPU (operator_cuda.py), where rows also have
`baseline`, the name of the other side, and `share_of_bandwidth`: the time that a copy of all inputs and outputs would
take, divided by ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from operator_cuda import measure_on_gpu
from torch import Tensor

from detrs.ops import (
    deform_attn,
    deform_attn_fused,
    deform_attn_reference,
    deform_attn_unfused,
    native_status,
    sampling_locations,
    sampling_weights,
)
from raydetr.environment import cpu_name

Shapes = tuple[tuple[int, int], ...]
OUT, MEMORY_OUT = Path("build/bench/operator.json"), Path("build/bench/operator_memory.json")
GPU_OUT = Path("build/bench/operator_gpu.json")
LEVELS_22K = ((100, 167), (50, 84), (25, 42), (13, 21))  # an image of 800 x 1333
LEVELS_5K = ((48, 80), (24, 40), (12, 20), (6, 10))  # 384 x 640
LEVELS_128PX = ((16, 16), (8, 8), (4, 4), (2, 2))
LEVELS_QUICKSTART = ((12, 12), (6, 6), (3, 3))  # 96 x 96


@dataclass(frozen=True)
class Case:
    """One size. `num_queries` None means an encoder: every token is a query and samples near its own position."""

    name: str
    shapes: Shapes
    num_queries: int | None = None
    num_images: int = 1
    num_heads: int = 8
    num_channels: int = 32
    num_points: int = 4
    dtype: torch.dtype = torch.float32
    fused: bool = False  # the baseline is then our plain form, with eager softmax and location arithmetic


QUICKSTART = Case("decoder 50 quickstart", LEVELS_QUICKSTART, 50, num_images=8, num_heads=4, num_channels=16)
PLAIN = (
    Case("encoder 22223", LEVELS_22K),
    Case("encoder 5100", LEVELS_5K),
    Case("encoder 128px", LEVELS_128PX, num_images=2),
    Case("decoder 300 on 22223", LEVELS_22K, num_queries=300),
    Case("decoder 300 on 5100", LEVELS_5K, num_queries=300),
    Case("decoder 300 128px", LEVELS_128PX, num_queries=300, num_images=2),
    QUICKSTART,
)
CASES = (
    *PLAIN,
    *(replace(case, name=f"{case.name} bf16", dtype=torch.bfloat16) for case in PLAIN),
    *(replace(case, name=f"fused {case.name}", fused=True) for case in PLAIN),
)


def pixel_centers(shapes: Shapes) -> Tensor:
    """Return [S, 2], (x, y) in [0, 1] of the center of every token."""
    grids = [
        torch.cartesian_prod((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width)
        for height, width in shapes
    ]
    return torch.cat(grids).flip(1)


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw value, reference points, offsets of a few pixels, and logits."""
    torch.manual_seed(0)
    num_tokens = sum(height * width for height, width in case.shapes)
    centers = pixel_centers(case.shapes) if case.num_queries is None else torch.rand(case.num_queries, 2)
    rows = (case.num_images, len(centers), case.num_heads, len(case.shapes), case.num_points)
    value = torch.randn(case.num_images, num_tokens, case.num_heads, case.num_channels)
    reference = centers[None, :, None].expand(case.num_images, -1, len(case.shapes), -1).contiguous()
    return value, reference, 2 * torch.randn(*rows, 2), torch.randn(rows)


def make_runs(case: Case, direction: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return our operator and the baseline (always float32) as functions without arguments."""
    value, reference, offsets, logits = make_inputs(case)
    samples = (sampling_locations(case.shapes, reference, offsets), sampling_weights(logits))
    if case.fused:
        samples = (offsets, logits)
    train = direction == "forward+backward"

    def make_run(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], object]:
        leaves = [value.to(dtype).detach(), *(tensor.detach().clone() for tensor in samples)]
        for leaf in leaves:
            leaf.requires_grad_(train)
        others = (reference,) if case.fused else ()

        def run() -> object:
            out = function(leaves[0], case.shapes, *others, *leaves[1:])
            return torch.autograd.grad(out, leaves, torch.ones_like(out)) if train else out

        return run

    ours, baseline = (
        (deform_attn_fused, deform_attn_unfused) if case.fused else (deform_attn, deform_attn_reference)
    )
    return make_run(ours, case.dtype), make_run(baseline, torch.float32)


def time_interleaved(runs: tuple[Callable[[], object], ...], seconds: float) -> list[list[float]]:
    """Return the milliseconds of each run, interleaved until `seconds` have passed, but at least three rounds."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for run, record in zip(runs, times, strict=True):
            start = clock()
            run()
            record.append(1e3 * (clock() - start))
    return times


def measure(case: Case, direction: str, threads: int, seconds: float) -> dict[str, object]:
    """Measure one row of the table."""
    torch.set_num_threads(threads)
    ours, baseline = time_interleaved(make_runs(case, direction), seconds)
    ratio = median(slow / fast for fast, slow in zip(ours, baseline, strict=True))
    row = {"case": case.name, "direction": direction, "threads": threads}
    return {**row, "ours_ms": median(ours), "baseline_ms": median(baseline), "ratio": ratio}


def peak_megabytes(case: Case, which: int) -> float:
    """Measure the memory that a training step of ours (0) or the baseline (1) needs besides its inputs; Linux only."""
    torch.set_num_threads(1)
    make_runs(Case("warm-up", LEVELS_128PX), "forward+backward")[which]()
    run = make_runs(case, "forward+backward")[which]

    def status(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1])

    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, VmHWM
    before = status("VmRSS")
    run()
    return (status("VmHWM") - before) / 1024


def measure_memory(case: Case) -> dict[str, object]:
    """Measure one row of the memory table, each side in a separate process."""
    # With a fixed threshold, the allocator returns freed tensors to the system at once: none counts for the peak.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks = []
    for which in (0, 1):
        command = [sys.executable, __file__, "--peak", str(CASES.index(case)), str(which)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(float(result.stdout))
    return {"case": case.name, "ours_mb": peaks[0], "baseline_mb": peaks[1], "ratio": peaks[1] / peaks[0]}


def print_row(row: dict[str, object]) -> None:
    """Print one line of the table; times in ms, memory in MB."""
    if "error" in row:
        print(f"{row['case']:<36}{row['direction']:<18}{row['baseline']} failed: {row['error']}", flush=True)
        return
    ours, baseline = (row.get(f"{side}_ms", row.get(f"{side}_mb")) for side in ("ours", "baseline"))
    what, threads = row.get("direction", "peak memory"), row.get("threads", 1)
    against = (
        f"  {row['baseline']}, {row['share_of_bandwidth']:.0%} of bandwidth" if "baseline" in row else ""
    )
    print(
        f"{row['case']:<36}{what:<18}{threads:>7}{ours:>11.3f}{baseline:>11.3f}{row['ratio']:>9.2f}{against}",
        flush=True,
    )


def measure_all(cases: list[Case], threads: list[int], seconds: float) -> list[dict[str, object]]:
    """Measure and print the rows of the CPU; on a terminal, show progress."""
    wanted = [(c, n, d) for c in cases for n in threads for d in ("forward", "forward+backward")]
    rows = []
    for number, (case, num_threads, direction) in enumerate(wanted, 1):
        if sys.stderr.isatty():
            print(
                f"{number} of {len(wanted)}: {case.name}, {direction}", end="\r", file=sys.stderr, flush=True
            )
        rows.append(measure(case, direction, num_threads, seconds))
        print_row(rows[-1])
    return rows


def main() -> None:
    """Measure all cases, print the table and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4.0, help="per row")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="measure only there; default: on both, if possible"
    )
    parser.add_argument("--official", type=Path, help="the official kernel's module (.so), for the GPU")
    parser.add_argument("--json", type=Path, help="where to write the rows (default: build/bench/)")
    parser.add_argument("--peak", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak is not None:
        print(peak_megabytes(CASES[args.peak[0]], args.peak[1]))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    cases = [case for case in CASES if args.only in case.name]
    if not cases:
        parser.error(
            f"--only: no case has {args.only!r} in its name; the cases are {[case.name for case in CASES]}"
        )
    print(f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}, {native_status().reason}")
    print(f"{'case':<36}{'direction':<18}{'threads':>7}{'ours':>11}{'baseline':>11}{'ratio':>9}")
    out = args.json or (GPU_OUT if args.device == "cuda" else OUT)
    rows = [] if args.device == "cuda" else measure_all(cases, args.threads, args.seconds)
    write(out, rows)

    def show(row: dict[str, object]) -> None:
        rows.append(row)
        print_row(row)
        write(out, rows)  # after every row: the benchmark may be stopped

    if args.device != "cpu" and torch.cuda.is_available():
        measure_on_gpu(LEVELS_22K, make_inputs, args.seconds, args.official, show)
    if args.device == "cuda":
        return
    memory = []
    if sys.platform == "linux":
        memory = [measure_memory(case) for case in cases if case.num_queries is None]
    for row in memory:
        print_row(row)
    write(MEMORY_OUT, memory)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
