"""Examine this machine: packages, native operators, cores, memory, GPUs and disk (`raydetr doctor` without data)."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from packaging.requirements import Requirement

from detrs.ops import NativeStatus, native_status
from raydetr.console import table
from raydetr.environment import cpu_name

GIB = 2**30

# --- Hardware, as the operating system describes it ---

# Flags of /proc/cpuinfo that each set of the operator's kernels needs (csrc/cpu/deform_attn.cpp)
INSTRUCTION_SETS = {"avx512": {"avx512f", "avx512dq", "avx512vl", "avx512bw"}, "avx2": {"avx2", "fma"}}
MAX_CGROUP_LIMIT = 2**60  # cgroup v1 has no word for "no limit", only larger numbers


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch can use; sizes in bytes."""

    name: str
    capability: str  # Such as "sm_90"
    total: int
    free: int


@dataclass(frozen=True)
class Machine:
    """Hardware that training can use; sizes in bytes. The container's limits are None where there are none."""

    num_cores: int  # That this process may use
    num_all_cores: int
    container_cores: float | None
    memory: int
    free_memory: int
    container_memory: int | None
    instruction_sets: tuple[str, ...]  # Best first; empty except on x86-64
    gpus: tuple[Gpu, ...]
    has_nvidia_driver: bool


def read_machine() -> Machine:
    """Read this machine's hardware."""
    memory, cgroup = psutil.virtual_memory(), Path("/sys/fs/cgroup")
    return Machine(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        os.cpu_count() or 1,
        container_cores(cgroup),
        memory.total,
        memory.available,
        container_memory(cgroup),
        instruction_sets(Path("/proc/cpuinfo")),
        tuple(_gpu(index) for index in range(torch.cuda.device_count())),
        Path("/proc/driver/nvidia/version").exists(),
    )


def instruction_sets(cpuinfo: Path) -> tuple[str, ...]:
    """Return those of INSTRUCTION_SETS that the processor has."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return tuple(name for name, needed in INSTRUCTION_SETS.items() if needed <= flags)


def container_memory(cgroup: Path) -> int | None:
    """Return the container's memory limit in bytes, from cgroup version 2 or 1."""
    for file in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        text = file.read_text().strip() if file.exists() else ""
        if text.isdigit() and int(text) < MAX_CGROUP_LIMIT:
            return int(text)
    return None


def container_cores(cgroup: Path) -> float | None:
    """Return the number of cores whose time the container gets, from cgroup version 2 or 1."""
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


# --- The report ---

State = Literal["ok", "note", "error"]

LISTED_PACKAGES = ("ray", "mlflow", "webdataset")  # With a line each, as torch has; the others share one
BUILD = "pip install --no-build-isolation -e ."
LOW_DISK = 5 * GIB  # Checkpoints of one run; less than a hundredth of it is an error
MAX_SOCKET_PATH = 107  # Bytes of the path of a socket, on Linux
RAY_SOCKET = b"/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
LOW_SHARED_MEMORY = GIB  # A few batches of large images, twice; Docker's default is 64 MiB


@dataclass(frozen=True)
class EnvironmentLine:
    """One examined subject. A note costs speed or a feature; with an error, training does not work."""

    subject: str
    state: State
    found: str
    remedy: str | None = None


@dataclass(frozen=True)
class EnvironmentReport:
    """All examined subjects, in the order in which they are printed."""

    lines: tuple[EnvironmentLine, ...]

    @property
    def can_train(self) -> bool:
        """Whether no line is an error."""
        return all(line.state != "error" for line in self.lines)

    def to_text(self) -> str:
        """Format aligned lines, each remedy below its subject."""
        rows = []
        for line in self.lines:
            rows.append((f"{line.state:<5}", line.subject, line.found))
            rows += [("", "", f"-> {line.remedy}")] if line.remedy else []
        return table(rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"can_train": self.can_train, "lines": [asdict(line) for line in self.lines]}


def environment_report() -> EnvironmentReport:
    """Examine this process's Python and packages, the machine, and the working folder."""
    machine, shared_memory = read_machine(), Path("/dev/shm")
    lines = [
        EnvironmentLine("Python", "ok", f"{sys.version.split()[0]}, {sys.prefix}"),
        torch_line(machine),
        *operator_lines(native_status(), machine),
        cores_line(machine),
        memory_line(machine),
        *gpu_lines(machine),
        disk_line(Path.cwd()),
        *socket_lines(),
        *([shared_memory_line(shutil.disk_usage(shared_memory).free)] if shared_memory.exists() else []),
        *package_lines(required_packages()),
    ]
    return EnvironmentReport(tuple(lines))


def torch_line(machine: Machine) -> EnvironmentLine:
    """Report the build of torch, and whether it can use the machine's GPUs."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    found = f"{torch.__version__}, built for {build}"
    if machine.has_nvidia_driver and torch.version.cuda is None:
        remedy = "install a CUDA build of torch (https://pytorch.org), then the operator again: " + BUILD
        return EnvironmentLine("torch", "note", f"{found}: it cannot use this machine's GPU", remedy)
    return EnvironmentLine("torch", "ok", found)


def operator_lines(status: NativeStatus, machine: Machine) -> Iterator[EnvironmentLine]:
    """Report which deformable attention runs on the CPU and on the GPU, and why."""
    cpu, gpu = "operator on the CPU", "operator on the GPU"
    slow = f"pure torch, several times slower: {status.reason}"
    available = ", ".join(machine.instruction_sets) or "none with kernels of its own"
    found = f"native, {status.instruction_set} kernels (the processor has: {available})"
    if "cpu" not in status.devices:
        remedy = f"install a C++ compiler (Debian, Ubuntu: apt install g++) and run `{BUILD}` again"
        yield EnvironmentLine(cpu, "note", slow, remedy)
    elif machine.instruction_sets and status.instruction_set != machine.instruction_sets[0]:
        is_limited = os.environ.get("ATEN_CPU_CAPABILITY")
        remedy = "unset ATEN_CPU_CAPABILITY" if is_limited else f"build it again: {BUILD}"
        yield EnvironmentLine(cpu, "note", found, remedy)
    else:
        yield EnvironmentLine(cpu, "ok", found)
    if not machine.gpus:
        yield EnvironmentLine(gpu, "ok", "not needed: there is no GPU that torch can use")
    elif "cuda" in status.devices:
        yield _gpu_operator_line(gpu, status, machine)
    else:
        remedy = f"install the CUDA toolkit (nvcc) that fits torch and run `{BUILD}` again"
        yield EnvironmentLine(gpu, "note", slow, remedy)


def _gpu_operator_line(subject: str, status: NativeStatus, machine: Machine) -> EnvironmentLine:
    oldest = status.oldest_gpu or (0, 0)
    old = [gpu.name for gpu in machine.gpus if divmod(int(gpu.capability.removeprefix("sm_")), 10) < oldest]
    if not old:
        return EnvironmentLine(subject, "ok", status.reason)
    found = f"pure torch on {', '.join(old)}: the kernels need compute capability {oldest[0]}.{oldest[1]}"
    return EnvironmentLine(subject, "note", found, "use a newer GPU: several times faster")


def cores_line(machine: Machine) -> EnvironmentLine:
    """Report the cores that the process may use, and their limits."""
    found = f"{cpu_name()}, {machine.num_cores} cores"
    if machine.num_cores < machine.num_all_cores:
        found += f" of {machine.num_all_cores} (the process is bound to them)"
    if machine.container_cores is None or machine.container_cores >= machine.num_cores:
        return EnvironmentLine("processor", "ok", found)
    found += f", and the container gets the time of {machine.container_cores:g}"
    return EnvironmentLine("processor", "note", found, "choose the number of workers by the latter number")


def memory_line(machine: Machine) -> EnvironmentLine:
    """Report the machine's memory, and the container's limit where it is lower."""
    found = f"{_gib(machine.memory)}, {_gib(machine.free_memory)} free"
    if machine.container_memory is not None and machine.container_memory < machine.memory:
        found += f"; the container is killed above {_gib(machine.container_memory)}"
    is_low = min(machine.free_memory, machine.container_memory or machine.free_memory) < 2 * GIB
    return EnvironmentLine("memory", "note" if is_low else "ok", found)


def gpu_lines(machine: Machine) -> Iterator[EnvironmentLine]:
    """Report each GPU, or that there is none."""
    if not machine.gpus:
        yield EnvironmentLine("GPU", "note", "none that torch can use: training runs on the CPU")
    for index, gpu in enumerate(machine.gpus):
        found = f"{gpu.name} ({gpu.capability}), {_gib(gpu.total)}, {_gib(gpu.free)} free"
        state: State = "ok" if gpu.free > gpu.total / 2 else "note"
        yield EnvironmentLine(f"GPU {index}", state, found)


def disk_line(folder: Path) -> EnvironmentLine:
    """Report the free space of the working folder, below which runs, checkpoints and logs are written."""
    free = shutil.disk_usage(folder).free
    found = f"{_gib(free)} free in {folder}"
    if not os.access(folder, os.W_OK):
        return EnvironmentLine("disk", "error", f"{folder} is not writable", "work in a folder of yours")
    state: State = "error" if free < LOW_DISK / 100 else "note" if free < LOW_DISK else "ok"
    remedy = None if state == "ok" else "runs keep their checkpoints below this folder: make room"
    return EnvironmentLine("disk", state, found, remedy)


def shared_memory_line(free: int) -> EnvironmentLine:
    """Report the space for Ray's objects in /dev/shm; batches need none there (see `raydetr.data.loader.ring`)."""
    found = f"{_gib(free)} free in /dev/shm, where Ray keeps its objects"
    if free >= LOW_SHARED_MEMORY:
        return EnvironmentLine("shared memory", "ok", found)
    return EnvironmentLine("shared memory", "note", found, "in a container: docker run --shm-size=8g")


def socket_problem() -> str | None:
    """Return what keeps Ray from creating its sockets, whose paths may have 107 bytes; None if nothing does."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    excess = len(os.fsencode(folder)) + len(RAY_SOCKET) - MAX_SOCKET_PATH
    if excess <= 0:
        return None
    return (
        f"TMPDIR {folder} is {excess} bytes too long for the sockets that Ray creates there: set RAY_TMPDIR to a "
        "shorter folder, such as /tmp"
    )


def socket_lines() -> Iterator[EnvironmentLine]:
    """Report a temporary folder in which Ray cannot create its sockets."""
    problem = socket_problem()
    if problem is not None:
        found, _, remedy = problem.partition(": ")
        yield EnvironmentLine("temporary folder", "error", found, remedy)


def required_packages(distribution: str = "raydetr") -> list[Requirement]:
    """Return the packages that training requires by this project's metadata, without those of extras.

    Raises:
        ValueError: the distribution itself is not installed.
    """
    try:
        requirements = map(Requirement, metadata.requires(distribution) or [])
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"{distribution} is not installed: pip install -e . in its folder") from error
    return [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]


def package_lines(requirements: Iterable[Requirement]) -> Iterator[EnvironmentLine]:
    """Report LISTED_PACKAGES, unsatisfied requirements, and the number of other packages."""
    others = 0
    for requirement in requirements:
        name, needed = requirement.name, requirement.specifier
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = ""
        if not installed or not needed.contains(installed, prereleases=True):
            found = f"{name}{needed} is needed, {installed or 'nothing'} is installed"
            yield EnvironmentLine(name, "error", found, f"pip install '{requirement}'")
        elif name in LISTED_PACKAGES:
            yield EnvironmentLine(name, "ok", f"{installed} (needed: {str(needed) or 'any'})")
        else:
            others += 1
    yield EnvironmentLine("other packages", "ok", f"{others} more are installed as needed")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
