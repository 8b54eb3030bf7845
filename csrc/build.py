"""Compile csrc/ into one library, `detrs/ops/_C.so`. Needs torch, and nothing else of Python: setup.py uses it.

    python3 csrc/build.py    build it in place, below models/

The library contains no Python and uses libtorch's stable ABI (docs/decisions/0003-stable-abi.md): one build works with
every Python and every torch >= 2.11. This file calls the compilers directly, because torch's `CppExtension` ties a
library to one version of each.

If CUDA's compiler is found, the library also has GPU kernels; it still loads on machines without GPU and CUDA.

    CXX   the C++ compiler
    NVCC  CUDA's compiler; empty (`NVCC= pip install ...`): build without GPU kernels
    TORCH_CUDA_ARCH_LIST  GPUs to build for, such as "8.0;9.0", from 8.0 on; by default all (CUDA_TARGETS)
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1].resolve()
LIBRARY = ROOT / "models" / "detrs" / "ops" / "_C.so"
OBJECTS = ROOT / "build" / "csrc"
SOURCES_OF = runpy.run_path(str(ROOT / "models/detrs/ops/sources.py"))  # an import of detrs would need torch

# kernel_code.h is compiled once per instruction set; the library selects one at run time
KERNEL_FLAGS = {
    "csrc/cpu/kernels_baseline.cpp": [],
    "csrc/cpu/kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/cpu/kernels_avx512.cpp": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"],
}
if platform.machine() not in ("x86_64", "AMD64"):
    KERNEL_FLAGS = {"csrc/cpu/kernels_baseline.cpp": []}
SOURCES = ["csrc/library.cpp", "csrc/cpu/deform_attn.cpp", "csrc/cpu/normalize.cpp", *KERNEL_FLAGS]
CUDA_SOURCE = "csrc/cuda/deform_attn.cu"
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*h"))

COMPILE_FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
# Allow the compiler to vectorize floor and comparisons; NaN and infinity keep their meaning.
COMPILE_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
COMPILE_FLAGS += [f"-ffile-prefix-map={ROOT}/="]  # reproducible: independent of the build folder
TORCH_2_11 = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# Compute capabilities to build for, if the compiler supports them: A100; RTX 30; RTX 40 and L4; H100 and H200; B200;
# RTX 50. The driver compiles the PTX of the oldest or newest for GPUs that are not among them.
CUDA_TARGETS = (80, 86, 89, 90, 100, 120)
CUDA_FLAGS = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden,-g0"]
OLDEST_CUDA = (12, 1)  # the first with atomicAdd of float4


def find_compiler() -> list[str] | None:
    """Return the C++ compiler's command: $CXX, or the first of the common names that exists."""
    for candidate in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    return None


@dataclass(frozen=True)
class Nvcc:
    """CUDA's compiler."""

    command: str
    targets: tuple[int, ...]  # compute capabilities, 80 for 8.0

    @property
    def flags(self) -> list[str]:
        """Machine code for each target, and PTX of the oldest and the newest."""
        code = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in self.targets]
        ptx = [f"-gencode=arch=compute_{target},code=compute_{target}" for target in self.ptx_targets]
        return [*CUDA_FLAGS, *code, *ptx]

    @property
    def ptx_targets(self) -> list[int]:
        """The targets whose PTX the library has."""
        return sorted({self.targets[0], self.targets[-1]})

    def with_host(self, compiler: list[str]) -> list[str]:
        """Return the flag that selects `compiler` as host compiler; none for commands of several words (ccache c++)."""
        return [f"-ccbin={shutil.which(compiler[0])}"] if len(compiler) == 1 else []

    @property
    def target_names(self) -> str:
        """Names of the targets in `flags`, to print."""
        names = [f"sm_{target}" for target in self.targets]
        return " ".join([*names, *(f"compute_{target}" for target in self.ptx_targets)])


def find_nvcc() -> Nvcc | str:
    """Return CUDA's compiler, or the reason why there is none."""
    homes = (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda")
    candidates = ["nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    if "NVCC" in os.environ:
        if not os.environ["NVCC"]:
            return "it was built with NVCC set to nothing"
        candidates = [os.environ["NVCC"]]
    command = next(filter(None, map(shutil.which, candidates)), None)
    if command is None:
        return f"{' or '.join(candidates)} was not found when it was built"
    release = re.search(r"release (\d+)\.(\d+)", output_of([command, "--version"]))
    if release is None or (int(release[1]), int(release[2])) < OLDEST_CUDA:
        return f"{command} was not at least CUDA {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} when it was built"
    known = output_of([command, "--list-gpu-code"]).split()
    targets = tuple(target for target in wanted_targets() if f"sm_{target}" in known)
    return (
        Nvcc(command, targets)
        if targets
        else f"{command} supported none of the targeted GPUs when it was built"
    )


def wanted_targets() -> list[int]:
    """Return the compute capabilities to build for: those of torch's variable, or CUDA_TARGETS; the oldest first."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    found = {10 * int(major) + int(minor) for major, minor in re.findall(r"(\d+)\.(\d)", listed)}
    if listed and not found:
        sys.exit(f"csrc/build.py: TORCH_CUDA_ARCH_LIST={listed}: expected numbers, such as 8.0;9.0")
    return sorted(target for target in found or CUDA_TARGETS if target >= CUDA_TARGETS[0])


def torch_folder() -> Path:
    """Return the folder of torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("csrc/build.py: torch is not installed; install it, then use pip's --no-build-isolation")
    return Path(spec.origin).parent


def headers_of(source: str) -> list[str]:
    """Return the headers on which `source` can depend: all for a file in csrc/, else those of csrc/ and its folder."""
    folder = str(Path(source).parent)
    return [path for path in HEADERS if folder == "csrc" or str(Path(path).parent) in ("csrc", folder)]


def compile_object(command: list[str], source: str) -> Path:
    """Compile one file, unless an object of the same source, headers and command exists."""
    command = [*command, "-c", str(ROOT / source)]
    digest = hashlib.sha256(repr(command).encode())
    for path in (source, *headers_of(source)):
        digest.update((ROOT / path).read_bytes())
    stem = source.removeprefix("csrc/").replace("/", "-")
    name = f"{stem}-{digest.hexdigest()[:16]}.o"
    if not (OBJECTS / name).exists():
        for stale in OBJECTS.glob(f"{stem}-*.o"):
            stale.unlink()
        run([*command, "-o", str(OBJECTS / name)])
    return OBJECTS / name


def compile_all(compiler: list[str], nvcc: Nvcc | str) -> list[Path]:
    """Compile what changed, in parallel."""
    found = (
        f'-DDETRS_WITH_CUDA="{nvcc.target_names}"'
        if isinstance(nvcc, Nvcc)
        else f'-DDETRS_WITHOUT_CUDA="{nvcc}"'
    )
    include = f"-isystem{torch_folder() / 'include'}"
    commands: dict[str, list[str]] = {}
    if isinstance(nvcc, Nvcc):  # first, because it takes the longest
        commands[CUDA_SOURCE] = [nvcc.command, *nvcc.with_host(compiler), *nvcc.flags]
    for source in SOURCES:
        flags = KERNEL_FLAGS.get(source, []) + ([found] if source == "csrc/library.cpp" else [])
        commands[source] = [*compiler, *COMPILE_FLAGS, *flags, TORCH_2_11, include]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compile_object(commands[source], source), commands))


def link(compiler: list[str], nvcc: Nvcc | str, objects: list[Path], library: Path) -> None:
    """Link the objects, unless the library was linked from the same ones."""
    names = " ".join(path.name for path in objects)
    linked = OBJECTS / "_C.so"
    record = OBJECTS / "_C.objects"
    if not (linked.exists() and record.exists() and record.read_text() == names):
        torch_library = [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu"]
        linker = [*compiler, "-s"]
        if isinstance(nvcc, Nvcc):
            # Link CUDA's runtime statically and hide its symbols: torch loads its own runtime
            linker = [nvcc.command, *nvcc.with_host(compiler), "--cudart=static", "-Xlinker=-s"]
            linker += ["-Xlinker=--exclude-libs,ALL"]
        run([*linker, "-shared", *map(str, objects), *torch_library, "-o", str(linked)])
        record.write_text(names)
    library.parent.mkdir(parents=True, exist_ok=True)
    if not library.exists() or library.read_bytes() != linked.read_bytes():
        # Replace the file instead of overwriting it: a running process may have the old one mapped
        shutil.copyfile(linked, library.with_suffix(".new"))
        library.with_suffix(".new").replace(library)
    record_sources(library)


def record_sources(library: Path) -> None:
    """Write beside a library what it was built from: a checkout without one finds an installed one by it."""
    library.with_suffix(SOURCES_OF["SUFFIX"]).write_text(SOURCES_OF["digest_sources"](ROOT / "csrc"))


def output_of(command: list[str]) -> str:
    """Return the output of a command; empty if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else ""


def run(command: list[str]) -> None:
    """Run a compiler's command; exit with its output if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        remedy = "\nNVCC= (set to nothing) builds without GPU kernels" if "nvcc" in command[0] else ""
        raise SystemExit(
            f"csrc/build.py: this command failed:\n{shlex.join(command)}\n{result.stdout}{result.stderr}{remedy}"
        )


def build(library: Path) -> None:
    """Compile what changed, in parallel, and link. Say on standard error if there are no GPU kernels, and why."""
    compiler = find_compiler()
    if compiler is None:
        sys.exit("csrc/build.py: no C++ compiler was found: install one, or name it in CXX")
    nvcc = find_nvcc()
    if isinstance(nvcc, str):
        print(f"csrc/build.py: building the operator without GPU kernels: {nvcc}", file=sys.stderr)
    OBJECTS.mkdir(parents=True, exist_ok=True)
    link(compiler, nvcc, compile_all(compiler, nvcc), library)


if __name__ == "__main__":
    build(LIBRARY)
