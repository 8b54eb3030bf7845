"""The machine's facts, asked of the operating system: cores, memory, instruction sets, GPUs.

Installed packages against what this one needs, as its metadata says (from pyproject.toml).

`raydetr doctor` without an argument: what a person needs to know of a machine before they train on it.
"""

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
from raydetr.environment import cpu_name

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


@dataclass(frozen=True)
class Package:
    """A requirement and what there is; `installed` None: nothing."""

    requirement: Requirement
    installed: str | None

    @property
    def fits(self) -> bool:
        """Whether it is installed in a version that will do."""
        return self.installed is not None and self.requirement.specifier.contains(
            self.installed, prereleases=True
        )

    def problem(self) -> str:
        """What does not fit, in words."""
        needed = f"{self.requirement.name}{self.requirement.specifier}"
        return f"{needed} is needed, {self.installed or 'nothing'} is installed"


def needed_packages(distribution: str = "raydetr") -> list[Package]:
    """Everything that must be there to train; what only extras need is left out.

    Raises:
        ValueError: the distribution itself is not installed.
    """
    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"{distribution} is not installed: pip install -e . in its folder") from error
    requirements = [Requirement(line) for line in lines]
    return examine(
        requirement
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    )


def examine(requirements: Iterable[Requirement]) -> list[Package]:
    """Look up what is installed for each."""
    return [Package(requirement, installed_version(requirement.name)) for requirement in requirements]


def installed_version(name: str) -> str | None:
    """None where the package is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


State = Literal["ok", "note", "fault"]

SHOWN = ("ray", "mlflow", "webdataset")  # with a line each; torch has its own; the others share one
REMOTE = {"s3fs": "s3://", "gcsfs": "gs://", "aiohttp": "https://"}
BUILD = "pip install --no-build-isolation -e ."
LITTLE_DISK = 5 * GIB  # checkpoints of one run; a fault below a hundredth of it
LITTLE_SHARED_MEMORY = GIB  # some batches of large images, twice; Docker gives 64 MiB unless it is told


@dataclass(frozen=True)
class EnvironmentLine:
    """One thing looked at. A note costs speed or a feature; with a fault training does not work."""

    subject: str
    state: State
    found: str
    remedy: str | None = None


@dataclass(frozen=True)
class EnvironmentReport:
    """Everything looked at, in the order in which it is printed."""

    lines: tuple[EnvironmentLine, ...]

    @property
    def can_train(self) -> bool:
        """Whether nothing is at fault."""
        return all(line.state != "fault" for line in self.lines)

    def to_text(self) -> str:
        """Aligned lines; a remedy stands below what it is for."""
        width = max(len(line.subject) for line in self.lines)
        text = []
        for line in self.lines:
            text.append(f"{line.state:<5}  {line.subject:<{width}}  {line.found}")
            text += [f"{'':<5}  {'':<{width}}  -> {line.remedy}"] if line.remedy else []
        return "\n".join(text)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"can_train": self.can_train, "lines": [asdict(line) for line in self.lines]}


def environment_report(folder: Path | None = None) -> EnvironmentReport:
    """Look at this process's Python, packages and machine, and at `folder`, by default the working folder."""
    machine, packages, folder = read_machine(), needed_packages(), folder or Path.cwd()
    shared_memory = Path("/dev/shm")
    lines = [
        EnvironmentLine("Python", "ok", f"{sys.version.split()[0]}, {sys.prefix}"),
        torch_line(machine),
        *operator_lines(native_status(), machine),
        cores_line(machine),
        memory_line(machine),
        *gpu_lines(machine),
        disk_line(folder),
        *([shared_memory_line(shutil.disk_usage(shared_memory).free)] if shared_memory.exists() else []),
        *package_lines(packages),
        *remote_lines(),
    ]
    return EnvironmentReport(tuple(lines))


def torch_line(machine: Machine) -> EnvironmentLine:
    """The build, and whether it can use the GPUs that are there."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    found = f"{torch.__version__}, built for {build}"
    if machine.has_nvidia_driver and torch.version.cuda is None:
        remedy = "install a CUDA build of torch (https://pytorch.org), then the operator again: " + BUILD
        return EnvironmentLine("torch", "note", f"{found}: it cannot use this machine's GPU", remedy)
    return EnvironmentLine("torch", "ok", found)


def operator_lines(status: NativeStatus, machine: Machine) -> Iterator[EnvironmentLine]:
    """Which deformable attention runs on the CPU and on the GPU, and why."""
    if "cpu" not in status.devices:
        remedy = f"install a C++ compiler (Debian, Ubuntu: apt install g++) and run `{BUILD}` again"
        found = f"pure torch, several times slower: {status.reason}"
        yield EnvironmentLine("operator on the CPU", "note", found, remedy)
    else:
        yield _cpu_kernels_line(str(status.instruction_set), machine)
    if "cuda" in status.devices:
        yield EnvironmentLine("operator on the GPU", "ok", status.reason)
    elif not machine.gpus:
        yield EnvironmentLine("operator on the GPU", "ok", f"not needed here; {status.reason}")
    else:
        remedy = f"install the CUDA toolkit (nvcc) that fits torch and run `{BUILD}` again"
        found = f"pure torch, several times slower: {status.reason}"
        yield EnvironmentLine("operator on the GPU", "note", found, remedy)


def _cpu_kernels_line(chosen: str, machine: Machine) -> EnvironmentLine:
    has = ", ".join(machine.instruction_sets) or "none that has kernels of its own"
    found = f"native, {chosen} kernels (the processor has: {has})"
    if machine.instruction_sets and chosen != machine.instruction_sets[0]:
        limit = os.environ.get("ATEN_CPU_CAPABILITY")
        remedy = "unset ATEN_CPU_CAPABILITY" if limit else f"build it again: {BUILD}"
        return EnvironmentLine("operator on the CPU", "note", found, remedy)
    return EnvironmentLine("operator on the CPU", "ok", found)


def cores_line(machine: Machine) -> EnvironmentLine:
    """What the process may use, and what keeps it from more."""
    found = f"{cpu_name()}, {machine.num_cores} cores"
    if machine.num_cores < machine.num_all_cores:
        found += f" of {machine.num_all_cores} (the process is bound to them)"
    if machine.container_cores is not None and machine.container_cores < machine.num_cores:
        found += f", and the container gets the time of {machine.container_cores:g}"
        return EnvironmentLine("processor", "note", found, "count workers by the latter number")
    return EnvironmentLine("processor", "ok", found)


def memory_line(machine: Machine) -> EnvironmentLine:
    """Of the machine, or less where a container limits it."""
    found = f"{_gib(machine.memory)}, {_gib(machine.free_memory)} free"
    if machine.container_memory is not None and machine.container_memory < machine.memory:
        found += f"; the container is killed above {_gib(machine.container_memory)}"
    little = min(machine.free_memory, machine.container_memory or machine.free_memory) < 2 * GIB
    return EnvironmentLine("memory", "note" if little else "ok", found)


def gpu_lines(machine: Machine) -> Iterator[EnvironmentLine]:
    """One each, or one that says that there is none."""
    if not machine.gpus:
        yield EnvironmentLine("GPU", "note", "none that torch can use: training runs on the CPU")
    for index, gpu in enumerate(machine.gpus):
        found = f"{gpu.name} ({gpu.capability}), {_gib(gpu.total)}, {_gib(gpu.free)} free"
        state: State = "ok" if gpu.free > gpu.total / 2 else "note"
        yield EnvironmentLine(f"GPU {index}", state, found)


def disk_line(folder: Path) -> EnvironmentLine:
    """Runs, checkpoints and logs go below the working folder."""
    free = shutil.disk_usage(folder).free
    found = f"{_gib(free)} free in {folder}"
    if not os.access(folder, os.W_OK):
        return EnvironmentLine("disk", "fault", f"{folder} is not writable", "work in a folder of yours")
    state: State = "fault" if free < LITTLE_DISK / 100 else "note" if free < LITTLE_DISK else "ok"
    remedy = None if state == "ok" else "runs keep their checkpoints below this folder: make room"
    return EnvironmentLine("disk", state, found, remedy)


def shared_memory_line(free: int) -> EnvironmentLine:
    """Ray keeps its objects in /dev/shm; batches need no room there (see `raydetr.data.loader.ring`)."""
    found = f"{_gib(free)} free in /dev/shm, where Ray keeps its objects"
    if free >= LITTLE_SHARED_MEMORY:
        return EnvironmentLine("shared memory", "ok", found)
    return EnvironmentLine("shared memory", "note", found, "in a container: docker run --shm-size=8g")


def package_lines(packages: list[Package]) -> Iterator[EnvironmentLine]:
    """Those in SHOWN, those that do not fit, and how many others there are."""
    others = 0
    for package in packages:
        name = package.requirement.name
        if not package.fits:
            remedy = f"pip install '{package.requirement}'"
            yield EnvironmentLine(name, "fault", package.problem(), remedy)
        elif name in SHOWN:
            needed = str(package.requirement.specifier) or "any"
            yield EnvironmentLine(name, "ok", f"{package.installed} (needed: {needed})")
        else:
            others += 1
    yield EnvironmentLine("other packages", "ok", f"{others} more are installed as needed")


def remote_lines() -> Iterator[EnvironmentLine]:
    """What reads shards from object stores and web servers; local shards need none of it."""
    for package, scheme in REMOTE.items():
        version = installed_version(package)
        if version is None:
            found = f"{package} is not installed: shards cannot be read from there"
            yield EnvironmentLine(f"shards at {scheme}", "note", found, f"pip install {package}")
        else:
            yield EnvironmentLine(f"shards at {scheme}", "ok", f"{package} {version}")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
