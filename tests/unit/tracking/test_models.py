"""A saved model becomes a run's logged model once, whatever comes between, and counts only when it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.models import Model

from heimdall_api.contract import TAG_ATTEMPT
from heimdall_tracking import MLflowTracker, TrackingError, models
from heimdall_tracking.errors import OvertakenError
from heimdall_tracking.runs import find_model, read_facts
from tests.unit.tracking.fakes import PATIENCE_S

# MLflow's own use of SQLAlchemy, not ours.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

CALLS = ("create_logged_model", "log_model_artifacts", "finalize_logged_model")


def saved(folder: Path, run_id: str) -> Path:
    """A model as flavors save it."""
    model = folder / "saved"
    (model / "data").mkdir(parents=True)
    (model / "data/weights").write_bytes(b"weights")
    Model(run_id=run_id, metadata={"sessions": ["a"]}).save(str(model / "MLmodel"))
    return model


def logged(client: MlflowClient, tracker: MLflowTracker) -> list[LoggedModel]:
    return list(client.search_logged_models([tracker.experiment_id]))


def is_whole(client: MlflowClient, tracker: MLflowTracker, tmp_path: Path) -> None:
    (model,) = logged(client, tracker)
    facts = read_facts(client, tracker.run_id)
    assert facts is not None
    assert find_model(client, facts) == model.model_id
    place = Path(model.artifact_location.removeprefix("file://"))
    assert (place / "data/weights").read_bytes() == b"weights"
    told = Model.load(str(place))
    assert (told.model_id, told.run_id, told.metadata) == (model.model_id, tracker.run_id, {"sessions": ["a"]})


def test_a_model_is_there_once_however_often_it_is_published(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path
) -> None:
    folder = saved(tmp_path, tracker.run_id)
    ids = {models.publish(client, tracker.run_id, folder, "key") for _ in range(2)}
    assert len(ids) == 1
    is_whole(client, tracker, tmp_path)
    assert models.publish(client, tracker.run_id, folder, "another") not in ids


@pytest.mark.parametrize("heard", [True, False], ids=["answer lost", "call lost"])
@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_goes_away_at_any_call_gets_the_model_behind_training_and_once(
    call: str,
    *,
    heard: bool,
    tracker: MLflowTracker,
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = getattr(tracker.client, call)
    failures = iter([True])

    def away_once(*arguments: Any, **more: Any) -> Any:
        fails = next(failures, False)
        answer = made(*arguments, **more) if heard or not fails else None
        if fails:
            raise ConnectionError("no answer")
        return answer

    monkeypatch.setattr(tracker.client, call, away_once)
    upload = tracker.log_model(saved(tmp_path, tracker.run_id))
    assert tracker.flush(PATIENCE_S)
    assert upload.result(0) is None
    is_whole(client, tracker, tmp_path)


def test_a_model_of_an_overtaken_attempt_is_not_found(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path
) -> None:
    folder = saved(tmp_path, tracker.run_id)
    client.set_tag(tracker.run_id, TAG_ATTEMPT, "2")
    with pytest.raises(OvertakenError, match="attempt 2 has taken over"):
        models.publish(client, tracker.run_id, folder, "key", attempt=1)
    tracker.keep_undelivered_in(tmp_path / "undelivered", attempt=1)
    for upload in (tracker.log_model(folder), tracker.log_artifacts_dir(folder, "plots")):
        with pytest.raises(TrackingError, match="attempt 2 has taken over"):
            upload.result(PATIENCE_S)
    facts = read_facts(client, tracker.run_id)
    assert facts is not None
    assert find_model(client, facts) is None
    assert not client.list_artifacts(tracker.run_id)
    models.publish(client, tracker.run_id, folder, "key", attempt=2)
    assert find_model(client, facts) is not None
