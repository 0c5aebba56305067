"""What the operator may not do, tried on the cluster as its service account."""

from __future__ import annotations

import pytest
import requests

from tests.e2e.cluster import Cluster, wait_for
from tests.e2e.conftest import PRIVILEGED, Mlflow, dry_run

pytestmark = pytest.mark.beside
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


def can_i(where: Cluster, verb: str, resource: str, *, account_of: Cluster | None = None, account: str = "") -> str:
    """Whether a release's operator, or another account, may do something in a namespace: yes or no."""
    account = account or f"system:serviceaccount:{(account_of or where).namespace}:heimdall-operator"
    kind, _, part = resource.partition("/")
    ask = ("kubectl", "-n", where.namespace, "auth", "can-i", verb, kind, f"--subresource={part}", f"--as={account}")
    return where.run(*ask, check=False).stdout.strip()


@pytest.mark.parametrize(("verb", "resource"), FORBIDDEN)
def test_the_operator_may_not(release: Cluster, verb: str, resource: str) -> None:
    assert can_i(release, verb, resource) == "no"


@pytest.mark.parametrize(("verb", "resource"), ALLOWED)
def test_the_operator_may(release: Cluster, verb: str, resource: str) -> None:
    assert can_i(release, verb, resource) == "yes"


@pytest.mark.parametrize(
    ("role", "verb", "resource", "answer"),
    [
        ("view", "list", "trainingruns", "yes"),
        ("view", "create", "trainingruns", "no"),
        ("edit", "create", "trainingruns", "yes"),
        ("edit", "patch", "trainingruns/status", "no"),
        ("admin", "delete", "trainingruns", "yes"),
    ],
)
def test_people_with_a_built_in_role_may(release: Cluster, role: str, verb: str, resource: str, answer: str) -> None:
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": f"people-who-{role}"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [{"kind": "User", "name": f"somebody-who-{role}s", "apiGroup": "rbac.authorization.k8s.io"}],
    }
    release.apply(binding)
    # The control plane puts built-in roles together behind the scenes.
    wait_for(
        lambda: can_i(release, verb, resource, account=f"somebody-who-{role}s") == answer,
        what=f"{role} may {verb} {resource}: {answer}",
        timeout_s=60,
    )


def test_who_reads_secrets_as_the_operator_is_refused(release: Cluster) -> None:
    account = f"system:serviceaccount:{release.namespace}:heimdall-operator"

    assert "Forbidden" in release.refused("get", "secret", "heimdall-database", f"--as={account}")
    release.kubectl("get", "jobs", f"--as={account}")  # what it may do it does by the same words


def test_a_privileged_pod_is_refused(release: Cluster) -> None:
    """Every namespace that these tests make is tried in this way before it is used: `restrict` in conftest.py."""
    assert "violates PodSecurity" in dry_run(release, PRIVILEGED)


def test_mlflow_answers_under_no_name_but_its_own(release: Cluster, mlflow: Mlflow) -> None:
    """What a page in somebody's browser reaches by a name of its own (DNS rebinding)."""
    asked = {"url": f"{mlflow.url}/api/2.0/mlflow/experiments/get?experiment_id=0", "auth": mlflow.login, "timeout": 30}

    assert requests.get(**asked).ok
    assert requests.get(**asked, headers={"Host": "evil.example"}).status_code == requests.codes.forbidden


def test_nobody_asks_mlflow_without_a_password(release: Cluster, mlflow: Mlflow) -> None:
    for path in ("api/2.0/mlflow/experiments/get?experiment_id=0", "get-artifact?run_uuid=0&path=x"):
        assert requests.get(f"{mlflow.url}/{path}", timeout=30).status_code == requests.codes.unauthorized, path
    assert requests.get(f"{mlflow.url}/health", timeout=30).ok


def test_a_training_pods_login_can_promote_nothing(release: Cluster, mlflow: Mlflow, canaries: dict[str, str]) -> None:
    made = mlflow.client.create_registered_model("nobodys-model")
    try:
        answer = requests.patch(
            f"{mlflow.url}/api/2.0/mlflow/registered-models/update",
            json={"name": made.name, "description": "mine"},
            auth=("heimdall-trainer", canaries["tracking/trainer-password"]),
            timeout=30,
        )
        assert answer.status_code == requests.codes.forbidden
    finally:
        mlflow.client.delete_registered_model(made.name)
