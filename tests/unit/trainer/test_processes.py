"""Processes that train or judge a model together, really: they say what one alone says, or one that was not stopped."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from heimdall_api.contract import ENV_ATTEMPT, ENV_MLFLOW_RUN_ID, ENV_TRACKING_URI, ExitCode
from heimdall_api.types import DEFAULT_EXPERIMENT
from heimdall_trainer.settings import DataSettings
from tests.unit.trainer.judged import judged

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PROCESSES = 2
PATIENCE_S = 300
ROOT = Path(__file__).parents[3]
STOP, STEPS = 4, 6
"""Of two epochs of three steps: in the middle of the second."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(module: str, *arguments: str, **variables: str) -> list[tuple[int, str]]:
    """Run a module as a group of processes: exit code and output of each."""
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=os.environ | group | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        said = [each.communicate(timeout=PATIENCE_S)[0] for each in started]
    finally:
        for each in started:
            each.kill()
    return [(each.returncode, text) for each, text in zip(started, said, strict=True)]


def test_metrics_do_not_depend_on_the_number_of_processes() -> None:
    said = together("tests.unit.trainer.judged")
    alone = judged(1, 0)
    for _, output in said:
        assert json.loads(output.splitlines()[-1]) == pytest.approx(alone, rel=1e-3)


def test_what_the_first_makes_alone_may_take_longer_than_a_collective() -> None:
    assert together("tests.unit.trainer.alone") == [(0, "made\n"), (0, "waited\n")]


def test_a_group_of_which_one_is_stopped_goes_on_as_if_nothing_had_been(
    recorded: DataSettings, mlflow_uri: str, tmp_path: Path
) -> None:
    training = {"epochs": 2, "batchSize": 2, "dataLoaderWorkers": 0, "checkpoints": {"keep": 1}}
    spec = {"model": {"backbone": "test_resnet"}, "data": {"testFraction": 0.2}, "training": training}
    spec |= {"export": {"onnx": True}}  # which the first one rehearses while the other waits
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"metadata": {"name": "group"}, "spec": spec}))
    client = MlflowClient(mlflow_uri)
    experiment = client.get_experiment_by_name(DEFAULT_EXPERIMENT)
    assert experiment is not None
    whole, stopped = (client.create_run(experiment.experiment_id).info.run_id for _ in range(2))

    def train(run_id: str, attempt: int, *stop: str) -> list[int]:
        variables = {
            ENV_TRACKING_URI: mlflow_uri,
            ENV_MLFLOW_RUN_ID: run_id,
            ENV_ATTEMPT: str(attempt),
            "HEIMDALL_DATABASE_URL": recorded.database_url.get_secret_value(),
            "HEIMDALL_RECORDINGS_URL": recorded.recordings_url,
            "HEIMDALL_CACHE_DIR": str(recorded.cache_dir),
        }
        done = together("tests.unit.trainer.grouped", str(file), str(tmp_path / "outputs"), *stop, **variables)
        return [code for code, _ in done]

    assert train(whole, 1) == [ExitCode.SUCCESS] * PROCESSES
    assert train(stopped, 1, str(STOP)) == [ExitCode.SIGTERM] * PROCESSES
    assert train(stopped, 2) == [ExitCode.SUCCESS] * PROCESSES
    for name in ("train/loss_step", "train/loss_epoch", "val/loss", "test/loss"):
        first, second = (
            [(item.step, item.value) for item in client.get_metric_history(run_id, name)] for run_id in (whole, stopped)
        )
        assert first
        assert [step for step, _ in second] == [step for step, _ in first]
        assert dict(second) == pytest.approx(dict(first), rel=1e-5)
    steps = [item.value for item in client.get_metric_history(whole, "train/loss_step")]
    assert len(steps) == STEPS
    epoch = client.get_metric_history(whole, "train/loss_epoch")[0].value
    assert epoch != pytest.approx(sum(steps[: STEPS // 2]) / (STEPS // 2), rel=1e-3), "the steps are the first one's"
