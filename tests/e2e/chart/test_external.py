"""Two releases on services that were there before them, all by TLS of an authority of their own.

The first one brings its MLflow and nothing else: PostgreSQL and an S3 server that is not MinIO are external. The second
one is an operator alone, whose MLflow is the first one's, behind a front that ends TLS and with a user made for it.
"""

from __future__ import annotations

import base64
import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.e2e.chart.external import (
    ARTIFACTS,
    LOGINS,
    ON_NODE,
    S3_IMAGE,
    S3_PORT,
    Services,
    front,
    make_buckets,
    postgresql,
    reader,
    s3,
    s3_server,
    secret,
    setup,
    writer,
)
from tests.e2e.chart.pages import Typist, section
from tests.e2e.chart.test_backup import account
from tests.e2e.cluster import Cluster, hack, port_forward, wait_for
from tests.e2e.conftest import Mlflow, contract_run, namespace
from tests.integration.certificates import make_certificate

INSTALL_TIMEOUT = "280s"
LIFE_S = 180.0
BACKUP, EXTERNAL = "docs/howto/backup.md", "docs/howto/external-services.md"


@pytest.fixture(scope="module")
def s3_image(release: Cluster) -> None:
    hack("hack/images", "build", "versitygw")
    hack("hack/cluster", "load", S3_IMAGE)


@contextmanager
def serving(release: Cluster, name: str, folder: Path) -> Iterator[Services]:
    """Services in a namespace of their own, which a release finds there; removed with it."""
    passwords = {login: secrets.token_hex(16) for login in LOGINS}
    with namespace(release, name) as cluster:
        hosts = [f"{host}.{cluster.namespace}.svc" for host in ("postgresql", "s3", "mlflow")]
        certificate = make_certificate(folder / "certificates", *hosts)
        files = (certificate.certificate, certificate.key)
        cluster.apply(secret("tls", {file.name: file.read_text() for file in files}))
        cluster.apply(setup(passwords))
        for manifest in (*postgresql(), *s3_server()):
            cluster.apply(manifest)
        cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=120s")
        made = Services(cluster, certificate.authority, passwords)
        make_buckets(made)
        yield made


@pytest.fixture(scope="module")
def services(release: Cluster, s3_image: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with serving(release, "services", tmp_path_factory.mktemp("external")) as made:
        yield made


def install(where: Cluster, values: dict[str, Any], *how: str) -> None:
    command = ("helm", "-n", where.namespace, *(how or ("install",)), "heimdall", "charts/heimdall", "-f", "-")
    where.run(*command, "--wait", "--timeout", INSTALL_TIMEOUT, text=json.dumps(values))


@pytest.fixture(scope="module")
def stores(release: Cluster, confined: None, services: Services) -> Iterator[Cluster]:
    """A release with an MLflow of its own on external PostgreSQL and S3."""
    with namespace(release, "stores") as made:
        for manifest in services.secrets():
            made.apply(manifest)
        install(made, on_stores(services, made))
        yield made


def on_stores(services: Services, release: Cluster) -> dict[str, Any]:
    """Values of a release that has an MLflow of its own, and all else from these services."""
    values = services.values(release)
    values["caBundle"] = {"certificates": services.authority.read_text()}
    values["tracking"] = {"publicUrl": services.tracking_url, "workers": 1, **ON_NODE}
    values["networkPolicies"]["tracking"] = {"from": values["networkPolicies"]["database"]["to"]}
    return values


@contextmanager
def mlflow_of(release: Cluster) -> Iterator[Mlflow]:
    """A release's MLflow for its administrator."""
    data = json.loads(release.kubectl("get", "secret", "heimdall-tracking", "-o", "json"))["data"]
    login = ("admin", base64.b64decode(data["admin-password"]).decode())
    with port_forward(release, "svc/heimdall-tracking", 5000) as port:
        yield Mlflow(f"http://127.0.0.1:{port}", login)


@pytest.fixture(scope="module")
def tracking(stores: Cluster) -> Iterator[Mlflow]:
    with mlflow_of(stores) as made:
        yield made


def log_in(mlflow: Mlflow, patch: pytest.MonkeyPatch) -> Mlflow:
    patch.setenv("MLFLOW_TRACKING_USERNAME", mlflow.login[0])
    patch.setenv("MLFLOW_TRACKING_PASSWORD", mlflow.login[1])
    return mlflow


@pytest.fixture
def as_admin(tracking: Mlflow, monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    return log_in(tracking, monkeypatch)


@pytest.fixture(scope="module")
def guest(release: Cluster, services: Services, stores: Cluster, tracking: Mlflow) -> Iterator[Cluster]:
    """A release that is an operator alone: its MLflow is the first one's, by TLS, with a user of its own."""
    for manifest in front(f"heimdall-tracking.{stores.namespace}.svc"):
        services.cluster.apply(manifest)
    make_user(tracking, "guest", services.passwords["mlflow"])
    services.cluster.kubectl("wait", "--for=condition=Ready", "pod/mlflow", "--timeout=60s")
    with namespace(release, "guest") as made:
        login = {"MLFLOW_TRACKING_USERNAME": "guest", "MLFLOW_TRACKING_PASSWORD": services.passwords["mlflow"]}
        # As where the chart is rendered without a cluster: every Secret is somebody's own.
        for manifest in (*services.secrets(), secret("my-mlflow", login), secret("heimdall-trainer", login)):
            made.apply(manifest)
        authority = {"ca.crt": services.authority.read_text()}
        made.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "company-ca"}, "data": authority})
        values = services.values(made)
        values["caBundle"] = {"existingConfigMap": "company-ca"}
        values["tracking"] = {
            "external": True,
            "externalUrl": services.tracking_url,
            "publicUrl": services.tracking_url,
            "existingSecret": "my-mlflow",
        }
        values["trainer"] = {"createSecrets": False}
        install(made, values)
        yield made


def make_user(mlflow: Mlflow, name: str, password: str) -> None:
    """A user who may manage experiments, runs and registered models."""

    def post(path: str, **body: str) -> None:
        body["username"] = name
        answer = requests.post(f"{mlflow.url}/api/{path}", json=body, auth=mlflow.login, timeout=30)
        assert answer.ok, answer.text

    post("2.0/mlflow/users/create", password=password)
    for kind in ("experiment", "run", "registered_model"):
        post("3.0/mlflow/users/permissions/grant", resource_type=kind, resource_id="*", permission="MANAGE")


def train(where: Cluster, mlflow: Mlflow, name: str) -> str:
    """A training that fails once and goes on from its checkpoint, which it fetches from the object store.

    Returns:
        The MLflow run.
    """
    where.apply(contract_run(name, steps=12, checkpointEvery=5, fail="crash", failAt=7, failAttempt=1))
    status = where.wait_for_phase(name, "Succeeded", "Failed", timeout_s=LIFE_S)
    assert (status["phase"], status["attempt"]) == ("Succeeded", 2), where.explain(name)
    (run,) = mlflow.runs_of(where.training_run(name)["metadata"]["uid"])
    assert run.info.status == "FINISHED"
    steps = [metric.step for metric in mlflow.client.get_metric_history(run.info.run_id, "train/loss")]
    assert (steps.count(4), steps.count(5)) == (1, 2), "the second attempt begins where the checkpoint was made"
    (version,) = mlflow.versions_of("steps", run.info.run_id)
    assert version.status == "READY"
    assert status["runURL"].startswith("https://mlflow."), status["runURL"]
    return str(run.info.run_id)


def test_a_release_trains_on_external_postgresql_and_s3(services: Services, stores: Cluster, as_admin: Mlflow) -> None:
    run_id = train(stores, as_admin, "on-external-stores")

    assert stores.list("statefulsets") == []
    assert services.sql("mlflow", f"SELECT status FROM runs WHERE run_uuid = '{run_id}'") == "FINISHED"
    of_mlflow = "FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'mlflow'"
    assert services.sql("mlflow", f"SELECT bool_and(ssl) {of_mlflow}") == "t"
    with port_forward(services.cluster, "svc/s3", S3_PORT) as port:
        listed = s3(services, port, "root").list_objects_v2(Bucket=ARTIFACTS)["Contents"]
    assert {"step-00000010-attempt-2.json", "MLmodel"} <= {item["Key"].rpartition("/")[2] for item in listed}
    assert "Succeeded" in stores.helm("test", "heimdall", "--timeout", INSTALL_TIMEOUT)


def said_by(where: Cluster, pod: dict[str, Any]) -> str:
    """What a pod says that runs to its end."""
    name = pod["metadata"]["name"]
    where.apply(pod)

    def has_ended() -> bool:
        return ((where.get("pod", name) or {}).get("status") or {}).get("phase") == "Succeeded"

    def explained() -> str:
        return where.run("kubectl", "-n", where.namespace, "logs", name, check=False).stdout

    wait_for(has_ended, what=f"the end of pod {name}", timeout_s=120, tell=explained)
    return where.kubectl("logs", name)


def test_recordings_are_added_to_external_stores_and_read_by_training_pods(stores: Cluster) -> None:
    assert said_by(stores, writer()) == ""
    assert said_by(stores, reader()).split() == ["seen", "iq"]


def test_a_release_trains_with_an_external_mlflow(services: Services, guest: Cluster, as_admin: Mlflow) -> None:
    train(guest, as_admin, "with-external-mlflow")

    assert {item["metadata"]["name"] for item in guest.list("deployments")} == {"heimdall-operator"}
    assert guest.list("secrets", "app.kubernetes.io/managed-by=Helm") == []
    assert guest.list("statefulsets") == []
    assert "Succeeded" in guest.helm("test", "heimdall", "--timeout", INSTALL_TIMEOUT)


@pytest.fixture
def moving(release: Cluster, confined: None, s3_image: None) -> Iterator[Cluster]:
    """A release whose PostgreSQL and object store are the chart's own."""
    with namespace(release, "moving") as made:
        install(made, on_own(made))
        yield made


def on_own(release: Cluster) -> dict[str, Any]:
    """Values of a release that has all from the chart."""
    return {
        "crd": {"install": False, "userRoles": False},
        "operator": {"namespaces": [release.namespace], "progressSeconds": 3, "resyncSeconds": 30, **ON_NODE},
        "tracking": {"publicUrl": "https://mlflow.example.com", "workers": 1, **ON_NODE},
        "database": ON_NODE,
        "objectStore": ON_NODE,
    }


def to_theirs(services: Services, port: int) -> str:
    """The commands that fill external stores, as they stand there, with what is the reader's own."""
    (commands,) = section(EXTERNAL, "Move what is there")[1:]
    inside = f"kubectl -n {services.cluster.namespace} exec -i postgresql -- pg_restore -U postgres "
    commands = commands.replace("pg_restore -h db.example.com -U ADMINISTRATOR ", inside)
    login = f"printf '%s\\n' root {services.passwords['root']} | mc alias set theirs https://127.0.0.1:{port}"
    return commands.replace("mc alias set theirs https://s3.example.com", login)


def test_what_the_chart_s_own_stores_hold_moves_to_external_ones(
    release: Cluster, moving: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hack("hack/cluster", "parts", "minio")
    name = "before-the-move"
    # By one address all the time: MLflow's client remembers where artifacts are.
    with mlflow_of(moving) as mlflow, serving(release, "theirs", tmp_path) as services:
        log_in(mlflow, monkeypatch)
        train(moving, mlflow, name)
        wait_for(lambda: "logs" in moving.status(name)["attempts"][1], what="the log being kept", timeout_s=LIFE_S)
        status = moving.status(name)
        before = account(mlflow, status)
        assert said_by(moving, writer()) == ""

        stop, _ = section(EXTERNAL, "Move what is there")
        with (
            port_forward(moving, "svc/heimdall-object-store", 9000) as own,
            port_forward(services.cluster, "svc/s3", S3_PORT) as theirs,
        ):
            typist = Typist(moving, tmp_path, own)
            authorities = tmp_path / ".mc/certs/CAs"
            authorities.mkdir(parents=True)
            shutil.copy(services.authority, authorities / "theirs.crt")
            typist.type(stop, *section(BACKUP, "Reach the object store")[1:], *section(BACKUP, "Back up"))
            typist.type(to_theirs(services, theirs))
        for manifest in services.secrets():
            moving.apply(manifest)
        install(moving, on_stores(services, moving), "upgrade", "--force-conflicts")

        assert moving.list("statefulsets") == []
        assert account(mlflow, status) == before
        assert moving.status(name) == status, "a finished run stays as it is"
        train(moving, mlflow, "after-the-move")
        assert said_by(moving, reader()).split() == ["seen", "iq"]
        kept = {claim["metadata"]["name"] for claim in moving.list("persistentvolumeclaims")}
        assert kept == {"data-heimdall-database-0", "data-heimdall-object-store-0"}
