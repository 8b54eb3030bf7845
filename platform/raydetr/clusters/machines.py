"""Know how many GPUs and CPUs the machine types of AWS and GCP have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# GPUs by family and size; a family that is not here, and is not one of ACCELERATED, has none
_AWS_GPUS = {
    ("g4dn",): {"xlarge": 1, "2xlarge": 1, "4xlarge": 1, "8xlarge": 1, "12xlarge": 4, "16xlarge": 1, "metal": 8},
    ("g5", "g6", "g6e"): {
        "xlarge": 1, "2xlarge": 1, "4xlarge": 1, "8xlarge": 1, "16xlarge": 1, "12xlarge": 4, "24xlarge": 4,
        "48xlarge": 8,
    },
    ("gr6",): {"4xlarge": 1, "8xlarge": 1},
    ("p3",): {"2xlarge": 1, "8xlarge": 4, "16xlarge": 8},
    ("p4d", "p4de"): {"24xlarge": 8},
    ("p5",): {"4xlarge": 1, "48xlarge": 8},
    ("p5e", "p5en"): {"48xlarge": 8},
}  # fmt: skip
_AWS_ACCELERATED = re.compile(r"(g|p|inf|trn|dl|f|vt|u)\d")  # families of which the table may lack one
_AWS_SIZES = {"medium": 1, "large": 2, "xlarge": 4}  # CPUs, at most

_GCP_GPUS = {
    "g2-standard": {4: 1, 8: 1, 12: 1, 16: 1, 32: 1, 24: 2, 48: 4, 96: 8},  # by CPUs
}
_GCP_WITHOUT_GPU = re.compile(r"(c2|c2d|c3|c3d|c4|c4a|c4d|e2|h3|m1|m2|m3|m4|n2|n2d|n4|t2a|t2d|z3)-")


def aws_gpus(instance_type: str) -> int | None:
    """Return the number of GPUs of an instance type; None if it is not known."""
    family, _, size = instance_type.partition(".")
    for families, by_size in _AWS_GPUS.items():
        if family in families:
            return by_size.get(size)
    return None if _AWS_ACCELERATED.match(family) or not size else 0


def aws_cpus(instance_type: str) -> int | None:
    """Return the largest number of CPUs that an instance type of this size can have; None if it is not known."""
    size = instance_type.partition(".")[2]
    multiple = re.fullmatch(r"(\d+)xlarge", size)
    return 4 * int(multiple[1]) if multiple else _AWS_SIZES.get(size)


def gcp_gpus(node_config: Mapping[str, Any]) -> int | None:
    """Return the number of GPUs of an instance; None if it is not known."""
    attached = [
        each.get("acceleratorCount")
        for each in node_config.get("guestAccelerators") or ()
        if isinstance(each, Mapping)
    ]
    machine = _gcp_machine(node_config)
    if attached:
        return sum(count for count in attached if isinstance(count, int))
    counted = re.fullmatch(r"a\d+-[a-z]+gpu-(\d+)g", machine)
    if counted:
        return int(counted[1])
    series, _, cpus = machine.rpartition("-")
    if series in _GCP_GPUS and cpus.isdigit():
        return _GCP_GPUS[series].get(int(cpus))
    return 0 if machine.startswith("n1-") or _GCP_WITHOUT_GPU.match(machine) else None


def gcp_cpus(node_config: Mapping[str, Any]) -> int | None:
    """Return the number of CPUs of an instance; None if it is not known."""
    counted = re.fullmatch(r"[a-z0-9]+-(standard|highmem|highcpu)-(\d+)", _gcp_machine(node_config))
    return int(counted[2]) if counted else None


def _gcp_machine(node_config: Mapping[str, Any]) -> str:
    return str(node_config.get("machineType", "")).rpartition("/")[2]
