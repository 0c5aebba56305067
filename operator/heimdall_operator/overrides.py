"""Pod template overrides: merged over the operator's template as Kubernetes merges patches. Pure.

They are refused where they would break what keeps a training pod apart from others, or what the operator needs to
follow it. Strategic merge (Kubernetes' documentation, "Update API Objects in Place Using kubectl patch"): objects are
merged, null removes, lists of named things are merged by their key, other lists are replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from heimdall_api.contract import GROUP, LABEL_MANAGED_BY
from heimdall_operator.observe import CONTAINER
from heimdall_operator.own import MOUNTS, RESOURCES, VARIABLES

FIELD: Final = "spec.podTemplate"
MERGE_KEYS: Final = {
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "imagePullSecrets": ("name",),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "ports": ("containerPort", "protocol"),
    "hostAliases": ("ip",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "resourceClaims": ("name",),
}
"""Lists that are merged, and what tells their items apart (patchMergeKey of the API types)."""
ADDED_TO: Final = frozenset({"envFrom"})
"""Lists that are added to: replacing envFrom would take away the access to recordings and MLflow."""

NO_CAPABILITIES: Final = {"drop": ["ALL"]}
NO_PRIVILEGES: Final = {"allowPrivilegeEscalation": False, "capabilities": NO_CAPABILITIES}
"""What every container has, also a user's own: namespaces of restricted Pod Security take no pod without."""
_ISOLATION: Final = "it would break the pod's isolation: remove it"
_CONTRACT: Final = "the operator needs it as it is: remove it"
_HOST_SECURITY: Final = ("seLinuxOptions", "appArmorProfile", "windowsOptions")
_HOST: Final = ("hostNetwork", "hostPID", "hostIPC")
_OWN_POD_FIELDS: Final = (
    "restartPolicy",
    "hostname",
    "subdomain",
    "nodeName",
    "activeDeadlineSeconds",
    "schedulingGates",
)
_OWN_CONTAINER_FIELDS: Final = ("image", "terminationMessagePath", "terminationMessagePolicy", "stdin", "tty")
_RESTARTS: Final = "a trainer that has ended would be started again in its pod, and not by spec.retries: remove it"
_OWN_RESTARTS: Final = ("restartPolicy", "restartPolicyRules")
_RESTART_OF_ALL: Final = "RestartAllContainers"
"""What a rule of any container may do to the trainer (Kubernetes' KEP-5532)."""
_SAFE_VOLUMES: Final = frozenset(
    {
        *("configMap", "secret", "emptyDir", "persistentVolumeClaim", "projected", "downwardAPI", "ephemeral", "csi"),
        *("image",),
    }
)
_KEPT: Final = frozenset(
    {
        *("metadata", "spec", "labels", "annotations", "securityContext", "containers", "volumes", "resources"),
        *("env", "envFrom", "volumeMounts", "limits", "requests", "runAsNonRoot", "seccompProfile", "capabilities"),
        *("allowPrivilegeEscalation", "readOnlyRootFilesystem", "automountServiceAccountToken", "name", "valueFrom"),
    }
)
"""What null must not remove from the operator's template."""
_TOP: Final = frozenset({"metadata", "spec"})


def overridden(template: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A pod template with a user's overrides, whose own containers have no more privileges than the operator's.

    Args:
        template: The operator's own.
        overrides: `spec.podTemplate`, without refusals.

    Returns:
        A new template.
    """
    merged = merge(template, overrides)
    for kind in ("containers", "initContainers"):
        for container in merged["spec"].get(kind) or []:
            container["securityContext"] = merge(NO_PRIVILEGES, container.get("securityContext") or {})
    return merged


def merge(template: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Lay overrides over a pod template.

    Args:
        template: The operator's own.
        overrides: `spec.podTemplate`, without refusals.

    Returns:
        A new template.
    """
    merged = copy.deepcopy(dict(template))
    for name, value in overrides.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = merge(merged[name], value)
        elif name in ADDED_TO and isinstance(value, list):
            merged[name] = [*(merged.get(name) or ()), *copy.deepcopy(value)]
        elif name in MERGE_KEYS and isinstance(value, list):
            merged[name] = _merge_named(merged.get(name) or (), value, MERGE_KEYS[name])
        else:
            merged[name] = copy.deepcopy(value)
    return merged


def _merge_named(old: Sequence[Any], new: Sequence[Any], keys: tuple[str, ...]) -> list[Any]:
    items = list(old)
    for item in new:
        place = next((index for index, known in enumerate(items) if _same(known, item, keys)), None)
        if place is None:
            items.append(copy.deepcopy(item))
        else:
            items[place] = merge(items[place], item)
    return items


def _same(one: Any, other: Any, keys: tuple[str, ...]) -> bool:
    return (
        isinstance(one, Mapping)
        and isinstance(other, Mapping)
        and other.get(keys[0]) is not None
        and all(one.get(key) == other.get(key) for key in keys)
    )


def refusals(overrides: Mapping[str, Any]) -> list[str]:
    """Why overrides can't be taken.

    Args:
        overrides: `spec.podTemplate`, as the user wrote it.

    Returns:
        Sentences that name the field and the remedy; empty where there is nothing to object to.
    """
    found: list[str] = [f"{FIELD}.{name} is unknown: use metadata and spec" for name in sorted(set(overrides) - _TOP)]
    found += _shapes(overrides, FIELD) + _removals(overrides, FIELD)
    if found:
        return found
    found += _metadata(overrides.get("metadata") or {})
    pod = overrides.get("spec") or {}
    found += _refuse(pod, f"{FIELD}.spec", _HOST, _ISOLATION, unless=lambda value: value is False)
    found += _refuse(pod, f"{FIELD}.spec", _OWN_POD_FIELDS, _CONTRACT)
    found += _pod_security(pod.get("securityContext") or {})
    found += _volumes(pod.get("volumes") or [])
    for kind in ("containers", "initContainers"):
        for container in pod.get(kind) or []:
            found += _container(container, f"{FIELD}.spec.{kind}[{container.get('name', '')}]")
    if pod.get("ephemeralContainers"):
        found.append(f"{FIELD}.spec.ephemeralContainers: they can't be in a template: remove them")
    return found


_FREE_KEYS: Final = frozenset({"labels", "annotations", "nodeSelector", "matchLabels"})
_OBJECTS: Final = frozenset(
    {"metadata", "spec", "securityContext", "seccompProfile", "resources", "limits", "requests"} | _FREE_KEYS
)
_OF_RESOURCES: Final = frozenset({"limits", "requests", "claims"})
"""What resources have; others must be objects too, which the API server knows or not."""


def _shapes(value: Any, path: str) -> list[str]:
    """Lists that are merged by key must hold objects with that key; named objects must be objects."""
    found: list[str] = []
    if not isinstance(value, Mapping):
        return found
    for name, child in value.items():
        where = f"{path}.{name}"
        if name in _OBJECTS and not isinstance(child, Mapping | None):
            found.append(f"{where} must be an object")
        elif name in _FREE_KEYS:
            continue  # their keys are the user's own words: env, ports, volumes …
        elif name in MERGE_KEYS and child is not None:
            key = MERGE_KEYS[name][0]
            if not isinstance(child, list) or not all(_has_key(item, key) for item in child):
                found.append(f"{where} must be a list of objects with {key}")
            else:
                found += [line for item in child for line in _shapes(item, f"{where}[{item[key]}]")]
        else:
            found += _amounts(child, where) if name == "resources" else []
            found += _shapes(child, where)
    return found


def _has_key(item: Any, key: str) -> bool:
    """Whether something is an object that its key tells from others."""
    return isinstance(item, Mapping) and isinstance(item.get(key), str | int) and bool(item[key])


def _amounts(resources: Any, path: str) -> list[str]:
    """Amounts that stand where limits and requests belong."""
    if not isinstance(resources, Mapping):
        return []
    strays = [
        name for name, value in resources.items() if name not in _OF_RESOURCES and not isinstance(value, Mapping | None)
    ]
    return [f"{path}.{name} must be an object: amounts belong into limits and requests" for name in strays]


def _removals(value: Any, path: str) -> list[str]:
    """What takes parts of the operator's template away: null where it has something, and the directives of patches."""
    if isinstance(value, list):
        return [line for item in value for line in _removals(item, path)]
    if not isinstance(value, Mapping):
        return []
    found: list[str] = []
    for name, child in value.items():
        if name.startswith("$"):
            found.append(f"{path}.{name}: directives of patches are not taken: remove it")
        elif child is None and name in _KEPT:
            found.append(f"{path}.{name}: null would remove what the pod needs: remove it")
        elif name not in _FREE_KEYS:
            found += _removals(child, f"{path}.{name}")
    return found


def _metadata(metadata: Mapping[str, Any]) -> list[str]:
    path = f"{FIELD}.metadata"
    found = [
        f"{path}.{name}: only labels and annotations can be given: remove it"
        for name in sorted(set(metadata) - {"labels", "annotations"})
    ]
    return found + [
        f"{path}.{kind}[{name}]: {_CONTRACT}"
        for kind in ("labels", "annotations")
        for name in metadata.get(kind) or {}
        if name.startswith(f"{GROUP}/") or name == LABEL_MANAGED_BY
    ]


def _pod_security(context: Mapping[str, Any]) -> list[str]:
    path = f"{FIELD}.spec.securityContext"
    return _user(context, path) + _refuse(context, path, ("sysctls", *_HOST_SECURITY), _ISOLATION)


def _user(context: Mapping[str, Any], path: str) -> list[str]:
    found = []
    if context.get("runAsUser") == 0:
        found.append(f"{path}.runAsUser: 0 is root; use another user")
    if "runAsNonRoot" in context and context["runAsNonRoot"] is not True:
        found.append(f"{path}.runAsNonRoot: {_ISOLATION}")
    profile = context.get("seccompProfile")
    if "seccompProfile" in context and (profile or {}).get("type") not in ("RuntimeDefault", "Localhost"):
        found.append(f"{path}.seccompProfile: {_ISOLATION}")
    return found


def _volumes(volumes: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for volume in volumes:
        path = f"{FIELD}.spec.volumes[{volume['name']}]"
        if volume["name"] in MOUNTS:
            found.append(f"{path}: the operator has a volume of this name: choose another name")
        sources = {name for name, value in volume.items() if name != "name" and value is not None}
        found += [f"{path}.{name}: {_ISOLATION}" for name in sorted(sources - _SAFE_VOLUMES)]
    return found


def _container(container: Mapping[str, Any], path: str) -> list[str]:
    found = _container_security(container.get("securityContext") or {}, f"{path}.securityContext")
    found += [
        f"{path}.ports[{port['containerPort']}].hostPort: {_ISOLATION}"
        for port in container.get("ports") or []
        if port.get("hostPort")
    ]
    if container["name"] == CONTAINER:
        return found + _trainer(container, path)
    rules = container.get("restartPolicyRules")
    actions = [rule.get("action") for rule in rules if isinstance(rule, Mapping)] if isinstance(rules, list) else []
    return found + [f"{path}.restartPolicyRules[{_RESTART_OF_ALL}]: {_RESTARTS}"] * (_RESTART_OF_ALL in actions)


def _container_security(context: Mapping[str, Any], path: str) -> list[str]:
    found = _user(context, path) + _refuse(context, path, ("procMount", *_HOST_SECURITY), _ISOLATION)
    found += _refuse(
        context, path, ("privileged", "allowPrivilegeEscalation"), _ISOLATION, unless=lambda value: value is False
    )
    # Each container has these; who says so again, as restricted namespaces ask for, may.
    if "capabilities" in context and context["capabilities"] != NO_CAPABILITIES:
        found.append(f"{path}.capabilities: {_ISOLATION}, or make it {{drop: [ALL]}}")
    return found


def _trainer(container: Mapping[str, Any], path: str) -> list[str]:
    """What of the training container is the operator's own."""
    remedies = {"image": "set spec.image instead"}
    found = [f"{path}.{name}: {remedies.get(name, _CONTRACT)}" for name in _OWN_CONTAINER_FIELDS if name in container]
    found += [f"{path}.{name}: {_RESTARTS}" for name in _OWN_RESTARTS if name in container]
    names = [variable["name"] for variable in container.get("env") or []]
    found += [f"{path}.env[{name}]: {_CONTRACT}" for name in names if name in VARIABLES]
    mounts = [mount["mountPath"] for mount in container.get("volumeMounts") or []]
    found += [f"{path}.volumeMounts[{place}]: {_CONTRACT}" for place in mounts if place in MOUNTS.values()]
    return found + [
        f"{path}.resources.{kind}.{name}: set spec.resources instead"
        for kind, amounts in (container.get("resources") or {}).items()
        if isinstance(amounts, Mapping)
        for name in RESOURCES
        if name in amounts
    ]


def _refuse(
    value: Mapping[str, Any],
    path: str,
    names: Sequence[str],
    why: str,
    *,
    unless: Callable[[Any], bool] = lambda value: value is None,
) -> list[str]:
    return [f"{path}.{name}: {why}" for name in names if name in value and not unless(value[name])]
