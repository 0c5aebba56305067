"""What a value of the chart may be, by the name that `# @type` gives it in values.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

REF: Final = "#/definitions/"


@dataclass(frozen=True)
class Type:
    """A type: its name for people, and its JSON schema."""

    title: str
    schema: dict[str, Any]

    def refers_to(self) -> list[str]:
        """Names of the types that it is made of."""
        return [value.removeprefix(REF) for value in _references(self.schema)]


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        for value in part.values():
            yield from _references(value)
    elif isinstance(part, list):
        for value in part:
            yield from _references(value)


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"{REF}{name}"}


def _list(of: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": of, **more}


def _closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def _text(pattern: str, limit: int | None = None) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern, **({"maxLength": limit} if limit else {})}


STRING: Final = {"type": "string"}
OPEN: Final = {"type": "object"}
"""Kubernetes' own deep structures, checked by the API server."""
_NAME: Final = "[a-z0-9]([a-z0-9.-]*[a-z0-9])?"
_OF_THE_CHART: Final = r"app\.kubernetes\.io/(name|instance|component|managed-by)|helm\.sh/chart"
"""Labels that the chart sets, and finds its own by."""

TYPES: Final[dict[str, Type]] = {
    "name": Type("name", _text(f"^{_NAME}$", 253)),
    "optionalName": Type("name or empty", _text(f"^({_NAME})?$", 253)),
    "nameStart": Type("up to 39 of a-z, 0-9, -, or empty", _text("^([a-z]([a-z0-9-]*[a-z0-9])?)?$", 39)),
    "key": Type("key", _text("^[-._a-zA-Z0-9]+$", 253)),
    "pullSecrets": Type("list of `{name}`", _list(_closed({"name": _ref("name")}, "name"))),
    "namespaces": Type("list of namespaces", _list(_text("^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", 63), uniqueItems=True)),
    "repository": Type("image name", _text(r"^[a-z0-9]([a-zA-Z0-9./_:-]*[a-z0-9])?$")),
    "tag": Type("image tag", _text(r"^[\w][\w.-]{0,127}$")),
    "digest": Type("digest or empty", _text("^(sha256:[a-f0-9]{64})?$")),
    "pullPolicy": Type("Always, IfNotPresent or Never", {"enum": ["Always", "IfNotPresent", "Never"]}),
    "sslMode": Type("libpq's sslmode", {"enum": ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]}),
    "seconds": Type("seconds", {"type": "number", "exclusiveMinimum": 0}),
    "graceSeconds": Type("seconds, at least 10", {"type": "integer", "minimum": 10}),
    "duration": Type("duration", _text("^([0-9]+(ms|s|m|h))+$")),
    "count": Type("1 to 64", {"type": "integer", "minimum": 1, "maximum": 64}),
    "url": Type("URL or empty", _text(r"^(https?://[^\s/]+\S*)?$")),
    "host": Type("host or empty", _text("^([A-Za-z0-9.-]*|[0-9A-Fa-f.]*(:[0-9A-Fa-f.]*){2,})$")),
    "hosts": Type("list of hosts", _list(_text(r"^[^,\s]+$"))),
    "bucket": Type("bucket", _text("^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")),
    "quantity": Type("quantity", {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?([kMGTPE]i?|m)?$"}),
    "quantities": Type("quantities", {"type": "object", "additionalProperties": _ref("quantity")}),
    "resources": Type(
        "ResourceRequirements",
        _closed({"requests": _ref("quantities"), "limits": _ref("quantities"), "claims": _list(OPEN)}),
    ),
    "labels": Type("labels", {"type": "object", "additionalProperties": STRING}),
    "ownLabels": Type(
        "labels",
        {
            "type": "object",
            "additionalProperties": STRING,
            "propertyNames": {"not": {"pattern": rf"^({_OF_THE_CHART})$"}},
        },
    ),
    "annotations": Type("annotations", {"type": "object", "additionalProperties": STRING}),
    "envVars": Type(
        "list of EnvVar",
        _list(_closed({"name": _text("^[-._a-zA-Z][-._a-zA-Z0-9]*$"), "value": STRING, "valueFrom": OPEN}, "name")),
    ),
    "nodeSelector": Type("labels", {"type": "object", "additionalProperties": STRING}),
    "labelSelector": Type(
        "LabelSelector",
        _closed(
            {
                "matchLabels": _ref("labels"),
                "matchExpressions": _list(
                    _closed(
                        {
                            "key": STRING,
                            "operator": {"enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
                            "values": _list(STRING),
                        },
                        *("key", "operator"),
                    )
                ),
            }
        ),
    ),
    "tolerations": Type(
        "list of Toleration",
        _list(
            _closed(
                {
                    "key": STRING,
                    "operator": {"enum": ["Exists", "Equal", "Lt", "Gt"]},
                    "value": STRING,
                    "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
                    "tolerationSeconds": {"type": "integer"},
                }
            )
        ),
    ),
    "affinity": Type("Affinity", _closed({"nodeAffinity": OPEN, "podAffinity": OPEN, "podAntiAffinity": OPEN})),
    "topologySpreadConstraints": Type(
        "list of TopologySpreadConstraint",
        _list(
            _closed(
                {
                    "maxSkew": {"type": "integer", "minimum": 1},
                    "topologyKey": STRING,
                    "whenUnsatisfiable": {"enum": ["DoNotSchedule", "ScheduleAnyway"]},
                    "labelSelector": _ref("labelSelector"),
                    "matchLabelKeys": _list(STRING),
                    "minDomains": {"type": "integer", "minimum": 1},
                    "nodeAffinityPolicy": {"enum": ["Honor", "Ignore"]},
                    "nodeTaintsPolicy": {"enum": ["Honor", "Ignore"]},
                },
                *("maxSkew", "topologyKey", "whenUnsatisfiable"),
            )
        ),
    ),
    "port": Type("port", {"type": "integer", "minimum": 1, "maximum": 65535}),
    "ports": Type("list of ports", _list(_ref("port"), uniqueItems=True)),
    "cidr": Type("address range", _text(r"^[0-9a-fA-F.:]+/[0-9]{1,3}$")),
    "cidrs": Type("list of address ranges", _list(_ref("cidr"))),
    "peer": Type(
        "NetworkPolicyPeer",
        {
            **_closed(
                {
                    "ipBlock": _closed({"cidr": _ref("cidr"), "except": _ref("cidrs")}, "cidr"),
                    "namespaceSelector": _ref("labelSelector"),
                    "podSelector": _ref("labelSelector"),
                }
            ),
            "minProperties": 1,
        },
    ),
    "peers": Type("list of NetworkPolicyPeer", _list(_ref("peer"))),
    "egressRules": Type(
        "list of NetworkPolicyEgressRule",
        _list(
            _closed(
                {
                    "to": _ref("peers"),
                    "ports": _list(
                        _closed(
                            {
                                "protocol": {"enum": ["TCP", "UDP", "SCTP"]},
                                "port": {"type": ["integer", "string"]},
                                "endPort": _ref("port"),
                            }
                        )
                    ),
                }
            )
        ),
    ),
}
