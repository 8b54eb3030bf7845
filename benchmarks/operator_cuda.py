"""Run the GPU part of bench_operator.py: our operator against others, in turns.

The others are eager `grid_sample`, and those that are installed: deformops and msda-triton (both in Triton), and the
official kernel, or one with the same interface, as an extension module with the functions `ms_deform_attn_forward` and
`ms_deform_attn_backward`.

Times are those of the device. All launches of a measurement are one CUDA graph, so that the time which Python and
torch need to launch them does not count; what cannot be captured is launched repeatedly between two events. Inputs
alternate among several copies, together at least twice as large as the cache.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
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
Operator = Callable[[Tensor, Tensor, Tensor], Tensor]  # of value, locations and weights

SIZES = ((None, 2), (None, 8), (300, 2), (300, 4), (900, 2))  # queries (None: an encoder) and images
ROUND_MS = 10.0  # of one contender in a round
COPIED = 2**28  # numbers, of the copy that shows the bandwidth


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


@dataclass(frozen=True)
class Contender:
    """An implementation: `prepare` returns it for given levels.

    `takes_half`: it gets the value in half precision; the others always float32. `half_weights`: the weights too.
    """

    name: str
    prepare: Callable[[Shapes], Operator]
    takes_half: bool = False
    half_weights: bool = False


def measure_on_gpu(
    shapes: Shapes,
    make_inputs: Callable[[Any], tuple[Tensor, ...]],
    seconds: float,
    official: Path | None,
    show: Callable[[Row], None],
) -> None:
    """Measure every case, in float32 and bfloat16; `show` gets each row, whose `threads` is 0 for the GPU."""
    contenders = list(find_contenders(official))
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: {bandwidth / 1e9:.0f} GB/s for copies in memory", flush=True)
    for (queries, images), dtype in itertools.product(SIZES, (torch.float32, torch.bfloat16)):
        kind = "encoder" if queries is None else f"decoder {queries} on"
        name = f"{kind} 22223 N={images} {str(dtype).removeprefix('torch.')}"
        case = GpuCase(name, shapes, queries, images, dtype)
        for direction in ("forward", "forward+backward"):
            for row in measure(case, direction, make_inputs, contenders, seconds):
                floor = floor_bytes(case, direction != "forward") / bandwidth * 1e3
                show({**row, "share_of_bandwidth": floor / float(str(row["ours_ms"]))})
            torch.cuda.empty_cache()


# --- The contenders ---


def find_contenders(official: Path | None) -> Iterator[Contender]:
    """Yield those that can be imported; say which are missing."""
    yield Contender(
        "grid_sample", lambda shapes: lambda *inputs: deform_attn_reference(inputs[0], shapes, *inputs[1:])
    )
    installable = (
        Contender("deformops", _deformops, takes_half=True, half_weights=True),
        Contender("msda_triton", _msda_triton),
    )
    for contender in installable:
        if importlib.util.find_spec(contender.name) is None:
            print(f"{contender.name} is not installed: left out", flush=True)
        else:
            yield contender
    if official is None:
        print("the official kernel is left out: give its module as --official PATH", flush=True)
        return
    try:
        module = load_module(official)
    except ImportError as error:
        print(f"the official kernel is left out: {error}", flush=True)
        return
    yield Contender("official", lambda shapes: official_operator(module, shapes))


def _levels(shapes: Shapes) -> tuple[Tensor, Tensor]:
    """Return sizes and first tokens of the levels, as most implementations take them."""
    sizes = torch.tensor(shapes, device="cuda")
    return sizes, torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))


def _deformops(shapes: Shapes) -> Operator:
    from deformops.registry import msda  # type: ignore[import-not-found]

    sizes, starts = _levels(shapes)
    return lambda value, locations, weights: msda(value, sizes, starts, locations, weights)


def _msda_triton(shapes: Shapes) -> Operator:
    from msda_triton import multiscale_deformable_attention  # type: ignore[import-not-found]

    sizes, _ = _levels(shapes)

    def operator(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = multiscale_deformable_attention(
            value, sizes, locations, weights, padding_mode="zeros", align_corners=False
        )
        return out.flatten(2)

    return operator


def load_module(path: Path) -> ModuleType:
    """Load an extension module from a file of any name."""
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a Python extension module (.so)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def official_operator(module: ModuleType, shapes: Shapes) -> Operator:
    """Wrap the official kernel; float32 only."""
    sizes, starts = _levels(shapes)

    class Official(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor, *samples: Tensor) -> Tensor:
            ctx.save_for_backward(value, *samples)
            out: Tensor = module.ms_deform_attn_forward(value, sizes, starts, *samples, value.shape[0])
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            value, *samples = ctx.saved_tensors
            grad = grads[0].contiguous()
            return tuple(module.ms_deform_attn_backward(value, sizes, starts, *samples, grad, value.shape[0]))

    def operator(*inputs: Tensor) -> Tensor:
        out: Tensor = Official.apply(*inputs)
        return out

    return operator


# --- Measuring ---


def measure(
    case: GpuCase,
    direction: str,
    make_inputs: Callable[[Any], tuple[Tensor, ...]],
    contenders: list[Contender],
    seconds: float,
) -> list[Row]:
    """Measure ours against all contenders, which take turns. One that fails gets a row with `error` and no time."""
    value, reference, offsets, logits = (tensor.cuda() for tensor in make_inputs(case))
    samples = (sampling_locations(case.shapes, reference, offsets), sampling_weights(logits))
    train = direction == "forward+backward"
    ours = Contender("ours", lambda shapes: lambda *inputs: deform_attn(inputs[0], shapes, *inputs[1:]), True)
    launches: dict[str, Launches] = {}
    errors: dict[str, str] = {}
    for contender in (ours, *contenders):
        dtype = case.dtype if contender.takes_half else torch.float32
        try:
            inputs = (
                value.to(dtype),
                samples[0],
                samples[1].to(dtype if contender.half_weights else torch.float32),
            )
            launches[contender.name] = Launches(contender.prepare(case.shapes), inputs, train)
        except Exception as error:  # whatever another library raises must not end the benchmark
            if contender is ours:
                raise
            errors[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in launches}
    while len(times["ours"]) < 5 or sum(map(len, times.values())) * ROUND_MS < 1e3 * seconds:
        for name, runs in launches.items():
            times[name].append(runs.milliseconds())
    row: Row = {"case": case.name, "direction": direction, "threads": 0, "ours_ms": median(times["ours"])}
    rows = []
    for contender in contenders:
        kind = "" if contender.takes_half or case.dtype == torch.float32 else " float32"
        named = {**row, "baseline": contender.name + kind}
        if contender.name in errors:
            rows.append({**named, "error": errors[contender.name]})
            continue
        pairs = zip(times["ours"], times[contender.name], strict=True)
        ratio = median(slow / fast for fast, slow in pairs)
        timing = "graph" if launches[contender.name].graph is not None else "launches"
        found = {"baseline_ms": median(times[contender.name]), "ratio": ratio, "timing": timing}
        rows.append({**named, **found, "difference": launches["ours"].difference(launches[contender.name])})
    return rows


class Launches:
    """Calls of an operator on alternating copies of its inputs, captured in a CUDA graph if that is possible."""

    def __init__(self, operator: Operator, inputs: tuple[Tensor, ...], train: bool) -> None:
        num_bytes = sum(tensor.nbytes for tensor in inputs)
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        count = min(16, math.ceil(2 * cache / num_bytes))
        self._operator, self._train = operator, train
        self._copies = [[tensor.clone().requires_grad_(train) for tensor in inputs] for _ in range(count)]
        self.out = self._call(self._copies[0]).detach()
        self._grad_out = torch.randn_like(self.out)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._capture()
        self._repeats = 1
        self._repeats = max(1, round(ROUND_MS / (self.milliseconds() * len(self._copies))))

    def _call(self, inputs: list[Tensor]) -> Tensor:
        return self._operator(inputs[0], inputs[1], inputs[2])

    def _launch_all(self) -> None:
        for inputs in self._copies:
            out = self._call(inputs)
            if self._train:
                torch.autograd.grad(out, inputs, self._grad_out)

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles Triton's kernels, which a capture must not do
                self._launch_all()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._launch_all()
        except RuntimeError:
            torch.cuda.synchronize()
            return
        self.graph = graph
        graph.replay()

    def milliseconds(self) -> float:
        """Return the time of one call, the mean over several."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(self._repeats):
            self._launch_all() if self.graph is None else self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / self._repeats / len(self._copies)

    def difference(self, other: Launches) -> float:
        """Return the largest difference of the outputs, relative to the largest output: both must compute the same."""
        one, two = self.out.double(), other.out.double()
        return float((one - two).abs().max() / two.abs().max())


def copy_bandwidth() -> float:
    """Measure the bytes per second, read and written, of a large copy."""
    source = torch.empty(COPIED, device="cuda").normal_()
    target = torch.empty_like(source)
    times = []
    for _ in range(11):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            target.copy_(source)
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / 5)
    return 2 * source.nbytes / median(times[1:]) * 1e3


def floor_bytes(case: GpuCase, train: bool) -> int:
    """Return the bytes that must be read and written at least: inputs and output, in training also their gradients."""
    num_tokens = sum(height * width for height, width in case.shapes)
    num_rows = case.num_images * (case.num_queries or num_tokens) * case.num_heads
    value = case.num_images * num_tokens * case.num_heads * case.num_channels * case.dtype.itemsize
    samples = num_rows * len(case.shapes) * case.num_points * 3 * 4
    out = num_rows * case.num_channels * case.dtype.itemsize
    # The backward pass reads the inputs and the gradient of the output, and writes the gradients of the inputs
    return (value + samples + out) + (2 * (value + samples) + out if train else 0)
