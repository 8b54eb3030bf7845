"""Run the CUDA kernels at small sizes under compute-sanitizer: the third stage of `make gpu`.

Memory comes from CUDA tensor by tensor, not from torch's cache, so that an access beyond the end of one is found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SECONDS = 56  # for all of them
ERRORS = 9  # exit code if a tool finds something


def main() -> None:
    """Run every tool; exit with 1 if one finds something or does not finish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write a row for each tool")
    parser.add_argument("--kernels", action="store_true", help="only run the kernels, in this process")
    args = parser.parse_args()
    if args.kernels:
        run_kernels()
        return
    command = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if command is None:
        print("compute-sanitizer is not installed: left out")
        return
    rows = []
    end = time.monotonic() + SECONDS
    for number, tool in enumerate(TOOLS):
        limit = (end - time.monotonic()) / (len(TOOLS) - number)
        found = run_tool(command, tool, limit)
        rows.append({"tool": tool, "found": found})
        print(f"{tool}: {found}", flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if any(row["found"] != "nothing" for row in rows):
        sys.exit(1)


def run_tool(command: str, tool: str, limit: float) -> str:
    """Return what a tool says of the kernels; "nothing" if it finds nothing."""
    arguments = [command, "--tool", tool, "--error-exitcode", str(ERRORS)]
    if tool == "memcheck":
        arguments += ["--report-api-errors", "no"]  # torch tries calls that may fail
    arguments += [sys.executable, __file__, "--kernels"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # To a file: the process that the tool starts outlives it, and would keep a pipe open
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(limit)
            found = "errors" if code == ERRORS else f"it failed with exit code {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver does not end
                process.wait(1)
            code, found = None, f"did not finish in {limit:.0f} s"
        file.seek(0)
        output = file.read()
    if code == 0 and "kernels have run" in output:
        return "nothing"
    print(output[-4000:], flush=True)
    return found if code != 0 else "nothing, but the kernels did not run"


def run_kernels() -> None:
    """Run both forms, forward and backward, in every dtype, with 4 to 32 lanes per row, and with NaN."""
    import torch

    from detrs.ops import deform_attn, deform_attn_fused

    shapes = ((5, 7), (3, 2), (1, 1))
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtype, num_channels in [(dtype, channels) for dtype in dtypes for channels in (12, 32, 64, 128)]:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        rows = (2, 37, 3, len(shapes), 5)
        value = torch.randn(2, 42, 3, num_channels, generator=generator)
        value[0, 0, 0, 0] = torch.nan  # rows that read it take the slow path
        locations = torch.rand(*rows, 2, generator=generator) * 1.6 - 0.3
        logits = torch.randn(rows, generator=generator)
        reference = torch.rand(2, 37, len(shapes), 4, generator=generator)
        leaves = [
            value.to("cuda", dtype),
            *(tensor.to("cuda", exact) for tensor in (reference, locations, logits)),
        ]
        for leaf in leaves:
            leaf.requires_grad_()
        for out in (
            deform_attn(leaves[0], shapes, leaves[2], leaves[3]),
            deform_attn_fused(leaves[0], shapes, *leaves[1:]),
        ):
            out.backward(torch.randn(out.shape, generator=generator).to("cuda", dtype))
    torch.cuda.synchronize()
    print("kernels have run")


if __name__ == "__main__":
    main()
