"""Private endpoints: MLflow, PostgreSQL and MinIO speak TLS alone, with certificates of an authority of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from heimdall_api.contract import ExitCode
from heimdall_tracking import MLflowTracker, SettingsError, load_settings
from heimdall_trainer.data import HeimdallDataset, generate
from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.settings import DataSettings, load_data_settings
from tests.integration.certificates import make_certificate
from tests.integration.servers import Certificate, Minio, Mlflow, Postgres

TIMEOUT_S = 180
BUCKET = "recordings"
EXPORTED = (
    *("MLFLOW_TRACKING_SERVER_CERT_PATH", "AWS_CA_BUNDLE", "MLFLOW_S3_ENDPOINT_URL"),
    "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE",
)


@dataclass(frozen=True)
class Private:
    """The three servers, and the authority that vouches for them."""

    mlflow: Mlflow
    postgres: Postgres
    minio: Minio
    certificate: Certificate
    stranger: Path
    """Certificate of an authority that signed nothing here."""

    def data(self, folder: Path, *, authority: Path | None, database_authority: Path | None = None) -> DataSettings:
        root = quote(str(database_authority or self.certificate.authority), safe="/")
        return load_data_settings(
            database_url=f"{self.postgres.url(BUCKET)}?sslmode=verify-full&sslrootcert={root}",
            recordings_url=f"s3://{BUCKET}/iq",
            s3_endpoint_url=self.minio.url.replace("127.0.0.1", "localhost"),
            s3_access_key=self.minio.access_key,
            s3_secret_key=self.minio.secret_key,
            s3_ca_bundle=authority,
            cache_dir=folder / "cache",
        )


@pytest.fixture(scope="module")
def private(clean_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Private]:
    folder = tmp_path_factory.mktemp("private")
    certificate, stranger = make_certificate(folder / "certificates"), make_certificate(folder / "stranger")
    with ExitStack() as after:
        postgres = Postgres(folder, certificate)
        after.callback(postgres.remove)
        after.callback(postgres.stop)
        postgres.start()
        for database in ("mlflow", BUCKET):
            postgres.create_database(database)
        minio = Minio(folder, certificate)
        after.callback(minio.stop)
        minio.start()
        for bucket in (Mlflow.bucket, BUCKET):
            minio.s3.create_bucket(Bucket=bucket)
        mlflow = Mlflow(folder, postgres, minio, certificate)
        after.callback(mlflow.stop)
        mlflow.start()
        yield Private(mlflow, postgres, minio, certificate, stranger.authority)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tracker gives to MLflow's client does not reach the next test."""
    for name in EXPORTED:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


def test_a_run_with_artifacts_is_tracked_by_tls(private: Private, tmp_path: Path) -> None:
    tracker = MLflowTracker(load_settings(tracking_uri=private.mlflow.url, ca_bundle=private.certificate.authority))
    run_id = tracker.start_run("private")
    (tmp_path / "weights.bin").write_bytes(b"weights")
    tracker.log_metrics({"loss": 0.5}, 1)
    tracker.log_artifact(tmp_path / "weights.bin")

    assert tracker.end_run(timeout_s=TIMEOUT_S)

    run = tracker.client.get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 0.5})
    assert private.mlflow.artifact(run, "weights.bin") == b"weights"


def test_artifacts_that_mlflow_does_not_proxy_go_to_a_private_endpoint(
    private: Private, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No host is named after the bucket, and no certificate vouches for one: it is addressed by path."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", private.minio.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", private.minio.secret_key)
    tracker = MLflowTracker(
        load_settings(
            tracking_uri=private.mlflow.url,
            ca_bundle=private.certificate.authority,
            s3_endpoint_url=private.minio.url.replace("127.0.0.1", "localhost"),
            s3_ca_bundle=private.certificate.authority,
            experiment_name="direct",
        )
    )
    tracker.client.create_experiment("direct", artifact_location=f"s3://{BUCKET}/direct")
    run_id = tracker.start_run("direct")
    (tmp_path / "weights.bin").write_bytes(b"weights")
    tracker.log_artifact(tmp_path / "weights.bin", "checkpoints")

    assert tracker.end_run(timeout_s=TIMEOUT_S)

    key = f"direct/{run_id}/artifacts/checkpoints/weights.bin"
    assert private.minio.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == b"weights"
    local = tracker.client.download_artifacts(run_id, "checkpoints/weights.bin", str(tmp_path))
    assert Path(local).read_bytes() == b"weights"


@pytest.mark.parametrize("wrong", ["nothing", "stranger"])
def test_an_mlflow_that_is_not_trusted_is_named_with_the_remedy(private: Private, wrong: str) -> None:
    bundle = None if wrong == "nothing" else private.stranger
    tracker = MLflowTracker(load_settings(tracking_uri=private.mlflow.url, ca_bundle=bundle))

    with pytest.raises(SettingsError, match=r"can't be trusted: .*; set MLFLOW_TRACKING_SERVER_CERT_PATH to a file"):
        tracker.start_run("never")


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_an_mlflow_whose_certificate_is_not_looked_at_is_tracked_beside_authorities_for_others(
    private: Private, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(private.stranger))
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    tracker = MLflowTracker(load_settings(tracking_uri=private.mlflow.url))
    run_id = tracker.start_run("insecure")
    tracker.log_metrics({"loss": 0.5}, 1)

    assert tracker.end_run(timeout_s=TIMEOUT_S)

    assert tracker.client.get_run(run_id).data.metrics == {"loss": 0.5}


def test_a_file_without_certificates_is_named(private: Private, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    tracker = MLflowTracker(load_settings(tracking_uri=private.mlflow.url, ca_bundle=tmp_path / "ca.pem"))

    with pytest.raises(SettingsError, match="which holds no certificates"):
        tracker.start_run("never")


def test_the_command_ends_at_once_with_a_configuration_error(private: Private, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("metadata: {name: private}\nspec: {model: {module: 'a:B'}}\n")
    done = subprocess.run(
        [Path(sys.executable).parent / "heimdall-train", "run", "-f", "run.yaml"],
        env={**os.environ, "MLFLOW_TRACKING_URI": private.mlflow.url},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    assert done.returncode == ExitCode.CONFIGURATION, done.stderr
    assert "InvalidConfiguration" in done.stderr
    assert "MLFLOW_TRACKING_SERVER_CERT_PATH" in done.stderr


def test_recordings_come_from_private_database_and_bucket(private: Private, tmp_path: Path) -> None:
    """The bucket is addressed by path: there is no host name for it."""
    settings = private.data(tmp_path, authority=private.certificate.authority)
    generate(settings, sessions=2, transmissions_per_session=1, receivers=2, samples=1024)

    assert len(HeimdallDataset.open(settings)) == 2


def test_a_bucket_that_is_not_trusted_is_named_with_the_remedy(private: Private, tmp_path: Path) -> None:
    settings = private.data(tmp_path, authority=private.stranger)

    with pytest.raises(ConfigurationError, match="can't be trusted: set HEIMDALL_S3_CA_BUNDLE to a file"):
        generate(settings, sessions=1, seed=9, transmissions_per_session=1, receivers=1, samples=1024)


def test_a_database_that_is_not_trusted_is_named_with_the_remedy(private: Private, tmp_path: Path) -> None:
    settings = private.data(tmp_path, authority=private.certificate.authority, database_authority=private.stranger)

    with pytest.raises(ConfigurationError, match=r"can't be trusted .*HEIMDALL_DATABASE_URL end in .*sslrootcert") as e:
        HeimdallDataset.open(settings)
    assert private.postgres.password not in str(e.value)


def test_a_file_of_certificates_that_is_not_there_is_no_empty_database(private: Private, tmp_path: Path) -> None:
    authority = private.certificate.authority
    settings = private.data(tmp_path, authority=authority, database_authority=tmp_path / "gone.pem")

    with pytest.raises(ConfigurationError, match=r"can't be trusted .*gone\.pem"):
        HeimdallDataset.open(settings)
