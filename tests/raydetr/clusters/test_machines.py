"""GPUs and CPUs of machine types, against the tables of AWS and Google."""

from __future__ import annotations

from typing import Any

import pytest

from raydetr.clusters.machines import aws_cpus, aws_gpus, gcp_cpus, gcp_gpus


@pytest.mark.parametrize(
    ("instance_type", "cpus", "gpus"),
    [
        ("g6.2xlarge", 8, 1),
        ("g6.12xlarge", 48, 4),
        ("g5.48xlarge", 192, 8),
        ("g4dn.16xlarge", 64, 1),
        ("p3.8xlarge", 32, 4),
        ("p4d.24xlarge", 96, 8),
        ("p5.48xlarge", 192, 8),
        ("m7i.2xlarge", 8, 0),
        ("c7i.large", 2, 0),
        ("g4dn.metal", None, 8),
        ("g99.xlarge", 4, None),
        ("p5.unheard", None, None),
        ("inf2.xlarge", 4, None),
        ("", None, None),
    ],
)
def test_aws(instance_type: str, cpus: int | None, gpus: int | None) -> None:
    assert (aws_cpus(instance_type), aws_gpus(instance_type)) == (cpus, gpus)


@pytest.mark.parametrize(
    ("machine_type", "cpus", "gpus"),
    [
        ("g2-standard-8", 8, 1),
        ("g2-standard-48", 48, 4),
        ("g2-standard-96", 96, 8),
        ("g2-standard-7", 7, None),
        ("a2-highgpu-1g", None, 1),
        ("a2-megagpu-16g", None, 16),
        ("a3-highgpu-8g", None, 8),
        ("e2-standard-8", 8, 0),
        ("n1-highmem-16", 16, 0),
        ("zones/us-central1-a/machineTypes/n2-standard-4", 4, 0),
        ("x9-standard-4", 4, None),
    ],
)
def test_gcp(machine_type: str, cpus: int | None, gpus: int | None) -> None:
    config = {"machineType": machine_type}
    assert (gcp_cpus(config), gcp_gpus(config)) == (cpus, gpus)


@pytest.mark.parametrize(
    ("accelerators", "expected"),
    [([{"acceleratorType": "nvidia-tesla-t4", "acceleratorCount": 2}], 2), ([], 0), (None, 0), (["t4"], 0)],
)
def test_gpus_that_are_attached(accelerators: Any, expected: int) -> None:
    assert gcp_gpus({"machineType": "n1-standard-8", "guestAccelerators": accelerators}) == expected
