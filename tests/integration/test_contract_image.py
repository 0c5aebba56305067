"""The example of a trainer that is one plain script keeps the contract: exit codes, tags, checkpoints, model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from heimdall_api.contract import (
    ENV_ATTEMPT,
    ENV_MLFLOW_RUN_ID,
    ENV_RUN_FILE,
    ENV_TERMINATION_MESSAGE,
    ENV_TRACKING_URI,
    TAG_ATTEMPT,
    TAG_BEST,
    TAG_CHECKPOINTS,
    TAG_PROGRESS,
    BestMetric,
    ExitCode,
    Progress,
    Reason,
    TerminationMessage,
    parse_checkpoints,
)
from heimdall_tracking.runs import find_model, read_facts

SCRIPT = Path(__file__).resolve().parents[2] / "images/contract/train.py"
TIMEOUT_S = 120

# MLflow's own use of SQLAlchemy, not ours.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")


@dataclass
class Trainer:
    """The script as the operator would start it, for one MLflow run."""

    client: MlflowClient
    uri: str
    run_id: str
    folder: Path

    def start(self, *, attempt: int = 1, **args: object) -> subprocess.Popen[str]:
        run_file = self.folder / "trainingrun.json"
        run_file.write_text(json.dumps({"spec": {"model": {"args": args}, "registration": {"model": "steps"}}}))
        self.client.set_tag(self.run_id, TAG_ATTEMPT, max(attempt, int(self.tags().get(TAG_ATTEMPT, 0))))
        env = {
            **os.environ,
            ENV_TRACKING_URI: self.uri,
            ENV_MLFLOW_RUN_ID: self.run_id,
            ENV_RUN_FILE: str(run_file),
            ENV_ATTEMPT: str(attempt),
            ENV_TERMINATION_MESSAGE: str(self.folder / "termination-log"),
        }
        return subprocess.Popen([sys.executable, str(SCRIPT)], env=env, text=True, stderr=subprocess.PIPE)

    def run(self, *, attempt: int = 1, **args: object) -> int:
        return finish(self.start(attempt=attempt, **args))

    def tags(self) -> dict[str, Any]:
        return dict(self.client.get_run(self.run_id).data.tags)

    def last_words(self) -> TerminationMessage:
        return TerminationMessage.model_validate_json((self.folder / "termination-log").read_text())


def finish(process: subprocess.Popen[str]) -> int:
    _, errors = process.communicate(timeout=TIMEOUT_S)
    print(errors)
    return process.returncode


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    folder = tmp_path_factory.mktemp("mlflow")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.create_experiment("contract", artifact_location=(folder / "artifacts").as_uri())
    return client


@pytest.fixture
def trainer(client: MlflowClient, tmp_path: Path) -> Trainer:
    experiment = client.get_experiment_by_name("contract")
    assert experiment is not None
    run = client.create_run(experiment.experiment_id)
    return Trainer(client, client.tracking_uri, run.info.run_id, tmp_path)


def test_sigterm_delivers_a_checkpoint_from_which_the_next_attempt_goes_on(trainer: Trainer) -> None:
    first = trainer.start(steps=1000, stepSeconds=0.2, checkpointEvery=1000)
    wait_for_tag(trainer, TAG_PROGRESS)
    first.send_signal(signal.SIGTERM)
    assert finish(first) == ExitCode.SIGTERM
    assert trainer.last_words().reason is Reason.PREEMPTED
    stopped_at = parse_checkpoints(trainer.tags()[TAG_CHECKPOINTS])[-1]
    assert stopped_at.last
    assert f"step {stopped_at.step} " in trainer.last_words().message

    # Parameters are what they are: the second attempt is told to stop where the first one did.
    assert (
        trainer.run(attempt=2, steps=1000, stepSeconds=0.2, checkpointEvery=1000, fail="user", failAt=stopped_at.step)
        == 1
    )
    assert trainer.last_words().reason is Reason.USER_ERROR
    assert parse_checkpoints(trainer.tags()[TAG_CHECKPOINTS])[-1] == stopped_at


def test_a_finished_training_leaves_everything_that_the_operator_reads(trainer: Trainer) -> None:
    assert trainer.run(steps=6, stepSeconds=0) == ExitCode.SUCCESS
    run = trainer.client.get_run(trainer.run_id)
    assert run.info.status == "RUNNING"  # the operator ends it
    assert run.data.params["steps"] == "6"
    assert run.data.metrics.keys() == {"train/loss", "val/loss"}
    progress = Progress.model_validate_json(run.data.tags[TAG_PROGRESS])
    assert (progress.step, progress.steps) == (6, 6)
    assert BestMetric.model_validate_json(run.data.tags[TAG_BEST]).name == "val/loss"
    checkpoint = parse_checkpoints(run.data.tags[TAG_CHECKPOINTS])[-1]
    assert [item.path for item in trainer.client.list_artifacts(trainer.run_id, "checkpoints")] == [checkpoint.path]
    facts = read_facts(trainer.client, trainer.run_id)
    assert facts is not None
    assert find_model(trainer.client, facts) is not None
    assert not (trainer.folder / "termination-log").exists()


def test_an_attempt_that_was_overtaken_publishes_nothing(trainer: Trainer) -> None:
    trainer.client.set_tag(trainer.run_id, TAG_ATTEMPT, "2")
    assert trainer.run(attempt=1, steps=6, stepSeconds=0) == ExitCode.FENCED
    assert trainer.last_words().reason is Reason.FENCED
    assert TAG_CHECKPOINTS not in trainer.tags()


def test_of_workers_that_train_together_the_first_alone_delivers(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = trainer.tags() | {TAG_ATTEMPT: "1"}
    monkeypatch.setenv("PET_NODE_RANK", "1")
    assert trainer.run(steps=6, stepSeconds=0) == ExitCode.SUCCESS
    assert trainer.client.get_run(trainer.run_id).data.metrics == {}
    assert trainer.tags() == before


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        ({"steps": -1}, ExitCode.CONFIGURATION, Reason.INVALID_CONFIGURATION),
        ({"fail": "cuda", "failAt": 0}, ExitCode.CUDA_OUT_OF_MEMORY, Reason.CUDA_OUT_OF_MEMORY),
    ],
)
def test_it_tells_how_it_failed(trainer: Trainer, args: dict[str, object], code: int, reason: Reason) -> None:
    assert trainer.run(**args) == code
    assert trainer.last_words().reason is reason


def test_an_mlflow_that_is_away_is_no_error_of_the_user(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    trainer.uri = "http://127.0.0.1:9"
    assert trainer.run(steps=2) == ExitCode.UNDELIVERED
    assert trainer.last_words().reason is Reason.TRACKING_UNAVAILABLE


def wait_for_tag(trainer: Trainer, name: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while name not in trainer.tags():
        assert time.monotonic() < deadline, f"no tag {name} within {TIMEOUT_S} s"
        time.sleep(0.2)
