"""Check and measure everything that needs a GPU, on a machine where nothing can be installed.

    make gpu                        # PYTHON=python3 names the interpreter, OFFICIAL=DIR the official kernel's source
    make gpu ARGS="--stages build,tests"

It needs one GPU, nvcc, a Python with torch >= 2.11, numpy, scipy, jaxtyping, pytest and Pillow, and no network. Parts
that need more are left out, with a line that says so. The stages run one after the other, each in processes of their
own. Their time limits add up to nine minutes: a stage that ends early leaves its time to the next ones, and one that
fails or hangs costs no other. Writes build/gpu/report.json and report.md after every stage, and the output of each
stage to build/gpu/STAGE.log. Exits with 1 if a stage failed or could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1].resolve()
BENCHMARKS = ROOT / "benchmarks"
OUT = ROOT / "build" / "gpu"
OFFICIAL_MODULE = OUT / "official" / "official_kernel.so"  # that gpu_build.py builds
SHOWN_LINES = 25  # of a stage's output, in the report

# The machine as torch sees it. In a process of its own, because CUDA can hang when it is initialized.
PROBE = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}
try:
    found["gpu"] = torch.cuda.get_device_name(0)
    found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(0)))
    found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    torch.ones(8, device="cuda").sum().item()
except Exception as error:
    found["gpu"], found["reason"] = None, str(error).split(". ")[0].splitlines()[0]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Stage:
    """A program with its own time limit. It may write `results`, a JSON file, for the report."""

    name: str
    title: str
    seconds: int
    program: str  # in benchmarks/
    arguments: tuple[str, ...] = ()

    @property
    def results(self) -> Path:
        """The file that the program may write: a list of rows, or a dict with `rows`."""
        return OUT / f"{self.name}.json"


STAGES = (
    Stage("build", "build for this GPU, and what doctor says", 100, "gpu_build.py"),
    Stage("tests", "tests that need a GPU", 130, "gpu_tests.py"),
    Stage("sanitizer", "compute-sanitizer at small sizes", 60, "gpu_sanitizer.py"),
    Stage("operator", "the operator against others", 60, "bench_operator.py"),
    Stage("step", "whole training steps", 65, "bench_step.py"),
    Stage("handoff", "hand-off of batches in page-locked memory", 15, "gpu_handoff.py"),
    Stage("training", "a short training in three precisions", 70, "gpu_training.py"),
)
STEP_OVERHEAD = 20  # seconds to import torch and transformers, and to end the last row that has begun
PROBE_SECONDS = 40  # the first import of torch from a cold disk takes half a minute

State = Literal["passed", "failed", "timed out", "not run"]


@dataclass
class Outcome:
    """What became of a stage."""

    name: str
    title: str
    state: State
    reason: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    command: str = ""
    last_lines: list[str] = field(default_factory=list)
    results: Any = None


def main() -> None:
    """Run the stages and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", default=",".join(names), help="which ones, separated by commas")
    parser.add_argument(
        "--official", type=Path, help="source of the official kernel: the folder with its src/"
    )
    args = parser.parse_args()
    wanted = args.stages.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"--stages: {', '.join(sorted(unknown))}: expected some of {', '.join(names)}")
    if args.official is not None and not (args.official / "src").is_dir():
        parser.error(f"--official: {args.official} has no folder src")
    sys.exit(run([stage for stage in STAGES if stage.name in wanted], args.official))


def run(stages: Sequence[Stage], official: Path | None) -> int:
    """Run the stages; return 0 if all have passed, else 1."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    start = time.monotonic()
    machine = describe_machine()
    problem = "" if machine.get("gpu") else f"no GPU: {machine.get('reason', 'torch finds none')}"
    outcomes: list[Outcome] = []
    write_report(machine, outcomes, stages, time.monotonic() - start)
    deadline = start + PROBE_SECONDS
    for stage in stages:
        deadline += stage.seconds
        print(f"\n=== {stage.name}: {stage.title}", flush=True)
        if problem:
            outcomes.append(Outcome(stage.name, stage.title, "not run", problem))
        elif not (BENCHMARKS / stage.program).exists():
            missing = f"benchmarks/{stage.program} does not exist"
            outcomes.append(Outcome(stage.name, stage.title, "failed", missing))
        else:
            limit = deadline - time.monotonic()
            command = command_of(stage, official, limit)
            outcomes.append(run_stage(stage, command, environment_of(machine), limit))
        outcome = outcomes[-1]
        print(f"=== {stage.name}: {outcome.state} {outcome.reason} ({outcome.seconds:.0f} s)", flush=True)
        write_report(machine, outcomes, stages[len(outcomes) :], time.monotonic() - start)
    print(f"\n{(OUT / 'report.md').read_text()}", flush=True)
    return 0 if all(outcome.state == "passed" for outcome in outcomes) else 1


def describe_machine() -> dict[str, Any]:
    """Return what the report says of the machine; `gpu` is None where there is none, with a `reason`."""
    machine: dict[str, Any] = {"python": sys.version.split()[0], "executable": sys.executable}
    machine["processors"] = os.cpu_count()
    machine["nvcc"] = find_tool("nvcc")
    machine["compute_sanitizer"] = find_tool("compute-sanitizer")
    driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 30)
    machine["driver"] = driver.splitlines()[0] if driver else None
    revision = output_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"], 10)
    machine["revision"] = revision or None
    found = output_of([sys.executable, "-c", PROBE], PROBE_SECONDS)
    try:
        machine.update(json.loads(found.splitlines()[-1]))
    except (IndexError, json.JSONDecodeError):
        machine.update(gpu=None, reason=f"{sys.executable} cannot import torch, or CUDA does not answer")
    for name, value in machine.items():
        print(f"{name}: {value}", flush=True)
    return machine


def find_tool(name: str) -> str | None:
    """Return the path of a tool of CUDA's toolkit; None if there is none."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    return shutil.which(name, path=path)


def output_of(command: list[str], seconds: float) -> str:
    """Return a command's standard output; empty if it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def command_of(stage: Stage, official: Path | None, limit: float) -> list[str]:
    """Return the command of a stage that has so many seconds."""
    command = [sys.executable, "-u", str(BENCHMARKS / stage.program), *stage.arguments]
    match stage.name:
        case "build":
            command += (
                [] if official is None else ["--official", str(official.resolve()), str(OFFICIAL_MODULE)]
            )
        case "operator":
            command += ["--device", "cuda", "--seconds", "0.6", "--json", str(stage.results)]
            command += ["--official", str(OFFICIAL_MODULE)] if OFFICIAL_MODULE.exists() else []
        case "step":
            minutes = max(limit - STEP_OVERHEAD, 1) / 60
            command += ["--device", "cuda", "--minutes", f"{minutes:.2f}", "--json", str(stage.results)]
        case _:
            command += ["--json", str(stage.results)]
    return command


def environment_of(machine: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment of the stages: this checkout's packages, CUDA's tools, and this GPU to build for."""
    roots = [ROOT / "platform", ROOT / "models", ROOT / "tests" / "support"]
    given = os.environ.get("PYTHONPATH", "")
    changes = {
        "PYTHONPATH": os.pathsep.join([*map(str, roots), *([given] if given else [])]),
        "PYTHONUNBUFFERED": "1",
        "TORCH_CUDA_ARCH_LIST": str(machine["capability"]),
    }
    if machine["nvcc"]:
        tools = Path(machine["nvcc"]).parent
        changes["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{tools}"
        changes["CUDA_HOME"] = os.environ.get("CUDA_HOME", str(tools.parent))
    return {**os.environ, **changes}


def run_stage(stage: Stage, command: list[str], environment: dict[str, str], limit: float) -> Outcome:
    """Run a stage until it ends, or for `limit` seconds; show its output and keep it in a file."""
    outcome = Outcome(stage.name, stage.title, "failed", limit=round(limit, 1), command=" ".join(command))
    lines: list[str] = []
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its own children can be ended too
    )
    reader = threading.Thread(
        target=copy_lines, args=(process, OUT / f"{stage.name}.log", lines), daemon=True
    )
    reader.start()
    try:
        code = process.wait(max(limit, 1))
        outcome.state = "passed" if code == 0 else "failed"
        outcome.reason = "" if code == 0 else f"exit code {code}" if code > 0 else f"signal {-code}"
    except subprocess.TimeoutExpired:
        outcome.state, outcome.reason = "timed out", f"after {limit:.0f} s"
    finally:
        end_processes(process)
    reader.join(5)  # a child that left the session may keep the output open
    outcome.seconds = round(time.monotonic() - start, 1)
    outcome.last_lines = lines[-SHOWN_LINES:]
    try:
        outcome.results = json.loads(stage.results.read_text())
    except (OSError, json.JSONDecodeError):
        outcome.results = (
            None  # not every stage has results, and one that was ended has written a part or none
        )
    return outcome


def copy_lines(process: subprocess.Popen[str], path: Path, lines: list[str]) -> None:
    """Copy the output of a process to the terminal, to a file and to `lines`."""
    assert process.stdout is not None
    with process.stdout, path.open("w") as file:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            print(line, end="", flush=True)
            file.write(line)
            file.flush()


def end_processes(process: subprocess.Popen[str]) -> None:
    """End what a stage has left behind. A process that hangs in the driver may not even die: do not wait for it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            continue


# --- The report ---


def write_report(
    machine: Mapping[str, Any], outcomes: Sequence[Outcome], waiting: Sequence[Stage], seconds: float
) -> None:
    """Write report.json and report.md; the stages that have not run yet are in it too."""
    rest = [Outcome(stage.name, stage.title, "not run", "not reached yet") for stage in waiting]
    everything = [*outcomes, *rest]
    passed = all(outcome.state == "passed" for outcome in everything)
    report = {
        "passed": passed,
        "seconds": round(seconds, 1),
        "machine": dict(machine),
        "stages": [asdict(outcome) for outcome in everything],
    }
    (OUT / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (OUT / "report.md").write_text(to_markdown(machine, everything, seconds))


def to_markdown(machine: Mapping[str, Any], outcomes: Sequence[Outcome], seconds: float) -> str:
    """Format the report."""
    name = machine.get("gpu") or "no GPU"
    lines = [f"# {name}", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items()]
    lines += ["", f"{seconds:.0f} s in all.", "", "| stage | state | seconds | limit |", "|---|---|---|---|"]
    for outcome in outcomes:
        state = f"{outcome.state}: {outcome.reason}" if outcome.reason else outcome.state
        lines.append(
            f"| {outcome.name}: {outcome.title} | {state} | {outcome.seconds:.0f} | {outcome.limit:.0f} |"
        )
    for outcome in outcomes:
        lines += ["", f"## {outcome.name}", ""]
        results = outcome.results
        rows = results.get("rows") if isinstance(results, dict) else results
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            lines += [*table(rows), ""]
        if outcome.last_lines:
            lines += ["```text", *outcome.last_lines, "```"]
        else:
            lines.append(f"{outcome.state}: {outcome.reason}".rstrip(": "))
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format rows with named values as a Markdown table, with a column for every name."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return lines + [f"| {' | '.join(cell(row.get(name, '')) for name in names)} |" for row in rows]


def cell(value: Any) -> str:
    """Format one value: numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


if __name__ == "__main__":
    main()
