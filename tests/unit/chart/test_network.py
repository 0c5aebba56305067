"""Who reaches whom: the rendered NetworkPolicies, evaluated as Kubernetes defines them, against a table of flows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.chart import test_flows as tried
from tests.unit.chart.helm import EVERY_ROLE_EXTERNAL, NAMESPACE, ROOT, STORES_EXTERNAL, Manifest, Rendered, render


@dataclass(frozen=True)
class Pod:
    """An end of a flow: a pod, or, without a namespace, an address outside."""

    namespace: str | None
    labels: tuple[tuple[str, str], ...] = ()

    def namespace_labels(self) -> dict[str, str]:
        return {"kubernetes.io/metadata.name": self.namespace or ""}


def of_release(component: str) -> Pod:
    labels = {"name": "heimdall", "instance": "heimdall", "component": component}
    return Pod(NAMESPACE, tuple((f"app.kubernetes.io/{key}", value) for key, value in labels.items()))


def training(namespace: str) -> Pod:
    labels = (("app.kubernetes.io/managed-by", "heimdall-operator"), ("training.heimdall.dev/run", "run"))
    return Pod(namespace, labels)


PODS = {
    **{name: of_release(name) for name in ("operator", "tracking", "database", "object-store", "test")},
    **{name: of_release(name) for name in ("tracking-migrate", "object-store-setup")},
    "trainer": training(NAMESPACE),
    "trainer of a team": training("team"),
    "recorder": Pod(NAMESPACE, (("training.heimdall.dev/access", "recordings"),)),
    "prometheus": Pod("monitoring", (("app", "prometheus"),)),
    "stranger": Pod(NAMESPACE, (("app", "stranger"),)),
    "stranger of a team": Pod("team", (("app", "stranger"),)),
    "dns": Pod("kube-system", (("k8s-app", "kube-dns"),)),
    "outside": Pod(None),
}
PORTS = {"tracking": 5000, "database": 5432, "object-store": 9000, "operator": 8081, "dns": 53}
ALLOWED = {
    *((source, "tracking") for source in ("operator", "test", "trainer", "trainer of a team")),
    *((source, "database") for source in ("tracking", "tracking-migrate", "trainer", "trainer of a team", "recorder")),
    *((source, "object-store") for source in ("tracking", "object-store-setup", "trainer", "trainer of a team")),
    ("recorder", "object-store"),
    ("prometheus", "operator"),
    *((source, "dns") for source in ("operator", "test", "tracking", "tracking-migrate", "object-store-setup")),
    *((source, "dns") for source in ("trainer", "trainer of a team")),
    # No policy selects them: what they may is their owner's matter.
    *((source, "dns") for source in ("recorder", "prometheus", "stranger", "stranger of a team", "outside")),
}


def chosen(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for item in selector.get("matchExpressions", []):
        value, operator = labels.get(item["key"]), item["operator"]
        if operator == "Exists" and value is None:
            return False
        if operator == "In" and value not in item["values"]:
            return False
        assert operator in ("Exists", "In"), operator
    return True


def is_peer(peer: dict[str, Any], other: Pod, home: str) -> bool:
    if "ipBlock" in peer:
        return other.namespace is None
    if other.namespace is None:
        return False
    if "namespaceSelector" in peer:
        if not chosen(peer["namespaceSelector"], other.namespace_labels()):
            return False
    elif other.namespace != home:
        return False
    return chosen(peer.get("podSelector", {}), dict(other.labels))


def side(policies: list[Manifest], pod: Pod, other: Pod, port: int, way: str) -> bool:
    """Whether one end of a flow lets it pass."""
    selecting = [
        item
        for item in policies
        if item["metadata"].get("namespace", NAMESPACE) == pod.namespace
        and way in item["spec"]["policyTypes"]
        and chosen(item["spec"]["podSelector"], dict(pod.labels))
    ]
    if not selecting:
        return True
    peers, rules = ("from", "ingress") if way == "Ingress" else ("to", "egress")
    return any(
        (not rule.get("ports") or port in {item["port"] for item in rule["ports"]})
        and (not rule.get(peers) or any(is_peer(peer, other, str(pod.namespace)) for peer in rule[peers]))
        for item in selecting
        for rule in item["spec"].get(rules, [])
    )


def passes(rendered: Rendered, source: Pod, target: Pod, port: int) -> bool:
    policies = rendered.of_kind("NetworkPolicy")
    return side(policies, source, target, port, "Egress") and side(policies, target, source, port, "Ingress")


@pytest.fixture(scope="module")
def rendered() -> Rendered:
    return render({"trainer.namespaces": ["team"]})


def test_every_flow_is_as_the_table_says(rendered: Rendered) -> None:
    found = {
        (source, target)
        for target, port in PORTS.items()
        for source in PODS
        if source != target and passes(rendered, PODS[source], PODS[target], port)
    }
    assert found == ALLOWED


ARROW = re.compile(r"^ *(\w+).*? <?-->\|(.+?)\| (\w+)", re.MULTILINE)
CALLED = {
    "store": "object-store",
    "migrate": "tracking-migrate",
    "setup": "object-store-setup",
    "worker": "trainer",
    "api": "API server",
}
"""What the diagram calls shorter, or after its part in a flow."""
OF_A_MOMENT = {"tracking-migrate", "object-store-setup", "test"}
"""Pods that are gone before one could ask from them."""
SAME = {"trainer of a team": "trainer", "trainer2": "trainer", "trainer elsewhere": "trainer"}
SAME |= {tried.CONTROL_PLANE: "API server"}
ALL_PORTS = 29400
"""Which of them is tried."""


def drawn() -> set[tuple[str, str, int]]:
    """The flows of docs/network.md: source, target and port."""
    arrows = ARROW.findall((ROOT / "docs/network.md").read_text())
    return {
        (CALLED.get(source, source), CALLED.get(target, target), int(port))
        for source, label, target in arrows
        for port in re.findall(r"\d+", label.replace("all ports", str(ALL_PORTS)))
    }


def test_every_flow_of_the_table_is_drawn_and_no_other() -> None:
    table = {(SAME.get(source, source), target, PORTS[target]) for source, target in ALLOWED if target != "dns"}
    api = {("operator", "API server", port) for port in (443, 6443)}
    assert drawn() == {*table, *api, ("trainer", "trainer", ALL_PORTS)}


def test_every_flow_that_is_drawn_is_tried_on_the_cluster_and_no_other() -> None:
    """But those of pods that are gone in a moment: that they got through shows in what they left."""
    flows = {(SAME.get(source, source), SAME.get(target, target), port) for source, target, port in tried.ALLOWED}
    assert {flow for flow in flows if flow[1] != "DNS"} == {flow for flow in drawn() if flow[0] not in OF_A_MOMENT}


@pytest.mark.parametrize("port", [443, 6443])
def test_the_operator_alone_of_the_release_reaches_the_api_server(rendered: Rendered, port: int) -> None:
    reaching = {name for name, pod in PODS.items() if passes(rendered, pod, PODS["outside"], port)}
    assert reaching == {"operator", "recorder", "prometheus", "stranger", "stranger of a team", "dns", "outside"}


def test_the_api_server_may_be_narrowed_to_its_addresses() -> None:
    rendered = render({"networkPolicies.apiServer.cidrs": ["172.18.0.2/32"], "networkPolicies.apiServer.ports": [6443]})
    rules = rendered.one("NetworkPolicy", "heimdall-operator")["spec"]["egress"]
    assert {
        "ports": [{"protocol": "TCP", "port": 6443}],
        "to": [{"ipBlock": {"cidr": "172.18.0.2/32"}}],
    } in rules
    assert not any(item["port"] == 443 for rule in rules for item in rule["ports"])


def test_workers_of_a_group_reach_each_other_and_nobody_of_another_namespace(rendered: Rendered) -> None:
    assert passes(rendered, PODS["trainer"], PODS["trainer"], 29400)
    assert not passes(rendered, PODS["trainer"], PODS["trainer of a team"], 29400)
    assert not passes(rendered, PODS["stranger"], PODS["trainer"], 29400)


def test_training_pods_reach_no_internet_unless_it_is_asked_for() -> None:
    assert not passes(render(), PODS["trainer"], PODS["outside"], 443)
    opened = render({"networkPolicies.trainer.egress": [{"ports": [{"port": 443}]}]})
    assert passes(opened, PODS["trainer"], PODS["outside"], 443)
    assert not passes(opened, PODS["trainer"], PODS["outside"], 80)


def test_training_pods_of_a_namespace_that_is_not_watched_are_strangers() -> None:
    rendered = render({"operator.namespaces": ["watched"]})
    assert passes(rendered, training("watched"), PODS["database"], 5432)
    assert not passes(rendered, training("other"), PODS["database"], 5432)


def test_the_ways_to_external_services_are_open_at_their_ports() -> None:
    rendered = render(
        {
            **STORES_EXTERNAL,
            "database.port": 6432,
            "objectStore.externalUrl": "http://s3.example.com:7480/",
        }
    )
    for name in ("tracking", "trainer"):
        assert passes(rendered, PODS[name], PODS["outside"], 6432), name
        assert passes(rendered, PODS[name], PODS["outside"], 7480), name
        assert not passes(rendered, PODS[name], PODS["outside"], 443), name
    everything = render(EVERY_ROLE_EXTERNAL)
    assert passes(everything, PODS["trainer"], PODS["outside"], 443)
    assert {item["metadata"]["name"] for item in everything.of_kind("NetworkPolicy")} == {
        "heimdall-deny",
        "heimdall-operator",
        "heimdall-test",
        "heimdall-trainer",
    }


def test_an_external_service_may_be_narrowed_to_where_it_is() -> None:
    peer = {"ipBlock": {"cidr": "192.0.2.7/32"}}
    rendered = render(
        {**EVERY_ROLE_EXTERNAL, "networkPolicies.database.to": [peer], "networkPolicies.database.ports": [15432]}
    )
    rules = rendered.one("NetworkPolicy", "heimdall-trainer")["spec"]["egress"]
    assert {"ports": [{"protocol": "TCP", "port": 15432}], "to": [peer]} in rules


def test_others_may_be_let_in() -> None:
    values = {f"networkPolicies.{role}.from": [{"podSelector": {}}] for role in ("tracking", "database", "objectStore")}
    rendered = render(values)
    for role in ("tracking", "database", "object-store"):
        assert passes(rendered, PODS["stranger"], PODS[role], PORTS[role])
        assert not passes(rendered, PODS["stranger of a team"], PODS[role], PORTS[role])


def test_there_are_none_where_they_are_not_wanted() -> None:
    assert not render({"networkPolicies.enabled": False}).of_kind("NetworkPolicy")
