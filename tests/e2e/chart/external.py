"""Services that were there before a release, each with a certificate of one authority: manifests and who may log in."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.chart.test_flows import TRAINING
from tests.e2e.cluster import ROOT, Cluster, port_forward
from tests.e2e.conftest import OTHER_NODE

S3_IMAGE = "ghcr.io/versity/versitygw:v1.8.0"
POSTGRESQL_IMAGE = "docker.io/library/postgres:15"
FRONT_IMAGE = "heimdall/contract:dev"
MLFLOW_IMAGE = "ghcr.io/mlflow/mlflow:v3.17.2-full"
UNPRIVILEGED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
REGION = "eu-central-1"
ARTIFACTS, RECORDINGS = "team-mlflow", "team-recordings"
POSTGRESQL_PORT, S3_PORT, FRONT_PORT = 5432, 7070, 8443
WHO = ("mlflow", "writer", "reader")
LOGINS = ("root", "mlflow", *(f"{store}/{who}" for store in ("database", "s3") for who in WHO))
ON_NODE = {"nodeSelector": {"kubernetes.io/hostname": OTHER_NODE}}
FRONT = """
import asyncio, ssl, sys

async def carry(source, target):
    try:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
    finally:
        target.close()

async def serve(reader, writer):
    behind = await asyncio.open_connection(sys.argv[1], 5000)
    await asyncio.gather(carry(reader, behind[1]), carry(behind[0], writer), return_exceptions=True)

async def main():
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain("/tls/server.pem", "/tls/server.key")
    server = await asyncio.start_server(serve, port=int(sys.argv[2]), ssl=context)
    await server.serve_forever()

asyncio.run(main())
"""
START_S3 = f"""
mkdir -p /data/store /data/users && cp /setup/users.json /data/users/
exec versitygw --port :{S3_PORT} --region {REGION} --cert /tls/server.pem --key /tls/server.key \
  --health /health --iam-dir /data/users posix /data/store
"""


@dataclass(frozen=True)
class Services:
    """PostgreSQL, an S3 server and a place for a front of MLflow, in a namespace of their own."""

    cluster: Cluster
    authority: Path
    passwords: dict[str, str] = field(repr=False)

    def host(self, name: str) -> str:
        return f"{name}.{self.cluster.namespace}.svc"

    @property
    def tracking_url(self) -> str:
        return f"https://{self.host('mlflow')}:{FRONT_PORT}"

    def sql(self, database: str, query: str) -> str:
        """What PostgreSQL's administrator reads."""
        command = ("exec", "postgresql", "--", "psql", "-U", "postgres", "-d", database, "-Atc", query)
        return self.cluster.kubectl(*command).strip()

    def secrets(self) -> list[dict[str, Any]]:
        """The Secrets that docs/howto/external-services.md asks for."""
        database = {f"{who}-password": self.passwords[f"database/{who}"] for who in WHO}
        store = {f"{who}-access-key": who for who in WHO}
        store |= {f"{who}-secret-key": self.passwords[f"s3/{who}"] for who in WHO}
        return [secret("my-database", database), secret("my-object-store", store)]

    def values(self, release: Cluster) -> dict[str, Any]:
        """Values of a release on these stores."""
        here = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.cluster.namespace}}}]
        return {
            "crd": {"install": False, "userRoles": False},
            "operator": {"namespaces": [release.namespace], "progressSeconds": 3, "resyncSeconds": 30, **ON_NODE},
            "database": {
                "external": True,
                "externalHost": self.host("postgresql"),
                "sslMode": "verify-full",
                "existingSecret": "my-database",
            },
            "objectStore": {
                "external": True,
                "externalUrl": f"https://{self.host('s3')}:{S3_PORT}",
                "region": REGION,
                "existingSecret": "my-object-store",
                "artifactsBucket": ARTIFACTS,
                "recordingsBucket": RECORDINGS,
            },
            "networkPolicies": {"database": {"to": here}, "objectStore": {"to": here}, "tracking": {"to": here}},
        }


def secret(name: str, data: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}


def service(name: str, port: int, user: int, container: dict[str, Any]) -> list[dict[str, Any]]:
    """A pod that has the server's certificate, and a Service before it."""
    pod = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "fsGroup": user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "containers": [
            {
                "name": name,
                "securityContext": UNPRIVILEGED,
                "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1},
                **container,
                "volumeMounts": [
                    {"name": "tls", "mountPath": "/tls"},
                    {"name": "data", "mountPath": "/data"},
                    *container.get("volumeMounts", []),
                ],
            }
        ],
        "volumes": [
            {"name": "tls", "secret": {"secretName": "tls", "defaultMode": 0o440}},
            {"name": "setup", "secret": {"secretName": "setup"}},
            {"name": "data", "emptyDir": {}},
        ],
        **ON_NODE,
    }
    labels = {"app": name}
    ports = [{"port": port}]
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": pod},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"selector": labels, "ports": ports},
        },
    ]


def postgresql() -> list[dict[str, Any]]:
    tls = ("ssl=on", "ssl_cert_file=/tls/server.pem", "ssl_key_file=/tls/server.key")
    container = {
        "image": POSTGRESQL_IMAGE,
        "args": ["postgres", *(part for option in tls for part in ("-c", option))],
        "env": [
            {"name": "PGDATA", "value": "/data/pgdata"},
            {"name": "POSTGRES_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "setup", "key": "root"}}},
        ],
        # Only the server that stays listens on TCP.
        "readinessProbe": {"exec": {"command": ["pg_isready", "-h", "127.0.0.1"]}, "periodSeconds": 1},
        "volumeMounts": [
            {"name": "setup", "mountPath": "/docker-entrypoint-initdb.d/roles.sql", "subPath": "roles.sql"},
        ],
    }
    return service("postgresql", POSTGRESQL_PORT, 999, container)


def s3_server() -> list[dict[str, Any]]:
    root = {"name": "setup", "key": "root"}
    container = {
        "image": S3_IMAGE,
        "command": ["sh", "-c", START_S3],
        "env": [
            {"name": "ROOT_ACCESS_KEY", "value": "root"},
            {"name": "ROOT_SECRET_KEY", "valueFrom": {"secretKeyRef": root}},
        ],
        "readinessProbe": {"httpGet": {"scheme": "HTTPS", "path": "/health", "port": S3_PORT}, "periodSeconds": 1},
        "volumeMounts": [{"name": "setup", "mountPath": "/setup"}],
    }
    return service("s3", S3_PORT, 1000, container)


def front(behind: str) -> list[dict[str, Any]]:
    """What ends TLS before an MLflow, as an ingress controller would."""
    container = {"image": FRONT_IMAGE, "command": ["python3", "-c", FRONT, behind, str(FRONT_PORT)]}
    return service("mlflow", FRONT_PORT, 65532, container)


WRITE = """
import os, boto3, psycopg2

with psycopg2.connect(os.environ["HEIMDALL_DATABASE_URL"]) as connection, connection.cursor() as cursor:
    cursor.execute("CREATE TABLE IF NOT EXISTS sessions AS SELECT 'seen' AS name")
store = boto3.client(
    "s3",
    endpoint_url=os.environ["HEIMDALL_S3_ENDPOINT_URL"],
    region_name=os.environ["HEIMDALL_S3_REGION"],
    aws_access_key_id=os.environ["HEIMDALL_S3_ACCESS_KEY"],
    aws_secret_access_key=os.environ["HEIMDALL_S3_SECRET_KEY"],
    verify=os.environ.get("HEIMDALL_S3_CA_BUNDLE"),
)
bucket = os.environ["HEIMDALL_RECORDINGS_URL"].removeprefix("s3://")
store.put_object(Bucket=bucket, Key="recording", Body=b"iq")
"""
READ = """
import os, boto3, psycopg2

with psycopg2.connect(os.environ["HEIMDALL_DATABASE_URL"]) as connection, connection.cursor() as cursor:
    cursor.execute("SELECT name FROM sessions")
    print(cursor.fetchone()[0])
store = boto3.client(
    "s3",
    endpoint_url=os.environ["HEIMDALL_S3_ENDPOINT_URL"],
    region_name=os.environ["HEIMDALL_S3_REGION"],
    aws_access_key_id=os.environ["HEIMDALL_S3_ACCESS_KEY"],
    aws_secret_access_key=os.environ["HEIMDALL_S3_SECRET_KEY"],
)
bucket = os.environ["HEIMDALL_RECORDINGS_URL"].removeprefix("s3://")
print(store.get_object(Bucket=bucket, Key="recording")["Body"].read().decode())
"""


def reader() -> dict[str, Any]:
    """A pod that is given what training pods are given, and reads recordings with it."""
    authority = "/etc/heimdall-ca/ca.crt"
    env = [{"name": name, "value": authority} for name in ("PGSSLROOTCERT", "AWS_CA_BUNDLE")]
    return of_recordings("reader", READ, access="heimdall-trainer", env=env, labels=TRAINING)


def writer() -> dict[str, Any]:
    """A pod that is given what manifests/examples/recordings.yaml is given, and adds recordings with it."""
    labels = {"training.heimdall.dev/access": "recordings"}
    return of_recordings("writer", WRITE, access="heimdall-recordings-writer", env=[], labels=labels)


def of_recordings(name: str, script: str, *, access: str, env: list[Any], labels: dict[str, str]) -> dict[str, Any]:
    container = {
        "name": name,
        "image": MLFLOW_IMAGE,
        "command": ["python3", "-c", script],
        "envFrom": [{"secretRef": {"name": access}}],
        "env": env,
        "volumeMounts": [{"name": "ca", "mountPath": "/etc/heimdall-ca"}],
        "securityContext": UNPRIVILEGED,
    }
    spec = {
        # A new pod may reach nothing until its node has heard of its network policies.
        "restartPolicy": "OnFailure",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": "ca", "configMap": {"name": "heimdall-ca", "optional": True}}],
        **ON_NODE,
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


def roles(passwords: dict[str, str]) -> str:
    """What docs/howto/external-services.md has PostgreSQL's administrator say, with passwords."""
    document = (ROOT / "docs/howto/external-services.md").read_text()
    (found,) = re.findall(r"```sql\n(.*?)```", document, re.DOTALL)
    words = (passwords[f"database/{who}"] for who in WHO)
    return re.sub("…", lambda _: next(words), re.sub(r"^ +", "", found, flags=re.MULTILINE))


def setup(passwords: dict[str, str]) -> dict[str, Any]:
    """Who may log in to the stores."""
    users = {
        who: {"access": who, "secret": passwords[f"s3/{who}"], "role": "user", "userID": 0, "groupID": 0} for who in WHO
    }
    files = {
        "roles.sql": roles(passwords),
        "users.json": json.dumps({"accessAccounts": users}),
        "root": passwords["root"],
    }
    return secret("setup", files)


def s3(services: Services, port: int, user: str) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=f"https://127.0.0.1:{port}",
        aws_access_key_id=user,
        aws_secret_access_key=services.passwords[user if user == "root" else f"s3/{user}"],
        region_name=REGION,
        verify=str(services.authority),
    )


def make_buckets(services: Services) -> None:
    """Two buckets, and for each key no more than docs/howto/external-services.md asks for."""
    write = ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload", "ListMultipartUploadParts")
    rights = {ARTIFACTS: {"mlflow": write}, RECORDINGS: {"writer": write, "reader": ("GetObject",)}}
    with port_forward(services.cluster, "svc/s3", S3_PORT) as port:
        root = s3(services, port, "root")
        for bucket, users in rights.items():
            root.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
            statements = [statement for user, actions in users.items() for statement in allow(bucket, user, actions)]
            root.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": statements}))


def allow(bucket: str, user: str, actions: tuple[str, ...]) -> list[dict[str, Any]]:
    """A policy's statements: a bucket may be listed, its objects handled."""
    on_bucket, on_objects = f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"
    return [
        {"Effect": "Allow", "Principal": {"AWS": [user]}, "Action": action, "Resource": resource}
        for action, resource in (
            (["s3:ListBucket", "s3:GetBucketLocation"], on_bucket),
            ([f"s3:{action}" for action in actions], on_objects),
        )
    ]
