"""MLflow with authentication as the chart sets it up: the chart's own script and file, before a real server."""

from __future__ import annotations

import math
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from heimdall_api.types import PromotionSpec, RegistrationSpec
from heimdall_operator.controller import said_by_mlflow
from heimdall_tracking import MLflowTracker, TrackingSettings, registry, runs
from heimdall_tracking.errors import is_permanent
from heimdall_tracking.experiments import ensure_experiment
from tests.integration.servers import ROOT, Minio, Mlflow, Postgres

FILES: Final = ROOT / "charts/heimdall/files/mlflow"
DATABASE: Final = "mlflow-with-auth"
USERS: Final = ("admin", "heimdall-operator", "heimdall-trainer")
DELIVERY_TIMEOUT_S: Final = 120
COMMAND_TIMEOUT_S: Final = 180
LARGE: Final = 12 * 1024 * 1024
"""Bytes of a file that goes to the object store in parts."""
PART: Final = 5 * 1024 * 1024

operator, trainer, admin = "heimdall-operator", "heimdall-trainer", "admin"


class SecuredMlflow(Mlflow):
    """MLflow's server with authentication, told what the chart tells it."""

    name = "mlflow-with-auth"

    def __init__(self, folder: Path, postgres: Postgres, minio: Minio) -> None:
        super().__init__(folder, postgres, minio)
        self.passwords = {user: secrets.token_hex(16) for user in USERS}
        self._secret_key = secrets.token_hex(16)
        self.folder = folder
        self._ini = folder / "basic_auth.ini"
        ini = (FILES / "basic_auth.ini").read_text()
        # The password is in the environment there, as it is in the chart.
        self._uri = f"postgresql+psycopg2://{postgres.user}@127.0.0.1:{postgres.port}/{DATABASE}"
        self._ini.write_text(ini.replace("DATABASE_URI", self._uri))

    def command(self) -> list[str]:
        return [*super().command(), "--workers=2", "--app-name=basic-auth"]

    def environment(self) -> dict[str, str]:
        own = {
            "PGPASSWORD": self._postgres.password,
            "MLFLOW_BACKEND_STORE_URI": self._uri,
            "MLFLOW_AUTH_CONFIG_PATH": str(self._ini),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self._secret_key,
        }
        return {**super().environment(), **own}

    def beside(self, command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run the chart's script as its Job, init container and probe do."""
        short = {user.removeprefix("heimdall-").upper(): word for user, word in self.passwords.items()}
        passwords = {f"{user}_PASSWORD": word for user, word in short.items()}
        env = {"BACKEND_STORE_URI": self._uri, "PROBE_PORT": str(self.port), **self.environment(), **passwords, **more}
        return subprocess.run(
            [sys.executable, str(FILES / "beside.py"), command],
            env={"PATH": os.environ["PATH"], "HOME": str(self._ini.parent), **env},
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )

    def client(self) -> MlflowClient:
        return MlflowClient(self.url, self.url)

    def entity_tag(self, run: Run, path: str) -> str:
        """What MinIO calls the content of a run's artifact."""
        key = f"{run.info.artifact_uri.removeprefix('mlflow-artifacts:/')}/{path}"
        found: str = self._minio.s3.head_object(Bucket=self.bucket, Key=key)["ETag"]
        return found.strip('"')

    @contextmanager
    def as_user(self, name: str) -> Iterator[None]:
        """The environment that the user's pod has."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_USERNAME", name)
            patch.setenv("MLFLOW_TRACKING_PASSWORD", self.passwords[name])
            yield


@pytest.fixture(scope="module")
def secured(server_folder: Path, postgres_process: Postgres, minio_process: Minio) -> Iterator[SecuredMlflow]:
    postgres_process.start()
    minio_process.start()
    postgres_process.create_database(DATABASE)
    server = SecuredMlflow(server_folder, postgres_process, minio_process)
    migrated = server.beside("migrate")
    assert migrated.returncode == 0, migrated.stderr
    waited = server.beside("wait")
    assert waited.returncode == 0, waited.stderr
    try:
        server.start()
        yield server
    finally:
        server.stop()


def refused(call: Callable[[], object]) -> str:
    """What the server says of a call that must not work."""
    with pytest.raises(MlflowException) as caught:
        call()
    return str(caught.value)


def test_nobody_is_let_in_without_a_password(secured: SecuredMlflow, tmp_path: Path) -> None:
    client = secured.client()
    with secured.as_user(operator):
        run_id = client.create_run(ensure_experiment(client, "not-for-everybody")).info.run_id
    (tmp_path / "file").write_text("content")

    said = [
        refused(client.search_experiments),
        refused(lambda: client.get_run(run_id)),
        refused(client.search_registered_models),
    ]
    assert all("401" in text or "not authenticated" in text for text in said), said
    with pytest.raises(Exception, match=r"401|not authenticated"):
        client.log_artifact(run_id, str(tmp_path / "file"))


def test_a_training_goes_the_whole_way_with_the_two_users_of_operator_and_trainer(
    secured: SecuredMlflow, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = secured.client()
    with secured.as_user(operator):
        facts = runs.ensure_run(client, uid="u1", experiment=name, name="run")
        runs.open_attempt(client, facts, 1)

    with secured.as_user(trainer):
        model_id = train(secured, facts, tmp_path, monkeypatch)

    spec = RegistrationSpec(model=name, aliases=["candidate"], promotion=PromotionSpec(metric="loss"))
    with secured.as_user(operator):
        client.log_text(facts.run_id, "the pod's log", "attempts/1/pod.log")
        runs.end_run(client, facts.run_id, "FINISHED")
        ended = runs.read_facts(client, facts.run_id)
        assert ended is not None
        assert registry.register(client, ended, spec).version == "1"
        assert client.get_registered_model(name).aliases == {"candidate": "1", "champion": "1"}
        assert client.get_run(facts.run_id).info.status == "FINISHED"
    with secured.as_user(trainer):  # a later training may start from a registered model
        assert model_id in client.get_model_version_by_alias(name, "champion").source


def train(secured: SecuredMlflow, facts: runs.RunFacts, folder: Path, patch: pytest.MonkeyPatch) -> str:
    """What a trainer says to MLflow: metrics, artifacts small and large, a checkpoint removed, a logged model."""
    import mlflow.artifacts
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    patch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "true")
    patch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", "1048576")
    patch.setenv("MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE", str(PART))
    client = secured.client()
    tracker = MLflowTracker(TrackingSettings(tracking_uri=secured.url, experiment_name="unused"))
    tracker.attach(facts.run_id)
    tracker.log_params({"lr": 1e-3})
    tracker.log_metrics({"loss": 0.5}, 1)
    content = os.urandom(LARGE)
    for file in ("old.ckpt", "new.ckpt"):
        (folder / file).write_bytes(content)
        tracker.log_artifact(folder / file, "checkpoints").result(DELIVERY_TIMEOUT_S)
    uri = client.get_run(facts.run_id).info.artifact_uri
    get_artifact_repository(uri, tracking_uri=secured.url).delete_artifacts("checkpoints/old.ckpt")
    model = client.create_logged_model(facts.experiment_id, name="model", source_run_id=facts.run_id)
    (folder / "model").mkdir()
    (folder / "model/MLmodel").write_text("flavors: {}")
    client.log_model_artifacts(model.model_id, str(folder / "model"))
    client.finalize_logged_model(model.model_id, "READY")
    assert tracker.flush(DELIVERY_TIMEOUT_S)
    assert tracker.close(DELIVERY_TIMEOUT_S)
    assert [item.path for item in client.list_artifacts(facts.run_id, "checkpoints")] == ["checkpoints/new.ckpt"]
    there = mlflow.artifacts.download_artifacts(
        run_id=facts.run_id, artifact_path="checkpoints/new.ckpt", dst_path=str(folder), tracking_uri=secured.url
    )
    assert Path(there).read_bytes() == content
    # MLflow goes on with a plain upload, and says nothing, where parts are not to be had.
    tag = secured.entity_tag(client.get_run(facts.run_id), "checkpoints/new.ckpt")
    assert tag.endswith(f"-{math.ceil(LARGE / PART)}"), "of what came in parts it tells their number"
    return str(model.model_id)


def test_a_trainer_can_change_no_registered_model_and_delete_no_experiment(secured: SecuredMlflow, name: str) -> None:
    client = secured.client()
    with secured.as_user(operator):
        experiment = ensure_experiment(client, name)
        run_id = client.create_run(experiment).info.run_id
        client.create_registered_model(name)
        client.create_model_version(name, f"runs:/{run_id}/model", run_id)

    with secured.as_user(trainer):
        for call in (
            lambda: client.set_registered_model_alias(name, "champion", "1"),
            lambda: client.create_model_version(name, f"runs:/{run_id}/model", run_id),
            lambda: client.delete_registered_model(name),
            lambda: client.delete_experiment(experiment),
        ):
            assert "ermission denied" in refused(call)
        # It is on the status of a run whose operator may not do something.
        with pytest.raises(MlflowException) as caught:
            client.delete_registered_model(name)
        assert said_by_mlflow(caught.value).startswith("MLflow says: ")
    with secured.as_user(trainer), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_PASSWORD", "another password")
        with pytest.raises(MlflowException) as caught:
            client.get_run(run_id)
    assert said_by_mlflow(caught.value).startswith("MLflow says: ")


def test_the_operator_owns_what_others_made_and_restores_what_they_deleted(secured: SecuredMlflow, name: str) -> None:
    client = secured.client()
    with secured.as_user(admin):
        experiment = ensure_experiment(client, name)
        client.delete_experiment(experiment)
    with secured.as_user(operator):
        assert ensure_experiment(client, name) == experiment
        run_id = client.create_run(experiment).info.run_id
        runs.end_run(client, run_id, "KILLED")
    assert "not authenticated" in refused(lambda: client.get_run(run_id))


def test_migrating_again_takes_over_a_changed_password_and_nothing_else(secured: SecuredMlflow) -> None:
    client = secured.client()
    old = secured.passwords[trainer]
    secured.passwords[trainer] = secrets.token_hex(16)
    with secured.as_user(trainer):
        assert "401" in (said := refused(client.search_experiments)) or "not authenticated" in said
        again = secured.beside("migrate")
        assert again.returncode == 0, again.stderr
        assert client.search_experiments()
    assert not any(word in again.stdout + again.stderr for word in (old, *secured.passwords.values()))


def test_readiness_asks_the_database_and_outlives_a_change_of_password(
    secured: SecuredMlflow, postgres: Postgres
) -> None:
    done = secured.beside("ready")
    assert done.returncode == 0, done.stderr
    rotated = secured.beside("ready", OPERATOR_PASSWORD="the-former-password")
    assert rotated.returncode == 0, rotated.stderr
    postgres.stop()
    try:
        away = secured.beside("ready")
    finally:
        postgres.start()
    assert away.returncode != 0, "no database, no service"


def test_a_database_that_is_away_is_no_wrong_password(secured: SecuredMlflow, postgres: Postgres, name: str) -> None:
    """What the operator repeats, and a trainer waits out, must not look like a refusal."""
    client = secured.client()
    with secured.as_user(operator):
        run_id = client.create_run(ensure_experiment(client, name)).info.run_id
        postgres.stop()
        try:
            with pytest.raises(MlflowException) as caught:
                client.get_run(run_id)
        finally:
            postgres.start()
        assert not is_permanent(caught.value), caught.value
        assert client.get_run(run_id).info.run_id == run_id


def test_helm_test_sees_a_server_that_works_and_lets_nobody_in(secured: SecuredMlflow) -> None:
    own = {
        "PATH": os.environ["PATH"],
        "HOME": str(secured.folder),
        "TRACKING_URI": secured.url,
        "NEEDS_LOGIN": "true",
        "MLFLOW_TRACKING_USERNAME": operator,
        "MLFLOW_TRACKING_PASSWORD": secured.passwords[operator],
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    }
    script = (FILES.parent / "test.py").read_text()
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "keeps artifacts in the object store" in done.stdout
    assert "lets nobody in without a password" in done.stdout


def test_the_server_waits_for_the_schema_and_the_users(secured: SecuredMlflow, postgres: Postgres) -> None:
    postgres.create_database("mlflow-empty")
    empty = f"postgresql+psycopg2://{postgres.user}@127.0.0.1:{postgres.port}/mlflow-empty"

    behind = secured.beside("wait", BACKEND_STORE_URI=empty, WAIT_S="0")
    assert behind.returncode != 0
    assert "(alembic_version) is at None" in behind.stderr

    postgres.execute("UPDATE users SET username = 'gone' WHERE username = 'heimdall-trainer'", DATABASE)
    try:
        assert "there is no user heimdall-trainer yet" in secured.beside("wait", WAIT_S="0").stderr
    finally:
        postgres.execute("UPDATE users SET username = 'heimdall-trainer' WHERE username = 'gone'", DATABASE)
    assert secured.beside("wait", WAIT_S="0").returncode == 0
