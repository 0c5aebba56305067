"""The cluster enforces NetworkPolicies: what they refuse is refused, on the same node and across nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, wait_for
from tests.e2e.conftest import GPU_NODE, OTHER_NODE, restrict

pytestmark = pytest.mark.beside

IMAGE = "heimdall/contract:dev"
SERVE = "import http.server as s; s.ThreadingHTTPServer(('', 8000), s.SimpleHTTPRequestHandler).serve_forever()"
ASK = "import sys, urllib.request as r; r.urlopen('http://' + sys.argv[1] + ':8000', timeout=3)"


def pod(name: str, node: str, *command: str) -> dict[str, Any]:
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{"name": "c", "image": IMAGE, "command": [*command], "securityContext": security}],
        },
    }


@pytest.fixture(scope="module")
def network(cluster: dict[str, str]) -> Iterator[Cluster]:
    """A namespace with a server on one node, and somebody to ask it on each."""
    made = Cluster(cluster, "heimdall-e2e-network")
    made.run("kubectl", "create", "namespace", made.namespace)
    try:
        restrict(made)
        made.apply(pod("server", OTHER_NODE, "python3", "-c", SERVE))
        for name, node in {"near": OTHER_NODE, "far": GPU_NODE}.items():
            made.apply(pod(name, node, "python3", "-c", "import time; time.sleep(3600)"))
        made.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=120s")
        yield made
    finally:
        made.run("kubectl", "delete", "namespace", made.namespace, "--timeout=120s")


def answers(network: Cluster, asker: str) -> bool:
    address = network.kubectl("get", "pod", "server", "-o", "jsonpath={.status.podIP}")
    ask = ("kubectl", "-n", network.namespace, "exec", asker, "--", "python3", "-c", ASK, address)
    return network.run(*ask, check=False).returncode == 0


@pytest.mark.parametrize("asker", ["near", "far"])
def test_a_policy_refuses_and_its_end_allows(network: Cluster, asker: str) -> None:
    wait_for(lambda: answers(network, asker), what="an answer without a policy", timeout_s=60)
    policy = {"podSelector": {"matchLabels": {"app": "server"}}, "policyTypes": ["Ingress"], "ingress": []}
    network.apply(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "deny"},
            "spec": policy,
        }
    )
    try:
        wait_for(lambda: not answers(network, asker), what="a refusal by the policy", timeout_s=60)
    finally:
        network.kubectl("delete", "networkpolicy", "deny")
    wait_for(lambda: answers(network, asker), what="an answer again", timeout_s=60)
