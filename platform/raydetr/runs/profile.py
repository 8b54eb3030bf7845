"""Show where the time of a training step goes: in a table that adds up to the step, and as a trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from torch.profiler import ProfilerActivity

from detrs import zoo
from raydetr.config import RunConfig, override
from raydetr.console import counted, table
from raydetr.data.layout import Layout
from raydetr.environment import cpu_name
from raydetr.runs.local import local_world
from raydetr.runs.resolve import resolve
from raydetr.training.loop import Training, training_batches
from raydetr.training.nonfinite import SkippedStep
from raydetr.training.step_timer import OTHER, CudaCalls, StepTimer, clock_of, count_cuda_calls

# Settings without effect on a step, or on that of a single process
PROFILE_IGNORES = (
    "init.", "model.backbone.weights", "evaluation.", "storage.", "tracking.", "data.val_transform.",
    "data.eval_batch_size", "cluster.address", "cluster.max_failures", "cluster.min_workers", "cluster.wait_minutes",
    "cluster.stall_minutes", "cluster.bf16_gradients",
)  # fmt: skip
WARM_UP, TRACED = 3, 2  # steps before and after those of the table
SLOW_LOADING = 0.1  # share of a step
TRACE, NUMBERS = "trace.json.gz", "profile.json"

# The parts of a step, in order: the name of each, and what the table calls it
PARTS = {
    "data": "waiting for data",
    "transfer": "transfer, normalization",
    "backbone": "forward: backbone",
    "neck": "forward: neck",
    "encoder": "forward: encoder",
    "queries": "forward: queries",
    "denoising": "forward: denoising queries",
    "decoder": "forward: decoder",
    "matcher": "matcher",
    "criterion": "criterion, without matcher",
    "backward": "backward",
    "clipping": "clipping",
    "optimizer": "optimizer, EMA",
    OTHER: OTHER,
}


@dataclass(frozen=True)
class Profile:
    """The mean times of a step, in seconds. `parts` adds up to `step_seconds`."""

    parts: Mapping[str, float]
    step_seconds: float
    num_steps: int
    images: int  # of a step, of this worker
    num_workers: int
    device: str
    host_syncs: float | None  # a step: how often the host waits for the device; None without a GPU
    kernels: float | None  # a step: that are launched; None without a GPU
    skipped_steps: int
    trace: str  # file

    def to_text(self) -> str:
        """Return the table, what it says, and how to open the trace."""
        rows = [
            (PARTS[name], f"{1e3 * seconds:.1f} ms", f"{seconds / self.step_seconds:.1%}")
            for name, seconds in self.parts.items()
        ]
        step = ("step", f"{1e3 * self.step_seconds:.1f} ms", "100.0%")
        return "\n".join([table([*rows, step], right=True), *self._notes()])

    def _notes(self) -> Iterator[str]:
        yield (
            f"means of {counted(self.num_steps, 'step')} on {self.device}; {counted(self.images, 'image')} a step, "
            f"{self.images / self.step_seconds:.3g} images/s"
        )
        if self.host_syncs is not None and self.kernels is not None:
            yield f"the host waits for the GPU {self.host_syncs:g} times a step, and launches {self.kernels:g} kernels"
        if self.num_workers > 1:
            yield f"this is the share of one of {self.num_workers} workers; sending gradients comes in addition"
        if self.skipped_steps:
            yield (
                f"warning: {counted(self.skipped_steps, 'step')} not finite, and without an update: the weights are "
                "random here"
            )
        if self.parts.get("data", 0.0) > SLOW_LOADING * self.step_seconds:
            yield "training waits for data: raise data.num_loader_workers, up to the number of free cores"
        yield f"trace: {self.trace}; open https://ui.perfetto.dev and drag the file onto the page"


def profile(config: RunConfig, *, num_steps: int, out: Path, progress: Callable[[int, int], None]) -> Profile:
    """Train a few steps in this process, with the data of `config` and new weights, and measure their parts.

    With several workers, it is the share of the first. On a GPU, times are those of the device, which does not wait for
    the measurement. Writes `profile.json` and a trace of two more steps, `trace.json.gz`, into `out`.

    Args:
        config: of the run.
        num_steps: that are measured, after a warm-up.
        out: folder for the results.
        progress: called with the number of finished steps, and of all.

    Raises:
        ValueError: the configuration or the shards cannot be used.
        OSError: the shards cannot be read, or `out` cannot be written.
        RuntimeError: the device is out of memory.
    """
    # A step takes the same time with any weights
    config = override(config, {"init.checkpoint": None, "model.backbone.weights": None})
    config, (shards, _) = resolve(config)
    out.mkdir(parents=True, exist_ok=True)
    world = local_world(config.cluster)
    torch.manual_seed(config.seed)
    training = Training(config, zoo.build(config.model), shards.num_samples, world)
    training.detector.train()
    timer = StepTimer(clock_of(world.device))
    _measure_parts(training, timer)
    layout = Layout(config.data.batch_size, config.cluster.num_workers, config.data.micro_batch_size)
    batches = training_batches(config, shards, layout, rank=0, position=0)
    skipped = 0

    def train_steps(count: int) -> None:
        nonlocal skipped
        for _ in range(count):
            timer.start_step()
            with timer.part("data"):
                micro_batches = list(islice(batches, layout.num_micro_batches))
            skipped += isinstance(training.train_step(*micro_batches), SkippedStep)
            progress(training.step, WARM_UP + num_steps + TRACED)

    train_steps(WARM_UP + num_steps)
    timer.start_step()
    steps = timer.steps()[WARM_UP:]
    trace = out / TRACE
    calls = _trace(lambda: train_steps(TRACED), world.device, trace)
    parts = {name: fmean(step.get(name, 0.0) for step in steps) for name in PARTS}
    found = Profile(
        parts={name: seconds for name, seconds in parts.items() if seconds > 0},
        step_seconds=fmean(sum(step.values()) for step in steps),
        num_steps=num_steps,
        images=sum(map(len, layout.micro_batches(0))),
        num_workers=config.cluster.num_workers,
        device=cpu_name() if world.device.type == "cpu" else torch.cuda.get_device_name(world.device),
        kernels=None if calls is None else calls.kernels / TRACED,
        host_syncs=None if calls is None else calls.host_syncs / TRACED,
        skipped_steps=skipped,
        trace=str(trace),
    )
    (out / NUMBERS).write_text(json.dumps(asdict(found), indent=1, allow_nan=False))
    return found


def _measure_parts(training: Training, timer: StepTimer) -> None:
    """Let the timer measure the parts of the steps of `training`."""
    training.part = timer.part
    training.criterion.match = timer.timed(training.criterion.match, "matcher")
    detector = training.detector
    for name in ("backbone", "neck", "encoder", "queries", "denoising", "decoder"):
        module = getattr(detector, name)
        if module is not None:
            timer.watch(module, name)


def _trace(run: Callable[[], None], device: torch.device, file: Path) -> CudaCalls | None:
    """Write a trace of a function; return its calls of CUDA, None on a CPU."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as recorded:
        run()
    recorded.export_chrome_trace(str(file))
    if device.type == "cpu":
        return None
    return count_cuda_calls(event.name for event in recorded.events())
