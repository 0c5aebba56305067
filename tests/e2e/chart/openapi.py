"""The schemas that a cluster serves, as kubeconform reads them: a JSON Schema per kind, closed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.e2e.cluster import Cluster

LOCATION = "{{ .Group }}_{{ .ResourceAPIVersion }}_{{ .ResourceKind }}.json"
"""kubeconform's name of a kind's schema; the core group is called as its version."""
GROUP_VERSIONS = (
    *("api/v1", "apis/apps/v1", "apis/batch/v1", "apis/networking.k8s.io/v1", "apis/policy/v1"),
    *("apis/rbac.authorization.k8s.io/v1", "apis/apiextensions.k8s.io/v1", "apis/training.heimdall.dev/v1alpha1"),
)
COMPONENTS = "#/components/schemas/"

Schema = dict[str, Any]


def write_schemas(cluster: Cluster, folder: Path) -> str:
    """Write the schemas of the cluster's kinds.

    Args:
        cluster: Whose.
        folder: Where to.

    Returns:
        What kubeconform is told to find them by.
    """
    for path in GROUP_VERSIONS:
        document = json.loads(cluster.kubectl("get", "--raw", f"/openapi/v3/{path}"))
        definitions = {name: closed(schema) for name, schema in document["components"]["schemas"].items()}
        group, _, version = path.partition("/")[2].rpartition("/")
        for name, schema in definitions.items():
            for kind in schema.get("x-kubernetes-group-version-kind", []):
                if (kind["group"], kind["version"]) == (group, version):
                    file = folder / f"{group or version}_{version}_{kind['kind'].lower()}.json"
                    file.write_text(json.dumps({"$ref": f"#/definitions/{name}", "definitions": definitions}))
    return f"{folder}/{LOCATION}"


def closed(schema: Schema) -> Schema:
    """A schema of OpenAPI as a JSON Schema that refuses fields it does not name."""
    made = dict(schema)
    if "$ref" in schema:
        made["$ref"] = f"#/definitions/{schema['$ref'].removeprefix(COMPONENTS)}"
    for name in ("items", "additionalProperties", "not"):
        if isinstance(schema.get(name), dict):
            made[name] = closed(schema[name])
    for name in ("allOf", "anyOf", "oneOf"):
        if name in schema:
            made[name] = [closed(item) for item in schema[name]]
    if "properties" in schema:
        made["properties"] = {name: closed(item) for name, item in schema["properties"].items()}
        # What has no type is a condition on an object whose fields are named around it.
        if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    if schema.get("nullable") and "type" in schema:
        made["type"] = [schema["type"], "null"]
    return made
