"""Run the kernels under the address and undefined-behavior sanitizers, with vectors of each width."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1200)  # the compiler takes minutes with sanitizers
CSRC = Path(__file__).parents[3] / "csrc"
MAIN = Path(__file__).with_name("kernels_main.cpp")
FLAGS = ["-std=c++17", "-O1", "-g", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math"]
# NaN and huge numbers are converted to integers only after a comparison has replaced them
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


def build_and_run(folder: Path, vector_bytes: int, csrc: Path = CSRC) -> subprocess.CompletedProcess[str]:
    """Build and run the baseline kernels with vectors of this width; the compiler splits them if too wide."""
    source = folder / "kernels.cpp"
    source.write_text(
        f'#define DETRS_KERNELS kernels_baseline\n#define DETRS_NAME "test"\n'
        f'#define DETRS_VECTOR_BYTES {vector_bytes}\n#include "cpu/kernel_code.h"\n'
    )
    program = folder / "program"
    command = ["c++", *FLAGS, *SANITIZERS, f"-I{csrc}", str(MAIN), str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler comes without sanitizers")
    assert built.returncode == 0, built.stderr
    return subprocess.run([program], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("vector_bytes", [16, 32, 64])
def test_no_stray_access_and_no_undefined_behavior(tmp_path, vector_bytes):
    result = build_and_run(tmp_path, vector_bytes)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "finished finite\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_an_injected_stray_access_is_found(tmp_path):
    """Without the clamp into the level the test above must fail."""
    shutil.copytree(CSRC, tmp_path / "csrc")
    code = tmp_path / "csrc" / "geometry.h"
    clamp = "after = after < length ? after : length - 1;"
    assert clamp in code.read_text()
    code.write_text(code.read_text().replace(clamp, ""))
    result = build_and_run(tmp_path, 32, tmp_path / "csrc")
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
