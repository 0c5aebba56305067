"""`helm test`: MLflow answers from its database, keeps artifacts in the object store, and lets nobody in unasked."""

import os
import tempfile
import uuid
from pathlib import Path

# A pod that was just made may be refused for seconds, until the network has heard of it.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

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
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        del os.environ[name]
    try:
        client.get_run(run)
    except MlflowException:
        print("MLflow lets nobody in without a password")
    else:
        raise SystemExit("MLflow answered somebody who gave no password")
