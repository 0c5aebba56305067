"""Tracking settings. Of several sources the first wins: arguments, environment, `.env`, settings file, defaults.

The variables are MLflow's own where it has one, so that what works with `mlflow` works here.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from pydantic import (
    AliasChoices,
    Field,
    SecretStr,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from heimdall_tracking.redact import redact

FILE_VARIABLE: Final = "HEIMDALL_SETTINGS"
FILE: Final = "heimdall.toml"
"""The settings file, in the working directory, where that variable names none."""
TABLES: Final = ("tracking", "data")
"""Its tables: it is one file for all, of which each class reads its own."""
ESCAPED: Final = "/ : @ ? # in a password as %2F %3A %40 %3F %23"
"""How a URL takes such characters: told where one may have been cut in the middle of a password."""
_HOST_AND_PORT: Final = re.compile(r"[\w.-]+:\d+(/.*)?")
_LOGIN: Final = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_exported: Final[dict[str, str]] = {}
"""What MLflow's client was given here, by variable."""
_OWN: Final = "Value error, "
"""What pydantic puts before the words of our own checks."""


class SettingsError(Exception):
    """Settings are missing or wrong; the message names each variable."""


class MaskedSettings(BaseSettings):
    """Settings that show no password: neither in errors nor where they are printed or dumped."""

    model_config = SettingsConfigDict(frozen=True, hide_input_in_errors=True)

    @field_serializer("*", mode="wrap")
    def _masked(self, value: Any, dump: SerializerFunctionWrapHandler) -> Any:
        # What is dumped is printed and logged, too.
        return redact(value) if isinstance(value, str) else dump(value)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, redact(value) if isinstance(value, str) else value


class LocalSettings(MaskedSettings):
    """Settings of what people start: from arguments, environment, `.env` and settings file, of which the first wins."""

    table: ClassVar[str]
    """Their table of the settings file, whose keys are the names of the fields."""

    model_config = SettingsConfigDict(
        # Fields may be given by name. Without a prefix, USERNAME, which many systems set, would be one of the names.
        env_prefix="HEIMDALL_",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        populate_by_name=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources, the first of which wins.

        Raises:
            SettingsError: There is a settings file that can't be read, or that sets what is no setting.
        """
        file = _file() if _of_file(cls) else None
        in_file = TomlConfigSettingsSource(settings_cls, file, (cls.table,))
        return init_settings, env_settings, dotenv_settings, in_file, file_secret_settings


class TrackingSettings(LocalSettings):
    """Where runs are tracked. The defaults are for a laptop: SQLite and local files."""

    table: ClassVar[str] = "tracking"

    tracking_uri: str = Field(
        default="sqlite:///mlflow.db",
        min_length=1,
        validation_alias="MLFLOW_TRACKING_URI",
    )
    """The MLflow server, or a local store."""
    registry_uri: str = Field(default="", validation_alias="MLFLOW_REGISTRY_URI")
    """The model registry. Empty: the tracking server's."""
    username: str = Field(default="", validation_alias="MLFLOW_TRACKING_USERNAME")
    password: SecretStr = Field(default=SecretStr(""), validation_alias="MLFLOW_TRACKING_PASSWORD")
    s3_endpoint_url: str = Field(
        default="",
        validation_alias=AliasChoices("MLFLOW_S3_ENDPOINT_URL", "HEIMDALL_S3_ENDPOINT_URL"),
    )
    """S3 server of artifacts that are not proxied by MLflow."""
    ca_bundle: Path | None = Field(
        default=None,
        validation_alias=AliasChoices("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    )
    """File with the certificate authorities of a private MLflow server."""
    s3_ca_bundle: Path | None = Field(
        default=None, validation_alias=AliasChoices("AWS_CA_BUNDLE", "HEIMDALL_S3_CA_BUNDLE")
    )
    """File with the certificate authorities of the S3 server."""
    s3_path_style: bool = Field(default=True, validation_alias="HEIMDALL_S3_PATH_STYLE")
    """Address buckets by path: private endpoints rarely have a host name per bucket."""
    backend_store_uri: SecretStr = Field(default=SecretStr(""), validation_alias="MLFLOW_BACKEND_STORE_URI")
    """Database of a server to be started by hand; a client does not need it."""
    experiment_name: str = Field(
        default="heimdall-localization",
        min_length=1,
        validation_alias="MLFLOW_EXPERIMENT_NAME",
    )
    run_name_prefix: str = Field(default="rf-localization", validation_alias="HEIMDALL_RUN_NAME_PREFIX")
    undelivered_dir: Path | None = Field(default=None, validation_alias="HEIMDALL_UNDELIVERED_DIR")
    """Folder for what could not be delivered when a process had to end: one folder in it for each run.

    By default the trainer's output folder, elsewhere the working directory."""

    @field_validator("tracking_uri", "registry_uri")
    @classmethod
    def _leads_somewhere(cls, value: str) -> str:
        if _HOST_AND_PORT.fullmatch(value):
            raise ValueError("has no scheme: write http:// or https:// before it")
        if value.startswith(("http://", "https://")):
            # An error of its own may show a part of the password.
            try:
                address = urlsplit(value)
                host, _ = address.hostname, address.port
            except ValueError:
                raise ValueError(f"has no number for a port; write {ESCAPED}") from None
            if not host:
                raise ValueError("names no host")
        return value

    @field_validator("ca_bundle", "s3_ca_bundle")
    @classmethod
    def _is_file(cls, value: Path | None) -> Path | None:
        if value is not None and not value.exists():
            raise ValueError(f"names {value}, which does not exist")
        return value

    @property
    def display_uri(self) -> str:
        """The tracking URI as it may be shown: without user and password."""
        return redact(self.tracking_uri)

    def export(self) -> None:
        """Give MLflow's client what it reads from the environment alone; variables that are set stay as they are.

        Raises:
            SettingsError: Another tracker of this process has given it another user or password.
        """
        values = {
            "MLFLOW_TRACKING_USERNAME": self.username,
            "MLFLOW_TRACKING_PASSWORD": self.password.get_secret_value(),
            "MLFLOW_S3_ENDPOINT_URL": self.s3_endpoint_url,
            # Its client refuses both together, and the file may be meant for others (REQUESTS_CA_BUNDLE).
            "MLFLOW_TRACKING_SERVER_CERT_PATH": "" if trusts_anybody() else str(self.ca_bundle or ""),
            "AWS_CA_BUNDLE": str(self.s3_ca_bundle or ""),
            "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "path" if self.s3_endpoint_url and self.s3_path_style else "",
        }
        for name, value in values.items():
            if value and not os.environ.get(name):
                os.environ[name] = _exported[name] = value
            elif value and name in _LOGIN and value != os.environ[name] == _exported.get(name):
                raise SettingsError(
                    f"{name}: a tracker of this process has another one, and MLflow's client knows one for all of "
                    "them: have a process for each, or remove the variable from os.environ before"
                )


def load_settings(**overrides: object) -> TrackingSettings:
    """Read the settings.

    Args:
        overrides: Values that win over every source.

    Returns:
        The settings.

    Raises:
        SettingsError: A value is wrong; the message names its variable, never its value.
    """
    try:
        return TrackingSettings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        problems = problems_of(error, TrackingSettings)
        raise SettingsError(f"the tracking settings can't be used: {'; '.join(problems)}") from None


def problems_of(error: ValidationError, settings: type[BaseSettings]) -> list[str]:
    """What is wrong with settings, each problem with its variable, perhaps its key in a file, and never with a value.

    Args:
        error: What reading them raised.
        settings: Their class.
    """
    problems = []
    for item in error.errors(include_input=False, include_url=False):
        name = _name(str(item["loc"][0]), settings) if item["loc"] else ""
        message = item["msg"].removeprefix(_OWN)
        # Our own words go on from the name; an error of several settings names them itself.
        separator = " " if message != item["msg"] else ": "
        problems.append(f"{name}{separator}{message}" if name else message)
    return problems


def trusts_anybody() -> bool:
    """Whether MLflow's client is told to look at no certificate."""
    return os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")


def _file() -> Path | None:
    """The settings file; None where none is named and none is there."""
    named = os.environ.get(FILE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(FILE) if Path(FILE).is_file() else None


def _of_file(settings: type[LocalSettings]) -> dict[str, Any]:
    """What the settings file says of some settings, by the names of their fields.

    Raises:
        SettingsError: It can't be read, or sets what is no setting.
    """
    file = _file()
    if file is None:
        return {}
    tables = _read(file)
    flat = [repr(name) for name in TABLES if not isinstance(tables.get(name, {}), dict)]
    if flat:
        raise SettingsError(f"the settings file {file} can't be used: {' and '.join(flat)} must be a table")
    mine: dict[str, Any] = tables.get(settings.table, {})
    unknown = [repr(name) for name in tables if name not in TABLES]
    unknown += [f"{name!r} in [{settings.table}]" for name in mine if name not in settings.model_fields]
    if unknown:
        raise SettingsError(
            f"the settings file {file} sets what is no setting: {', '.join(unknown)}; its tables are "
            f"{' and '.join(f'[{name}]' for name in TABLES)}, and [{settings.table}] takes "
            f"{', '.join(settings.model_fields)}"
        )
    return mine


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise SettingsError(f"the settings file {file} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"the settings file {file} is no TOML: {error}") from None


def _name(name: str, settings: type[BaseSettings]) -> str:
    """A setting as people know it: its variable, and its key where the settings file has one."""
    variable = _variable(name, settings)
    if not issubclass(settings, LocalSettings):
        return variable
    key = next((each for each in _of_file(settings) if _variable(each, settings) == variable), None)
    return variable if key is None else f"{variable} (or {key} in {_file()})"


def _variable(name: str, settings: type[BaseSettings]) -> str:
    """The variable of a setting that pydantic names by its field, or by the variable already."""
    field = settings.model_fields.get(name)
    if field is None:
        return name
    alias = field.validation_alias
    if alias is None:
        return f"{settings.model_config.get('env_prefix', '')}{name.upper()}"
    return str(alias.choices[0] if isinstance(alias, AliasChoices) else alias)
