"""What is large goes from training pods to the object store itself, in parts, by addresses that MLflow signs."""

from __future__ import annotations

import re

import pytest

from heimdall_api.contract import parse_checkpoints
from tests.e2e.chart.test_passwords import s3
from tests.e2e.cluster import Cluster, port_forward
from tests.e2e.conftest import Mlflow, contract_run

pytestmark = pytest.mark.beside
LIFE_S = 240.0
LARGE, LIMIT = 12 * 2**20, 5 * 2**20
"""Bytes of a checkpoint, and from how many on one is large: less than the chart says, for pods with little memory."""
IN_PARTS = re.compile(r"-[2-9]$")
"""How MinIO's tag ends of what came in parts: with their number. MLflow is silent where it sends a file as a whole."""


def test_a_large_checkpoint_arrives_in_parts(
    release: Cluster, mlflow: Mlflow, canaries: dict[str, str], name: str
) -> None:
    limit = {"name": "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", "value": str(LIMIT)}
    template = {"spec": {"containers": [{"name": "trainer", "env": [limit]}]}}
    release.apply(contract_run(name, spec={"podTemplate": template}, steps=5, checkpointBytes=LARGE))

    status = release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=LIFE_S)

    assert status["phase"] == "Succeeded", release.explain(name)
    run = mlflow.client.get_run(status["runID"])
    (checkpoint,) = parse_checkpoints(run.data.tags["heimdall.checkpoints"])
    root = {"ACCESS_KEY": "heimdall-root", "SECRET_KEY": canaries["object-store/root-password"]}
    with port_forward(release, "svc/heimdall-object-store", 9000) as port:
        store = s3(f"http://127.0.0.1:{port}", {f"HEIMDALL_S3_{key}": value for key, value in root.items()})
        key = f"{run.info.experiment_id}/{run.info.run_id}/artifacts/{checkpoint.path}"
        found = store.head_object(Bucket="mlflow", Key=key)
    assert found["ContentLength"] == LARGE
    assert IN_PARTS.search(found["ETag"].strip('"'))
