"""Experiments, found or created by many processes at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient


def ensure_experiment(client: MlflowClient, name: str) -> str:
    """Find an experiment, create it where it is missing, restore it where it was deleted.

    Args:
        client: Client of the tracking server.
        name: Name of the experiment.

    Returns:
        The experiment's ID.

    Raises:
        MlflowException: The server is away or refuses.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Another process was faster.
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise MlflowException(f"experiment {name!r} was deleted for good while it was being created")
    if experiment.lifecycle_stage == "deleted":
        _restore(client, name, experiment.experiment_id)
    return str(experiment.experiment_id)


def _restore(client: MlflowClient, name: str, experiment_id: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.restore_experiment(experiment_id)
    except MlflowException:
        # MLflow refuses to restore what another process has restored meanwhile.
        found = client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage == "deleted":
            raise
