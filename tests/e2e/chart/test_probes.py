"""A probe tells what it is for: MLflow without its database serves nobody, and goes on as it was when that is back."""

from __future__ import annotations

from typing import Any

from tests.e2e.cluster import Cluster, condition, wait_for
from tests.e2e.conftest import Mlflow

DATABASE = "statefulset/heimdall-database"
AWAY_S, BACK_S = 120.0, 180.0


def server(release: Cluster) -> dict[str, Any]:
    """MLflow's pod, without one that an earlier test has replaced."""
    found = release.list("pods", "app.kubernetes.io/component=tracking")
    (pod,) = [item for item in found if "deletionTimestamp" not in item["metadata"]]
    return pod


def wait_until_ready_is(release: Cluster, status: str, timeout_s: float) -> None:
    wait_for(
        lambda: condition(server(release)["status"], "Ready").get("status") == status,
        what=f"MLflow's readiness being {status}",
        timeout_s=timeout_s,
    )


def test_mlflow_is_not_ready_while_its_database_is_away(release: Cluster, mlflow: Mlflow) -> None:
    before = server(release)
    release.kubectl("scale", DATABASE, "--replicas=0")
    try:
        wait_until_ready_is(release, "False", AWAY_S)
    finally:
        release.kubectl("scale", DATABASE, "--replicas=1")
        release.kubectl("rollout", "status", DATABASE, f"--timeout={BACK_S:.0f}s")
    wait_until_ready_is(release, "True", BACK_S)

    after = server(release)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    restarts = [pod["status"]["containerStatuses"][0]["restartCount"] for pod in (before, after)]
    assert restarts[0] == restarts[1], "what lacks its database is not mended by being started anew"
    assert mlflow.client.get_experiment("0")
