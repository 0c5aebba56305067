"""A release of the chart that landed last: upgraded as it trains, rolled back, removed, installed on what it left."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.e2e.chart.pages import Typist, section
from tests.e2e.cluster import Cluster, condition, port_forward, wait_for
from tests.e2e.conftest import OTHER_NODE, PLACES, Mlflow, contract_run, namespace

pytestmark = pytest.mark.nodes
NAME = "again"
RELEASED = Path(__file__).parent / "released/heimdall-0.2.0.tgz"
INSTALL_TIMEOUT = "280s"
LIFE_S = 240.0
STORES = tuple(f"{NAME}-heimdall-{role}" for role in ("database", "object-store"))
LOGINS = f"{NAME}-heimdall-tracking"
SECRETS = (*STORES, LOGINS)
VOLUMES = {f"data-{store}-0" for store in STORES}
RUN = "in-flight"
STAYS = {"podTemplate": {"spec": {"nodeSelector": {"kubernetes.io/hostname": OTHER_NODE}}}}
"""Beside this test a node goes."""
ROLES = ("operator", "tracking", "database", "objectStore")
REPLACED = ("--set-string", ",".join(f"{role}.podAnnotations.upgraded=yes" for role in ROLES))
"""Every pod of the release is replaced, as where a version brings other images."""
COMPONENTS = ("operator", "tracking", "database", "object-store")


@pytest.fixture
def again(release: Cluster, confined: None) -> Iterator[Cluster]:
    """An empty namespace; removed with everything in it."""
    with namespace(release, "again") as made:
        yield made


def install(again: Cluster, chart: str | Path, *more: str) -> None:
    # One worker process: MLflow is started many times here, and each of them takes seconds of a processor to begin.
    listed = (
        # What is of the cluster would not go with the namespace.
        *("--set", "crd.install=false,crd.userRoles=false", "--set", "tracking.workers=1"),
        *("--set", f"operator.namespaces={{{again.namespace}}}"),
    )
    again.helm("install", NAME, str(chart), *listed, *PLACES, *more, "--wait", "--timeout", INSTALL_TIMEOUT)


def upgrade(again: Cluster, *more: str) -> None:
    """As docs/upgrading.md says."""
    kept = ("--reset-then-reuse-values", *more)
    again.helm("upgrade", NAME, "charts/heimdall", *kept, "--wait", "--timeout", INSTALL_TIMEOUT)


def passwords(again: Cluster, *names: str) -> dict[str, dict[str, str]]:
    return {name: json.loads(again.kubectl("get", "secret", name, "-o", "json"))["data"] for name in names}


def with_mlflow(again: Cluster, call: Callable[[Mlflow], Any], target: str = f"svc/{LOGINS}") -> Any:
    """Ask MLflow, as its administrator with the password that the Secret has now."""
    word = base64.b64decode(passwords(again, LOGINS)[LOGINS]["admin-password"]).decode()
    with port_forward(again, target, 5000) as port, pytest.MonkeyPatch.context() as patch:
        mlflow = Mlflow(f"http://127.0.0.1:{port}", ("admin", word))
        for variable, value in zip(("USERNAME", "PASSWORD"), mlflow.login, strict=True):
            patch.setenv(f"MLFLOW_TRACKING_{variable}", value)
        anonymous = requests.get(f"{mlflow.url}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=30)
        assert anonymous.status_code == requests.codes.unauthorized
        return call(mlflow)


def record(mlflow: Mlflow) -> str:
    run = mlflow.client.create_run("0")
    mlflow.client.log_text(run.info.run_id, "kept", "kept.txt")
    return str(run.info.run_id)


def go_back(again: Cluster, folder: Path) -> None:
    """To the first revision, as docs/upgrading.md says where passwords have changed since."""
    _, by_upgrade = section("docs/upgrading.md", "Back")
    named = re.sub(r"(values|upgrade) heimdall ", rf"\1 {NAME} ", by_upgrade)
    Typist(again, folder).type(named.replace("--revision 3", "--revision 1"))


def change_password(again: Cluster, secret: str, key: str) -> None:
    word = base64.b64encode(b"changed-since").decode()
    again.kubectl("patch", "secret", secret, "-p", json.dumps({"data": {key: word}}))
    upgrade(again)


def pods(again: Cluster, role: str) -> dict[str, str]:
    """Names of a role's pods that are ready, by their UIDs."""
    selector = f"app.kubernetes.io/instance={NAME},app.kubernetes.io/component={role}"
    found = [item for item in again.list("pods", selector) if "deletionTimestamp" not in item["metadata"]]
    ready = [item for item in found if condition(item["status"], "Ready").get("status") == "True"]
    return {item["metadata"]["uid"]: item["metadata"]["name"] for item in ready}


def evict(again: Cluster, pod: str) -> str:
    """Ask for what a drain asks for; what is said where it is refused, or nothing."""
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": again.namespace}}
    path = f"/api/v1/namespaces/{again.namespace}/pods/{pod}/eviction"
    return again.run("kubectl", "create", "--raw", path, "-f", "-", text=json.dumps(body), check=False).stderr


def drain_one_of_two(again: Cluster, call: Callable[[Mlflow], Any]) -> None:
    """One MLflow server goes, as with its node; the budget keeps the other one, which serves."""

    def may_go() -> bool:
        return bool((again.get("pdb", LOGINS) or {}).get("status", {}).get("disruptionsAllowed"))

    wait_for(may_go, what="two servers, of which one may go", timeout_s=LIFE_S)
    first, second = pods(again, "tracking").values()
    assert evict(again, first) == ""
    assert "violate the pod's disruption budget" in evict(again, second)
    with_mlflow(again, call, f"pod/{second}")


def test_a_release_outlives_upgrade_rollback_and_removal(again: Cluster, tmp_path: Path) -> None:
    install(again, RELEASED)
    before = passwords(again, *SECRETS)
    run_id = with_mlflow(again, record)

    again.apply(contract_run(RUN, spec=STAYS, steps=30, stepSeconds=1))
    started = again.wait_for_phase(RUN, "Running", timeout_s=LIFE_S)
    old = {role: pods(again, role) for role in COMPONENTS}
    upgrade(again, *REPLACED)
    for role, uids in old.items():
        assert len(uids) == 1
        assert not uids.keys() & pods(again, role).keys(), f"{role} was not replaced"
    assert passwords(again, *SECRETS) == before
    ended = again.wait_for_phase(RUN, "Succeeded", "Failed", timeout_s=LIFE_S)
    assert (ended["phase"], ended["attempt"], ended["runID"]) == ("Succeeded", 1, started["runID"]), again.explain(RUN)
    uid = again.training_run(RUN)["metadata"]["uid"]

    def trained_once(mlflow: Mlflow) -> None:
        assert mlflow.client.get_run(run_id).info.run_id == run_id
        assert [item.path for item in mlflow.client.list_artifacts(run_id)] == ["kept.txt"]
        assert [(run.info.run_id, run.info.status) for run in mlflow.runs_of(uid)] == [(ended["runID"], "FINISHED")]
        assert [version.status for version in mlflow.versions_of("steps", ended["runID"])] == ["READY"]

    with_mlflow(again, trained_once)
    upgrade(again, "--set", "tracking.replicas=2")
    drain_one_of_two(again, trained_once)

    again.helm("rollback", NAME, "1", "--wait", "--timeout", INSTALL_TIMEOUT)
    assert passwords(again, *SECRETS) == before
    with_mlflow(again, trained_once)

    again.helm("uninstall", NAME, "--wait", "--timeout", "180s")
    mine = f"app.kubernetes.io/instance={NAME}"
    wait_for(lambda: not again.list("pods", mine), what="the end of the release's pods", timeout_s=120)
    assert passwords(again, *SECRETS) == before
    assert {item["metadata"]["name"] for item in again.list("pvc")} == VOLUMES

    install(again, "charts/heimdall")
    assert passwords(again, *SECRETS) == before
    with_mlflow(again, trained_once)
    assert again.status(RUN) == ended, "what ended is not trained again"
    assert "Succeeded" in again.helm("test", NAME, "--timeout", INSTALL_TIMEOUT)

    change_password(again, STORES[1], "reader-secret-key")
    changed = passwords(again, *SECRETS, "heimdall-trainer")
    go_back(again, tmp_path)
    assert passwords(again, *SECRETS, "heimdall-trainer") == changed
    assert changed["heimdall-trainer"]["HEIMDALL_S3_SECRET_KEY"] != before[STORES[1]]["reader-secret-key"]
