"""What `raydetr doctor` says of machines that are not this one, and of this one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from detrs.ops import NativeStatus, native_status
from raydetr.doctor import machine
from raydetr.doctor import machine as environment
from raydetr.doctor import machine as packages
from raydetr.doctor.machine import GIB, EnvironmentLine, EnvironmentReport, Gpu, Machine, environment_report

H200 = Gpu("NVIDIA H200", "sm_90", 140 * GIB, 139 * GIB)
LAPTOP = Machine(8, 8, None, 16 * GIB, 12 * GIB, None, ("avx2",), (), False)
NATIVE = NativeStatus(("cpu",), "avx2", Path("_C.so"), "native kernels for avx2")
PURE = NativeStatus((), None, Path("_C.so"), "_C.so does not exist")


def change(**changes) -> Machine:
    return dataclasses.replace(LAPTOP, **changes)


def test_this_machine_can_train_and_is_described() -> None:
    report = environment_report()
    lines = {line.subject: line for line in report.lines}
    assert report.can_train
    assert metadata.version("torch").partition("+")[0] in lines["torch"].found
    assert lines["ray"].found.startswith(metadata.version("ray"))
    assert f"{len(os.sched_getaffinity(0))} cores" in lines["processor"].found
    if "cpu" in native_status().devices:
        assert str(native_status().instruction_set) in lines["operator on the CPU"].found
    assert json.loads(json.dumps(report.to_dict()))["lines"][0]["subject"] == "Python"


def test_columns_are_aligned_and_remedies_stand_below() -> None:
    lines = (
        EnvironmentLine("Python", "ok", "3.11"),
        EnvironmentLine("a longer one", "note", "gone", "get it"),
    )
    assert EnvironmentReport(lines).to_text().splitlines() == [
        "ok     Python        3.11",
        "note   a longer one  gone",
        "                     -> get it",
    ]


def test_only_a_fault_prevents_training() -> None:
    note, fault = EnvironmentLine("a", "note", ""), EnvironmentLine("b", "fault", "")
    assert EnvironmentReport((note,)).can_train
    assert not EnvironmentReport((note, fault)).can_train


def test_without_the_library_the_reason_and_the_remedy() -> None:
    line, _ = environment.operator_lines(PURE, LAPTOP)
    assert line.state == "note"
    assert "several times slower: _C.so does not exist" in line.found
    assert line.remedy is not None
    assert "compiler" in line.remedy


def test_native_kernels_below_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = change(instruction_sets=("avx512", "avx2"))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    line, _ = environment.operator_lines(NATIVE, newer)
    assert (line.state, line.remedy) == ("note", "unset ATEN_CPU_CAPABILITY")
    line, _ = environment.operator_lines(NATIVE, LAPTOP)
    assert line.state == "ok"


def test_the_gpu_s_kernels_are_reported_where_there_is_a_gpu() -> None:
    with_gpu = change(gpus=(H200,))
    _, line = environment.operator_lines(NATIVE, with_gpu)
    assert (line.subject, line.state) == ("operator on the GPU", "note")
    assert "nvcc" in str(line.remedy)
    _, line = environment.operator_lines(dataclasses.replace(NATIVE, devices=("cpu", "cuda")), with_gpu)
    assert line.state == "ok"


def test_gpus() -> None:
    assert [line.state for line in environment.gpu_lines(LAPTOP)] == ["note"]
    busy = dataclasses.replace(H200, free=GIB)
    first, second = environment.gpu_lines(change(gpus=(H200, busy)))
    assert (first.subject, first.state, second.state) == ("GPU 0", "ok", "note")
    assert first.found == "NVIDIA H200 (sm_90), 140.0 GiB, 139.0 GiB free"


def test_a_gpu_that_this_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    line = environment.torch_line(change(has_nvidia_driver=True))
    assert line.state == "note"
    assert "cannot use this machine's GPU" in line.found
    assert environment.torch_line(LAPTOP).state == "ok"


def test_cores_and_memory_of_a_container() -> None:
    line = environment.cores_line(change(num_cores=4, container_cores=1.5))
    assert line.state == "note"
    assert "4 cores of 8" in line.found
    assert "the time of 1.5" in line.found
    assert environment.cores_line(LAPTOP).state == "ok"
    line = environment.memory_line(change(container_memory=GIB))
    assert (line.state, "killed above 1.0 GiB" in line.found) == ("note", True)
    assert environment.memory_line(LAPTOP).state == "ok"


@pytest.mark.parametrize(
    ("free", "state"),
    [(100 * GIB, "ok"), (GIB, "note"), (GIB // 100, "fault")],
    ids=["room", "little", "none"],
)
def test_disk(free: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert environment.disk_line(tmp_path).state == state


def test_a_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert environment.disk_line(tmp_path).state == "fault"


def test_docker_s_shared_memory() -> None:
    line = environment.shared_memory_line(64 * 2**20)
    assert (line.state, line.remedy) == ("note", "in a container: docker run --shm-size=8g")
    assert environment.shared_memory_line(4 * GIB).state == "ok"


def test_packages_that_are_missing_or_too_old() -> None:
    names = ["torch>=2.11", "torch>=99", "surely-not-installed>=1", "ray[train]>=2"]
    lines = list(environment.package_lines(packages.examine(map(Requirement, names))))
    assert [line.state for line in lines] == ["fault", "fault", "ok", "ok"]
    assert lines[0].found == f"torch>=99 is needed, {metadata.version('torch')} is installed"
    assert lines[1].found == "surely-not-installed>=1 is needed, nothing is installed"
    assert lines[1].remedy == "pip install 'surely-not-installed>=1'"
    assert lines[3].found == "1 more are installed as needed"


def test_needed_packages_are_those_of_the_metadata() -> None:
    names = {package.requirement.name for package in packages.needed_packages()}
    assert {"torch", "ray", "webdataset", "mlflow"} <= names
    assert "pytest" not in names  # an extra's
    with pytest.raises(ValueError, match=r"surely-not-installed is not installed: pip install"):
        packages.needed_packages("surely-not-installed")


def test_remote_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed_version", {"aiohttp": "3.14"}.get)
    found = {line.subject: (line.state, line.remedy) for line in environment.remote_lines()}
    assert found["shards at s3://"] == ("note", "pip install s3fs")
    assert found["shards at https://"] == ("ok", None)


@pytest.mark.parametrize(
    ("files", "memory", "cores"),
    [
        ({"memory.max": "max\n", "cpu.max": "max 100000\n"}, None, None),
        ({"memory.max": "1073741824\n", "cpu.max": "150000 100000\n"}, GIB, 1.5),
        ({"memory/memory.limit_in_bytes": "1073741824\n", "cpu/cpu.cfs_quota_us": "50000\n",
          "cpu/cpu.cfs_period_us": "100000\n"}, GIB, 0.5),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n", "cpu/cpu.cfs_quota_us": "-1\n",
          "cpu/cpu.cfs_period_us": "100000\n"}, None, None),
        ({}, None, None),
    ],
    ids=["unlimited", "version 2", "version 1", "version 1 unlimited", "no container"],
)  # fmt: skip
def test_limits_of_a_container(files: dict[str, str], memory, cores, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.container_memory(tmp_path) == memory
    assert machine.container_cores(tmp_path) == cores


def test_instruction_sets(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    assert machine.instruction_sets(cpuinfo) == ()
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx avx2 fma avx512f\n")
    assert machine.instruction_sets(cpuinfo) == ("avx2",)
    cpuinfo.write_text("flags\t\t: avx2 fma avx512f avx512dq avx512vl avx512bw\n")
    assert machine.instruction_sets(cpuinfo) == ("avx512", "avx2")
