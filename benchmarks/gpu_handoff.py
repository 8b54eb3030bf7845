"""Copy batches to the GPU from slots of shared memory that are page-locked as in training: a stage of `make gpu`.

Slots are filled again as soon as `PinnedMemory` says that the copies from them have ended; every batch must arrive
intact. Measures the copies per second of page-locked and of ordinary memory.
"""

from __future__ import annotations

import argparse
import json
import mmap
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from raydetr.data.loader.pinned import PinnedMemory

SHAPE = (4, 800, 1088, 3)  # of a batch
NUM_SLOTS, NUM_BATCHES = 4, 60


def main() -> None:
    """Check and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    torch.zeros(1, device="cuda")  # PinnedMemory does nothing before
    slots = [make_slot() for _ in range(NUM_SLOTS)]
    pinned = PinnedMemory()
    check_content(pinned, slots)
    rows = []
    for name, array in (("page-locked", slots[0]), ("ordinary", np.empty(SHAPE, np.uint8))):
        gigabytes = copies_per_second(array) * array.nbytes / 1e9
        rows.append(
            {"memory": name, "pinned": torch.from_numpy(array).is_pinned(), "gigabytes_per_second": gigabytes}
        )
        print(f"{name}: {gigabytes:.1f} GB/s", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not rows[0]["pinned"]:
        sys.exit("the slots could not be page-locked")


def make_slot() -> npt.NDArray[np.uint8]:
    """Return an array in anonymous shared memory, as the slots of loader processes are."""
    memory = mmap.mmap(-1, int(np.prod(SHAPE)))
    return np.frombuffer(memory, np.uint8).reshape(SHAPE)


def check_content(pinned: PinnedMemory, slots: list[npt.NDArray[np.uint8]]) -> None:
    """Send batches through the slots; exit if one arrives with the content of another."""
    free, images = list(range(len(slots))), []
    for value in range(NUM_BATCHES):
        while not free:
            free += pinned.pop_finished()
        slot = free.pop(0)
        slots[slot][...] = value
        pinned.pin(slot, slots[slot])
        images.append(torch.from_numpy(slots[slot]).to("cuda", non_blocking=True))
        if not pinned.defer_release(slot):
            sys.exit("the slots could not be page-locked")
    torch.cuda.synchronize()
    wrong = [value for value, image in enumerate(images) if image.unique().tolist() != [value]]
    if wrong:
        sys.exit(f"{len(wrong)} of {NUM_BATCHES} batches arrived with the content of others: {wrong}")
    print(f"{NUM_BATCHES} batches arrived intact", flush=True)


def copies_per_second(array: npt.NDArray[np.uint8]) -> float:
    """Measure copies of an array to the GPU, one after the other."""
    tensor, target = torch.from_numpy(array), torch.empty(SHAPE, dtype=torch.uint8, device="cuda")
    count = 40
    target.copy_(tensor, non_blocking=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        target.copy_(tensor, non_blocking=True)
    torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
