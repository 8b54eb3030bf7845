"""Reduce KubeRay's CRD to the names and types of its fields, which `raydetr cluster check` compares manifests with.

To update `fields_kuberay.yaml` to another version of KubeRay, take the CRD of its release,
helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml, and run

    python -m raydetr.clusters.crd ray.io_rayjobs.yaml v1.7.0 > platform/raydetr/clusters/fields_kuberay.yaml
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from raydetr.clusters.fields import ONE_OF
from raydetr.user_files import parse_yaml, read_text


def reduce_crd(crd: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of version v1 of a CRD, without its status: equal parts of the result are one object."""
    versions = crd["spec"]["versions"]
    schema = next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    schema["properties"].pop("status", None)
    fields: dict[str, Any] = _share(_reduce(schema), {})
    return fields


def to_yaml(fields: Mapping[str, Any], version: str) -> str:
    """Return the fields as a file; what occurs several times is written once, as an anchor."""
    head = f"# Fields of KubeRay {version}, generated from its CRD of RayJob by crd.py: do not edit.\n"
    return head + yaml.dump(fields, width=116, default_flow_style=None)


def _reduce(schema: Mapping[str, Any]) -> Any:
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    if "enum" in schema:
        return ONE_OF + ", ".join(schema["enum"])
    if schema["type"] == "array":
        return [_reduce(schema["items"])]
    if schema["type"] != "object":
        return schema["type"]
    if "properties" in schema:
        # A field with a default can be omitted
        required = {
            name
            for name in schema.get("required", ())
            if name in schema["properties"] and "default" not in schema["properties"][name]
        }
        return {
            name + "!" * (name in required): _reduce(below) for name, below in schema["properties"].items()
        }
    values = schema.get("additionalProperties")
    return {"*": _reduce(values)} if isinstance(values, Mapping) else "any"


def _share(fields: Any, seen: dict[str, Any]) -> Any:
    if isinstance(fields, str):
        return fields
    shared = (
        [_share(fields[0], seen)]
        if isinstance(fields, list)
        else {name: _share(below, seen) for name, below in fields.items()}
    )
    return seen.setdefault(json.dumps(shared, sort_keys=True), shared)


if __name__ == "__main__":
    sys.stdout.write(to_yaml(reduce_crd(parse_yaml(read_text(Path(sys.argv[1])))), sys.argv[2]))
