"""What the operator says of itself, as long as it is not replaced: its metrics and its log."""

from __future__ import annotations

import json

import requests

from tests.e2e.cluster import Cluster, port_forward
from tests.e2e.conftest import contract_run

LIFE_S = 240.0


def test_metrics_and_logs_tell_of_the_run(release: Cluster, name: str) -> None:
    release.apply(contract_run(name, steps=2))
    release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)
    uid = release.training_run(name)["metadata"]["uid"]

    with port_forward(release, "deployment/heimdall-operator", 8081) as port:
        text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    lines = release.kubectl("logs", "deployment/heimdall-operator", "--tail=-1").splitlines()

    for metric in (
        'heimdall_trainingruns{phase="Succeeded",reason="Completed"}',
        'heimdall_attempts_total{reason="Completed"}',
        "heimdall_job_seconds_count",
        "heimdall_look_seconds_bucket",
        'heimdall_mlflow_seconds_count{call="register"}',
        "heimdall_queue_depth",
    ):
        assert metric in text
    about = [json.loads(line) for line in lines if name in line]
    assert {"acting"} <= {line["event"] for line in about}
    assert all(
        (line["namespace"], line["trainingrun"], line["uid"]) == (release.namespace, name, uid) for line in about
    )
