"""MLflow's server and what it stands on, as processes, for as long as something is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.integration.servers import Minio, Mlflow, Postgres


@dataclass(frozen=True)
class Servers:
    """They run, and each has a database or a bucket for MLflow."""

    postgres: Postgres
    minio: Minio
    mlflow: Mlflow


@contextmanager
def servers(*, artifacts: bool) -> Iterator[Servers]:
    """Start them, and end and remove them afterwards.

    Args:
        artifacts: Whether artifacts are stored; MinIO is not started otherwise.
    """
    with ExitStack() as after:
        folder = Path(after.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)  # PostgreSQL runs as another user
        postgres, minio = Postgres(folder), Minio(folder)
        after.callback(postgres.remove)
        after.callback(postgres.stop)
        postgres.start()
        postgres.create_database("mlflow")
        if artifacts:
            after.callback(minio.stop)
            minio.start()
            minio.s3.create_bucket(Bucket=Mlflow.bucket)
        mlflow = Mlflow(folder, postgres, minio)
        after.callback(mlflow.stop)
        mlflow.start()
        yield Servers(postgres, minio, mlflow)
