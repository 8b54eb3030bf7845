"""A stand-in for a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cuda_stand_in import OnCpu, profile, replacements


@pytest.fixture
def stand_in_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch find a GPU, whose tensors are on the CPU."""
    for name, value in replacements().items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.profiler, "profile", profile)
    for settings in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):  # put back after the test
        monkeypatch.setattr(settings, "fp32_precision", settings.fp32_precision)
    with OnCpu():
        yield
