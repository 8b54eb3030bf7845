"""Build the operator for this machine's GPU, and say what `raydetr doctor` says of it: the first stage of `make gpu`.

With `--official SOURCE MODULE`, also build the official kernel from a copy of its source. If that fails, the stage does
not: the benchmark of the operator leaves it out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1].resolve()

SUFFIXES = (".h", ".cpp", ".cuh", ".cu")  # of the official source
# What it uses of torch, and torch no longer has
RENAMED = (
    (r"THC/THCAtomics\.cuh", "ATen/cuda/Atomic.cuh"),
    (r"\.type\(\)\.is_cuda\(\)", ".is_cuda()"),
    (r"(AT_DISPATCH_FLOATING_TYPES\(\w+)\.type\(\)", r"\1.scalar_type()"),
    (r"\.data<", ".data_ptr<"),
    (r"AT_ASSERTM\(", "TORCH_CHECK("),
    (r"AT_ERROR\(", "TORCH_CHECK(false, "),
)


def main() -> None:
    """Build and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", type=Path, nargs=2, metavar=("SOURCE", "MODULE"))
    args = parser.parse_args()
    start = time.monotonic()
    official = None
    if args.official:
        try:
            official = start_official(*args.official)
        except (OSError, UnicodeError) as error:
            print(f"the official kernel is left out: {error}", flush=True)
    built = subprocess.run([sys.executable, str(ROOT / "csrc" / "build.py")], check=False)
    print(f"csrc/build.py: exit code {built.returncode} after {time.monotonic() - start:.0f} s", flush=True)
    problem = report_operator()
    if official is not None:
        output, _ = official.communicate()
        print(*output.splitlines()[-15:], sep="\n")
        print(f"official kernel: {'built' if args.official[1].exists() else 'failed'}, after", end=" ")
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    if built.returncode or problem:
        sys.exit(problem or "the operator was not built")


def report_operator() -> str:
    """Print the state of the operator; return what is wrong with it, or nothing."""
    import torch

    from detrs.ops import native_status
    from detrs.ops.native import supports_gpu

    print(native_status().reason, flush=True)
    try:
        from raydetr.doctor.machine import gpu_lines, operator_lines, read_machine, torch_line
    except ModuleNotFoundError as error:
        print(f"what raydetr doctor says is left out: {error}", flush=True)
    else:
        machine = read_machine()
        for line in (torch_line(machine), *operator_lines(native_status(), machine), *gpu_lines(machine)):
            print(f"{line.state:<5} {line.subject}: {line.found}", flush=True)
    if "cuda" not in native_status().devices:
        return f"there are no native kernels for the GPU: {native_status().reason}"
    return "" if supports_gpu(torch.cuda.current_device()) else "this GPU is too old for the native kernels"


def start_official(source: Path, module: Path) -> subprocess.Popen[str]:
    """Start to compile the official kernel in a process of its own, beside our operator."""
    folder = module.parent
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source / "src", folder / "src")
    for path in (path for suffix in SUFFIXES for path in (folder / "src").rglob(f"*{suffix}")):
        text = path.read_text()
        for old, new in RENAMED:
            text = re.sub(old, new, text)
        path.write_text(text)
    command = [sys.executable, "-u", __file__, "--compile-official", str(module)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def compile_official(module: Path) -> None:
    """Compile the copy beside `module`, without torch's build tools, which need setuptools."""
    from concurrent.futures import ThreadPoolExecutor
    from sysconfig import get_path

    import torch

    source = module.parent / "src"
    files = [*source.glob("*.cpp"), *source.rglob("cuda/*.cu"), *source.rglob("cpu/*.cpp")]
    cuda, of_torch = Path(os.environ["CUDA_HOME"]), Path(torch.__file__).parent
    nvcc = str(cuda / "bin" / "nvcc")
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    # The packages that torch's wheel brings have the headers of cuSPARSE and others, which nvcc may come without
    packaged = of_torch.parent.glob("nvidia/*/include")
    headers = of_torch / "include"
    folders = (source, headers, headers / "torch/csrc/api/include", cuda / "include", get_path("include"))
    include = [f"-I{path}" for path in (*folders, *packaged)]
    flags = ["-O3", "-std=c++17", "-DWITH_CUDA", f"-DTORCH_EXTENSION_NAME={module.stem}", "-w", *include]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]

    def compile_file(file: Path) -> Path:
        target = module.parent / f"{file.stem}-{file.suffix[1:]}.o"
        gpu = [
            "-x",
            "cu",
            f"-gencode=arch=compute_{capability},code=sm_{capability}",
            "--expt-relaxed-constexpr",
        ]
        run([nvcc, *gpu, "-Xcompiler=-fPIC", *flags, "-c", str(file), "-o", str(target)])
        return target

    with ThreadPoolExecutor() as pool:
        objects = [str(path) for path in pool.map(compile_file, files)]
    libraries = [f"-L{path}" for path in (of_torch / "lib", cuda / "lib64")]
    libraries += ["-lc10", "-lc10_cuda", "-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-ltorch_python"]
    run([nvcc, "-shared", "-Xcompiler=-fPIC", *objects, *libraries, "-o", str(module)])


def run(command: Sequence[str]) -> None:
    """Run a compiler; exit with its output if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile-official"]:
        compile_official(Path(sys.argv[2]))
    else:
        main()
