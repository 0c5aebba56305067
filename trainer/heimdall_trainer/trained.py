"""Localizers that were trained before: versions of the registry, or checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from heimdall_trainer.data.split import SESSIONS
from heimdall_trainer.errors import ConfigurationError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from torch import nn

REGISTRY: Final = "models:/"


@dataclass(frozen=True)
class TrainedLocalizer:
    """A network, and what is known of its training."""

    net: nn.Module
    """The LocalizationNet, on the CPU, in evaluation."""
    run_id: str | None = None
    """The MLflow run that it came from."""
    sessions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Recording sessions of its training by side: train, validation, test. Empty where that is not known."""

    @property
    def arrivals(self) -> bool:
        """Whether it locates by times of arrival too."""
        return bool(self.net.arrivals)


def find_localizer(model: str, client: MlflowClient) -> TrainedLocalizer:
    """Load a localizer. A model is code: load what you trust.

    Args:
        model: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, or the path of a checkpoint.
        client: Client of tracking server and registry.

    Returns:
        The localizer.

    Raises:
        ConfigurationError: There is none, or it is something else.
        MlflowException: The server is away.
    """
    found = _registered(model, client) if model.startswith(REGISTRY) else _checkpoint(model)
    found.net.eval()
    return found


def _registered(model: str, client: MlflowClient) -> TrainedLocalizer:
    import mlflow.artifacts
    import mlflow.pyfunc
    from mlflow.exceptions import MlflowException

    from heimdall_trainer.serving import Localizer

    name, version = _name_and_version(model, client)
    with tempfile.TemporaryDirectory() as folder:
        local = mlflow.artifacts.download_artifacts(
            f"{REGISTRY}{name}/{version}",
            dst_path=folder,
            tracking_uri=client.tracking_uri,
            registry_uri=client._registry_uri,  # noqa: SLF001 - there is no other way
        )
        try:
            loaded = mlflow.pyfunc.load_model(local)
            served = loaded.unwrap_python_model()
        except MlflowException:
            served = None
    if not isinstance(served, Localizer):
        raise ConfigurationError(f"--model {model} is no localizer of this trainer: its commands know no other model")
    known = (loaded.metadata.metadata or {}).get(SESSIONS, {})
    return TrainedLocalizer(served.net, client.get_model_version(name, version).run_id, known)


def _name_and_version(model: str, client: MlflowClient) -> tuple[str, str]:
    from mlflow.exceptions import MlflowException

    path = model.removeprefix(REGISTRY)
    name, at, alias = path.partition("@")
    try:
        if at:
            return name, str(client.get_model_version_by_alias(name, alias).version)
        name, _, version = path.partition("/")
        if not version.isdigit():
            raise ConfigurationError(f"--model {model}: use models:/NAME/VERSION or models:/NAME@ALIAS")
        return name, str(client.get_model_version(name, version).version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise ConfigurationError(f"--model {model}: {error.message}") from error


def _checkpoint(model: str) -> TrainedLocalizer:
    import torch

    from heimdall_trainer.data.module import HeimdallDataModule
    from heimdall_trainer.model.module import LocalizationModule

    file = Path(model)
    if not file.is_file():
        raise ConfigurationError(f"--model {model} is neither models:/NAME/VERSION, models:/NAME@ALIAS nor a file")
    try:
        held: Any = torch.load(file, map_location="cpu", weights_only=False)
        module = LocalizationModule(**held["hyper_parameters"])
        module.load_state_dict(held["state_dict"])
    except Exception as error:
        raise ConfigurationError(
            f"--model {model} is no checkpoint of the localizer ({type(error).__name__})"
        ) from error
    return TrainedLocalizer(module.net, None, held.get(HeimdallDataModule.__qualname__, {}).get(SESSIONS, {}))
