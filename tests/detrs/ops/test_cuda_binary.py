"""Test the machine code of the CUDA kernels in the built library: registers, spills, widths, instructions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec

import pytest

from detrs.ops import native_status

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# A multiprocessor has 65,536 registers and a block 128 threads: with these limits 8, 6 and 4 blocks fit
MOST_REGISTERS = {("float", 4): 64, ("half", 4): 64, ("half", 8): 80, ("double", 4): 128}
# With L * P = 16 and 32 channels: warp instructions per sample in the loop over the samples
MOST_INSTRUCTIONS = {("forward", "float"): 40, ("backward", "float"): 120}

pytestmark = pytest.mark.skipif("cuda" not in native_status().devices, reason=native_status().reason)


@dataclass(frozen=True)
class Kernel:
    """One kernel, compiled for one GPU architecture."""

    target: str
    direction: str
    storage: str  # float, double, or half for both kinds of 16 bits
    vector: int
    lanes: int
    code: tuple[str, ...]  # instructions, with their addresses

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.code)

    def loops(self) -> list[tuple[str, ...]]:
        """Return the loops: the code between a backward branch and its target."""
        places = {int(line.split("*")[1], 16): number for number, line in enumerate(self.code)}
        found = []
        for number, line in enumerate(self.code):
            target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", line)
            if target and places.get(int(target[1], 16), number) < number:
                found.append(self.code[places[int(target[1], 16)] : number + 1])
        return found


def read_binary(*options: str) -> str:
    """Return the output of cuobjdump, from the CUDA toolkit or from PyPI, for the library."""
    package = find_spec("nvidia")
    folders = (package and package.submodule_search_locations) or []
    path = os.pathsep.join(
        [*(f"{folder}/cu13/bin" for folder in folders), os.environ["PATH"], "/usr/local/cuda/bin"]
    )
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip(
            "cuobjdump and nvdisasm are not installed (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)"
        )
    command = [tool, *options, str(native_status().library)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    ).stdout


def describe(mangled: str) -> tuple[str, str, int, int]:
    """Return direction, storage, vector and lanes from the name of a kernel."""
    found = re.search(r"(forward|backward)_kernelI(f|d|6__half|13__nv_bfloat16)Li(\d+)ELi(\d+)E", mangled)
    assert found is not None, mangled
    storage = {"f": "float", "d": "double"}.get(found[2], "half")
    return found[1], storage, int(found[3]), int(found[4])


def machine_code() -> list[str]:
    """Return the GPU architectures that the library has code for."""
    return re.findall(r"sm_\d+", native_status().reason.split("for GPUs: ")[1])


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Return the kernels for the oldest and newest GPUs and for the first with atomics on four floats, to save time."""
    found = []
    for target in sorted({*machine_code()[::5], "sm_90"} & {*machine_code()}):
        for text in read_binary("-sass", "-arch", target).split("Function : ")[1:]:
            lines = re.findall(r"^\s+(/\*[0-9a-f]{4,}\*/\s+\S.*?);", text, flags=re.MULTILINE)
            found.append(Kernel(target, *describe(text.split()[0]), tuple(lines)))
    return found


def test_every_kernel_exists_for_every_gpu():
    assert set(machine_code()) <= set(TARGETS)
    ptx = read_binary("-ptx")
    for target in (machine_code()[0], machine_code()[-1]):  # the oldest, and for later GPUs the newest
        assert target.replace("sm", "compute") in native_status().reason.split()
        assert f".target {target}" in ptx
    parts = re.split(r"arch = (sm_\d+)", read_binary("--dump-resource-usage"))
    num_kernels = {
        target: len(re.findall(r"_kernelI", text))
        for target, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    assert {target: num_kernels.get(target) for target in machine_code()} == dict.fromkeys(machine_code(), 26)


def test_registers_and_spills():
    num_kernels = 0
    text = read_binary("--dump-resource-usage")
    for name, usage in re.findall(r"Function (\S+_kernelI\S+):\s+(.*)", text):
        _, storage, vector, _ = describe(name)
        numbers = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", usage)}
        assert numbers["REG"] <= MOST_REGISTERS[storage, vector], name
        assert numbers["STACK"] == numbers["LOCAL"] == 0, f"{name} spills registers: {usage}"
        num_kernels += 1
    assert num_kernels % 26 == 0
    assert num_kernels > 0


def test_no_instruction_touches_local_memory(kernels):
    for kernel in kernels:
        assert kernel.count(r"\b(LDL|STL)\b") == 0, kernel


def test_channels_are_loaded_and_stored_16_bytes_at_a_time(kernels):
    """8 bytes for four numbers of half precision."""
    for kernel in kernels:
        width = 64 if (kernel.storage, kernel.vector) == ("half", 4) else 128
        loads = [loop for loop in kernel.loops() if sum(f"LDG.E.{width}" in line for line in loop) >= 4]
        assert loads, (
            f"{kernel.target} {kernel.direction} {kernel.storage}: no loop loads four corners at this width"
        )
        if kernel.direction == "forward":
            assert kernel.count(rf"STG\.E\.{width}\b") == (2 if kernel.storage == "double" else 1)


def test_gradients_are_added_four_at_a_time_where_the_gpu_can(kernels):
    for kernel in kernels:
        if kernel.direction == "forward":
            assert kernel.count(r"\b(RED|REDG|ATOM|ATOMG)\.") == 0
            continue
        corners = 4 * kernel.vector
        if kernel.storage == "double":
            assert kernel.count(r"RED\S*\.ADD\.F64") == corners
        elif int(kernel.target.removeprefix("sm_")) >= 90:
            assert kernel.count(r"RED\S*\.ADD\.F32x4") == corners // 4
        else:
            assert kernel.count(r"RED\S*\.ADD\.F32\b(?!x)") == corners
        assert kernel.count(r"\bATOM") == 0, "an atomic operation that returns its result"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_instructions_of_a_sample(kernels, direction):
    (kernel,) = [
        k for k in kernels if (k.target, k.direction, k.storage, k.lanes) == ("sm_90", direction, "float", 8)
    ]
    loads = r"LDG\.E\.128"
    loops = [loop for loop in kernel.loops() if any(re.search(loads, line) for line in loop)]
    # The fastest of the loops: that of rows with NaN is slower
    per_sample = [4 * len(loop) / sum(re.search(loads, line) is not None for line in loop) for loop in loops]
    assert min(per_sample) <= MOST_INSTRUCTIONS[direction, "float"]
