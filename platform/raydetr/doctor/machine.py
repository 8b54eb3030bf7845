"""The machine's facts, asked of the operating system: cores, memory, instruction sets, GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

GIB = 2**30
# The flags of /proc/cpuinfo that the operator's kernels of each name need (csrc/cpu/deform_attn.cpp)
INSTRUCTION_SETS = {
    "avx512": {"avx512f", "avx512dq", "avx512vl", "avx512bw"},
    "avx2": {"avx2", "fma"},
}
MAX_CGROUP_LIMIT = 2**60  # larger numbers are how cgroup v1 says "no limit"


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch sees; bytes."""

    name: str
    capability: str  # such as "sm_90"
    total: int
    free: int


@dataclass(frozen=True)
class Machine:
    """What training has to do with; bytes. The container's limits are None where there are none."""

    num_cores: int  # that this process may use
    num_all_cores: int
    container_cores: float | None
    memory: int
    free_memory: int
    container_memory: int | None
    instruction_sets: tuple[str, ...]  # best first; empty off x86-64
    gpus: tuple[Gpu, ...]
    has_nvidia_driver: bool


def read_machine(root: Path = Path("/")) -> Machine:
    """This machine, as the process sees it; `root` is where proc and sys are looked for."""
    memory = psutil.virtual_memory()
    return Machine(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        os.cpu_count() or 1,
        container_cores(root / "sys/fs/cgroup"),
        memory.total,
        memory.available,
        container_memory(root / "sys/fs/cgroup"),
        instruction_sets(root / "proc/cpuinfo"),
        tuple(_gpu(index) for index in range(torch.cuda.device_count())),
        (root / "proc/driver/nvidia/version").exists(),
    )


def instruction_sets(cpuinfo: Path) -> tuple[str, ...]:
    """Those of INSTRUCTION_SETS that the processor has."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return tuple(name for name, needed in INSTRUCTION_SETS.items() if needed <= flags)


def container_memory(cgroup: Path) -> int | None:
    """The container's limit in bytes: cgroup version 2, else version 1."""
    for file in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        text = file.read_text().strip() if file.exists() else ""
        if text.isdigit() and int(text) < MAX_CGROUP_LIMIT:
            return int(text)
    return None


def container_cores(cgroup: Path) -> float | None:
    """How many cores' time the container gets: cgroup version 2, else version 1."""
    quota, period = "", ""
    if (cgroup / "cpu.max").exists():
        quota, period = (cgroup / "cpu.max").read_text().split()
    elif (cgroup / "cpu" / "cpu.cfs_quota_us").exists():
        quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.strip().isdigit() else None  # "max" and "-1" are no limit


def _gpu(index: int) -> Gpu:
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(torch.cuda.get_device_name(index), f"sm_{major}{minor}", total, free)
