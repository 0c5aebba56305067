"""Where recordings and features lie. Of several sources the first wins: environment, `.env`, defaults for a laptop."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class DataSettings(BaseSettings):
    """Settings of data access; each one's variable is `HEIMDALL_` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix="HEIMDALL_", env_file=".env", extra="ignore", frozen=True)

    database_url: SecretStr = SecretStr("sqlite:///heimdall.db")
    """Database of recording sessions. A password may be left to PGPASSWORD."""
    recordings_url: str = "file:recordings"
    """`s3://bucket[/prefix]`, or `file:` and a folder."""
    s3_endpoint_url: str = ""
    """S3 server; empty for AWS."""
    s3_access_key: SecretStr = SecretStr("")
    s3_secret_key: SecretStr = SecretStr("")
    s3_region: str = "us-east-1"
    s3_ca_bundle: str = ""
    """File with the certificate authorities of a private endpoint."""
    cache_dir: Path = Path("~/.cache/heimdall-features")
    """Folder of cached features."""
    skip_limit: float = Field(default=0.05, ge=0, le=1)
    """Share of recordings that may be unreadable before training is refused."""
    read_threads: int = Field(default=8, ge=1, le=64)
    """Recordings that are read side by side."""
