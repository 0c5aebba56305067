"""A training's ONNX file and plots in a real MLflow with PostgreSQL and MinIO, and what is made of them afterwards."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from heimdall_api.contract import ONNX_FILE, PLOTS_DIR
from heimdall_tracking.runs import find_model, read_facts
from tests import trainer_command
from tests.integration.conftest import Stack

RECEIVERS = 3
SPEC: dict[str, Any] = {
    "model": {"backbone": "test_resnet"},
    "training": {"epochs": 1, "batchSize": 4, "dataLoaderWorkers": 0},
    "export": {"onnx": True},
}

HeimdallTrain = Callable[..., str]


@pytest.fixture
def heimdall_train(stack: Stack, name: str, tmp_path: Path) -> HeimdallTrain:
    """The command line, with a database and a bucket of the test's own: what it prints."""
    place = f"{name[:30].strip('-')}-{secrets.token_hex(3)}"
    stack.postgres.create_database(place)
    stack.minio.s3.create_bucket(Bucket=place)
    env = {
        **os.environ,
        "MLFLOW_TRACKING_URI": stack.mlflow.url,
        "HEIMDALL_DATABASE_URL": stack.postgres.url(place),
        "HEIMDALL_RECORDINGS_URL": f"s3://{place}",
        "HEIMDALL_S3_ENDPOINT_URL": stack.minio.url,
        "HEIMDALL_S3_ACCESS_KEY": stack.minio.access_key,
        "HEIMDALL_S3_SECRET_KEY": stack.minio.secret_key,
        "HEIMDALL_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }

    return partial(trainer_command.heimdall_train, env=env, cwd=tmp_path)


def in_minio(stack: Stack, location: str, path: str) -> bytes:
    """The bytes of an artifact as they lie in the bucket."""
    key = f"{location.removeprefix('mlflow-artifacts:/').strip('/')}/{path}"
    content: bytes = stack.minio.s3.get_object(Bucket=stack.mlflow.bucket, Key=key)["Body"].read()
    return content


def test_the_bytes_of_the_export_lie_in_minio_and_the_version_can_be_looked_at(
    stack: Stack, name: str, heimdall_train: HeimdallTrain, tmp_path: Path
) -> None:
    import onnxruntime

    heimdall_train("data", "generate", "--sessions", "4", "--transmissions", "3", "--receivers", str(RECEIVERS))
    spec = {**SPEC, "registration": {"model": name}, "tracking": {"experiment": name}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"metadata": {"name": "exported"}, "spec": spec}))

    said = heimdall_train("run", "-f", "run.yaml")

    assert f"model:   models:/{name}/1" in said
    client = stack.client()
    version = client.get_model_version(name, "1")
    assert version.run_id is not None
    run = client.get_run(version.run_id)
    facts = read_facts(client, version.run_id)
    assert facts is not None
    model_id = find_model(client, facts)
    assert model_id is not None
    assert model_id in client.get_model_version_download_uri(name, "1")
    logged = client.get_logged_model(model_id)
    exported = in_minio(stack, run.info.artifact_uri, ONNX_FILE)
    assert in_minio(stack, logged.artifact_location, ONNX_FILE) == exported, "the version has it"
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    inputs = {
        "spectrograms": np.zeros((2, RECEIVERS + 1, 3, 128, 32), np.float32),
        "receivers": np.zeros((2, RECEIVERS + 1, 2), np.float32),
    }
    position, sigma = session.run(["position", "sigma"], inputs)
    assert (position.shape, sigma.shape) == ((2, 2), (2, 2))
    assert (sigma > 0).all()
    for plot in ("error_map.png", "calibration.png", "loss.png"):
        assert in_minio(stack, run.info.artifact_uri, f"{PLOTS_DIR}/{plot}").startswith(b"\x89PNG")

    figures = json.loads(heimdall_train("evaluate", "--model", f"models:/{name}/1", "--json"))
    assert figures["run"] == version.run_id
    for figure in ("position_error_median_m", "coverage_95"):
        assert figures[figure] == pytest.approx(run.data.metrics[f"test/{figure}"], rel=1e-3)
    heimdall_train("export", "--model", f"models:/{name}/1", "-o", "again.onnx")
    again = onnxruntime.InferenceSession(tmp_path / "again.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(again.run(["position"], inputs)[0], position, atol=0.1)
