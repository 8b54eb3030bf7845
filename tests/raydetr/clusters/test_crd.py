"""A CRD, reduced to names and types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raydetr.clusters import fields
from raydetr.clusters.crd import reduce_crd, to_yaml

ENV = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "value": {"type": "string", "default": ""}},
        "required": ["name", "value"],
    },
}
SPEC = {
    "type": "object",
    "required": ["mode"],
    "properties": {
        "mode": {"type": "string", "enum": ["a", "b"]},
        "cpu": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "env": ENV,
        "other": {"type": "object", "properties": {"env": ENV}},
    },
}
CRD = """
spec:
  versions:
  - {name: v1alpha1, schema: {openAPIV3Schema: {type: object}}}
  - name: v1
    schema:
      openAPIV3Schema: {type: object, properties: {spec: SPEC, status: {type: object}}}
"""


@pytest.fixture
def reduced() -> dict[str, Any]:
    return reduce_crd(yaml.safe_load(CRD.replace("SPEC", yaml.dump(SPEC, default_flow_style=True))))


def test_a_crd_is_reduced_to_names_and_types(reduced: dict[str, Any]) -> None:
    env = [{"name!": "string", "value": "string"}]  # a field with a default can be omitted
    assert reduced == {
        "spec": {
            "mode!": "one of a, b",
            "cpu": "quantity",
            "labels": {"*": "string"},
            "free": "any",
            "env": env,
            "other": {"env": env},
        }
    }


def test_what_occurs_twice_is_written_once(reduced: dict[str, Any]) -> None:
    text = to_yaml(reduced, "v9")
    assert text.startswith("# Fields of KubeRay v9, generated")
    assert text.count("name!") == 1
    assert yaml.safe_load(text) == reduced


def test_the_fields_in_the_package_are_those_of_a_rayjob() -> None:
    known = fields.load("kuberay")
    assert (
        known["spec"]["rayClusterSpec"]["headGroupSpec!"]["template!"]["spec"]["containers!"][0]["name!"]
        == "string"
    )
    assert fields.mismatches({"spec": {}}, known, "") == []
    file = Path(fields.__file__).parent / "fields_kuberay.yaml"
    assert file.stat().st_size < 30_000
