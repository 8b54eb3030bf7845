"""Measure the stream: pixels, order, hand-off, start-up, and a simulation of a large world.

    make bench-stream

Uses the photographs of the folder RAYDETR_COCO_TINY (`annotations/`, `train2017/`, `val2017/`), otherwise generated
images. Ours and the baseline alternate in one process, on one core; all times are medians. Prints a table and writes
build/bench/stream.json, a list of {case, ours, baseline, ratio, unit, target}: `target` is the minimal ratio or,
without a ratio, the maximum of `ours`, or null. Exits with 1 if a case misses it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import stream_order
import stream_pixels

OUT = Path("build/bench/stream.json")


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each case that is repeated")
    seconds = parser.parse_args().seconds
    rows = []
    print(f"{'case':<76} {'ours':>9} {'baseline':>9} {'unit':<9} {'ratio':>7} {'target':>8}")
    for part in (stream_pixels, stream_order):
        for row in part.cases(seconds):
            rows.append(row | {"reached": is_reached(row)})
            print(line(row), flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if all(row["reached"] for row in rows) else 1)


def is_reached(row: dict[str, Any]) -> bool:
    """Return whether a case reaches its target, a ratio or a limit, if it has one."""
    if row["target"] is None:
        return True
    return bool(row["ours"] <= row["target"] if row["ratio"] is None else row["ratio"] >= row["target"])


def line(row: dict[str, Any]) -> str:
    """Format a row of the table."""
    baseline = "" if row["baseline"] is None else f"{row['baseline']:.4g}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    target = ""
    if row["target"] is not None:
        target = (
            f"{'<=' if row['ratio'] is None else '>='} {row['target']:g}{'' if is_reached(row) else ' !'}"
        )
    return f"{row['case']:<76} {row['ours']:9.4g} {baseline:>9} {row['unit']:<9} {ratio:>7} {target:>8}"


if __name__ == "__main__":
    main()
