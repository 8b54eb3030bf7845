"""Run programs for a GPU on the CPU: tensors "on cuda" are copies on the CPU, events are clocks.

It shows that a program runs to its end, and what it makes of its numbers, but not what only a GPU can show, such as a
result that is read before it is there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NAME = "Stand-in"


class OnCpu(TorchFunctionMode):
    """Replaces "cuda" by "cpu" in all calls of torch; `copies`: moving a tensor to the GPU copies it."""

    def __init__(self, *, copies: bool = True) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0].clone() if self.copies else args[0]
        moved = any(map(_is_gpu, (*args, *kwargs.values())))
        args = tuple("cpu" if _is_gpu(argument) else argument for argument in args)
        kwargs = {name: "cpu" if _is_gpu(argument) else argument for name, argument in kwargs.items()}
        if moved and self.copies and func is Tensor.to:
            kwargs["copy"] = True
        return func(*args, **kwargs)


def _is_gpu(argument: Any) -> bool:
    return isinstance(argument, str | torch.device) and str(argument).partition(":")[0] == "cuda"


class Event:
    """A moment of the clock of the process."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.moment = 0.0

    def record(self, stream: object = None) -> None:
        self.moment = time.perf_counter()

    def synchronize(self) -> None:
        """Do nothing: all work is done at once."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.moment - self.moment) + 1e-3


class Graph:
    """A captured graph; it computes nothing again."""

    def replay(self) -> None:
        """Do nothing."""


CALLS = ("cudaLaunchKernel", "cudaLaunchKernel", "cudaStreamSynchronize")  # of whatever is profiled


@contextlib.contextmanager
def profile(**_: object) -> Iterator[SimpleNamespace]:
    """Take the place of torch.profiler.profile: the trace has CALLS."""
    yield SimpleNamespace(events=lambda: [SimpleNamespace(name=name) for name in CALLS])


def replacements(*, captures: bool = True) -> dict[str, Any]:
    """Return what takes the place of the functions and classes of torch.cuda; `captures`: graphs can be captured."""

    @contextlib.contextmanager
    def graph(_: Graph) -> Iterator[None]:
        if not captures:
            raise RuntimeError("a stand-in that captures nothing")
        yield

    @contextlib.contextmanager
    def stream(_: object) -> Iterator[None]:
        yield

    def constant(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    a_stream = SimpleNamespace(wait_stream=constant(None), synchronize=constant(None))
    properties = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=1 << 30, L2_cache_size=1 << 16)
    return {
        "is_available": constant(True),
        "device_count": constant(1),
        "current_device": constant(0),
        "get_device_name": constant(NAME),
        "get_device_capability": constant((9, 0)),
        "get_device_properties": constant(properties),
        "is_bf16_supported": constant(True),
        "mem_get_info": constant((0, 0)),
        "memory_allocated": constant(0),
        "max_memory_allocated": constant(0),
        "reset_peak_memory_stats": constant(None),
        "synchronize": constant(None),
        "empty_cache": constant(None),
        "is_current_stream_capturing": constant(False),
        "current_stream": constant(a_stream),
        "Stream": constant(a_stream),
        "stream": stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
    }
