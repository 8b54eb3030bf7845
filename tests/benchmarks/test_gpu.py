"""Test `make gpu` without a GPU: the report is complete whatever the stages do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from raydetr.recipes.quickstart import quickstart_dino

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STAGES = ["build", "tests", "sanitizer", "operator", "step", "handoff", "training"]


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load benchmarks/gpu.py with another output folder."""
    module = load("gpu", monkeypatch)
    monkeypatch.setattr(module, "OUT", tmp_path / "out")
    monkeypatch.setattr(module, "OFFICIAL_MODULE", tmp_path / "none.so")
    return module


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look it up there
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec.loader.exec_module(module)
    return module


def report_of(module: ModuleType) -> dict:
    report = json.loads((module.OUT / "report.json").read_text())
    text = (module.OUT / "report.md").read_text()
    for stage in report["stages"]:
        assert f"## {stage['name']}" in text
        assert stage["reason"] in text
    return report


def test_the_limits_add_up_to_nine_minutes(gpu: ModuleType) -> None:
    assert [stage.name for stage in gpu.STAGES] == STAGES
    assert gpu.PROBE_SECONDS + sum(stage.seconds for stage in gpu.STAGES) <= 540


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_stage_says_so(gpu: ModuleType) -> None:
    assert gpu.run(gpu.STAGES, None) == 1
    report = report_of(gpu)
    assert [stage["name"] for stage in report["stages"]] == STAGES
    assert {stage["state"] for stage in report["stages"]} == {"not run"}
    assert all(stage["reason"].startswith("no GPU: ") for stage in report["stages"])
    assert report["machine"]["gpu"] is None
    assert report["machine"]["torch"] == torch.__version__


@pytest.fixture
def stand_ins(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Replace the machine by one with a GPU, and the stages by programs that fail in different ways."""
    monkeypatch.setattr(
        gpu, "describe_machine", lambda: {"gpu": "Stand-in", "capability": "9.0", "nvcc": None}
    )
    monkeypatch.setattr(gpu, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(gpu, "PROBE_SECONDS", 0)
    programs = {
        "passes": "import json, sys; print('fine'); json.dump([{'a': 1.5}], open(sys.argv[2], 'w'))",
        "fails": "import sys; print('first\\nlast'); sys.exit('what is wrong')",
        "crashes": "import os; os.kill(os.getpid(), 11)",
        # With a child that keeps the output open, and deaf to the first signal
        "hangs": "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN)\n"
        "print('started'); child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid); time.sleep(60)",
        "writes half": "import sys, time; open(sys.argv[2], 'w').write('[{'); print('half')",
    }
    stages = []
    for name, code in programs.items():
        (tmp_path / f"{name}.py").write_text(code)
        stages.append(gpu.Stage(name, f"it {name}", 2 if name == "hangs" else 10, f"{name}.py"))
    stages.append(gpu.Stage("missing", "it is missing", 10, "missing.py"))
    monkeypatch.setattr(gpu, "STAGES", tuple(stages))
    return gpu


def test_a_stage_that_fails_or_hangs_costs_no_other(
    stand_ins: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stages that end early leave their time: here the one that hangs would get it
    monkeypatch.setattr(stand_ins, "run_stage", limited(stand_ins.run_stage, stand_ins.STAGES))
    start = time.monotonic()
    assert stand_ins.run(stand_ins.STAGES, None) == 1
    assert time.monotonic() - start < 30
    stages = {stage["name"]: stage for stage in report_of(stand_ins)["stages"]}
    states = {name: (stage["state"], stage["reason"]) for name, stage in stages.items()}
    assert states == {
        "passes": ("passed", ""),
        "fails": ("failed", "exit code 1"),
        "crashes": ("failed", "signal 11"),
        "hangs": ("timed out", "after 2 s"),
        "writes half": ("passed", ""),
        "missing": ("failed", "benchmarks/missing.py does not exist"),
    }
    assert stages["passes"]["results"] == [{"a": 1.5}]
    assert stages["fails"]["last_lines"] == ["first", "last", "what is wrong"]
    assert stages["writes half"]["results"] is None
    started, child = stages["hangs"]["last_lines"]
    assert started == "started"
    assert has_ended(int(child))
    assert "| 1.5 |" in (stand_ins.OUT / "report.md").read_text()


def has_ended(process: int) -> bool:
    """Return whether a process has ended; one whose parent has not yet asked for its exit code still has an entry."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def limited(run_stage, stages):
    seconds = {stage.name: stage.seconds for stage in stages}
    return lambda stage, command, environment, limit: run_stage(
        stage, command, environment, min(limit, seconds[stage.name])
    )


def test_a_run_that_is_interrupted_has_a_report(
    stand_ins: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(stage, *arguments):
        if stage.name == "fails":
            raise KeyboardInterrupt
        return stand_ins.Outcome(stage.name, stage.title, "passed")

    monkeypatch.setattr(stand_ins, "run_stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stand_ins.run(stand_ins.STAGES, None)
    states = [stage["state"] for stage in report_of(stand_ins)["stages"]]
    assert states == ["passed"] + ["not run"] * 5


def test_the_commands_of_the_stages_are_understood(gpu: ModuleType) -> None:
    """Every program exists and knows the options that it gets."""
    for stage in gpu.STAGES:
        path = BENCHMARKS / stage.program
        text = path.read_text()
        options = [word for word in gpu.command_of(stage, None, 65.0) if word.startswith("--")]
        assert all(f'"{option}"' in text for option in options), f"{stage.program}: {options}"


def test_the_training_uses_the_quickstarts_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quickstart_dino() == load("gpu_training", monkeypatch).MODEL


@pytest.mark.slow
def test_the_training_runs_on_a_cpu(tmp_path: Path) -> None:
    """A few steps, which is too few to pass: the criteria must say so."""
    out = tmp_path / "training.json"
    options = [
        "--device",
        "cpu",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--images",
        "8",
        "3",
        "--json",
        str(out),
    ]
    roots = [str(BENCHMARKS.parent / folder) for folder in ("platform", "models")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "gpu_training.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "fp32: the loss fell from" in done.stderr
    rows = json.loads(out.read_text())
    assert [row["precision"] for row in rows] == ["fp32", "bf16", "fp16"]
    assert all(row["finite"] for row in rows)
