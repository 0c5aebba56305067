"""The whole way: the real localizer, on recordings that lie in PostgreSQL and MinIO, to a registered model."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from heimdall_api.contract import TAG_UID, parse_checkpoints
from tests.e2e.cluster import ROOT, Cluster, condition, port_forward, wait_for
from tests.e2e.conftest import Mlflow
from tests.e2e.test_life_cycle import holding_gpus

pytestmark = pytest.mark.beside

TRAINING_S = 900.0
FALL_NATS = 0.3
"""What the loss falls by from the first epoch to the last: by twice that, with these recordings and this seed."""
PREDICT = """
import json, math, sys
from pathlib import Path
import mlflow
from heimdall_trainer.data import HeimdallDataset
from heimdall_trainer.settings import load_data_settings

Path("model").mkdir()
model = mlflow.pyfunc.load_model(sys.argv[1], dst_path="model")
dataset = HeimdallDataset.open(load_data_settings(), model.metadata.metadata["sessions"]["test"])
errors, sigmas = [], []
for sample in map(dataset.__getitem__, range(len(dataset))):
    out = model.predict({name: sample[name][None].numpy() for name in ("spectrograms", "receivers")})
    errors.append(math.dist(out["position"][0], sample["position"]))
    sigmas += out["sigma"][0].tolist()
print(json.dumps({"errors": errors, "sigmas": sigmas}))
"""


def example(name: str, **training: Any) -> dict[str, Any]:
    """The example that the documents name, under another name."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "manifests/examples/localizer.yaml").read_text())
    document["metadata"]["name"] = name
    document["spec"]["training"] |= training
    return document


@dataclass(frozen=True)
class Trained:
    """A TrainingRun that went the whole way, and its MLflow run."""

    resource: dict[str, Any]
    run: Any

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.resource["status"]
        return status


@pytest.fixture(scope="module")
def trained(release: Cluster, mlflow: Mlflow, recordings: None) -> Iterator[Trained]:
    """`kubectl apply` of the example, and `kubectl wait` until it is complete."""
    del recordings
    release.kubectl("apply", "-f", "manifests/examples/localizer.yaml")
    try:
        wait = ("wait", "--for=condition=Complete", "trainingrun/localizer", f"--timeout={TRAINING_S:.0f}s")
        done = release.run("kubectl", "-n", release.namespace, *wait, check=False, timeout_s=TRAINING_S + 60)
        assert done.returncode == 0, release.explain("localizer")
        resource = release.training_run("localizer")
        runs = mlflow.runs_of(resource["metadata"]["uid"])
        assert len(runs) == 1
        yield Trained(resource, runs[0])
    finally:
        release.kubectl("delete", "trainingrun", "localizer", "--timeout=120s")


def test_the_resource_ends_with_run_id_and_model_version(release: Cluster, trained: Trained) -> None:
    status = trained.status
    uri = release.kubectl("get", "trainingrun", "localizer", "-o", "jsonpath={.status.modelURI}")
    assert uri == status["modelURI"]

    assert status["phase"] == "Succeeded"
    assert status["runID"] == trained.run.info.run_id
    assert status["runURL"].endswith(f"/runs/{status['runID']}")
    assert status["modelURI"] == f"models:/heimdall-localizer/{status['modelVersion']}"
    assert status["progress"]["percent"] == 100
    assert status["bestMetric"]["name"] == "val/loss"
    assert [item["reason"] for item in status["attempts"]] == ["Completed"]
    assert status["completionTime"] >= status["startTime"]
    assert condition(status, "ModelRegistered")["status"] == "True"


def test_the_run_tells_what_was_trained(trained: Trained, mlflow: Mlflow) -> None:
    run, client = trained.run, mlflow.client

    assert run.info.status == "FINISHED"
    assert run.data.tags[TAG_UID] == trained.resource["metadata"]["uid"]
    assert run.data.params["model.backbone"] == "resnet10t"
    assert run.data.params["training.epochs"] == "6"
    assert len(run.data.params["dataset.digest"]) == 64
    steps = [item.step for item in client.get_metric_history(run.info.run_id, "train/loss_step")]
    assert steps == sorted(set(steps))
    assert len(steps) > 2 * 6, "a value for each step"
    epochs = client.get_metric_history(run.info.run_id, "val/position_error_median_m")
    assert len(epochs) == 6, "a value for each epoch"
    assert "test/position_error_median_m" in run.data.metrics


def test_the_validation_loss_fell(trained: Trained, mlflow: Mlflow) -> None:
    history = [item.value for item in mlflow.client.get_metric_history(trained.run.info.run_id, "val/loss")]

    assert history[-1] < history[0] - FALL_NATS


def test_bytes_of_the_checkpoints_lie_in_minio(release: Cluster, trained: Trained, canaries: dict[str, str]) -> None:
    import boto3

    checkpoints = parse_checkpoints(trained.run.data.tags["heimdall.checkpoints"])
    assert 1 <= len(checkpoints) <= 4, "the three best and the last"
    with port_forward(release, "svc/heimdall-object-store", 9000) as port:
        store = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id="heimdall-root",
            aws_secret_access_key=canaries["object-store/root-password"],
            region_name="us-east-1",
        )
        for checkpoint in checkpoints:
            experiment, run_id = trained.run.info.experiment_id, trained.run.info.run_id
            key = f"{experiment}/{run_id}/artifacts/{checkpoint.path}"
            content = store.get_object(Bucket="mlflow", Key=key)["Body"].read()
            assert hashlib.sha256(content).hexdigest() == checkpoint.sha256
        listed = store.list_objects_v2(Bucket="mlflow", Prefix=f"{experiment}/{run_id}/artifacts/checkpoints/")
        assert len(listed["Contents"]) == len(checkpoints), "what was replaced is gone"


def test_the_version_predicts_in_a_fresh_process(
    release: Cluster, mlflow: Mlflow, trained: Trained, canaries: dict[str, str], tmp_path: Path
) -> None:
    with (
        port_forward(release, "svc/heimdall-database", 5432) as database,
        port_forward(release, "svc/heimdall-object-store", 9000) as store,
    ):
        env = {
            **os.environ,
            "MLFLOW_TRACKING_URI": mlflow.url,
            "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
            "HEIMDALL_DATABASE_URL": f"postgresql://heimdall_reader@127.0.0.1:{database}/heimdall",
            "PGPASSWORD": canaries["database/reader-password"],
            "HEIMDALL_RECORDINGS_URL": "s3://heimdall-recordings",
            "HEIMDALL_S3_ENDPOINT_URL": f"http://127.0.0.1:{store}",
            "HEIMDALL_S3_ACCESS_KEY": "heimdall-reader",
            "HEIMDALL_S3_SECRET_KEY": canaries["object-store/reader-secret-key"],
            "HEIMDALL_CACHE_DIR": str(tmp_path / "cache"),
        }
        done = subprocess.run(
            [sys.executable, "-c", PREDICT, trained.status["modelURI"]],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    told = trained.run.data.metrics["test/position_error_median_m"]
    assert median(out["errors"]) == pytest.approx(told, rel=0.01), "it is the network that was tested"
    assert all(sigma > 0 for sigma in out["sigmas"])


BORING = "pytorch_lightning.demos.boring_classes"
BROKEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "an unknown backbone": (
        {"model": {"backbone": "resnet81"}},
        "InvalidConfiguration",
        "spec.model.backbone names 'resnet81', which timm does not have: did you mean",
    ),
    "a module that can't be imported": (
        {"model": {"module": "nowhere.to.be:Found"}},
        "InvalidConfiguration",
        "spec.model.module 'nowhere.to.be:Found' can't be imported: ModuleNotFoundError",
    ),
    "an exception in training": (
        {"data": {"module": f"{BORING}:BoringDataModule"}},
        "UserError",
        "IndexError: too many indices for tensor of dimension 2 (",
    ),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN.keys())
def test_what_can_not_train_fails_with_a_reason(
    release: Cluster, mlflow: Mlflow, recordings: None, name: str, case: tuple[dict[str, Any], str, str]
) -> None:
    del recordings
    spec, reason, message = case
    run = example(name)
    run["spec"] = {"resources": run["spec"]["resources"], "training": {"dataLoaderWorkers": 0}, **spec}
    release.apply(run)

    status = release.wait_for_phase(name, "Failed", timeout_s=TRAINING_S)

    failed = condition(status, "Failed")
    assert (failed["reason"], failed["status"]) == (reason, "True")
    assert message in failed["message"]
    assert len(status["attempts"]) == 1, "nothing is tried again that can't work"
    assert [item.info.status for item in mlflow.runs_of(release.training_run(name)["metadata"]["uid"])] == ["FAILED"]
    wait_for(lambda: not holding_gpus(release, name), what="the GPU being free", timeout_s=60)


def test_a_lightning_module_of_somebody_else_trains(release: Cluster, mlflow: Mlflow, trainer: None, name: str) -> None:
    del trainer
    run = example(name)
    run["spec"] = {
        "model": {"module": f"{BORING}:BoringModel"},
        "training": {"epochs": 2, "dataLoaderWorkers": 0},
        "resources": run["spec"]["resources"],
    }
    release.apply(run)

    status = release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=TRAINING_S)

    assert status["phase"] == "Succeeded", release.explain(name)
    run_found = mlflow.client.get_run(status["runID"])
    assert run_found.info.status == "FINISHED"
    assert parse_checkpoints(run_found.data.tags["heimdall.checkpoints"])
