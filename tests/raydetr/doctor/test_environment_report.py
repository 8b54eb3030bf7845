"""The report of `raydetr doctor` about this machine and about invented ones."""

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
from raydetr.doctor.machine import (
    GIB,
    EnvironmentLine,
    EnvironmentReport,
    Gpu,
    Machine,
    environment_report,
)

H200 = Gpu("NVIDIA H200", "sm_90", 140 * GIB, 139 * GIB)
LAPTOP = Machine(8, 8, None, 16 * GIB, 12 * GIB, None, ("avx2",), (), False)
NATIVE = NativeStatus(("cpu",), "avx2", Path("_C.so"), "native kernels for avx2")
PURE = NativeStatus((), None, Path("_C.so"), "_C.so does not exist")


def modified(**changes) -> Machine:
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


def test_columns_are_aligned_and_remedies_are_below() -> None:
    lines = (
        EnvironmentLine("Python", "ok", "3.11"),
        EnvironmentLine("a longer one", "note", "gone", "get it"),
    )
    assert EnvironmentReport(lines).to_text().splitlines() == [
        "ok     Python        3.11",
        "note   a longer one  gone",
        "                     -> get it",
    ]


def test_only_an_error_prevents_training() -> None:
    note, error = EnvironmentLine("a", "note", ""), EnvironmentLine("b", "error", "")
    assert EnvironmentReport((note,)).can_train
    assert not EnvironmentReport((note, error)).can_train


def test_a_missing_library_is_reported_with_reason_and_remedy() -> None:
    line, _ = machine.operator_lines(PURE, LAPTOP)
    assert line.state == "note"
    assert "several times slower: _C.so does not exist" in line.found
    assert line.remedy is not None
    assert "compiler" in line.remedy


def test_native_kernels_below_the_processors_best_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = modified(instruction_sets=("avx512", "avx2"))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    line, _ = machine.operator_lines(NATIVE, newer)
    assert (line.state, line.remedy) == ("note", "unset ATEN_CPU_CAPABILITY")
    line, _ = machine.operator_lines(NATIVE, LAPTOP)
    assert line.state == "ok"


def test_gpu_kernels_are_reported_where_there_is_a_gpu() -> None:
    for status in (NATIVE, PURE, dataclasses.replace(NATIVE, devices=("cpu", "cuda"))):
        _, line = machine.operator_lines(status, LAPTOP)
        assert (line.state, line.found) == ("ok", "not needed: there is no GPU that torch can use")
    with_gpu = modified(gpus=(H200,))
    _, line = machine.operator_lines(NATIVE, with_gpu)
    assert (line.subject, line.state) == ("operator on the GPU", "note")
    assert "nvcc" in str(line.remedy)
    with_kernels = dataclasses.replace(NATIVE, devices=("cpu", "cuda"), oldest_gpu=(8, 0))
    _, line = machine.operator_lines(with_kernels, with_gpu)
    assert line.state == "ok"
    old = dataclasses.replace(H200, name="Tesla T4", capability="sm_75")
    _, line = machine.operator_lines(with_kernels, modified(gpus=(H200, old)))
    assert (line.state, "pure torch on Tesla T4" in line.found) == ("note", True)


def test_a_busy_gpu_is_a_note() -> None:
    assert [line.state for line in machine.gpu_lines(LAPTOP)] == ["note"]
    busy = dataclasses.replace(H200, free=GIB)
    first, second = machine.gpu_lines(modified(gpus=(H200, busy)))
    assert (first.subject, first.state, second.state) == ("GPU 0", "ok", "note")
    assert first.found == "NVIDIA H200 (sm_90), 140.0 GiB, 139.0 GiB free"


def test_a_gpu_that_this_torch_cannot_use_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    line = machine.torch_line(modified(has_nvidia_driver=True))
    assert line.state == "note"
    assert "cannot use this machine's GPU" in line.found
    assert machine.torch_line(LAPTOP).state == "ok"


def test_cores_and_memory_of_a_container_are_notes() -> None:
    line = machine.cores_line(modified(num_cores=4, container_cores=1.5))
    assert line.state == "note"
    assert "4 cores of 8" in line.found
    assert "the time of 1.5" in line.found
    assert machine.cores_line(LAPTOP).state == "ok"
    line = machine.memory_line(modified(container_memory=GIB))
    assert (line.state, "killed above 1.0 GiB" in line.found) == ("note", True)
    assert machine.memory_line(LAPTOP).state == "ok"


@pytest.mark.parametrize(
    ("free", "state"),
    [(100 * GIB, "ok"), (GIB, "note"), (GIB // 100, "error")],
    ids=["plenty", "little", "none"],
)
def test_little_disk_is_a_note_and_none_an_error(
    free: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert machine.disk_line(tmp_path).state == state


def test_a_folder_that_is_not_writable_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert machine.disk_line(tmp_path).state == "error"


def test_dockers_default_shared_memory_is_a_note() -> None:
    line = machine.shared_memory_line(64 * 2**20)
    assert (line.state, line.remedy) == ("note", "in a container: docker run --shm-size=8g")
    assert machine.shared_memory_line(4 * GIB).state == "ok"


def test_packages_that_are_missing_or_too_old_are_errors() -> None:
    names = ["torch>=2.11", "torch>=99", "surely-not-installed>=1", "ray[train]>=2"]
    lines = list(machine.package_lines(map(Requirement, names)))
    assert [line.state for line in lines] == ["error", "error", "ok", "ok"]
    assert lines[0].found == f"torch>=99 is needed, {metadata.version('torch')} is installed"
    assert lines[1].found == "surely-not-installed>=1 is needed, nothing is installed"
    assert lines[1].remedy == "pip install 'surely-not-installed>=1'"
    assert lines[3].found == "1 more are installed as needed"


def test_required_packages_are_those_of_the_metadata() -> None:
    names = {requirement.name for requirement in machine.required_packages()}
    assert {"torch", "ray", "webdataset", "mlflow"} <= names
    assert "pytest" not in names  # Only an extra requires it
    with pytest.raises(ValueError, match=r"surely-not-installed is not installed: pip install"):
        machine.required_packages("surely-not-installed")


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
def test_limits_of_a_container_are_read_from_cgroups(
    files: dict[str, str], memory, cores, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.container_memory(tmp_path) == memory
    assert machine.container_cores(tmp_path) == cores


def test_instruction_sets_are_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    assert machine.instruction_sets(cpuinfo) == ()
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx avx2 fma avx512f\n")
    assert machine.instruction_sets(cpuinfo) == ("avx2",)
    cpuinfo.write_text("flags\t\t: avx2 fma avx512f avx512dq avx512vl avx512bw\n")
    assert machine.instruction_sets(cpuinfo) == ("avx512", "avx2")
