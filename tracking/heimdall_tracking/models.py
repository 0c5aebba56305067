"""Logged models: a model that was saved becomes the run's, exactly once, and counts only when it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from heimdall_api.contract import MODEL_NAME
from heimdall_tracking.runs import check_attempt, logged_models

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

TAG_KEY: Final = "heimdall.key"
"""Which saved model a logged one was made of: making one is not idempotent in MLflow, so it is looked for first."""
MLMODEL: Final = "MLmodel"


def publish(client: MlflowClient, run_id: str, folder: Path, key: str, *, attempt: int | None = None) -> str:
    """Give a saved model to the run; made again, after whatever interruption, it is there once.

    Args:
        client: Client of the tracking server.
        run_id: The run.
        folder: The model, as MLflow's flavors save it. Its MLmodel is told the ID of the logged model.
        key: Names this saved model among all.
        attempt: The attempt that it comes from, where newer ones may take over.

    Returns:
        ID of the logged model.

    Raises:
        OvertakenError: A newer attempt has taken over; nobody finds the model.
        Exception: The server is away or refuses.
    """
    from mlflow.entities import LoggedModelStatus

    run = client.get_run(run_id)
    made = _find(client, run, key) or client.create_logged_model(
        run.info.experiment_id, name=MODEL_NAME, source_run_id=run_id, tags={TAG_KEY: key}
    )
    model_id = str(made.model_id)
    if made.status != LoggedModelStatus.READY:
        _name(folder, model_id)
        client.log_model_artifacts(model_id, str(folder))
        check_attempt(client.get_run(run_id), attempt)
        client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    return model_id


def _find(client: MlflowClient, run: Run, key: str) -> LoggedModel | None:
    models = logged_models(client, run.info.run_id, experiment_id=run.info.experiment_id)
    return next((model for model in models if model.tags.get(TAG_KEY) == key), None)


def _name(folder: Path, model_id: str) -> None:
    """Write the ID into the MLmodel, from which whoever loads the model learns it."""
    from mlflow.models import Model

    saved = Model.load(str(folder))
    if saved.model_id != model_id:
        saved.model_id = model_id
        saved.save(str(folder / MLMODEL))
