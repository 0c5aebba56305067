"""Data settings: which source wins, and what errors say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import SecretStr

from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.settings import DataSettings, load_data_settings

SECRET = "hunter2"


SOURCES: dict[str, tuple[object, object, object, object]] = {
    "database_url": tuple(f"postgresql+psycopg://{name}/db" for name in "abcd"),  # type: ignore[dict-item]
    "recordings_url": ("file:a", "file:b", "file:c", "file:d"),
    "s3_endpoint_url": ("http://a", "http://b", "http://c", "http://d"),
    "s3_region": ("a", "b", "c", "d"),
    "s3_ca_bundle": (Path("a.pem"), Path("b.pem"), Path("c.pem"), Path("d.pem")),
    "s3_path_style": (False, True, False, True),
    "cache_dir": (Path("a"), Path("b"), Path("c"), Path("d")),
    "cache_limit_gib": (1.0, 2.0, 3.0, 4.0),
    "redis_url": ("redis://a", "redis://b", "redis://c", "redis://d"),
    "weights_url": ("a", "b", "c", "d"),
    "skip_limit": (0.1, 0.2, 0.3, 0.4),
    "read_threads": (1, 2, 3, 4),
}
"""What settings file, `.env`, environment and argument say.

The two keys of S3 go together, and have a test of their own."""


def test_every_setting_s_sources_are_tested() -> None:
    assert {*SOURCES, "s3_access_key", "s3_secret_key"} == DataSettings.model_fields.keys()


@pytest.mark.parametrize("field", SOURCES)
def test_of_each_setting_the_first_source_wins(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def value() -> object:
        found = getattr(load_data_settings(), field)
        return found.get_secret_value() if isinstance(found, SecretStr) else found

    in_file, in_env_file, in_environment, argument = SOURCES[field]
    for each in SOURCES[field]:
        if isinstance(each, Path):
            each.touch()
    variable = f"HEIMDALL_{field.upper()}"
    assert value() != in_file
    as_toml = json.dumps(str(in_file) if isinstance(in_file, Path) else in_file)
    Path("heimdall.toml").write_text(f"[data]\n{field} = {as_toml}\n")
    assert value() == in_file
    Path(".env").write_text(f"{variable}={in_env_file}\n")
    assert value() == in_env_file
    monkeypatch.setenv(variable, str(in_environment))
    assert value() == in_environment
    found = getattr(load_data_settings(**{field: argument}), field)
    assert (found.get_secret_value() if isinstance(found, SecretStr) else found) == argument


def test_the_two_keys_of_s3_come_from_the_first_source_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(**arguments: object) -> list[str]:
        settings = load_data_settings(**arguments)
        return [key.get_secret_value() for key in (settings.s3_access_key, settings.s3_secret_key) if key]

    assert keys() == []
    Path("heimdall.toml").write_text("[data]\ns3_access_key = 'file'\ns3_secret_key = 'file'\n")
    assert keys() == ["file"] * 2
    Path(".env").write_text("HEIMDALL_S3_ACCESS_KEY=env-file\nHEIMDALL_S3_SECRET_KEY=env-file\n")
    assert keys() == ["env-file"] * 2
    monkeypatch.setenv("HEIMDALL_S3_ACCESS_KEY", "environment")
    monkeypatch.setenv("HEIMDALL_S3_SECRET_KEY", "environment")
    assert keys() == ["environment"] * 2
    assert keys(s3_access_key="argument", s3_secret_key="argument") == ["argument"] * 2


def test_arguments_beat_the_environment_which_beats_the_file_which_beats_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert load_data_settings().s3_region == "us-east-1"
    Path(".env").write_text("HEIMDALL_S3_REGION=from-file\nHEIMDALL_READ_THREADS=3\n")
    assert load_data_settings().s3_region == "from-file"
    monkeypatch.setenv("HEIMDALL_S3_REGION", "from-environment")
    assert load_data_settings().s3_region == "from-environment"
    assert load_data_settings(s3_region="from-argument").s3_region == "from-argument"
    assert load_data_settings(s3_region="from-argument").read_threads == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[data]\nskip = 0.1", r"heimdall.toml sets what is no setting: 'skip' in \[data\]"),
        ("[data]\nskip_limit = 2", r"HEIMDALL_SKIP_LIMIT \(or skip_limit in heimdall.toml\): Input should be less"),
        ("[data", "heimdall.toml is no TOML"),
        (f"[data]\ns3_access_key = '{SECRET}'", "HEIMDALL_S3_SECRET_KEY is missing"),
    ],
)
def test_what_is_wrong_in_a_settings_file_is_told(text: str, words: str) -> None:
    Path("heimdall.toml").write_text(text)
    with pytest.raises(ConfigurationError, match=words) as caught:
        load_data_settings()
    assert SECRET not in str(caught.value)


def test_secrets_of_a_settings_file_do_not_show() -> None:
    Path("heimdall.toml").write_text(f"[data]\nredis_url = 'redis://:{SECRET}@host'\n[tracking]\nusername = 'a'\n")
    settings = load_data_settings()
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == f"redis://:{SECRET}@host"
    assert SECRET not in f"{settings!r} {settings.model_dump_json()}"


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEIMDALL_RECORDINGS_URL", "")
    assert load_data_settings().recordings_url == "file:./recordings"


def test_without_any_settings_a_laptop_is_served() -> None:
    settings = load_data_settings()
    assert settings.database_url.get_secret_value() == "sqlite:///heimdall.db"
    assert settings.cache_dir == Path.home() / ".cache/heimdall-trainer"


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_way_to_write_postgresql_means_the_driver_that_is_installed(scheme: str) -> None:
    settings = load_data_settings(database_url=f"{scheme}://user:{SECRET}@host/db")
    assert settings.database_url.get_secret_value() == f"postgresql+psycopg://user:{SECRET}@host/db"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HEIMDALL_DATABASE_URL", f"user:{SECRET}@host/db"),
        ("HEIMDALL_DATABASE_URL", f"mysql://user:{SECRET}@host/db"),
        ("HEIMDALL_RECORDINGS_URL", f"https://user:{SECRET}@host/bucket"),
        ("HEIMDALL_SKIP_LIMIT", SECRET),
        ("HEIMDALL_SKIP_LIMIT", "1.5"),
        ("HEIMDALL_READ_THREADS", "0"),
        ("HEIMDALL_REDIS_URL", f"http://user:{SECRET}@host"),
        ("HEIMDALL_REDIS_URL", f"redis://:{SECRET}/more@host:6379/0"),
        ("HEIMDALL_RECORDINGS_URL", f"s3://KEY:{SECRET}@bucket"),
        ("HEIMDALL_RECORDINGS_URL", f"s3://{SECRET}@bucket/iq"),
        ("HEIMDALL_RECORDINGS_URL", f"s3://KEY:1/{SECRET}@bucket/iq"),
        ("HEIMDALL_WEIGHTS_URL", f"s3://KEY:{SECRET}@bucket/weights"),
        ("HEIMDALL_WEIGHTS_URL", f"s3:KEY:{SECRET}@bucket/weights"),
        ("HEIMDALL_S3_ENDPOINT_URL", f"https://KEY:{SECRET}@minio:9000"),
        ("HEIMDALL_S3_ENDPOINT_URL", f"KEY:{SECRET}@minio:9000"),
        ("HEIMDALL_S3_ENDPOINT_URL", "minio:9000"),
        ("HEIMDALL_CACHE_LIMIT_GIB", "0"),
        ("HEIMDALL_S3_CA_BUNDLE", "/nowhere/ca.pem"),
    ],
)
def test_a_wrong_value_is_named_by_its_variable_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=variable) as caught:
        load_data_settings()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "missing"),
    [("HEIMDALL_S3_ACCESS_KEY", "HEIMDALL_S3_SECRET_KEY"), ("HEIMDALL_S3_SECRET_KEY", "HEIMDALL_S3_ACCESS_KEY")],
)
def test_one_key_without_the_other_is_refused(monkeypatch: pytest.MonkeyPatch, given: str, missing: str) -> None:
    monkeypatch.setenv(given, SECRET)
    with pytest.raises(ConfigurationError, match=f"{missing} is missing") as caught:
        load_data_settings()
    assert SECRET not in str(caught.value)


def test_all_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEIMDALL_SKIP_LIMIT", "2")
    monkeypatch.setenv("HEIMDALL_READ_THREADS", "many")
    with pytest.raises(ConfigurationError, match=r"SKIP_LIMIT.*READ_THREADS"):
        load_data_settings()


def test_credentials_do_not_show_in_a_representation() -> None:
    settings = load_data_settings(
        database_url=f"postgresql://user:{SECRET}@host/db",
        s3_access_key=SECRET,
        s3_secret_key=SECRET,
        redis_url=f"redis://:{SECRET}@host",
    )
    assert SECRET not in repr(settings)
    assert SECRET not in settings.model_dump_json()


def test_what_was_copied_past_the_checks_is_masked_all_the_same() -> None:
    urls = dict.fromkeys(("recordings_url", "weights_url", "s3_endpoint_url"), f"https://key:{SECRET}@host")
    settings = load_data_settings().model_copy(update=urls)
    for text in (repr(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert SECRET not in text
        assert text.count("https://***@host") == 3


def test_an_object_s_name_may_hold_what_a_bucket_s_may_not() -> None:
    assert load_data_settings(recordings_url="s3://bucket/a@b:c").recordings_url == "s3://bucket/a@b:c"
    assert load_data_settings(recordings_url="file:a@b:c").recordings_url == "file:a@b:c"
