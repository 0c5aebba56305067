"""Which source wins, and that secrets show nowhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from heimdall_tracking.settings import SettingsError, TrackingSettings, load_settings

CANARY = "canary2f7c"
VARIABLES = {
    "tracking_uri": "MLFLOW_TRACKING_URI",
    "registry_uri": "MLFLOW_REGISTRY_URI",
    "username": "MLFLOW_TRACKING_USERNAME",
    "password": "MLFLOW_TRACKING_PASSWORD",
    "s3_endpoint_url": "MLFLOW_S3_ENDPOINT_URL",
    "backend_store_uri": "MLFLOW_BACKEND_STORE_URI",
    "experiment_name": "MLFLOW_EXPERIMENT_NAME",
    "run_name_prefix": "HEIMDALL_RUN_NAME_PREFIX",
    "ca_bundle": "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "s3_ca_bundle": "AWS_CA_BUNDLE",
    "s3_path_style": "HEIMDALL_S3_PATH_STYLE",
    "undelivered_dir": "HEIMDALL_UNDELIVERED_DIR",
}


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "HEIMDALL_", "AWS_")) or name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def value_of(settings: TrackingSettings, field: str) -> str:
    value = getattr(settings, field)
    return str(value.get_secret_value() if isinstance(value, SecretStr) else value)


def test_every_setting_has_a_variable() -> None:
    assert VARIABLES.keys() == TrackingSettings.model_fields.keys()


def test_the_defaults_are_for_a_laptop() -> None:
    settings = load_settings()

    assert settings.tracking_uri == "sqlite:///mlflow.db"
    assert settings.experiment_name == "heimdall-localization"
    assert settings.run_name_prefix == "rf-localization"
    assert settings.password.get_secret_value() == ""


VALUES = {"s3_path_style": ("False", "True", "False")}
"""Of settings that are no text: what file, environment and argument say."""


@pytest.mark.parametrize("field", VARIABLES)
def test_arguments_beat_the_environment_which_beats_the_env_file(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_file, in_environment, argument = VALUES.get(field, ("from-file", "from-environment", "from-argument"))
    for file in (in_file, in_environment, argument):
        Path(file).touch()  # some name files that must be there
    default = value_of(load_settings(), field)
    assert default != in_file

    Path(".env").write_text(f"{VARIABLES[field]}={in_file}\n")
    assert value_of(load_settings(), field) == in_file

    monkeypatch.setenv(VARIABLES[field], in_environment)
    assert value_of(load_settings(), field) == in_environment

    assert value_of(load_settings(**{field: argument}), field) == argument


@pytest.mark.parametrize("field", ["ca_bundle", "s3_ca_bundle"])
def test_a_file_of_authorities_that_there_is_not_is_named_by_its_variable(field: str) -> None:
    with pytest.raises(SettingsError, match=f"{VARIABLES[field]}.*/nowhere/ca.pem, which does not exist"):
        load_settings(**{field: "/nowhere/ca.pem"})


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_requests_own_variables_name_the_authorities_too(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("ca.pem").touch()
    monkeypatch.setenv(variable, "ca.pem")
    assert load_settings().ca_bundle == Path("ca.pem")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")

    assert load_settings().tracking_uri == "sqlite:///mlflow.db"


def test_the_s3_endpoint_of_recordings_serves_artifacts_where_mlflow_has_no_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEIMDALL_S3_ENDPOINT_URL", "http://recordings")
    assert load_settings().s3_endpoint_url == "http://recordings"

    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://artifacts")
    assert load_settings().s3_endpoint_url == "http://artifacts"


def test_either_name_in_the_environment_beats_the_env_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("MLFLOW_S3_ENDPOINT_URL=http://file\n")
    monkeypatch.setenv("HEIMDALL_S3_ENDPOINT_URL", "http://environment")

    assert load_settings().s3_endpoint_url == "http://environment"


@pytest.mark.parametrize("variable", [name.upper() for name in VARIABLES])
def test_variables_of_the_system_that_are_named_like_a_setting_mean_nothing(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_settings()
    monkeypatch.setenv(variable, "alice")

    assert load_settings() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [("tracking_uri", ""), ("experiment_name", ""), ("tracking_uri", [CANARY]), ("password", {CANARY: CANARY})],
)
def test_an_error_names_the_variable_and_not_the_value(field: str, value: object) -> None:
    with pytest.raises(SettingsError, match=VARIABLES[field]) as caught:
        load_settings(**{field: value})

    assert CANARY not in str(caught.value)
    assert caught.value.__suppress_context__, "the cause would show the value in a traceback"


@pytest.mark.parametrize("field", ["tracking_uri", "registry_uri"])
@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("mlflow.example:5000", "has no scheme"),
        ("127.0.0.1:5000/team", "has no scheme"),
        ("http://", "names no host"),
        ("https://:5000", "names no host"),
        ("http://mlflow:port", "has no number for a port"),
        ("http://alice:a/b@mlflow:5000", "has no number for a port"),
    ],
)
def test_an_address_that_leads_nowhere_is_told_at_once(field: str, address: str, words: str) -> None:
    with pytest.raises(SettingsError, match=f"{VARIABLES[field]} {words}") as caught:
        load_settings(**{field: address})
    assert "a/b" not in str(caught.value)
    with pytest.raises(ValidationError) as bare:
        TrackingSettings(**{field: address})  # type: ignore[arg-type]
    assert "a/b" not in f"{bare.value} {bare.value!r}"


@pytest.mark.parametrize(
    "address",
    ["sqlite:///mlflow.db", "sqlite:////data/mlflow.db", "./mlruns", "file:///mlruns", "http://mlflow", "databricks"],
)
def test_every_other_address_is_left_to_mlflow(address: str) -> None:
    assert load_settings(tracking_uri=address).tracking_uri == address


def test_one_error_names_every_wrong_variable() -> None:
    with pytest.raises(SettingsError, match=r"MLFLOW_TRACKING_URI.*MLFLOW_EXPERIMENT_NAME"):
        load_settings(tracking_uri="", experiment_name="")


def test_secrets_show_in_no_representation() -> None:
    settings = load_settings(
        tracking_uri=f"http://alice:{CANARY}@mlflow:5000",
        registry_uri=f"postgresql://alice:{CANARY}@db/registry",
        s3_endpoint_url=f"https://key:{CANARY}@minio:9000",
        password=CANARY,
        backend_store_uri=f"postgresql://mlflow:{CANARY}@db/mlflow",
    )

    shown = (repr(settings), str(settings), f"{settings}", repr([settings]), settings.display_uri)
    for text in (*shown, settings.model_dump_json(), repr(settings.model_dump())):
        assert CANARY not in text
    for text in (repr(settings), settings.model_dump_json()):
        assert "mlflow:5000" in text


def test_display_uri_keeps_host_port_and_path() -> None:
    settings = load_settings(tracking_uri=f"https://alice:{CANARY}@mlflow.example:8443/team")

    assert settings.display_uri == "https://***@mlflow.example:8443/team"
    assert load_settings(tracking_uri="http://mlflow:5000").display_uri == "http://mlflow:5000"


def test_settings_can_not_be_changed_once_they_are_read() -> None:
    with pytest.raises(ValidationError):
        load_settings().tracking_uri = "http://elsewhere"  # type: ignore[misc]


def test_export_gives_mlflow_what_it_lacks_and_leaves_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(username="alice", password=CANARY, s3_endpoint_url="http://minio")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "bob")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "x")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")  # so that it is put back after the test
    for name in ("MLFLOW_S3_ENDPOINT_URL", "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)

    settings.export()

    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "bob"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == CANARY
    assert os.environ["MLFLOW_S3_ENDPOINT_URL"] == "http://minio"
    assert os.environ["MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"] == "path"


def test_export_gives_mlflow_what_is_set_to_nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("MLFLOW_TRACKING_USERNAME=alice\n")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")

    load_settings().export()

    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "alice"


@pytest.mark.parametrize("field", ["username", "password"])
def test_a_second_user_in_one_process_is_refused_and_not_taken_for_the_first(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLES[field], "")
    first = load_settings(**{field: CANARY})
    first.export()
    first.export()
    with pytest.raises(SettingsError, match=f"^{VARIABLES[field]}: a tracker of this process has another") as caught:
        load_settings(**{field: f"{CANARY}-too"}).export()
    assert CANARY not in str(caught.value)

    monkeypatch.setenv(VARIABLES[field], "of the environment")
    load_settings(**{field: "other"}).export()
    assert os.environ[VARIABLES[field]] == "of the environment"


@pytest.mark.parametrize(("insecure", "given"), [("true", ""), ("1", ""), ("false", "bundle")])
def test_authorities_are_not_given_to_an_mlflow_that_looks_at_no_certificate(
    insecure: str, given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its client refuses both together; the file may be meant for everything else that is asked."""
    (tmp_path / "bundle").touch()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "bundle"))
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", insecure)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "")
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")  # so that it is put back after the test

    load_settings().export()

    assert Path(os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH", "")).name == given
