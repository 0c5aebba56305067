"""What Lightning's logger hands on to the tracker."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from heimdall_tracking import MLflowTracker, load_settings
from heimdall_trainer.logger import make_logger

# MLflow's own use of SQLAlchemy, not ours.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
PATIENCE_S = 60


@pytest.mark.parametrize("kind", [dict, "AttributeDict", Namespace])
def test_hyperparameters_of_every_kind_are_logged(kind: Any, tmp_path: Path) -> None:
    pl = import_module("pytorch_lightning")
    make = import_module("pytorch_lightning.utilities").AttributeDict if kind == "AttributeDict" else kind
    logged: list[dict[str, Any]] = []
    tracker: Any = SimpleNamespace(log_params=logged.append)
    make_logger(pl, tracker, tmp_path).log_hyperparams(make(width=3, lr=0.1))
    assert logged == [{"module": {"width": 3, "lr": 0.1}}]


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_the_other_processes_of_a_group_log_no_pictures(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    tracker: Any = SimpleNamespace(run_id="r")
    logger = make_logger(import_module(package), tracker, tmp_path)
    logger.experiment.log_figure(logger.run_id, object(), "error.png")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tracker(mlflow_uri: str) -> Iterator[MLflowTracker]:
    made = MLflowTracker(load_settings(tracking_uri=mlflow_uri))
    made.start_run("logged")
    yield made
    made.close(0)


def test_what_a_module_logs_by_the_client_goes_behind_training(
    tracker: MLflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is away must not be waited for, nor end training."""
    run_id, folder, back = tracker.run_id, tmp_path / "logged", threading.Event()
    (tmp_path / "several").mkdir()
    for number in range(2):
        (tmp_path / f"several/{number}.txt").write_text(str(number))
    for call in ("log_artifact", "log_artifacts", "log_batch", "set_tag"):
        waits_for(tracker.client, call, back, monkeypatch)

    client = make_logger(import_module("pytorch_lightning"), tracker, folder).experiment
    for step in range(2):
        client.log_text(run_id, f"step {step}", f"texts/{step}/note.txt")
    client.log_artifacts(run_id, str(tmp_path / "several"), "folder")
    client.log_metric(run_id, "loss", 0.5, step=3)
    client.log_image(run_id, np.zeros((2, 2, 3), np.uint8), key="map", step=4)
    assert len(list(folder.rglob("note.txt"))) == 2

    back.set()
    assert tracker.flush(PATIENCE_S)
    for step in range(2):
        assert Path(client.download_artifacts(run_id, f"texts/{step}/note.txt")).read_text() == f"step {step}"
    assert [Path(item.path).name for item in client.list_artifacts(run_id, "folder")] == ["0.txt", "1.txt"]
    assert len(client.list_artifacts(run_id, "images")) == 2
    assert [(each.step, each.value) for each in client.get_metric_history(run_id, "loss")] == [(3, 0.5)]
    assert tracker._uploader is not None
    tracker._uploader.close(PATIENCE_S)  # its thread has seen to everything then
    assert list(folder.iterdir()) == [], "what was delivered is not kept"


def waits_for(client: Any, call: str, event: threading.Event, patch: pytest.MonkeyPatch) -> None:
    whole = getattr(client, call)

    def late(*arguments: Any, **more: Any) -> Any:
        assert event.wait(PATIENCE_S)
        return whole(*arguments, **more)

    patch.setattr(client, call, late)


def test_what_is_logged_to_another_run_is_left_to_mlflow(tracker: MLflowTracker, tmp_path: Path) -> None:
    other = tracker.client.create_run(tracker.experiment_id).info.run_id
    client = make_logger(import_module("pytorch_lightning"), tracker, tmp_path / "logged").experiment
    client.log_text(other, "mine", "note.txt")
    client.log_metric(other, "loss", 1.0)
    client.set_tag(other, "note", "mine")
    found = client.get_run(other).data
    assert (found.metrics, found.tags["note"]) == ({"loss": 1.0}, "mine")
    assert [item.path for item in client.list_artifacts(other)] == ["note.txt"]
    assert not (tmp_path / "logged").exists()
