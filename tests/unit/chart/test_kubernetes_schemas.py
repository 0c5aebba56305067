"""Every rendered manifest has only fields that Kubernetes knows, of their types, before an API server says so.

The schemas are those of Kubernetes' Python client, which is generated from its OpenAPI.
tests/e2e/chart/test_schemas.py asks the cluster's own. `prometheus-operator.json` has those of the Prometheus
operator's kinds, without descriptions, out of the definitions in its Go module (v0.85.0, Apache-2.0).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from kubernetes import client

from tests.e2e.chart.openapi import closed
from tests.unit.chart.helm import Manifest, render
from tests.unit.chart.variants import NOT_KUBERNETES, VARIANTS

PLAIN: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "bool": bool,
    "float": (int, float),
    "object": object,
    "datetime": str,
    "bytes": str,
    "IntOrString": (int, str),
}


def problems(value: Any, kind: str, path: str) -> list[str]:
    """What of a value is not of a type of the client; a type is written as the client writes it."""
    if listed := re.fullmatch(r"List\[(.+)]", kind):
        if not isinstance(value, list):
            return [f"{path} is no list"]
        return [found for at, item in enumerate(value) for found in problems(item, listed[1], f"{path}[{at}]")]
    if mapped := re.fullmatch(r"Dict\[str, (.+)]", kind):
        if not isinstance(value, dict):
            return [f"{path} is no map"]
        return [found for name, item in value.items() for found in problems(item, mapped[1], f"{path}.{name}")]
    if kind in PLAIN:
        is_flag = isinstance(value, bool) and kind in ("int", "float", "IntOrString")
        return [] if isinstance(value, PLAIN[kind]) and not is_flag else [f"{path} is {value!r}, and should be {kind}"]
    model = getattr(client, kind)
    if not isinstance(value, dict):
        return [f"{path} is no {kind}"]
    fields = {wire: model.openapi_types[name] for name, wire in model.attribute_map.items()}
    found = [f"{path}.{name} is no field of {kind}" for name in value if name not in fields]
    for name, item in value.items():
        if name in fields and item is not None:
            found += problems(item, fields[name], f"{path}.{name}")
    return found


def model_of(manifest: Manifest) -> str:
    """The client's name of a manifest's kind."""
    version = manifest["apiVersion"].rpartition("/")[2]
    return f"{version[0].upper()}{version[1:]}{manifest['kind']}"


@pytest.mark.parametrize("case", VARIANTS)
def test_kubernetes_knows_every_field(case: str) -> None:
    found = []
    for manifest in render(VARIANTS[case]).manifests:
        if manifest["kind"] not in NOT_KUBERNETES:
            name = f"{manifest['kind']}/{manifest['metadata']['name']}"
            found += problems(manifest, model_of(manifest), name)
    assert found == []


def test_a_field_that_does_not_exist_and_a_wrong_type_are_seen() -> None:
    job = {"apiVersion": "batch/v1", "kind": "Job", "spec": {"backoffLimit": "6", "template": {"spec": {"restart": 1}}}}
    assert problems(job, model_of(job), "Job") == [
        "Job.spec.backoffLimit is '6', and should be int",
        "Job.spec.template.spec.restart is no field of V1PodSpec",
    ]


def troubles(manifest: Manifest) -> list[str]:
    """What the Prometheus operator's definition of a manifest's kind finds wrong."""
    schemas = json.loads((Path(__file__).parent / "prometheus-operator.json").read_text())
    found = jsonschema.Draft202012Validator(closed(schemas[manifest["kind"]])).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in found]


@pytest.mark.parametrize("kind", sorted(NOT_KUBERNETES))
def test_the_prometheus_operator_knows_every_field(kind: str) -> None:
    (manifest,) = render(VARIANTS["everything"]).of_kind(kind)
    assert troubles(manifest) == []


def test_what_the_prometheus_operator_would_refuse_is_seen() -> None:
    monitor, rules = (render(VARIANTS["everything"]).of_kind(kind)[0] for kind in ("ServiceMonitor", "PrometheusRule"))
    monitor["spec"]["endpoints"][0] |= {"interval": "often", "paths": "/metrics"}
    rules["spec"]["groups"][0]["rules"][0]["for"] = 5
    assert {text.partition(":")[0] for text in (*troubles(monitor), *troubles(rules))} == {
        "$.spec.endpoints[0]",
        "$.spec.endpoints[0].interval",
        "$.spec.groups[0].rules[0].for",
    }
