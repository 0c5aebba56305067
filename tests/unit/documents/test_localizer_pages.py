"""docs/howto/own-recordings.md and use-the-model.md, done as they say: their scripts, in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from heimdall_api.types import RegistrationSpec
from tests.trainer_command import TIMEOUT_S, heimdall_train
from tests.unit.documents.documents import blocks

RECEIVERS = 3
pytestmark = [
    pytest.mark.slow,
    # MLflow's own use of SQLAlchemy, and its advice.
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*inferred as AnyType"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*Add type hints to the `predict` method"),
]


def scripts(page: str) -> dict[str, str]:
    found = [block.text for block in blocks("python") if block.where == page]
    return {text.splitlines()[0].removeprefix("# "): text for text in found}


def run(script: str, text: str, folder: Path, env: Mapping[str, str]) -> str:
    """What a script prints; it must succeed."""
    (folder / script).write_text(text)
    command = [sys.executable, script]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def env() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "HEIMDALL_"))}


def test_the_session_of_the_page_is_written_and_can_be_read(tmp_path: Path, env: dict[str, str]) -> None:
    from heimdall_trainer.data import HeimdallDataset
    from heimdall_trainer.settings import load_data_settings

    ((name, text),) = scripts("docs/howto/own-recordings.md").items()

    assert [run(name, text, tmp_path, env) for _ in range(2)] == ["added\n", "was there\n"]
    inspected = heimdall_train("data", "inspect", env=env, cwd=tmp_path)
    assert inspected == "field-1: 1 transmissions, 2 recordings\n"
    settings = load_data_settings(
        database_url=f"sqlite:///{tmp_path}/heimdall.db",
        recordings_url=f"file:{tmp_path}/recordings",
        cache_dir=tmp_path / "cache",
    )
    assert HeimdallDataset.open(settings)[0]["spectrograms"].shape == (2, 3, 128, 32)


def champion(folder: Path, uri: str) -> None:
    """An untrained localizer as the version that the page asks for, with its ONNX file."""
    import numpy as np
    from mlflow import MlflowClient

    from heimdall_tracking import MLflowTracker, load_settings
    from heimdall_tracking.registry import register
    from heimdall_tracking.runs import read_facts
    from heimdall_trainer.export import export_localizer
    from heimdall_trainer.model.net import LocalizationNet
    from heimdall_trainer.modelling import log_localizer

    net = LocalizationNet("test_resnet").eval()
    MlflowClient(uri).create_experiment("heimdall-localization", artifact_location=(folder / "artifacts").as_uri())
    tracker = MLflowTracker(load_settings(tracking_uri=uri))
    run_id = tracker.start_run("used")
    onnx = export_localizer(net, folder / "model.onnx").file
    example = {
        "spectrograms": np.zeros((1, RECEIVERS, 3, 128, 32), np.float32),
        "receivers": np.zeros((1, RECEIVERS, 2), np.float32),
    }
    log_localizer(tracker, net, example, folder=folder, onnx=onnx, known={})
    assert tracker.end_run(timeout_s=60)
    facts = read_facts(tracker.client, run_id)
    assert facts is not None
    register(tracker.client, facts, RegistrationSpec(model="heimdall-localizer", aliases=["champion"]))


def test_the_model_is_used_as_the_page_says(
    tmp_path: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    champion(tmp_path, uri)
    page = scripts("docs/howto/use-the-model.md")
    assert set(page) == {"locate.py", "locate_onnx.py"}

    said = {name: run(name, text, tmp_path, {**env, "MLFLOW_TRACKING_URI": uri}) for name, text in page.items()}

    place = re.match(r"(\d+\.\d+) (\d+\.\d+), give or take \d+ m", said["locate.py"])
    assert place is not None, said
    assert abs(float(place[1]) - 52) + abs(float(place[2]) - 10) < 1, "near the receivers"
    assert re.match(r"\[\s*-?\d.*\] \[\s*\d.*\]\n$", said["locate_onnx.py"]), said
