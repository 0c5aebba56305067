"""Writes the CustomResourceDefinition from the types: `python -m heimdall_api.crd [--check]`.

Pydantic's JSON schema is not yet a structural schema: references are resolved, what only pydantic needs is dropped,
and "X or null" becomes an optional X. What remains is what the types say, so that there is one home for every rule.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from heimdall_api.contract import GROUP, KIND, PLURAL, VERSION
from heimdall_api.rules import VALIDATIONS, cel
from heimdall_api.types import NAME_RULE, TrainingRunSpec, TrainingRunStatus

Schema = dict[str, Any]

ROOT: Final = Path(__file__).resolve().parents[2]
TARGETS: Final = (ROOT / "manifests/crd/trainingruns.yaml", ROOT / "charts/heimdall/files/crd.yaml")
HEADER: Final = "# Generated from api/heimdall_api/types.py by `make generate`: change the types, not this file.\n"

COLUMNS: Final[list[Schema]] = [
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
    {
        "name": "Progress",
        "type": "integer",
        "jsonPath": ".status.progress.percent",
        "description": "Percent done",
    },
    {"name": "Attempts", "type": "integer", "jsonPath": ".status.attempt"},
    {"name": "GPUs", "type": "integer", "jsonPath": ".status.gpus", "description": "GPUs of all workers together"},
    {"name": "Run-ID", "type": "string", "jsonPath": ".status.runID"},
    {"name": "Model-Version", "type": "string", "jsonPath": ".status.modelVersion"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    {"name": "Job", "type": "string", "jsonPath": ".status.jobName", "priority": 1},
    {
        "name": "Reason",
        "type": "string",
        "jsonPath": '.status.conditions[?(@.type=="Complete")].reason',
        "priority": 1,
    },
]

# Parts of pydantic's JSON schema that a structural schema must not or need not have.
_DROPPED: Final = frozenset({"title", "$defs", "additionalProperties", "propertyNames", "discriminator", "const"})


def _without_null(node: Schema) -> Schema:
    """`X or null` becomes X: absent is how a resource says None."""
    options = [option for option in node.get("anyOf", []) if option.get("type") != "null"]
    if len(options) != 1:
        return node
    return {**options[0], **{key: value for key, value in node.items() if key != "anyOf"}}


def _resolve(node: Schema, definitions: dict[str, Schema]) -> Schema:
    if "$ref" not in node:
        return node
    target = definitions[node["$ref"].rsplit("/", 1)[-1]]
    rest = {key: value for key, value in node.items() if key != "$ref"}
    merged = {**target, **rest}
    # A type's own rules and the rules of the field that has this type both count.
    both = [*target.get(VALIDATIONS, []), *rest.get(VALIDATIONS, [])]
    if both:
        merged[VALIDATIONS] = both
    return merged


def _structural(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """Turn a node of pydantic's JSON schema into one of a structural schema."""
    node = _resolve(_without_null(_resolve(node, definitions)), definitions)
    out = {key: value for key, value in node.items() if key not in _DROPPED}
    if out.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "exclusiveMinimum" in out:
        out["minimum"], out["exclusiveMinimum"] = out["exclusiveMinimum"], True
    if "exclusiveMaximum" in out:
        out["maximum"], out["exclusiveMaximum"] = out["exclusiveMaximum"], True
    if "properties" in node:
        out["properties"] = {name: _structural(child, definitions) for name, child in node["properties"].items()}
        _default_objects(out["properties"])
    elif isinstance(node.get("additionalProperties"), dict):
        out["additionalProperties"] = _structural(node["additionalProperties"], definitions)
    if "items" in node:
        out["items"] = _structural(node["items"], definitions)
    if out.get("default") is None:
        out.pop("default", None)
    return out


def _default_objects(properties: dict[str, Schema]) -> None:
    """Give objects that need nothing a default, so that their own fields' defaults are filled in.

    The default is written out whole, because rules are checked against it as it stands.
    """
    for child in properties.values():
        if "properties" in child and not child.get("required") and "default" not in child:
            child["default"] = _defaults(child)


def _defaults(schema: Schema) -> Schema:
    return {name: child["default"] for name, child in schema["properties"].items() if "default" in child}


def schema_of(model: type[TrainingRunSpec] | type[TrainingRunStatus]) -> Schema:
    """The structural schema of a type.

    Args:
        model: The pydantic model of the spec or the status.

    Returns:
        An OpenAPI v3 schema as Kubernetes' structural schemas ask for.
    """
    mode: Any = "validation" if model is TrainingRunSpec else "serialization"
    schema = model.model_json_schema(by_alias=True, mode=mode)
    return _structural(schema, schema.get("$defs", {}))


def custom_resource_definition() -> Schema:
    """The whole CustomResourceDefinition of the TrainingRun."""
    spec = schema_of(TrainingRunSpec)
    spec["default"] = _defaults(spec)  # an empty spec is a valid one
    status = schema_of(TrainingRunStatus)
    # What is only sometimes known must not be required; the operator alone writes the status.
    status.pop("required", None)
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": "trainingrun",
                "shortNames": ["tr"],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": COLUMNS,
                    "subresources": {"status": {}},
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "description": "A training of a model: one MLflow run, over as many attempts as it takes.",
                            "properties": {
                                "apiVersion": {"type": "string"},
                                "kind": {"type": "string"},
                                "metadata": {"type": "object"},
                                "spec": spec,
                                "status": status,
                            },
                            VALIDATIONS: [cel(NAME_RULE.cel, NAME_RULE.message)],
                        }
                    },
                }
            ],
        },
    }


def render() -> str:
    """The CRD as YAML, as the generated files hold it."""
    import yaml

    text = yaml.safe_dump(custom_resource_definition(), sort_keys=False, width=110, allow_unicode=True)
    return HEADER + text


def main() -> None:
    """Write the generated files, or tell with --check whether they are up to date."""
    parser = argparse.ArgumentParser(description="Write the CRD from the TrainingRun's types.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    check = parser.parse_args().check
    text = render()
    for target in TARGETS:
        if check and (not target.exists() or target.read_text() != text):
            sys.exit(f"{target.relative_to(ROOT)} is not up to date: run `make generate` and commit the result")
        if not check:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)


if __name__ == "__main__":
    main()
