"""One MLflow server, PostgreSQL and MinIO for all integration tests; ended and removed after them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from heimdall_tracking import MLflowTracker, TrackingSettings
from tests.integration.servers import Minio, Mlflow, Postgres, Redis, Server

HTTP_RETRIES = "2"
HTTP_TIMEOUT_S = "10"
"""Less patience within a call than MLflow's own: what is tested is the patience around it. Where HEIMDALL_OUTAGE_S asks
for the long form, calls have MLflow's own, as users' have."""

OWN_VARIABLES = {
    *("HEIMDALL_DATABASE_URL", "HEIMDALL_S3_CA_BUNDLE", "HEIMDALL_REDIS_URL", "HEIMDALL_UNDELIVERED_DIR"),
    *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"),
}

LONGEST = ("test_export.py", "test_undelivered.py", "test_tracking.py", "test_outages.py")

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/integration/" in str(item.path):
            item.add_marker(pytest.mark.integration)
    # What takes longest begins first, where files run beside each other.
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def clean_environment() -> Iterator[None]:
    """Nothing of the caller's own servers and credentials."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("MLFLOW_", "AWS_", "PG")) or name in OWN_VARIABLES:
                patch.delenv(name)
        if "HEIMDALL_OUTAGE_S" not in os.environ:
            patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", HTTP_RETRIES)
            patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", HTTP_TIMEOUT_S)
        patch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture(scope="session")
def server_folder(clean_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def postgres_process(server_folder: Path) -> Iterator[Postgres]:
    server = Postgres(server_folder)
    with ExitStack() as after:
        after.callback(server.remove)
        after.callback(server.stop)
        server.start()
        server.create_database("mlflow")
        yield server


@pytest.fixture(scope="session")
def minio_process(server_folder: Path) -> Iterator[Minio]:
    server = Minio(server_folder)
    with ExitStack() as after:
        after.callback(server.stop)
        server.start()
        server.s3.create_bucket(Bucket=Mlflow.bucket)
        yield server


@pytest.fixture(scope="session")
def mlflow_process(server_folder: Path, postgres_process: Postgres, minio_process: Minio) -> Iterator[Mlflow]:
    server = Mlflow(server_folder, postgres_process, minio_process)
    with ExitStack() as after:
        after.callback(server.stop)
        server.start()
        yield server


@pytest.fixture(scope="session")
def redis_process(server_folder: Path) -> Iterator[Redis]:
    server = Redis(server_folder)
    with ExitStack() as after:
        after.callback(server.stop)
        yield server


@pytest.fixture
def redis(redis_process: Redis) -> Redis:
    """It runs, whatever the test before did to it."""
    redis_process.start()
    return redis_process


@pytest.fixture
def postgres(postgres_process: Postgres) -> Postgres:
    """It runs, whatever the test before did to it."""
    postgres_process.start()
    return postgres_process


@pytest.fixture
def minio(minio_process: Minio) -> Minio:
    """It runs, whatever the test before did to it."""
    minio_process.start()
    return minio_process


@dataclass(frozen=True)
class Stack:
    """The three servers, and what speaks to them."""

    mlflow: Mlflow
    postgres: Postgres
    minio: Minio

    def servers(self, *names: str) -> list[Server]:
        return [server for server in (self.postgres, self.minio, self.mlflow) if server.name in names]

    def client(self) -> MlflowClient:
        return MlflowClient(self.mlflow.url, self.mlflow.url)

    def tracker(self, experiment: str) -> MLflowTracker:
        return MLflowTracker(TrackingSettings(tracking_uri=self.mlflow.url, experiment_name=experiment))


@pytest.fixture
def stack(postgres: Postgres, minio: Minio, mlflow_process: Mlflow) -> Stack:
    """All three run, whatever the test before did to them."""
    mlflow_process.start()
    return Stack(mlflow_process, postgres, minio)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name for the test's own experiment, model, database or bucket."""
    short = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower().removeprefix("test_"))[:40].strip("-")
    return f"{short}-{next(_numbers)}"
