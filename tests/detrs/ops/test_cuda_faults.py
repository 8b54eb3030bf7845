"""Inject faults into the source of the CUDA kernels: the emulation must find each. Run it under the sanitizers too."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

import emulated
from emulated_cases import PYRAMID, all_cases, assert_right, make_case

pytestmark = emulated.needs_compiler


@dataclass(frozen=True)
class Fault:
    """Replace `right` in a file of csrc/ by `wrong`; `seen` is a pattern of the error that must follow."""

    file: str
    right: str
    wrong: str
    seen: str


WRONG_NUMBERS = "not close|ended by signal"  # a wild token is a wild address
FAULTS = {
    "uninitialized shared memory": Fault(
        "cuda/kernels.cuh",
        "shared.tokens[slot][at] = tokens, shared.factors[slot][at] = factors;",
        "shared.tokens[slot][at] = tokens; if (!PLANTED || at != 1) shared.factors[slot][at] = factors;",
        WRONG_NUMBERS,
    ),
    "write past the end of shared memory": Fault(
        "cuda/kernels.cuh",
        "if (row.lane < 4) shared.dots[row.slot][at].at[row.lane] = dot;",
        "if (row.lane < 4) (&shared.dots[0][0])[PLANTED ? sizeof shared.dots / sizeof shared.dots[0][0]"
        " : row.slot * (kPass<kLanes> + 1) + at].at[row.lane] = dot;",
        "behind the end of shared memory|AddressSanitizer",
    ),
    "barrier in only half of the lanes": Fault(
        "cuda/kernels.cuh",
        "T sum = (odd ?",
        "if (PLANTED && odd) __syncwarp();\n  T sum = (odd ?",
        "lanes of a warp wait at different places",
    ),
    "lanes that return early": Fault(
        "cuda/kernels.cuh",
        "  T sums[kVector];",
        "  if (PLANTED && !has_channels) return;\n  T sums[kVector];",
        "lanes wait for others that have finished",
    ),
}
FAULTS_FOR_SANITIZERS = {
    "read past the end of a tensor": Fault(
        "geometry.h",
        "after = after < length ? after : length - 1;",
        "after = PLANTED || after < length ? after : length - 1;",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "write past the end of a tensor": Fault(
        "cuda/kernels.cuh",
        "if (!row.exists) query = problem.num_queries - 1;",
        "if (!row.exists && !PLANTED) query = problem.num_queries - 1;\n    row.exists = row.exists || PLANTED;",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "misaligned vector load": Fault(
        "cuda/kernels.cuh",
        "const Channels<Stored> value(problem.value, call, row, channel);",
        "const Channels<Stored> value(problem.value, call, row, channel + (PLANTED ? 1 : 0));",
        "misaligned address",
    ),
}


def plant(folder: Path, faults: Iterable[Fault]) -> tuple[Path, int]:
    """Copy csrc/ and inject all faults; return the copy and the number of barriers in the kernels.

    Fault number n, counted from 1, is active if n is chosen at run time. Numbers beyond the faults remove one barrier
    each."""
    csrc = folder / "csrc"
    shutil.copytree(emulated.CSRC, csrc)
    faults = list(faults)
    for number, fault in enumerate(faults, start=1):
        text = (csrc / fault.file).read_text()
        assert fault.right in text, f"{fault.file} no longer has: {fault.right}"
        text = text.replace(fault.right, fault.wrong.replace("PLANTED", f"(emulation::planted == {number})"))
        (csrc / fault.file).write_text(text)
    kernels = csrc / "cuda" / "kernels.cuh"
    numbers = count(len(faults) + 1)
    text, num_barriers = re.subn(
        r"^( +)(__syncwarp\(\);)",
        lambda match: f"{match[1]}if (emulation::planted != {next(numbers)}) {match[2]}",
        kernels.read_text(),
        flags=re.MULTILINE,
    )
    kernels.write_text(text)
    return csrc, num_barriers


CASES = [
    make_case(PYRAMID, reference_size=size, seed=seed, num_queries=21, num_points=30, num_channels=12)
    for size in (0, 4)
    for seed in (0, 1, 5)
]


def check(program: Path, fault: int) -> None:
    """Fail if a fault shows."""
    for case, result in zip(CASES, emulated.run(program, CASES, fault), strict=True):
        assert_right(case, result)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("planted")
    csrc, num_barriers = plant(folder, FAULTS.values())
    # Architecture 800 adds floats one by one.
    return emulated.build(folder, csrc=csrc, architecture=800), num_barriers


def test_without_an_active_fault_nothing_is_found(planted):
    check(planted[0], 0)


@pytest.mark.parametrize("name", FAULTS)
def test_an_injected_fault_is_found(planted, name):
    with pytest.raises(AssertionError, match=FAULTS[name].seen):
        check(planted[0], list(FAULTS).index(name) + 1)


def test_every_barrier_is_necessary(planted):
    program, num_barriers = planted
    assert num_barriers >= 4, "no barriers were found in the source"
    for number in range(num_barriers):
        with pytest.raises(AssertionError, match=WRONG_NUMBERS):
            check(program, len(FAULTS) + 1 + number)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [800, 900])
def test_no_stray_access_and_no_undefined_behavior(tmp_path, architecture):
    program = emulated.build(tmp_path, sanitize=True, architecture=architecture)
    cases = all_cases()
    for case, result in zip(cases, emulated.run(program, cases), strict=True):
        assert_right(case, result)


@pytest.mark.slow
def test_the_sanitizers_find_injected_faults(tmp_path):
    faults = {**FAULTS, **FAULTS_FOR_SANITIZERS}
    csrc, _ = plant(tmp_path, faults.values())
    program = emulated.build(tmp_path, sanitize=True, csrc=csrc)
    check(program, 0)
    for number, fault in enumerate(faults.values(), start=1):
        with pytest.raises(AssertionError, match=fault.seen.replace("ended by signal", "AddressSanitizer")):
            check(program, number)
