"""Run the programs of the stages of `make gpu` without a GPU: with stand-ins for it and for the tools of CUDA."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from cuda_stand_in import NAME, OnCpu, replacements
from detrs.ops import deform_attn, native_status, sampling_locations, sampling_weights
from only_packages import hide_others
from sampling import random_inputs

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
PROGRAMS = (
    "gpu", "gpu_build", "gpu_tests", "gpu_sanitizer", "bench_operator", "bench_step", "gpu_handoff", "gpu_training",
)  # fmt: skip
MARK = ".".join(
    ("pytest", "mark", "gpu")
)  # in one piece, it would make this file one of those that need a GPU
THERE = ("torch", "numpy", "scipy", "jaxtyping", "pytest", "pillow")
SHAPES = ((5, 7), (3, 2))


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a function that imports a program of benchmarks/, anew in each test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for path in BENCHMARKS.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return importlib.import_module


def run_where_little_is_installed(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a Python with the packages that `make gpu` needs, and in the environment of its stages."""
    roots = [hide_others(folder, THERE), *(ROOT / name for name in ("platform", "models", "tests/support"))]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, roots)),
            # A pytest that starts its plugins would look for those that are hidden
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )


# --- Only the packages that make gpu needs ---


def test_all_programs_start(tmp_path: Path) -> None:
    code = f"""
        import runpy, sys
        for absent in ("pydantic", "ray", "mlflow", "webdataset", "hypothesis", "xdist", "yaml"):
            try:
                __import__(absent)
            except ModuleNotFoundError:
                continue
            sys.exit(f"{{absent}} is there")
        sys.path.insert(0, {str(BENCHMARKS)!r})
        for program in {PROGRAMS!r}:
            sys.argv = [program, "--help"]
            try:
                runpy.run_path(f"{BENCHMARKS}/{{program}}.py", run_name="__main__")
            except SystemExit as end:
                assert end.code == 0, f"{{program}}: {{end.code}}"
    """
    done = run_where_little_is_installed(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(PROGRAMS)


def test_the_gpu_tests_can_be_set_up(tmp_path: Path) -> None:
    """All are found, and so are their fixtures, but for those of the loader, which has a stage of its own."""
    code = f"""
        import dataclasses, runpy, sys, torch
        from cuda_stand_in import replacements
        import detrs.ops.native as native
        for name, value in replacements().items():
            setattr(torch.cuda, name, value)
        native._status = dataclasses.replace(native._status, devices=("cpu", "cuda"))
        sys.argv = ["gpu_tests", "--setup-plan", "-q"]
        runpy.run_path({str(BENCHMARKS / "gpu_tests.py")!r}, run_name="__main__")
    """
    done = run_where_little_is_installed(code, tmp_path)
    assert done.stderr.strip() == "no test has run", done.stdout + done.stderr
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if MARK in path.read_text()
    }
    loader = "tests/raydetr/data/loader/test_pinned.py"
    assert f"{loader} is left out: No module named " in done.stdout
    lines = [line.strip() for line in done.stdout.splitlines()]
    found = {line.partition("::")[0] for line in lines if line.startswith("tests/") and "::" in line}
    assert found == files - {loader}
    for test in ("test_graph_capture[32]", "full dino", "test_zeros", "test_the_clock_of_a_gpu"):
        assert test in done.stdout


def test_the_report_of_the_gpu_tests(tmp_path: Path) -> None:
    """What fails, is skipped or takes long has a row; files that cannot be imported are left out with a line."""
    tests = {
        "one/conftest.py": "import pydantic",
        "one/test_results.py": """
            import pytest

            @pytest.fixture
            def broken():
                raise OSError("no such device")

            @GPU
            def test_good(): pass

            @GPU
            def test_bad(): assert 1 == 2

            @GPU
            def test_error(broken): pass

            @GPU
            @pytest.mark.slow
            def test_skipped(): pytest.skip("too little memory")

            @GPU
            def test_sanitizer(): raise AssertionError("has a stage of its own")

            def test_other(): raise AssertionError("is not one of them")
        """,
        "two/test_needs_more.py": "import pytest, pydantic\n@GPU\ndef test_it(): pass",
        "two/test_needs_no_gpu.py": "raise AssertionError('it is not read')",
    }
    for name, content in tests.items():
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content).replace("GPU", MARK))
    code = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(BENCHMARKS)!r})
        import gpu_tests
        gpu_tests.ROOT, gpu_tests.SLOW_SECONDS = Path.cwd(), 60
        sys.argv = ["gpu_tests", "--json", "tests.json"]
        gpu_tests.main()
    """
    done = run_where_little_is_installed(code, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "tests/two/test_needs_more.py is left out: No module named 'pydantic'" in done.stdout
    total, *rows = json.loads((tmp_path / "tests.json").read_text())
    assert total == {"test": "all", "outcome": "1 passed, 2 failed, 1 skipped"}
    assert [(row["test"].rpartition("::")[2], row["outcome"]) for row in rows] == [
        ("test_bad", "failed"),
        ("test_error", "failed"),
        ("test_skipped", "skipped"),
    ]
    assert "assert 1 == 2" in rows[0]["message"]
    assert "no such device" in rows[1]["message"]
    assert "too little memory" in rows[2]["message"]


# --- The build ---

OLD = """
#include <THC/THCAtomics.cuh>
AT_ASSERTM(value.type().is_cuda(), "not on a GPU");
AT_DISPATCH_FLOATING_TYPES(value.type(), "forward", [&] { run(value.data<scalar_t>()); });
AT_ERROR("not compiled");
"""
NEW = """
#include <ATen/cuda/Atomic.cuh>
TORCH_CHECK(value.is_cuda(), "not on a GPU");
AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), "forward", [&] { run(value.data_ptr<scalar_t>()); });
TORCH_CHECK(false, "not compiled");
"""
COMPILER = """\
#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
case "$*" in *broken*) echo "error: it is broken"; exit 1;; esac
while [ "$1" != -o ]; do shift; done
echo > "$2"
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a folder like the official kernel's, and a compiler that only writes down how it is called."""
    source = tmp_path / "source"
    for name in ("vision.cpp", "cpu/code.cpp", "cpu/code.h", "cuda/code.cu", "cuda/code.cuh"):
        path = source / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(OLD)
    (source / "src/cuda/code.o").write_bytes(b"\xff\xfe")  # of an earlier build
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "nvcc"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return source


def test_the_official_kernel_is_built_from_a_changed_copy(
    program: Callable[[str], ModuleType], stand_in_gpu: None, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_build, module = program("gpu_build"), source.parent / "official" / "official_kernel.so"
    started = []
    with monkeypatch.context() as changed:
        changed.setattr(subprocess, "Popen", lambda command, **_: started.append(command))
        gpu_build.start_official(source, module)
    assert started == [
        [sys.executable, "-u", str(BENCHMARKS / "gpu_build.py"), "--compile-official", str(module)]
    ]
    copy = module.parent / "src"
    texts = [path.read_text() for path in copy.rglob("*.*") if path.suffix != ".o"]
    assert texts == [NEW] * 5
    assert (source / "src/vision.cpp").read_text() == OLD
    gpu_build.compile_official(module)
    assert module.exists()
    *compiled, linked = (source.parent / "bin" / "calls").read_text().splitlines()
    assert len(compiled) == 3
    for name in ("vision.cpp", "cpu/code.cpp", "cuda/code.cu"):
        (call,) = (call for call in compiled if f"-c {copy / name} " in call)
        assert "arch=compute_90,code=sm_90" in call
        assert call.rpartition(" -o ")[2] in linked.split()
    (copy / "cpu/broken.cpp").write_text("")
    with pytest.raises(SystemExit, match="error: it is broken"):
        gpu_build.compile_official(module)


@pytest.mark.skipif("cuda" not in native_status().devices, reason=native_status().reason)
@pytest.mark.parametrize(
    ("is_new", "problem"), [(True, ""), (False, "this GPU is too old for the native kernels")]
)
def test_what_is_said_of_the_built_operator(
    program: Callable[[str], ModuleType],
    stand_in_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_new: bool,
    problem: str,
) -> None:
    monkeypatch.setattr("detrs.ops.native.supports_gpu", lambda index: is_new)
    assert program("gpu_build").report_operator() == problem
    shown = capsys.readouterr().out
    assert native_status().reason in shown
    assert NAME in shown  # from raydetr doctor


# --- compute-sanitizer ---

SANITIZER = """\
#!/bin/sh
case "$2" in
memcheck) case "$*" in *"--report-api-errors no"*) echo "kernels have run";; esac;;
racecheck) echo "a race at line 7"; exit 9;;
initcheck) echo "kernels have"; exec sleep 60;;
synccheck) exit 0;;
esac
"""


def test_what_compute_sanitizer_finds(
    program: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    sanitizer = program("gpu_sanitizer")
    monkeypatch.setattr(sanitizer, "SECONDS", 4)
    monkeypatch.setattr(sys, "argv", ["gpu_sanitizer", "--json", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit) as ended:
        sanitizer.main()
    assert ended.value.code == 1
    memcheck, racecheck, initcheck, synccheck = json.loads((tmp_path / "found.json").read_text())
    assert memcheck == {"tool": "memcheck", "found": "nothing"}
    assert racecheck == {"tool": "racecheck", "found": "errors"}
    assert initcheck["found"].startswith("did not finish in ")
    assert synccheck["found"] == "nothing, but the kernels did not run"
    assert "a race at line 7" in capsys.readouterr().out
    tool.write_text("#!/bin/sh\nexit 3\n")
    assert sanitizer.run_tool(str(tool), "memcheck", 5) == "it failed with exit code 3"


def test_without_compute_sanitizer_a_line_says_so(
    program: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitizer = program("gpu_sanitizer")
    monkeypatch.setattr(sanitizer.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["gpu_sanitizer"])
    sanitizer.main()
    assert capsys.readouterr().out == "compute-sanitizer is not installed: left out\n"


def test_the_kernels_under_compute_sanitizer_run(
    program: Callable[[str], ModuleType], stand_in_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    program("gpu_sanitizer").run_kernels()
    assert capsys.readouterr().out == "kernels have run\n"


# --- The operator ---

OFFICIAL = """
import torch
from detrs.ops import deform_attn_reference

def ms_deform_attn_forward(value, sizes, starts, locations, weights, images_at_once):
    shapes = tuple(map(tuple, sizes.tolist()))
    assert starts.tolist() == [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    assert images_at_once == len(value)
    return deform_attn_reference(value, shapes, locations, weights)

def ms_deform_attn_backward(value, sizes, starts, locations, weights, grad, images_at_once):
    assert grad.is_contiguous()
    leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    with torch.enable_grad():
        out = ms_deform_attn_forward(leaves[0], sizes, starts, *leaves[1:], images_at_once)
    return torch.autograd.grad(out, leaves, grad)
"""


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Write a module with the interface of the official kernel, which computes with the reference."""
    path = tmp_path / "official_kernel.py"
    path.write_text(OFFICIAL)
    return path


def test_the_official_interface_gives_the_same_output_and_gradients(
    program: Callable[[str], ModuleType], stand_in_gpu: None, official: Path
) -> None:
    operator_cuda = program("operator_cuda")
    operator = operator_cuda.official_operator(operator_cuda.load_module(official), SHAPES)
    inputs = [tensor.requires_grad_() for tensor in random_inputs(SHAPES, dtype=torch.float64)]
    found, expected = operator(*inputs), deform_attn(inputs[0], SHAPES, *inputs[1:])
    grad = torch.randn(expected.shape[::-1], dtype=torch.float64).permute(2, 1, 0)  # not contiguous
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("captures", [True, False])
def test_rows_of_the_operator(
    program: Callable[[str], ModuleType],
    stand_in_gpu: None,
    official: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    captures: bool,
) -> None:
    bench_operator, operator_cuda = program("bench_operator"), program("operator_cuda")
    monkeypatch.setattr(torch.cuda, "graph", replacements(captures=captures)["graph"])
    monkeypatch.setattr(operator_cuda, "SIZES", ((None, 1), (20, 2)))
    monkeypatch.setattr(operator_cuda, "ROUND_MS", 0.1)
    monkeypatch.setattr(operator_cuda, "COPIED", 2**10)
    monkeypatch.setattr(bench_operator, "LEVELS_22K", SHAPES)
    find = operator_cuda.find_contenders

    def with_one_that_fails(official: Path):
        yield operator_cuda.Contender("other", lambda shapes: lambda *inputs: inputs[0].no_such_method())
        yield from find(official)

    monkeypatch.setattr(operator_cuda, "find_contenders", with_one_that_fails)
    monkeypatch.chdir(tmp_path)
    options = ["--device", "cuda", "--seconds", "0.001", "--official", str(official)]
    monkeypatch.setattr(sys, "argv", ["bench_operator", *options])
    bench_operator.main()
    assert [path.name for path in Path("build/bench").iterdir()] == ["operator_gpu.json"]
    rows = json.loads(Path("build/bench/operator_gpu.json").read_text())
    names = [f"{case} 22223 N={images}" for case, images in (("encoder", 1), ("decoder 20 on", 2))]
    assert list(dict.fromkeys(row["case"] for row in rows)) == [
        f"{name} {dtype}" for name in names for dtype in ("float32", "bfloat16")
    ]
    for row in rows:
        assert row["ours_ms"] > 0
        assert row["share_of_bandwidth"] > 0
        if row["baseline"].startswith("other"):
            assert row["error"].startswith("AttributeError: ")
        else:
            assert row["ratio"] > 0
            assert row["timing"] == ("graph" if captures else "launches")
            # The others compute in float32
            assert row["difference"] < (2**-7 if "bfloat16" in row["case"] else 1e-5)
    kinds = [row["baseline"] for row in rows if "bfloat16" in row["case"]]
    assert set(kinds) == {"other float32", "grid_sample float32", "official float32"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [None, 20])
def test_the_bytes_that_must_be_moved_are_those_of_the_tensors(
    program: Callable[[str], ModuleType], dtype: torch.dtype, queries: int | None
) -> None:
    operator_cuda, bench_operator = program("operator_cuda"), program("bench_operator")
    case = operator_cuda.GpuCase("case", SHAPES, queries, 2, dtype)
    value, reference, offsets, logits = bench_operator.make_inputs(case)
    inputs = [
        value.to(dtype),
        sampling_locations(SHAPES, reference, offsets).contiguous(),
        sampling_weights(logits).contiguous(),
    ]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = deform_attn(leaves[0], SHAPES, *leaves[1:])
    grad = torch.ones_like(out)
    forward = sum(tensor.nbytes for tensor in (*inputs, out))
    backward = sum(tensor.nbytes for tensor in (*inputs, grad, *torch.autograd.grad(out, leaves, grad)))
    assert operator_cuda.floor_bytes(case, train=False) == forward
    assert operator_cuda.floor_bytes(case, train=True) == forward + backward


# --- The hand-off ---


@pytest.fixture
def handoff(
    program: Callable[[str], ModuleType], stand_in_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[ModuleType]:
    module = program("gpu_handoff")
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda _: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    monkeypatch.setattr(module, "SHAPE", (1, 4, 5, 3))
    monkeypatch.setattr(sys, "argv", ["gpu_handoff", "--json", str(tmp_path / "handoff.json")])
    yield module
    gc.collect()  # what is page-locked is unlocked when it is deleted


def test_batches_that_are_copied_arrive_intact(
    handoff: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handoff.main()
    assert "60 batches arrived intact" in capsys.readouterr().out
    rows = json.loads((tmp_path / "handoff.json").read_text())
    assert [row["memory"] for row in rows] == ["page-locked", "ordinary"]
    assert all(row["gigabytes_per_second"] > 0 for row in rows)


def test_a_slot_that_is_filled_while_it_is_read_is_found(handoff: ModuleType) -> None:
    with (
        OnCpu(copies=False),
        pytest.raises(SystemExit, match="56 of 60 batches arrived with the content of others"),
    ):
        handoff.main()


def test_memory_that_cannot_be_page_locked_is_an_error(
    handoff: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = SimpleNamespace(cudaHostRegister=lambda *_: 304)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    with pytest.raises(SystemExit, match="could not be page-locked"):
        handoff.check_content(handoff.PinnedMemory(), [np.zeros((2, 2), np.uint8)])
