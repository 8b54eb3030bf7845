"""Measure the parts of training steps, so that they add up to the steps.

Time is a sequence of marks. Each mark names the part that goes on from there, so that every interval between two marks
belongs to exactly one part: a part does not count the parts that are entered within it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn
from torch.profiler import record_function

OTHER = "other"
# What a trace calls the calls of CUDA that launch a kernel, and those in which the host waits for the device
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


class Clock(Protocol):
    """Takes instants without waiting for the device, and later says what is between them."""

    def now(self) -> Any:
        """Return an instant."""

    def seconds(self, start: Any, end: Any) -> float:
        """Return the time between two instants."""


class WallClock:
    """The time of this process, for a CPU."""

    def now(self) -> float:
        """Return an instant."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Return the time between two instants."""
        return end - start


class CudaClock:
    """The time of the device. An instant is when the device gets there, after all work that was given to it before.

    The host is often ahead of the device, so that the time of the host says nothing about the work of a part. A part
    in which the device waits for the host, for data or to launch kernels, counts that time.
    """

    def now(self) -> torch.cuda.Event:
        """Return an instant."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the time between two instants; wait until the device has passed both."""
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3


def clock_of(device: torch.device) -> Clock:
    """Return the clock for work on a device."""
    return CudaClock() if device.type == "cuda" else WallClock()


class StepTimer:
    """Records which part of a step is going on. In a trace of torch.profiler, the parts have their names."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # Those that were entered and not left, with their ranges in a trace
        self._parts: list[tuple[str, Any]] = []
        self._marks: list[tuple[Any, str]] = []
        self._starts: list[int] = []  # the marks with which steps start

    def start_step(self) -> None:
        """Start a step, and end the one before."""
        self._starts.append(len(self._marks))
        self._mark()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time within as that of a part."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    def watch(self, module: nn.Module, name: str) -> None:
        """Count the calls of a module as a part."""
        module.register_forward_pre_hook(lambda *_: self._enter(name))
        module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return the function, whose calls count as a part."""

        def call(*arguments: Any) -> Any:
            with self.part(name):
                return function(*arguments)

        return call

    def steps(self) -> list[dict[str, float]]:
        """Return the seconds of each part of each complete step; `other` is what belongs to no part."""
        found = []
        for start, end in pairwise(self._starts):
            seconds: dict[str, float] = {}
            for (instant, name), (following, _) in pairwise(self._marks[start : end + 1]):
                seconds[name] = seconds.get(name, 0.0) + self._clock.seconds(instant, following)
            found.append(seconds)
        return found

    def _enter(self, name: str) -> None:
        recorded = record_function(name)
        recorded.__enter__()  # type: ignore[no-untyped-call]
        self._parts.append((name, recorded))
        self._mark()

    def _leave(self) -> None:
        _, recorded = self._parts.pop()
        recorded.__exit__(None, None, None)
        self._mark()

    def _mark(self) -> None:
        self._marks.append((self._clock.now(), self._parts[-1][0] if self._parts else OTHER))


@dataclass(frozen=True)
class CudaCalls:
    """How often the host launched a kernel, and how often it waited for the device."""

    kernels: int
    host_syncs: int


def count_cuda_calls(names: Iterable[str]) -> CudaCalls:
    """Count the calls in the names of the events of a trace, `event.name for event in profile.events()`."""
    counts = Counter(names)
    return CudaCalls(sum(counts[name] for name in _LAUNCHES), sum(counts[name] for name in _WAITS))
