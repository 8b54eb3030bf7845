"""Builds the native operator (csrc/) into one library, `detrs/ops/_C.so`. All else is in pyproject.toml.

The library holds no Python: it speaks libtorch's stable ABI (docs/decisions/0003-stable-abi.md), so one build
serves every Python and every torch >= 2.11. Hence this file compiles by itself: torch's `CppExtension` ties a
library to one version of both.

Without a C++ compiler the packages are installed without the library and run in pure torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
OBJECTS = ROOT / "build" / "csrc"

# kernel_code.h is compiled once per instruction set; the library picks one when it runs
KERNEL_FLAGS = {
    "csrc/cpu/kernels_baseline.cpp": [],
    "csrc/cpu/kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/cpu/kernels_avx512.cpp": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"],
}
if platform.machine() not in ("x86_64", "AMD64"):
    KERNEL_FLAGS = {"csrc/cpu/kernels_baseline.cpp": []}
SOURCES = ["csrc/library.cpp", "csrc/cpu/deform_attn.cpp", *KERNEL_FLAGS]
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))

COMPILE_FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
# Both only allow the compiler to vectorise floor and comparisons; NaN and infinity keep their meaning.
COMPILE_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
COMPILE_FLAGS += [f"-ffile-prefix-map={ROOT}/="]  # the same library whatever folder it is built in
TORCH_2_11 = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, or the first of the usual names that exists."""
    for candidate in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    return None


def torch_folder() -> Path:
    """Where torch is installed (found without importing it)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("setup.py: torch is not installed; install it, then use pip's --no-build-isolation")
    return Path(spec.origin).parent


def compile_object(compiler: list[str], source: str) -> Path:
    """Compile one file, unless an object of the same source, headers and command is there already."""
    flags = [*COMPILE_FLAGS, *KERNEL_FLAGS.get(source, []), TORCH_2_11]
    command = [*compiler, *flags, f"-isystem{torch_folder() / 'include'}", "-c", str(ROOT / source)]
    digest = hashlib.sha256(repr(command).encode())
    for path in (source, *HEADERS):
        digest.update((ROOT / path).read_bytes())
    name = f"{Path(source).stem}-{digest.hexdigest()[:16]}.o"
    if not (OBJECTS / name).exists():
        for stale in OBJECTS.glob(f"{Path(source).stem}-*.o"):
            stale.unlink()
        run([*command, "-o", str(OBJECTS / name)])
    return OBJECTS / name


def link(compiler: list[str], objects: list[Path], library: Path) -> None:
    """Link the objects, unless the library was linked from exactly these."""
    names = " ".join(path.name for path in objects)
    linked = OBJECTS / "_C.so"
    record = OBJECTS / "_C.objects"
    if not (linked.exists() and record.exists() and record.read_text() == names):
        folder = torch_folder() / "lib"
        run([*compiler, "-shared", *map(str, objects), f"-L{folder}", "-ltorch_cpu", "-s", "-o", str(linked)])
        record.write_text(names)
    library.parent.mkdir(parents=True, exist_ok=True)
    if not library.exists() or library.read_bytes() != linked.read_bytes():
        # a new file: a process that has the old one loaded keeps it
        shutil.copyfile(linked, library.with_suffix(".new"))
        library.with_suffix(".new").replace(library)


def run(command: list[str]) -> None:
    """Run a compiler's command; on failure stop with what it said."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"setup.py: this failed:\n{shlex.join(command)}\n{result.stderr}")


class BuildOperator(build_ext):
    """Compiles csrc/ and puts the library where the extension module would go."""

    def get_ext_filename(self, fullname: str) -> str:
        """`detrs/ops/_C.so`: no Python version in the name, because there is no Python inside."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile what changed, in parallel, and link."""
        compiler = find_compiler()
        assert compiler is not None, "without a compiler there is no extension"
        OBJECTS.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: compile_object(compiler, source), SOURCES))
        link(compiler, objects, Path(self.get_ext_fullpath(ext.name)))


class AnyPythonWheel(bdist_wheel):
    """A wheel for this platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """`py3-none-<platform>`."""
        python, abi, tag = super().get_tag()
        return ("py3", "none", tag) if self.distribution.has_ext_modules() else (python, abi, tag)


operator = Extension("detrs.ops._C", sources=SOURCES, depends=HEADERS)
if find_compiler() is None:
    print("setup.py: no C++ compiler: installing without the native operator (slower)", file=sys.stderr)
    setup()
else:
    setup(ext_modules=[operator], cmdclass={"build_ext": BuildOperator, "bdist_wheel": AnyPythonWheel})
