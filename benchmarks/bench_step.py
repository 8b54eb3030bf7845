"""Benchmark whole training steps: the models of the five papers with ResNet-50, in turns with transformers'.

    make bench-step                                        the CPU: all models, 320 and 800 px, one and all threads
    make bench-step ARGS="--models detr dino --sizes 320 --threads 1"
    make bench-step ARGS="--only models"                   or variants, or loader; they come first, and are short
    make bench-step ARGS="--device cuda --minutes 5"       a GPU: fp32, TF32, bf16, then the variants in bf16

A step is forward pass, criterion, backward pass, clipping and AdamW, on one batch in memory, with new weights. The
variants compare the fused operator with the plain one, and a compiled detector with an eager one; the loader feeds
steps with augmented photographs (of RAYDETR_COCO_TINY, otherwise drawn images), against the same batches from memory.

transformers is no dependency. Without it, its rows are left out, with a line. To install it beside:
`.venv/bin/python -m pip install transformers`.

Both sides take turns in one process; a ratio is the median over pairs of consecutive steps, so that a busy machine
slows both. Times are CPU time for one thread, else wall time. The share of the peak is that of the multiply-adds of
matrix products and convolutions (deformable attention is not counted) over what one large matrix product reaches in
the same precision on the same threads. Prints a table and writes build/bench/step.json, for a GPU step_gpu.json,
{machine, torch, transformers, rows, left_out}, after every row: a row that fails has its `error`, and the others
follow.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from step_cuda import PRECISIONS, measure_on_gpu, measure_variants_on_gpu
from step_models import (
    MODELS,
    Step,
    anchor_step,
    check_same_work,
    find_transformers,
    has_anchor,
    make_batch,
    our_step,
)
from torch.utils.flop_counter import FlopCounterMode

from detrs.ops import native_status
from raydetr.environment import cpu_name

OUT = {"cpu": Path("build/bench/step.json"), "cuda": Path("build/bench/step_gpu.json")}
SIZES = {320: (320, 426), 800: (800, 1066)}
MIN_ROUNDS = 3
COMPILED = ("detr", "deformable_detr")  # compiling takes longer than all else
KINDS = {"cpu": ("variants", "loader", "models"), "cuda": ("models", "variants")}  # in this order

Row = dict[str, Any]


@dataclass
class Report:
    """The rows so far, on the screen and in the file."""

    machine: str
    deadline: float  # of time.monotonic
    path: Path
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, case: Row, measure: Callable[[], Row], needs: float = 0.0) -> None:
        """Measure a row, show and write it; a row that fails has an error instead.

        It is left out if the time is up, or if it `needs` more seconds than are left.
        """
        name = " ".join(str(value) for value in case.values())
        left = self.deadline - time.monotonic()
        if left < needs:
            self.leave_out(
                f"{name}: it may need {needs:.0f} s, and --minutes leaves {max(left, 0):.0f} s"
                if needs
                else f"{name}: the time of --minutes is up"
            )
            return
        if sys.stderr.isatty():
            print(f"{name} ...", end="\r", file=sys.stderr, flush=True)
        try:
            row = case | measure()
        except Exception as error:  # whatever it is: the other rows are worth having
            row = case | {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.rows.append(row)
        print(line(row), flush=True)
        self.write()

    def leave_out(self, why: str) -> None:
        """Say what is not measured."""
        self.left_out.append(why)
        print(f"left out: {why}", flush=True)
        self.write()

    def write(self) -> None:
        """Write the file."""
        library = find_transformers()
        content = {
            "machine": self.machine,
            "torch": torch.__version__,
            "transformers": None if library is None else library.__version__,
            "rows": self.rows,
            "left_out": self.left_out,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Measure what the options choose."""
    args = parse_arguments()
    on_gpu = args.device == "cuda"
    machine = f"{cpu_name()}, {os.cpu_count()} cores"
    if on_gpu:
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    report = Report(machine, time.monotonic() + 60 * args.minutes, args.json)
    print(f"{machine}, torch {torch.__version__}, {native_status().reason}")
    library = find_transformers()
    if library is None:
        report.leave_out("transformers is not installed: .venv/bin/python -m pip install transformers")
    else:
        print(f"transformers {library.__version__}")
    print(HEADER)
    sizes = [(size, SIZES[size]) for size in sorted(args.sizes)]
    if on_gpu:
        shape = sizes[-1]
        if "models" in args.only:
            measure_on_gpu(report, args.models, shape, args.precisions, args.batch, args.rounds)
        if "variants" in args.only:
            measure_variants_on_gpu(
                report, args.models, COMPILED, shape, args.precisions[-1], args.batch, args.rounds
            )
        return
    if "variants" in args.only:
        measure_variants(report, args.models, sizes[0], args.threads, args.seconds)
    if "loader" in args.only:
        measure_loader(report, args.models[0], args.seconds)
    if "models" in args.only:
        measure_models(report, args.models, sizes, args.threads, args.seconds)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=list(SIZES))
    parser.add_argument("--minutes", type=float, default=25.0, help="rows after this time are left out")
    parser.add_argument("--json", type=Path, help="where to write the rows (default: build/bench/)")
    parser.add_argument(
        "--only", nargs="+", choices=KINDS["cpu"], help="default: all; the loader feeds only steps on the CPU"
    )
    cpu = parser.add_argument_group("on the CPU, one image a step; variants: the smallest of --sizes")
    cpu.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    cpu.add_argument("--seconds", type=float, default=8.0, help="per row, but at least three rounds")
    gpu = parser.add_argument_group("on a GPU, the largest of --sizes; variants: the last of --precisions")
    gpu.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    gpu.add_argument("--batch", type=int, default=2, help="images a step")
    gpu.add_argument("--rounds", type=int, default=5, help="steps per row and side")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; `raydetr doctor` says why")
    args.only = args.only or KINDS[args.device]
    if unknown := set(args.only) - set(KINDS[args.device]):
        parser.error(f"--only {' '.join(unknown)}: not on a GPU, where there are {', '.join(KINDS['cuda'])}")
    args.json = args.json or OUT[args.device]
    return args


def measure_models(
    report: Report,
    models: Iterable[str],
    sizes: list[tuple[int, tuple[int, int]]],
    threads: list[int],
    seconds: float,
) -> None:
    """Measure every model against transformers'."""
    for size, (height, width) in sizes:
        for name in models:
            for number in threads:
                case = {"case": name, "size": size, "threads": number}
                report.add(case, lambda: measure_model(name, height, width, number, seconds))  # noqa: B023


def measure_model(name: str, height: int, width: int, threads: int, seconds: float) -> Row:
    """Measure one model, in turns with transformers' if it is there and has it."""
    torch.set_num_threads(threads)
    config, batch = MODELS[name], make_batch(height, width, num_images=1)
    steps = [our_step(config, batch)]
    with FlopCounterMode(display=False) as counter:
        losses = [steps[0]()]
    if find_transformers() is not None and has_anchor(config):
        steps.append(anchor_step(config, batch))
        losses.append(steps[1]())
        check_same_work(name, *zip(steps, losses, strict=True))
    times = time_in_turns(steps, seconds)
    row = summarize(times, 1) | ({"baseline": "transformers"} if len(steps) > 1 else {})
    peak = 2 * 2048**3 / min(time_in_turns([_large_product()], 0.5)[0])
    return row | {"peak_share": counter.get_total_flops() / median(times[0]) / peak}


def measure_variants(
    report: Report,
    models: Iterable[str],
    size: tuple[int, tuple[int, int]],
    threads: list[int],
    seconds: float,
) -> None:
    """Measure the fused operator against the plain one, and a compiled detector against an eager one."""
    name_of_size, shape = size
    for name in models:
        for number in threads:
            case = {"case": f"{name}, fused operator", "size": name_of_size, "threads": number}
            if MODELS[name].architecture in ("deformable_detr", "dino"):
                report.add(case, lambda: measure_fused(name, shape, number, seconds))  # noqa: B023
        case = {"case": f"{name}, compiled", "size": name_of_size, "threads": threads[-1]}
        if name in COMPILED:
            report.add(case, lambda: measure_compiled(name, shape, threads[-1], seconds))  # noqa: B023


def measure_fused(name: str, shape: tuple[int, int], threads: int, seconds: float) -> Row:
    """Measure the fused operator against the plain one."""
    torch.set_num_threads(threads)
    batch = make_batch(*shape, num_images=1)
    steps = [our_step(MODELS[name], batch, fused=fused) for fused in (True, False)]
    for step in steps:
        step()
    return summarize(time_in_turns(steps, seconds), 1) | {"baseline": "plain operator"}


def measure_compiled(name: str, shape: tuple[int, int], threads: int, seconds: float) -> Row:
    """Measure a compiled detector against an eager one; `compile_s` is the first step."""
    torch.set_num_threads(threads)
    batch = make_batch(*shape, num_images=1)
    steps = [our_step(MODELS[name], batch, compiled=compiled) for compiled in (True, False)]
    began = time.perf_counter()
    steps[0]()
    compile_s = time.perf_counter() - began
    for step in steps:
        step()
    return summarize(time_in_turns(steps, seconds), 1) | {"baseline": "eager", "compile_s": compile_s}


def measure_loader(report: Report, name: str, seconds: float) -> None:
    """Measure steps that the loader feeds against steps from memory."""
    try:
        from step_loader import time_loader
    except ImportError as error:
        report.leave_out(f"the loader: {error}")
        return
    for num_workers in (0, 1):
        where = "in a process of its own" if num_workers else "in the same process"
        case = {"case": f"{name}, loader {where}", "size": 320, "threads": 1}
        report.add(
            case,
            lambda: summarize(time_loader(MODELS[name], num_workers, seconds), 1) | {"baseline": "memory"},  # noqa: B023
        )


def time_in_turns(steps: list[Callable[[], object]] | list[Step], seconds: float) -> list[list[float]]:
    """Return the seconds of each step, in turns until `seconds` have passed, but at least three rounds."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < MIN_ROUNDS:
        for step, record in zip(steps, times, strict=True):
            start = clock()
            step()
            record.append(clock() - start)
    return times


def summarize(times: list[list[float]], num_images: int) -> Row:
    """Return medians in ms, images per second, and the median ratio of the second side to the first."""
    row: Row = {"ours_ms": 1e3 * median(times[0]), "images_per_second": num_images / median(times[0])}
    if len(times) > 1:
        row["baseline_ms"] = 1e3 * median(times[1])
        row["ratio"] = median(slow / fast for fast, slow in zip(*times, strict=True))
    return row


def _large_product() -> Callable[[], object]:
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return lambda: a @ b


HEADER = f"{'case':<44}{'px':>5}{'threads':>9}{'ours ms':>10}{'baseline':>10}{'ratio':>7}{'images/s':>10}{'of peak':>9}"


def line(row: Row) -> str:
    """Format a row of the table."""
    start = f"{row['case']:<44}{row['size']:>5}{row.get('threads', row.get('precision')):>9}"
    if "error" in row:
        return f"{start}  {row['error'].splitlines()[0]}"
    baseline = f"{row['baseline_ms']:>10.1f}{row['ratio']:>7.2f}" if "ratio" in row else " " * 17
    share = f"{row['peak_share']:>9.0%}" if "peak_share" in row else " " * 9
    rest = [f"against {row['baseline']}"] if "baseline" in row else []
    rest += [f"first step {row['compile_s']:.0f} s"] if "compile_s" in row else []
    rest += (
        [f"{row['peak_mb']:.0f} MB, {row['kernels']} kernels, {row['host_syncs']} syncs"]
        if "kernels" in row
        else []
    )
    return (
        f"{start}{row['ours_ms']:>10.1f}{baseline}{row['images_per_second']:>10.2f}{share}  {', '.join(rest)}"
    )


if __name__ == "__main__":
    main()
