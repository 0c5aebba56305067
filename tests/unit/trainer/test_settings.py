"""Data settings: which source wins, and what errors say."""

from __future__ import annotations

from pathlib import Path

import pytest

from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.settings import load_data_settings

SECRET = "hunter2"


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
        database_url=f"postgresql://user:{SECRET}@host/db", s3_access_key=SECRET, s3_secret_key=SECRET
    )
    assert SECRET not in repr(settings)
    assert SECRET not in settings.model_dump_json()
