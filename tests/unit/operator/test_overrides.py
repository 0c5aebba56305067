"""Pod template overrides: merged as Kubernetes merges, refused where they break isolation or the contract."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heimdall_operator.overrides import merge, refusals

TEMPLATE: dict[str, Any] = {
    "metadata": {"labels": {"a": "1"}},
    "spec": {
        "containers": [
            {
                "name": "trainer",
                "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                "envFrom": [{"secretRef": {"name": "ours"}}],
                "resources": {"limits": {"memory": "1Gi"}},
            }
        ],
        "volumes": [{"name": "scratch", "emptyDir": {}}],
    },
}


def trainer(**more: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "trainer", **more}]}}


def test_lists_of_named_things_are_merged_by_their_key() -> None:
    merged = merge(TEMPLATE, trainer(env=[{"name": "B", "value": "3"}, {"name": "C", "value": "4"}]))

    environment = {item["name"]: item["value"] for item in merged["spec"]["containers"][0]["env"]}
    assert environment == {"A": "1", "B": "3", "C": "4"}
    assert merged["spec"]["volumes"] == TEMPLATE["spec"]["volumes"]


def test_env_from_is_added_to() -> None:
    merged = merge(TEMPLATE, trainer(envFrom=[{"configMapRef": {"name": "mine"}}]))

    assert merged["spec"]["containers"][0]["envFrom"] == [
        {"secretRef": {"name": "ours"}},
        {"configMapRef": {"name": "mine"}},
    ]


def test_null_removes() -> None:
    merged = merge({"spec": {"a": 1, "b": 2}}, {"spec": {"a": None}})

    assert merged == {"spec": {"b": 2}}


def test_other_lists_are_replaced() -> None:
    template = {"spec": {"tolerations": [{"key": "a"}]}}

    assert merge(template, {"spec": {"tolerations": [{"key": "b"}]}}) == {"spec": {"tolerations": [{"key": "b"}]}}


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner), max_leaves=20)
)
def test_merging_nothing_changes_nothing_and_the_template_is_left_alone(value: Any) -> None:
    template = {"spec": {"x": value}}

    assert merge(template, {}) == template
    merge(template, {"spec": {"x": {"y": 1}}})
    assert template == {"spec": {"x": value}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "the host's network": ({"spec": {"hostNetwork": True}}, "spec.podTemplate.spec.hostNetwork: it would break"),
    "the host's files": (
        {"spec": {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}},
        "spec.podTemplate.spec.volumes[v].hostPath: it would break",
    ),
    "root": ({"spec": {"securityContext": {"runAsUser": 0}}}, "securityContext.runAsUser: 0 is root"),
    "root by the container": (trainer(securityContext={"runAsNonRoot": False}), "runAsNonRoot: it would break"),
    "root by null": (trainer(securityContext={"runAsNonRoot": None}), "runAsNonRoot: null would remove"),
    "no security context": ({"spec": {"securityContext": None}}, "spec.securityContext: null would remove"),
    "no security context of the container": (trainer(securityContext=None), "securityContext: null would remove"),
    "no labels": ({"metadata": {"labels": None}}, "metadata.labels: null would remove"),
    "no environment": (trainer(env=None), ".env: null would remove"),
    "another AppArmor profile": (
        trainer(securityContext={"appArmorProfile": {"type": "Unconfined"}}),
        "appArmorProfile",
    ),
    "a mount of ours": (
        trainer(volumeMounts=[{"name": "x", "mountPath": "/scratch"}]),
        "volumeMounts[/scratch]: the operator needs",
    ),
    "the mount of the authorities": (
        trainer(volumeMounts=[{"name": "x", "mountPath": "/etc/heimdall-ca"}]),
        "volumeMounts[/etc/heimdall-ca]: the operator needs",
    ),
    "privileges": (trainer(securityContext={"privileged": True}), "securityContext.privileged: it would break"),
    "more privileges": (trainer(securityContext={"allowPrivilegeEscalation": True}), "allowPrivilegeEscalation"),
    "capabilities": (trainer(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}), "capabilities: it would"),
    "capabilities by null": (trainer(securityContext={"capabilities": None}), "capabilities: null would remove"),
    "some capabilities": (trainer(securityContext={"capabilities": {"drop": ["NET_RAW"]}}), "make it {drop: [ALL]}"),
    "a port of the host": (
        trainer(ports=[{"containerPort": 80, "hostPort": 80}]),
        "containers[trainer].ports[80].hostPort: it would break",
    ),
    "no seccomp": ({"spec": {"securityContext": {"seccompProfile": {"type": "Unconfined"}}}}, "seccompProfile"),
    "another restart policy": ({"spec": {"restartPolicy": "Always"}}, "restartPolicy: the operator needs it"),
    "a restart policy of the trainer": (
        trainer(restartPolicy="Always"),
        "containers[trainer].restartPolicy: a trainer that has ended would be started again in its pod",
    ),
    "restart rules of the trainer": (
        trainer(restartPolicyRules=[{"action": "Restart", "exitCodes": {"operator": "In", "values": [143]}}]),
        "containers[trainer].restartPolicyRules: a trainer that has ended would be started again in its pod",
    ),
    "a sidecar that restarts the trainer": (
        {"spec": {"initContainers": [{"name": "side", "restartPolicyRules": [{"action": "RestartAllContainers"}]}]}},
        "initContainers[side].restartPolicyRules[RestartAllContainers]: a trainer that has ended would be started",
    ),
    "the image": (trainer(image="mine"), "containers[trainer].image: set spec.image instead"),
    "the memory": (
        trainer(resources={"limits": {"memory": "9Gi"}}),
        "containers[trainer].resources.limits.memory: set spec.resources instead",
    ),
    "the run": (trainer(env=[{"name": "MLFLOW_RUN_ID", "value": "x"}]), "env[MLFLOW_RUN_ID]: the operator needs"),
    "the grace period that the trainer is told": (
        trainer(env=[{"name": "HEIMDALL_GRACE_PERIOD_S", "value": "9"}]),
        "env[HEIMDALL_GRACE_PERIOD_S]: the operator needs",
    ),
    "a label of ours": (
        {"metadata": {"labels": {"training.heimdall.dev/attempt": "9"}}},
        "labels[training.heimdall.dev/attempt]: the operator needs",
    ),
    "a name": ({"metadata": {"name": "x"}}, "spec.podTemplate.metadata.name: only labels and annotations"),
    "a volume of ours": ({"spec": {"volumes": [{"name": "scratch"}]}}, "choose another name"),
    "the volume of the authorities": (
        {"spec": {"volumes": [{"name": "heimdall-ca", "secret": {"secretName": "mine"}}]}},
        "volumes[heimdall-ca]: the operator has a volume of this name",
    ),
    "an unknown part": ({"sepc": {}}, "spec.podTemplate.sepc is unknown: use metadata and spec"),
    "a list that is none": ({"spec": {"containers": {"name": "trainer"}}}, "must be a list of objects with name"),
    "resources that are none": (trainer(resources="x"), "resources must be an object"),
    "an amount that is no limit": (
        trainer(resources={"nvidia.com/gpu": 1, "claims": [{"name": "gpu"}]}),
        "resources.nvidia.com/gpu must be an object: amounts belong into limits and requests",
    ),
    "limits that are none": (trainer(resources={"limits": 4}), "resources.limits must be an object"),
    "a profile that is none": (
        {"spec": {"securityContext": {"seccompProfile": "RuntimeDefault"}}},
        "spec.podTemplate.spec.securityContext.seccompProfile must be an object",
    ),
    "a name that is none": ({"spec": {"volumes": [{"name": {"a": 1}}]}}, "must be a list of objects with name"),
    "an object that is none": ({"spec": []}, "spec.podTemplate.spec must be an object"),
    "no trainer": (trainer(**{"$patch": "delete"}), "$patch: directives of patches are not taken"),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_break_isolation_or_contract_is_refused(overrides: dict[str, Any], message: str) -> None:
    found = refusals(overrides)

    assert any(message in line for line in found), found


TAKEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a place": {"spec": {"nodeSelector": {"a": "b"}, "tolerations": [], "priorityClassName": "high", "affinity": {}}},
    "a command": trainer(command=["python", "train.py"], workingDir="/app"),
    "another user": {"spec": {"securityContext": {"runAsUser": 1000, "fsGroup": 1000}}},
    "a claim": {"spec": {"volumes": [{"name": "d", "persistentVolumeClaim": {"claimName": "d"}}]}},
    "authorities of the user's own": {"spec": {"volumes": [{"name": "ca", "configMap": {"name": "mine"}}]}},
    "a sidecar": {"spec": {"containers": [{"name": "side", "image": "x", "resources": {"limits": {"memory": "1Gi"}}}]}},
    "a sidecar of a restricted namespace": {
        "spec": {
            "initContainers": [
                {
                    "name": "side",
                    "image": "x",
                    "restartPolicy": "Always",
                    "ports": [{"containerPort": 80}],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                }
            ]
        }
    },
    "a sidecar with rules of its own": {
        "spec": {
            "containers": [
                {"name": "side", "restartPolicy": "Never", "restartPolicyRules": [{"action": "Restart"}, "x", None]}
            ]
        }
    },
    "other devices": trainer(resources={"limits": {"rdma/hca": 1}}),
    "labels and places named like lists": {
        "metadata": {"labels": {"env": "prod", "volumes": "many"}, "annotations": {"containers": "one"}},
        "spec": {"nodeSelector": {"env": "gpu"}},
    },
    "no host network": {"spec": {"hostNetwork": False}},
}


@pytest.mark.parametrize("overrides", TAKEN.values(), ids=TAKEN.keys())
def test_what_is_the_users_own_is_taken(overrides: dict[str, Any]) -> None:
    assert refusals(overrides) == []


_WORDS = (
    *("metadata", "spec", "labels", "containers", "name", "trainer", "volumes", "env", "ports", "securityContext"),
    *("seccompProfile", "resources", "limits"),
)
_leaf = st.none() | st.booleans() | st.integers() | st.sampled_from(_WORDS) | st.text(max_size=5)
_json = st.recursive(
    _leaf,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=30,
)
_FIELDS = {
    "resources": ("limits", "requests", "claims", "cpu"),
    "securityContext": ("seccompProfile", "runAsUser", "capabilities"),
    "env": ("name", "value"),
    "ports": ("containerPort", "hostPort"),
}
"""Of a container, some that have parts: what stands there in an object's or a list's place is what nobody expects."""
_container = st.sampled_from(sorted(_FIELDS)).flatmap(
    lambda name: st.fixed_dictionaries(
        {
            "name": st.just("trainer"),
            name: _json | st.dictionaries(st.sampled_from(_FIELDS[name]), _leaf | _json, min_size=1, max_size=2),
        }
    )
)
_templates = st.dictionaries(st.sampled_from(["metadata", "spec"]) | st.text(max_size=4), _json, max_size=3)


@given(_templates | _container.map(lambda container: {"spec": {"containers": [container]}}))
def test_whatever_a_user_writes_is_refused_or_merged_and_never_raises(overrides: dict[str, Any]) -> None:
    if not refusals(overrides):
        merge(TEMPLATE, overrides)
