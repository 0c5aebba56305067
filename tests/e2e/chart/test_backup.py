"""The commands of docs/howto/backup.md, as they stand there: what they saved comes back after everything was lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.chart.pages import Typist, section
from tests.e2e.chart.test_passwords import read, s3
from tests.e2e.cluster import Cluster, hack, port_forward, wait_for
from tests.e2e.conftest import Mlflow, contract_run

PAGE = "docs/howto/backup.md"
FORWARD = "kubectl -n heimdall port-forward service/heimdall-object-store 9000\n"
"""It goes on until it is ended: the tests' own way to call it does that, and finds a free port."""
LIFE_S = 240.0


def psql(release: Cluster, user: str, statement: str) -> str:
    asked = ("psql", "-U", user, "-d", "heimdall", "-tA", "-v", "ON_ERROR_STOP=1", "-c", statement)
    return release.kubectl("exec", "heimdall-database-0", "--", *asked).strip()


def account(mlflow: Mlflow, status: dict[str, Any]) -> dict[str, Any]:
    """What MLflow tells of a finished TrainingRun: metrics, the model's versions and files, the log of its attempt."""
    run = mlflow.client.get_run(status["runID"])
    versions = mlflow.versions_of("steps", status["runID"])
    models = [version.source.rpartition("/")[2] for version in versions]
    files = [file for model in models for file in mlflow.client.list_logged_model_artifacts(model)]
    log = f"attempts/1/{status['attempts'][0]['pod']}.log"
    return {
        "metrics": run.data.metrics,
        "ended": (run.info.status, run.info.end_time),
        "versions": [(item.version, item.status, item.source) for item in versions],
        "files": [(file.path, file.file_size) for file in files],
        "log": mlflow.artifact(status["runID"], log),
    }


def lose_everything(typist: Typist) -> None:
    for database in ("mlflow", "heimdall"):
        typist.release.kubectl("exec", "heimdall-database-0", "--", "dropdb", "-U", "postgres", "--force", database)
    for bucket in ("heimdall/mlflow", "heimdall/heimdall-recordings"):
        typist.type(f"mc rm --recursive --force {bucket}")
        assert typist.type(f"mc ls --recursive {bucket}") == ""


def test_what_was_backed_up_comes_back(release: Cluster, mlflow: Mlflow, name: str, tmp_path: Path) -> None:
    hack("hack/cluster", "parts", "minio")
    release.apply(contract_run(name, steps=3))
    status = release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)
    wait_for(lambda: "logs" in release.status(name)["attempts"][0], what="the log being kept", timeout_s=LIFE_S)
    before = account(mlflow, status)
    assert before["metrics"]["val/loss"] > 0
    assert before["versions"]
    assert before["files"]
    assert before["log"]
    with port_forward(release, "service/heimdall-object-store", 9000) as port:
        typist = Typist(release, tmp_path, port)
        forward, *log_in = section(PAGE, "Reach the object store")
        assert forward == FORWARD
        typist.type(*log_in)
        writer = s3(f"http://127.0.0.1:{port}", read(release, "heimdall-recordings-writer"))
        writer.put_object(Bucket="heimdall-recordings", Key="backed/up", Body=b"iq")
        psql(release, "heimdall_writer", "CREATE TABLE backed_up AS SELECT 7 AS session")
        typist.type(*section(PAGE, "Back up"))

        lose_everything(typist)
        typist.type(*section(PAGE, "Restore"))

        # As training pods read them: the rights of readers are back too.
        reader = s3(f"http://127.0.0.1:{port}", read(release, "heimdall-trainer"))
        assert reader.get_object(Bucket="heimdall-recordings", Key="backed/up")["Body"].read() == b"iq"
        assert psql(release, "heimdall_reader", "SELECT session FROM backed_up") == "7"
        writer.delete_object(Bucket="heimdall-recordings", Key="backed/up")
        psql(release, "heimdall_writer", "DROP TABLE backed_up")
    assert account(mlflow, status) == before
    assert release.status(name) == status, "a finished run stays as it is"
    assert json.loads((tmp_path / ".mc/config.json").read_text())["aliases"].keys().isdisjoint({"heimdall"})


def test_a_dump_that_was_cut_off_is_told(release: Cluster, tmp_path: Path) -> None:
    dump, check = (text.splitlines()[0] for text in section(PAGE, "Back up"))
    typist = Typist(release, tmp_path)
    typist.type(dump, check)
    whole = (tmp_path / "mlflow.dump").read_bytes()
    (tmp_path / "mlflow.dump").write_bytes(whole[: len(whole) * 9 // 10])

    with pytest.raises(AssertionError, match="could not read from input file"):
        typist.type(check)
