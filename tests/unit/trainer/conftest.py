"""What the trainer's tests share: a clean environment, a few generated recordings, an MLflow on SQLite."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from heimdall_api.contract import ENV_TERMINATION_MESSAGE
from heimdall_trainer.settings import DataSettings
from tests.unit.trainer.builders import SESSIONS, data_settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a developer's variables nor a `.env` file reach a test, and no test leaves files behind."""
    for name in list(os.environ):
        if name.startswith(("HEIMDALL_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a pod's trainer leaves its termination message."""
    file = tmp_path / "termination-log"
    monkeypatch.setenv(ENV_TERMINATION_MESSAGE, str(file))
    return file


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """What watches for SIGTERM in one test's process does not in the next."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background have it ignored
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors are tiny here: a second thread costs more than it brings."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> DataSettings:
    """Settings of an SQLite database and a folder that hold generated sessions. To be left as they are."""
    from heimdall_trainer.data.generator import generate

    settings = data_settings(tmp_path_factory.mktemp("recorded"))
    generate(settings, **SESSIONS)
    return settings


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tracking URI of an MLflow on SQLite, with an experiment named after the localizer's."""
    from mlflow import MlflowClient

    from heimdall_api.types import DEFAULT_EXPERIMENT

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(uri).create_experiment(DEFAULT_EXPERIMENT, artifact_location=(folder / "artifacts").as_uri())
    return uri
