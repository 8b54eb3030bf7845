"""Name metrics in MLflow, whose charts are grouped by the part of a name before its slash."""

from __future__ import annotations

import re

_DATA = ("skipped_steps", "corrupt_samples", "unpredicted_images", "unreadable_records")
_TIME = (
    "epoch", "images_per_second", "train_seconds", "latency_ms", "evaluation_images_per_second", "worker_hours",
    "cpu_seconds",
)  # fmt: skip


def metric_name(name: str) -> str:
    """Return the name in MLflow of a metric of the events: `loss_bbox` is `loss/bbox`, `AP50` is `AP/AP50`.

    Loss terms of single decoder layers, of the encoder and of denoising are in `loss_aux/`. Characters that MLflow does
    not allow are replaced.
    """
    name = re.sub(r"[^\w.\- :/]", "_", name)
    if "/" in name:
        return name
    if re.fullmatch(r"A[PR]\w*", name):
        return f"AP/{name}"
    if name in _DATA:
        return f"data/{name}"
    if name in _TIME:
        return f"time/{name}"
    term = name.removeprefix("loss_")
    return f"loss_aux/{term}" if re.search(r"_(\d+|enc|dn)$", term) else f"loss/{term}"
