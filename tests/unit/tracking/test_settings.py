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


VALUES = {"s3_path_style": ("False", "True", "False", "True")}
"""Of settings that are no text: what settings file, `.env`, environment and argument say."""


@pytest.mark.parametrize("field", VARIABLES)
def test_arguments_beat_the_environment_which_beats_the_env_file_which_beats_the_settings_file(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = ("from-file", "from-env-file", "from-environment", "from-argument")
    in_file, in_env_file, in_environment, argument = VALUES.get(field, usual)
    for file in (in_file, in_env_file, in_environment, argument):
        Path(file).touch()  # some name files that must be there
    default = value_of(load_settings(), field)
    assert default != in_file

    Path("heimdall.toml").write_text(f"[tracking]\n{field} = '{in_file}'\n")
    assert value_of(load_settings(), field) == in_file

    Path(".env").write_text(f"{VARIABLES[field]}={in_env_file}\n")
    assert value_of(load_settings(), field) == in_env_file

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


def test_a_variable_names_another_settings_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path("heimdall.toml").write_text("[tracking]\nexperiment_name = 'here'\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/my.toml").write_text("[tracking]\nrun_name_prefix = 'there'\n")
    monkeypatch.setenv("HEIMDALL_SETTINGS", "elsewhere/my.toml")

    settings = load_settings()

    assert (settings.experiment_name, settings.run_name_prefix) == ("heimdall-localization", "there")
    monkeypatch.setenv("HEIMDALL_SETTINGS", "")
    assert load_settings().experiment_name == "here"


def test_values_of_a_settings_file_have_types_of_their_own() -> None:
    Path("heimdall.toml").write_text("[tracking]\ns3_path_style = false\nundelivered_dir = '/left'\n")

    assert load_settings().s3_path_style is False
    assert load_settings().undelivered_dir == Path("/left")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[tracking]\nuri = 'x'", r"'uri' in \[tracking\]; .* takes tracking_uri, "),
        ("[tracking]\nMLFLOW_TRACKING_URI = 'x'", r"'MLFLOW_TRACKING_URI' in \[tracking\]"),
        ("[tracking]\nTracking_URI = 'x'", r"'Tracking_URI' in \[tracking\]"),
        ("tracking_uri = 'x'", r"'tracking_uri'; its tables are \[tracking\] and \[data\]"),
        ("[traking]\ntracking_uri = 'x'\n[tracking.more]", r"'traking', 'more' in \[tracking\]"),
    ],
)
def test_a_key_that_is_no_setting_is_named_with_its_file(text: str, named: str) -> None:
    Path("heimdall.toml").write_text(text)

    with pytest.raises(SettingsError, match=f"heimdall.toml sets what is no setting: {named}"):
        load_settings()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[tracking]\npassword = canary2f7c", "my.toml is no TOML: .*line 2"),
        (b"[tracking]\npassword = '\xff'", "my.toml is no TOML"),
        (b"tracking = 'canary2f7c'\ndata = 1", "my.toml can't be used: 'tracking' and 'data' must be a table"),
        (None, "my.toml can't be read: No such file"),
    ],
)
def test_a_settings_file_that_can_not_be_used_is_named(
    content: bytes | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        Path("my.toml").write_bytes(content)
    monkeypatch.setenv("HEIMDALL_SETTINGS", "my.toml")

    with pytest.raises(SettingsError, match=words) as caught:
        load_settings()
    assert CANARY not in str(caught.value)


def test_a_wrong_value_of_a_settings_file_is_named_by_its_key_too() -> None:
    Path("heimdall.toml").write_text(f"[tracking]\nexperiment_name = ''\ntracking_uri = 'http://a:{CANARY}/b@mlflow'\n")

    with pytest.raises(SettingsError) as caught:
        load_settings(registry_uri="http://")

    assert "MLFLOW_EXPERIMENT_NAME (or experiment_name in heimdall.toml): " in str(caught.value)
    assert "MLFLOW_TRACKING_URI (or tracking_uri in heimdall.toml) has no number" in str(caught.value)
    assert "MLFLOW_REGISTRY_URI names no host" in str(caught.value)
    assert CANARY not in str(caught.value)


def test_secrets_of_a_settings_file_show_in_no_representation() -> None:
    Path("heimdall.toml").write_text(f"[tracking]\npassword = '{CANARY}'\n")
    settings = load_settings()

    assert settings.password.get_secret_value() == CANARY
    assert CANARY not in f"{settings!r} {settings.model_dump_json()} {settings.model_dump()}"


def test_the_tables_of_others_are_left_to_them() -> None:
    Path("heimdall.toml").write_text("[data]\nwhatever = 1\n")

    assert load_settings().tracking_uri == "sqlite:///mlflow.db"


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


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (".env", "MLFLOW_S3_ENDPOINT_URL=http://file\n"),
        ("heimdall.toml", "[tracking]\ns3_endpoint_url = 'http://file'\n"),
    ],
)
def test_either_name_in_the_environment_beats_the_files(file: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(file).write_text(text)
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
