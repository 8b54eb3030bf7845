"""Run the source of the CUDA kernels on the CPU: build tests/detrs/ops/emulation and pass cases to it."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sampling import Shapes

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
EMULATION = ROOT / "tests" / "detrs" / "ops" / "emulation"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-Wall",
    "-Werror",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    "-Wno-subobject-linkage",
]
# NaN and huge numbers are converted to integers only after a comparison has replaced them
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
STORAGES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as csrc/deform_attn.h numbers them

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or sys.platform != "linux",
    reason="the emulation needs a C++ compiler on Linux",
)


@dataclass(frozen=True)
class Case:
    """One call, forward and backward. With a reference, `locations` and `weights` hold offsets and logits. `order` is
    that of the lanes: 0 ascending, 1 descending, else a random seed."""

    shapes: Shapes
    value: Tensor
    locations: Tensor
    weights: Tensor
    grad_out: Tensor
    reference: Tensor | None = None
    wants_reference_grad: bool = True
    order: int = 0


@dataclass(frozen=True)
class Result:
    """Output and gradients. That of the value is in the dtype of the arithmetic; `reference` is per head, or None."""

    out: Tensor
    value: Tensor
    reference: Tensor | None
    locations: Tensor
    weights: Tensor


def build(folder: Path, *, sanitize: bool = False, csrc: Path = CSRC, architecture: int = 900) -> Path:
    """Build the program that runs cases; `architecture` selects the atomics that the kernels use."""
    program = folder / "emulate"
    flags = [*FLAGS, *(SANITIZERS if sanitize else []), f"-D__CUDA_ARCH__={architecture}"]
    include = [f"-I{EMULATION}", f"-I{csrc}", "-include", "cuda_runtime.h"]  # this header first, as with nvcc
    command = ["c++", *flags, *include, str(EMULATION / "main.cpp"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler comes without sanitizers")
    assert built.returncode == 0, built.stderr
    return program


def start(
    program: Path, cases: Sequence[Case], fault: int = 0
) -> tuple[subprocess.CompletedProcess[str], bytes]:
    """Run the cases in one process with an injected fault; return the process and the bytes of its results."""
    given, written = program.with_suffix(".cases"), program.with_suffix(".results")
    given.write_bytes(b"".join(encode(case) for case in cases))
    command = [program, given, written, str(fault)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    return process, written.read_bytes()


def run(program: Path, cases: Sequence[Case], fault: int = 0) -> list[Result]:
    """Return the results of all cases; fail with the program's error message if it reports one."""
    process, written = start(program, cases, fault)
    assert process.returncode == 0, process.stderr or f"ended by signal {-process.returncode}"
    reader = Reader(written)
    results = [decode(reader, case) for case in cases]
    assert reader.position == len(written)
    return results


def encode(case: Case) -> bytes:
    """Encode a case in the format that main.cpp reads."""
    storage = STORAGES.index(case.value.dtype)
    num_levels, num_points = case.weights.shape[3:]
    size = 0 if case.reference is None else case.reference.shape[3]
    wants_grad = case.wants_reference_grad and size != 0
    sizes = [
        storage,
        *case.value.shape,
        case.weights.shape[1],
        num_levels,
        num_points,
        size,
        wants_grad,
        case.order,
    ]
    tensors = [torch.tensor(sizes), torch.tensor(case.shapes), case.value]
    tensors += [] if case.reference is None else [case.reference]
    return b"".join(to_bytes(tensor) for tensor in (*tensors, case.locations, case.weights, case.grad_out))


def to_bytes(tensor: Tensor) -> bytes:
    """Return the numbers of the tensor, last index fastest."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


class Reader:
    """Read tensors from bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Read the next tensor."""
        end = self.position + math.prod(shape) * dtype.itemsize
        assert end <= len(self.content), "the results end early"
        content = bytearray(self.content[self.position : end])
        self.position = end
        return (
            torch.frombuffer(content, dtype=dtype).reshape(shape)
            if content
            else torch.empty(shape, dtype=dtype)
        )


def decode(reader: Reader, case: Case) -> Result:
    """Decode a result in the format that main.cpp writes."""
    arithmetic = case.locations.dtype
    out = reader.take(case.grad_out.shape, case.value.dtype)
    value = reader.take(case.value.shape, arithmetic)
    reference = None
    if case.reference is not None and case.wants_reference_grad:
        reference = reader.take((*case.weights.shape[:4], case.reference.shape[3]), arithmetic)
    return Result(
        out,
        value,
        reference,
        reader.take(case.locations.shape, arithmetic),
        reader.take(case.weights.shape, arithmetic),
    )
