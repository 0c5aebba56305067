"""The commands of runbooks, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.chart.pages import Typist, section
from tests.e2e.cluster import Cluster
from tests.e2e.conftest import Mlflow, contract_run

VOLUME_FULL = "docs/runbooks/HeimdallVolumeFull.md"
PASSWORDS = "docs/runbooks/passwords.md"
ATTEMPTS_FAIL = "docs/runbooks/HeimdallAttemptsFail.md"
LOG_IN = 'PGPASSWORD="$MLFLOW_PASSWORD" psql -h 127.0.0.1 -U mlflow -d mlflow -c "SELECT 1"'
"""As MLflow does: by TCP, where a password is asked for."""


@pytest.fixture
def typist(release: Cluster, tmp_path: Path) -> Typist:
    return Typist(release, tmp_path)


def psql(release: Cluster, database: str, statement: str) -> None:
    asked = ("psql", "-U", "postgres", "-d", database, "-v", "ON_ERROR_STOP=1", "-c", statement)
    release.kubectl("exec", "heimdall-database-0", "--", *asked)


def test_how_full_the_volumes_are_can_be_seen(typist: Typist) -> None:
    said = typist.type(*section(VOLUME_FULL, "What it looks like"))

    assert said.count("Use%") == 2


def test_a_statefulset_takes_another_size_and_keeps_its_pod(typist: Typist, release: Cluster) -> None:
    def pod() -> tuple[str, list[str]]:
        metadata = (release.get("pod", "heimdall-database-0") or {})["metadata"]
        return metadata["uid"], [owner["uid"] for owner in metadata.get("ownerReferences", [])]

    before = pod()
    typist.type(*section(VOLUME_FULL, "Make it larger"))

    made = release.get("statefulset", "heimdall-database") or {}
    assert made["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"] == "32Gi"
    release.kubectl("rollout", "status", "statefulset/heimdall-database", "--timeout=120s")
    assert pod() == (before[0], [made["metadata"]["uid"]])
    assert before[1] != [made["metadata"]["uid"]]


def has_files(release: Cluster, run_id: str) -> bool:
    """Whether the object store's volume has files of a run of MLflow's first experiment."""
    look = ("exec", "heimdall-object-store-0", "--", "ls", f"/data/mlflow/0/{run_id}")
    return release.run("kubectl", "-n", release.namespace, *look, check=False).returncode == 0


def test_what_was_deleted_in_mlflow_long_ago_is_removed(typist: Typist, release: Cluster, mlflow: Mlflow) -> None:
    old, new = (mlflow.client.create_run("0").info.run_id for _ in range(2))
    mlflow.client.log_text(old, "takes space", "large.txt")
    assert has_files(release, old)
    for run_id in (old, new):
        mlflow.client.delete_run(run_id)
    psql(release, "mlflow", f"UPDATE runs SET deleted_time = 0 WHERE run_uuid = '{old}'")

    typist.type(*section(VOLUME_FULL, "Make room"))

    assert mlflow.client.get_run(new).info.lifecycle_stage == "deleted"
    with pytest.raises(Exception, match="not found"):
        mlflow.client.get_run(old)
    assert not has_files(release, old)


def test_roles_get_the_passwords_of_the_secret(typist: Typist, release: Cluster) -> None:
    psql(release, "postgres", "ALTER ROLE mlflow PASSWORD 'another'")
    log_in = ("kubectl", "-n", release.namespace, "exec", "heimdall-database-0", "--", "bash", "-c", LOG_IN)
    assert "password authentication failed" in release.run(*log_in, check=False).stderr

    [ask] = [text for text in section(PASSWORDS, "Give everybody the passwords of the Secrets") if "psql" in text]
    typist.type(ask)

    assert release.run(*log_in).returncode == 0


def test_a_password_can_be_read(typist: Typist, canaries: dict[str, str]) -> None:
    said = typist.type(*section(PASSWORDS, "A password is lost, refused, or to be changed"))

    assert said == canaries["tracking/admin-password"]


def test_runs_are_listed_with_reasons_and_nodes(typist: Typist, release: Cluster, name: str) -> None:
    release.apply(contract_run(name, fail="configuration"))
    node = release.wait_for_phase(name, "Failed", timeout_s=240)["attempts"][0]["node"]

    said = typist.type(*section(ATTEMPTS_FAIL, "What to do"))

    assert re.search(rf"^{release.namespace} +{name} +Failed +InvalidConfiguration +{node}$", said, re.MULTILINE), said
