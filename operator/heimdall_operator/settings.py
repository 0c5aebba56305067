"""The operator's settings: environment variables `HEIMDALL_OPERATOR_…`, set by the chart."""

from __future__ import annotations

from functools import cached_property
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from heimdall_operator.manifests import CABundle
from heimdall_tracking.settings import MaskedSettings


class OperatorSettings(MaskedSettings):
    """Settings of the operator; each field's environment variable is its name in capitals with the prefix."""

    model_config = SettingsConfigDict(env_prefix="HEIMDALL_OPERATOR_")

    tracking_uri: str = Field(min_length=1)
    """The MLflow server, as the operator and the training pods reach it."""
    tracking_public_url: str = ""
    """The MLflow server as people reach it, for links. Empty: tracking_uri."""
    trainer_image: str = Field(min_length=1)
    """Image of training pods whose TrainingRun names none."""
    trainer_secret: str = "heimdall-trainer"  # noqa: S105 - the name of a Secret
    """Secret whose keys training pods get as environment variables; every namespace with TrainingRuns needs it."""
    image_pull_policy: str = "IfNotPresent"
    """Pull policy of the trainer's image."""
    grace_period_seconds: int = Field(default=60, ge=10)
    """Time a trainer has after SIGTERM to make and deliver a checkpoint."""
    ca_config_map: str = ""
    """ConfigMap with the certificate authorities of private servers, in every training namespace. Empty: none."""
    ca_secret: str = ""
    """The same as a Secret."""
    ca_key: str = "ca.crt"
    """Key of the certificates in that ConfigMap or Secret."""
    namespaces: str = ""
    """Namespaces to watch, separated by commas. Empty: all."""
    health_port: int = 8080
    """Port of the liveness probe."""
    metrics_port: int = 8081
    """Port of the Prometheus metrics."""
    workers: int = Field(default=16, ge=1)
    """How many TrainingRuns are looked at side by side."""
    resync_seconds: float = Field(default=300, gt=0)
    """Everything is looked at again this often, in case an event was missed."""
    progress_seconds: float = Field(default=15, gt=0)
    """How often progress is read from MLflow, and at most written to a status."""
    lost_pod_seconds: float = Field(default=300, gt=0)
    """A pod that has not ended this long after its grace period counts as lost with its node."""
    request_timeout_seconds: float = Field(default=30, gt=0)
    """Bound of one request to the API server."""

    @field_validator("tracking_uri", "tracking_public_url")
    @classmethod
    def _hold_no_password(cls, value: str) -> str:
        if "@" in urlsplit(value).netloc:
            raise ValueError(
                "must hold no user and no password (links show it): set MLFLOW_TRACKING_USERNAME and …_PASSWORD"
            )
        return value

    @cached_property
    def namespace_list(self) -> list[str]:
        """The namespaces to watch; empty for all."""
        return [name.strip() for name in self.namespaces.split(",") if name.strip()]

    @property
    def ca_bundle(self) -> CABundle | None:
        """What training pods are given to trust private servers by."""
        name = self.ca_secret or self.ca_config_map
        return CABundle(name=name, key=self.ca_key, is_secret=bool(self.ca_secret)) if name else None

    @property
    def public_url(self) -> str:
        """The address that links to MLflow begin with."""
        return (self.tracking_public_url or self.tracking_uri).rstrip("/")
