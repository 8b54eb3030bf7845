"""The parts of a step add up to it: by definition, one unit of time after the other."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from raydetr.training.step_timer import OTHER, StepTimer, WallClock, clock_of, count_cuda_calls


class PlayedClock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.time = 0

    def now(self) -> int:
        return self.time

    def seconds(self, start: int, end: int) -> float:
        return float(end - start)


@pytest.mark.parametrize("seed", range(5))
def test_every_unit_of_time_belongs_to_the_innermost_part(seed: int) -> None:
    draw, clock = random.Random(seed), PlayedClock()
    timer = StepTimer(clock)
    expected: list[dict[str, float]] = []
    for _ in range(4):
        timer.start_step()
        counted: dict[str, float] = {}
        entered: list[tuple[str, ExitStack]] = []
        for _ in range(60):
            action = draw.choice(["enter", "leave", "pass"])
            if action == "enter" and len(entered) < 4:
                stack, name = ExitStack(), draw.choice("abcde")
                stack.enter_context(timer.part(name))
                entered.append((name, stack))
            elif action == "leave" and entered:
                entered.pop()[1].close()
            else:
                clock.time += 1
                name = entered[-1][0] if entered else OTHER
                counted[name] = counted.get(name, 0.0) + 1
        while entered:
            entered.pop()[1].close()
        expected.append(counted)
    timer.start_step()
    found = timer.steps()
    assert [{name: time for name, time in step.items() if time} for step in found] == expected
    assert sum(sum(step.values()) for step in found) == clock.time


def test_an_incomplete_step_is_not_counted() -> None:
    timer = StepTimer(PlayedClock())
    assert timer.steps() == []
    timer.start_step()
    assert timer.steps() == []


def test_modules_and_functions_are_parts_also_when_they_fail() -> None:
    clock = PlayedClock()

    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock.time += 2
            if x.sum() < 0:
                raise ValueError("negative")
            return x

    module, timer = Failing(), StepTimer(clock)
    timer.watch(module, "module")

    def work(x: torch.Tensor) -> torch.Tensor:
        clock.time += 3
        out: torch.Tensor = module(x)
        clock.time += 5
        return out

    timed = timer.timed(work, "function")
    timer.start_step()
    assert timed(torch.ones(2)).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="negative"):
        timed(-torch.ones(2))
    clock.time += 7
    timer.start_step()
    assert timer.steps() == [{"function": 3.0 + 5 + 3, "module": 2.0 + 2, OTHER: 7.0}]


def test_the_clock_of_a_cpu_is_that_of_the_process() -> None:
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, WallClock)
    assert clock.seconds(clock.now(), clock.now()) >= 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_clock_of_a_gpu_counts_its_work_and_not_that_of_the_host() -> None:
    timer = StepTimer(clock_of(torch.device("cuda")))
    x = torch.randn(4096, 4096, device="cuda")
    timer.start_step()
    with timer.part("long"):  # the host only gives the work to the device
        for _ in range(50):
            x = x @ x / 4096
    with timer.part("short"):
        x = x + 1
    timer.start_step()
    (step,) = timer.steps()
    assert step["long"] > 20 * step["short"] > 0


def test_launches_and_waits_of_cuda_are_counted_by_their_names() -> None:
    names = ["aten::mm", "cudaLaunchKernel", "cudaLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync"]
    calls = count_cuda_calls([*names, "cudaStreamSynchronize", "cudaDeviceSynchronize"])
    assert (calls.kernels, calls.host_syncs) == (3, 1)
