"""What the operator may not do, tried on the cluster as its service account."""

from __future__ import annotations

import pytest

from tests.e2e.cluster import Cluster

FORBIDDEN = [
    ("get", "secrets"),
    ("list", "secrets"),
    ("create", "pods"),
    ("delete", "pods"),
    ("create", "pods/exec"),
    ("patch", "jobs"),
    ("delete", "trainingruns"),
    ("create", "trainingruns"),
    ("get", "configmaps"),
    ("list", "nodes"),
    ("create", "clusterrolebindings.rbac.authorization.k8s.io"),
]
ALLOWED = [("create", "jobs"), ("patch", "trainingruns/status"), ("get", "pods/log"), ("create", "services")]


def can_i(where: Cluster, verb: str, resource: str, *, account_of: Cluster | None = None) -> str:
    """Whether a release's operator may do something in a namespace: yes or no."""
    account = f"system:serviceaccount:{(account_of or where).namespace}:heimdall-operator"
    kind, _, part = resource.partition("/")
    ask = ("kubectl", "-n", where.namespace, "auth", "can-i", verb, kind, f"--subresource={part}", f"--as={account}")
    return where.run(*ask, check=False).stdout.strip()


@pytest.mark.parametrize(("verb", "resource"), FORBIDDEN)
def test_the_operator_may_not(release: Cluster, verb: str, resource: str) -> None:
    assert can_i(release, verb, resource) == "no"


@pytest.mark.parametrize(("verb", "resource"), ALLOWED)
def test_the_operator_may(release: Cluster, verb: str, resource: str) -> None:
    assert can_i(release, verb, resource) == "yes"
