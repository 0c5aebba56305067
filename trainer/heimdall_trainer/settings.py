"""Where recordings and features lie.

Of several sources the first wins: arguments, environment, `.env`, settings file, defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Final, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator

from heimdall_tracking.settings import ESCAPED, LocalSettings, SettingsError, problems_of
from heimdall_trainer.errors import ConfigurationError

PREFIX: Final = "HEIMDALL_"
KEYS: Final = f"{PREFIX}S3_ACCESS_KEY and {PREFIX}S3_SECRET_KEY"
_POSTGRES: Final = "postgresql+psycopg://"


class DataSettings(LocalSettings):
    """Settings of data access; each one's variable is `HEIMDALL_` and its name in capitals.

    The defaults are for a laptop: an SQLite file and a folder. `load_data_settings` gives errors that people can read.
    """

    table: ClassVar[str] = "data"

    database_url: SecretStr = SecretStr("sqlite:///heimdall.db")
    """Database of recording sessions: `postgresql://…` or `sqlite:///FILE`. A password may be left to PGPASSWORD."""
    recordings_url: str = "file:./recordings"
    """Where recordings lie: `s3://BUCKET[/PREFIX]`, or `file:` and a folder."""
    s3_endpoint_url: str | None = None
    """S3 server, such as MinIO's address. Without it: AWS."""
    s3_access_key: SecretStr | None = None
    """Without the two keys, boto3 looks for credentials where it always does (a role, a profile)."""
    s3_secret_key: SecretStr | None = None
    s3_region: str = "us-east-1"
    s3_ca_bundle: Path | None = None
    """File with the certificate authorities of a private endpoint."""
    s3_path_style: bool = True
    """Address buckets by path: private endpoints rarely have a host name per bucket."""
    cache_dir: Path = Path("~/.cache/heimdall-trainer")
    """Folder of cached features (spectrograms, times of arrival) and downloaded weights."""
    cache_limit_gib: float = Field(default=50, gt=0)
    """About how large the cached features may become, in GiB; what was not used for long goes first."""
    redis_url: SecretStr | None = None
    """A Redis that keeps features for several machines: `redis://USER:PASSWORD@HOST:PORT/DB`, `rediss://…` with TLS.

    Optional: where it is away or slow, the folder alone is used."""
    weights_url: str = ""
    """`file:` and a folder, or `s3://BUCKET[/PREFIX]`: weights as `BACKBONE.safetensors` or `BACKBONE.pth`.

    Empty: the library's own, from the Internet."""
    skip_limit: float = Field(default=0.05, ge=0, le=1)
    """Share of recordings that may be missing or corrupt before training is refused."""
    read_threads: int = Field(default=8, ge=1, le=64)
    """Recordings that are read or written side by side."""

    @field_validator("database_url")
    @classmethod
    def _use_psycopg(cls, value: SecretStr) -> SecretStr:
        url = value.get_secret_value().strip()
        scheme, separator, rest = url.partition("://")
        if not separator:
            raise ValueError("is no database URL: use postgresql://USER:PASSWORD@HOST/DATABASE or sqlite:///FILE")
        if scheme in {"postgres", "postgresql"}:
            return SecretStr(_POSTGRES + rest)
        if scheme not in {"sqlite", "postgresql+psycopg"}:
            raise ValueError(f"names the unknown database {scheme!r}: use postgresql:// or sqlite:///")
        return SecretStr(url)

    @field_validator("redis_url")
    @classmethod
    def _check_redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        url = value.get_secret_value()
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("is no URL of a Redis: use redis://USER:PASSWORD@HOST:PORT/DB, or rediss:// for TLS")
        try:
            _ = urlsplit(url).port
        except ValueError:
            # Its own words may show a part of the password.
            raise ValueError(f"has no number for a port: write {ESCAPED}") from None
        return value

    @field_validator("recordings_url", "weights_url")
    @classmethod
    def _check_place(cls, value: str) -> str:
        if holds_keys(value):
            raise ValueError(f"names keys beside the bucket: write s3://BUCKET[/PREFIX], and set {KEYS}")
        return value

    @field_validator("s3_endpoint_url")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value and "@" in value:
            raise ValueError(f"names keys beside the server: leave them out, and set {KEYS}")
        if value and not value.startswith(("http://", "https://")):
            raise ValueError(f"must begin with http:// or https://, as in http://{value}")
        return value

    @field_validator("cache_dir")
    @classmethod
    def _expand_home(cls, value: Path) -> Path:
        return value.expanduser()

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        problems = []
        if (self.s3_access_key is None) != (self.s3_secret_key is None):
            missing = "S3_SECRET_KEY" if self.s3_secret_key is None else "S3_ACCESS_KEY"
            problems.append(f"{PREFIX}{missing} is missing: the two keys of S3 go together")
        if not self.recordings_url.startswith(("file:", "s3://")):
            problems.append(f"{PREFIX}RECORDINGS_URL must be s3://BUCKET[/PREFIX], or file: and a folder")
        if self.s3_ca_bundle is not None and not self.s3_ca_bundle.is_file():
            problems.append(f"{PREFIX}S3_CA_BUNDLE names {self.s3_ca_bundle}, which is no file")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def holds_keys(url: str) -> bool:
    """Whether a URL of S3 names keys, as in `s3://KEY:SECRET@BUCKET`: no bucket has a colon or an @ in its name."""
    scheme, _, rest = url.partition(":")
    return scheme == "s3" and not {"@", ":"}.isdisjoint(rest.removeprefix("//").partition("/")[0])


def load_data_settings(**overrides: object) -> DataSettings:
    """Read the settings.

    Args:
        overrides: Values that win over every source.

    Returns:
        The settings.

    Raises:
        ConfigurationError: Values are missing or wrong; the message names each variable, and never a value.
    """
    try:
        return DataSettings(**overrides)  # type: ignore[arg-type]
    except SettingsError as error:
        raise ConfigurationError(str(error)) from None
    except ValidationError as error:
        problems = problems_of(error, DataSettings)
        raise ConfigurationError(f"the data settings can't be used: {'; '.join(problems)}") from None
