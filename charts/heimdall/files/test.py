"""`helm test`: MLflow answers from its database, keeps artifacts in the object store, and lets nobody in unasked."""

import os
import tempfile
import urllib.error
import urllib.request
import uuid
from http import HTTPStatus
from pathlib import Path

# A pod that was just made may be refused for seconds, until the network has heard of it.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")

from mlflow import MlflowClient

URI = os.environ["TRACKING_URI"]
EXPERIMENT = "heimdall-helm-test"
client = MlflowClient(URI, URI)

found = client.get_experiment_by_name(EXPERIMENT)
experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT)
run = client.create_run(experiment).info.run_id
try:
    content = uuid.uuid4().hex
    client.log_text(run, content, "helm-test.txt")
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(client.download_artifacts(run, "helm-test.txt", folder)).read_text()
    if kept != content:
        raise SystemExit("the artifact came back changed")
    print("MLflow answers from its database and keeps artifacts in the object store")
finally:
    client.delete_run(run)

if os.environ.get("NEEDS_LOGIN"):
    try:
        urllib.request.urlopen(f"{URI}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=30)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.UNAUTHORIZED:
            raise
        print("MLflow lets nobody in without a password")
    else:
        raise SystemExit("MLflow answered somebody who gave no password")
