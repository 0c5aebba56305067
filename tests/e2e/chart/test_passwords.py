"""Passwords of Secrets that were there are used and left alone, and each of them opens no more than it should."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, port_forward

pytestmark = pytest.mark.e2e

SECRETS = (
    *("heimdall-database", "heimdall-object-store", "heimdall-tracking"),
    *("heimdall-trainer", "heimdall-recordings-writer"),
)
UPGRADE_TIMEOUT = "300s"


def secrets(release: Cluster) -> dict[str, dict[str, str]]:
    return {name: read(release, name) for name in SECRETS}


def read(release: Cluster, name: str) -> dict[str, str]:
    data: dict[str, str] = json.loads(release.kubectl("get", "secret", name, "-o", "json"))["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def restarts(release: Cluster, name: str) -> tuple[str, int]:
    pod = json.loads(release.kubectl("get", "pod", name, "-o", "json"))
    return pod["metadata"]["uid"], pod["status"]["containerStatuses"][0]["restartCount"]


def s3(endpoint: str, access: dict[str, str]) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=access["HEIMDALL_S3_ACCESS_KEY"],
        aws_secret_access_key=access["HEIMDALL_S3_SECRET_KEY"],
        region_name="us-east-1",
    )


def test_no_secret_is_made_where_one_was_there(release: Cluster) -> None:
    """What others are made of is theirs: the release holds the two that it made of them."""
    made = {item["metadata"]["name"] for item in release.list("secrets", "app.kubernetes.io/managed-by=Helm")}
    assert made == {"heimdall-trainer", "heimdall-recordings-writer"}


def test_an_upgrade_keeps_passwords_and_restarts_no_database(release: Cluster) -> None:
    before, database = secrets(release), restarts(release, "heimdall-database-0")
    release.helm("upgrade", "heimdall", "charts/heimdall", "--reuse-values", "--wait", "--timeout", UPGRADE_TIMEOUT)
    assert secrets(release) == before
    assert restarts(release, "heimdall-database-0") == database


def test_helm_test_passes(release: Cluster) -> None:
    assert "Succeeded" in release.helm("test", "heimdall", "--timeout", UPGRADE_TIMEOUT)


def test_an_existing_secret_that_is_not_there_is_refused(release: Cluster) -> None:
    options = ("--dry-run=server", "--reuse-values", "--set", "database.existingSecret=nowhere")
    with pytest.raises(AssertionError, match="Secret nowhere is not in namespace"):
        release.helm("upgrade", "heimdall", "charts/heimdall", *options)


def test_the_reader_of_recordings_can_not_write_them(release: Cluster) -> None:
    from botocore.exceptions import ClientError

    with port_forward(release, "svc/heimdall-object-store", 9000) as port:
        endpoint = f"http://127.0.0.1:{port}"
        writer = s3(endpoint, read(release, "heimdall-recordings-writer"))
        reader = s3(endpoint, read(release, "heimdall-trainer"))
        writer.put_object(Bucket="heimdall-recordings", Key="rights-of-users", Body=b"iq")
        assert reader.get_object(Bucket="heimdall-recordings", Key="rights-of-users")["Body"].read() == b"iq"
        with pytest.raises(ClientError, match="AccessDenied"):
            reader.delete_object(Bucket="heimdall-recordings", Key="rights-of-users")
        for client in (reader, writer):
            with pytest.raises(ClientError, match="AccessDenied"):
                client.list_objects_v2(Bucket="mlflow")
        writer.delete_object(Bucket="heimdall-recordings", Key="rights-of-users")


def test_the_reader_of_sessions_can_not_write_them(release: Cluster) -> None:
    import psycopg2

    with port_forward(release, "svc/heimdall-database", 5432) as port:

        def connect(secret: str, database: str) -> Any:
            access = read(release, secret)
            user = access["HEIMDALL_DATABASE_URL"].removeprefix("postgresql://").split("@")[0]
            return psycopg2.connect(
                host="127.0.0.1",
                port=port,
                user=user,
                password=access["PGPASSWORD"],
                dbname=database,
                connect_timeout=30,
            )

        connection = connect("heimdall-trainer", "heimdall")
        try:
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                connection.cursor().execute("CREATE TABLE intruder (id int)")
        finally:
            connection.close()
        with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
            connect("heimdall-recordings-writer", "mlflow")
