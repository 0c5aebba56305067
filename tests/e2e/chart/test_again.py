"""A release of its own with generated passwords: upgraded, rolled back, removed, installed again on what it left."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, port_forward, wait_for
from tests.e2e.conftest import PLACES, namespace

NAME = "again"
INSTALL_TIMEOUT = "420s"
SECRETS = tuple(f"{NAME}-heimdall-{role}" for role in ("database", "object-store", "tracking"))
VOLUMES = {f"data-{NAME}-heimdall-database-0", f"data-{NAME}-heimdall-object-store-0"}
# Its operator watches its own namespace alone, which the other release's watches too: nothing is trained here.
OPTIONS = ("--set", "crd.install=false", *PLACES)


@pytest.fixture
def again(release: Cluster) -> Iterator[Cluster]:
    """An empty namespace; removed with everything in it."""
    with namespace(release, "again") as made:
        try:
            yield made
        finally:
            made.run("helm", "-n", made.namespace, "uninstall", NAME, "--wait", "--timeout", "120s", check=False)


def install(again: Cluster, verb: str) -> None:
    options = (*OPTIONS, "--set", f"operator.namespaces={{{again.namespace}}}", "--wait", "--timeout", INSTALL_TIMEOUT)
    again.helm(verb, NAME, "charts/heimdall", *options)


def passwords(again: Cluster) -> dict[str, dict[str, str]]:
    return {name: json.loads(again.kubectl("get", "secret", name, "-o", "json"))["data"] for name in SECRETS}


def with_mlflow(again: Cluster, call: Any) -> Any:
    """Ask MLflow as its administrator, with the password that the Secret has now."""
    from mlflow import MlflowClient

    password = base64.b64decode(passwords(again)[SECRETS[2]]["admin-password"]).decode()
    with port_forward(again, f"svc/{NAME}-heimdall-tracking", 5000) as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        return call(MlflowClient(f"http://127.0.0.1:{port}"))


def record(client: Any) -> str:
    run = client.create_run("0")
    client.log_text(run.info.run_id, "kept", "kept.txt")
    return str(run.info.run_id)


def test_generated_passwords_open_what_was_kept(again: Cluster) -> None:
    install(again, "install")
    before = passwords(again)
    run_id = with_mlflow(again, record)

    def still_there(client: Any) -> list[str]:
        assert client.get_run(run_id).info.run_id == run_id
        return [item.path for item in client.list_artifacts(run_id)]

    install(again, "upgrade")
    assert passwords(again) == before
    assert with_mlflow(again, still_there) == ["kept.txt"]

    again.helm("rollback", NAME, "1", "--wait", "--timeout", INSTALL_TIMEOUT)
    assert passwords(again) == before
    assert with_mlflow(again, still_there) == ["kept.txt"]

    again.helm("uninstall", NAME, "--wait", "--timeout", "180s")
    wait_for(lambda: not again.list("pods"), what="the end of all pods", timeout_s=120)
    assert passwords(again) == before
    assert {item["metadata"]["name"] for item in again.list("pvc")} == VOLUMES

    install(again, "install")
    assert passwords(again) == before
    assert with_mlflow(again, still_there) == ["kept.txt"]
    assert "Succeeded" in again.helm("test", NAME, "--timeout", INSTALL_TIMEOUT)
