"""One SQLite store for all tests, since making its tables takes seconds; every test has names of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from heimdall_tracking import MLflowTracker, TrackingSettings

_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def _folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a tracker could not deliver lies in the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="session")
def client(store_uri: str) -> MlflowClient:
    return MlflowClient(store_uri, store_uri)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name for the test's own experiment and registered model."""
    return f"{re.sub(r'[^a-z0-9]+', '-', request.node.name.lower())[:60]}-{next(_numbers)}"


@pytest.fixture
def experiment(client: MlflowClient, name: str, tmp_path: Path) -> str:
    """ID of an experiment of the test's own, whose artifacts lie in its own folder."""
    return str(client.create_experiment(name, artifact_location=(tmp_path / "artifacts").as_uri()))


@pytest.fixture
def own(store_uri: str, experiment: str) -> MlflowClient:
    """A client whose methods a test may replace."""
    return MlflowClient(store_uri, store_uri)


@pytest.fixture
def tracker(own: MlflowClient, store_uri: str, name: str) -> Iterator[MLflowTracker]:
    """It has started a run in the test's own experiment."""
    tracker = MLflowTracker(TrackingSettings(tracking_uri=store_uri, experiment_name=name), own)
    tracker.start_run("run")
    yield tracker
    tracker.close(0)


NewRun = Callable[..., str]


@pytest.fixture
def new_run(client: MlflowClient, experiment: str) -> NewRun:
    """Makes a finished run with metrics and a model, as a trainer leaves it; gives its ID."""

    def make(*, model: bool = True, status: str = "FINISHED", start_time: int | None = None, **metrics: float) -> str:
        run_id: str = client.create_run(experiment, start_time=start_time).info.run_id
        for metric, value in metrics.items():
            client.log_metric(run_id, metric, value)
        if model:
            made = client.create_logged_model(experiment, name="model", source_run_id=run_id)
            client.finalize_logged_model(made.model_id, "READY")
        if status != "RUNNING":
            client.set_terminated(run_id, status)
        return run_id

    return make
