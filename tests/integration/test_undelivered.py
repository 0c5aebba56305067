"""A server that stays away: the process ends all the same, and what it kept is delivered by the command it named."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from heimdall_api.contract import TAG_CHECKPOINTS, ExitCode, parse_checkpoints
from heimdall_tracking.queue import MetricQueue
from tests.integration.conftest import Stack
from tests.integration.servers import ROOT, wait_until
from tests.integration.test_tracking import arrivals, content_of, train, upload

TIMEOUT_S = 600
"""Only so that a test that hangs ends: importing torch takes long on a busy machine."""
POINTS = 30_000
"""So many that a delivery can be killed in the middle."""
HEIMDALL_TRAIN = Path(sys.executable).parent / "heimdall-train"
EPOCHS = 6
IMPATIENT_FOR_THE_MODEL = """
from heimdall_trainer import cli
from heimdall_trainer.pipeline import TrainingPipeline
deliver = TrainingPipeline._deliver

def impatient(self):
    self._patience.timeout_s = 3
    deliver(self)

TrainingPipeline._deliver = impatient
cli.main()
"""
LOGGING = """
import time
from pathlib import Path
from tests.unit.trainer.user_modules import Line

class Logging(Line):
    def on_train_end(self):
        Path("trained").touch()

    def train_dataloader(self):
        if Path("trained").exists():  # asked for an example, for the model
            Path("logging").touch()
            deadline = time.monotonic() + 120
            while not Path("go-on").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        return super().train_dataloader()
"""
MODULE = """
import os, time
from pathlib import Path
from tests.unit.trainer.user_modules import Line

class Waiting(Line):
    def on_train_batch_start(self, batch, batch_idx):
        deadline = time.monotonic() + 120
        while self.global_step == 3 and not Path("go-on").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
"""
IMPATIENT = """
import sys
from heimdall_trainer import cli, pipeline
pipeline.DELIVERY_TIMEOUT_S = 3
cli.main()
"""


def deliver(stack: Stack, folder: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [HEIMDALL_TRAIN, "deliver", str(folder)],
        env={**os.environ, "MLFLOW_TRACKING_URI": stack.mlflow.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_what_was_left_is_delivered_once_though_its_delivery_is_killed(
    stack: Stack, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MetricQueue.__init__.__kwdefaults__, "memory_points", 1000)
    tracker = stack.tracker(name)
    tracker.keep_undelivered_in(tmp_path / "undelivered")
    run_id = tracker.start_run("run")
    stack.mlflow.kill()
    steps = train(tracker, first=0, duration_s=1)
    for step in range(steps, POINTS):
        tracker.log_metrics({"loss": step}, step)
    upload(tracker, tmp_path, "during")
    assert not tracker.close(1)
    assert tracker.undelivered is not None
    assert tracker.undelivered.points == POINTS
    (tmp_path / "during.bin").unlink()  # what is kept is there without it
    stack.mlflow.start()

    killed = deliver(stack, tracker.undelivered.folder)
    wait_until(lambda: len(arrivals(stack, run_id, "loss")) > 2000, what="some of it is there", timeout_s=TIMEOUT_S)
    killed.kill()
    killed.communicate()
    some = len(arrivals(stack, run_id, "loss"))
    again = deliver(stack, tracker.undelivered.folder)
    printed, _ = again.communicate(timeout=TIMEOUT_S)

    assert 2000 < some < POINTS, "it was killed in the middle"
    assert again.returncode == 0, printed
    assert arrivals(stack, run_id, "loss") == list(range(POINTS))
    run = stack.client().get_run(run_id)
    assert run.data.params == {f"p{step}": str(step) for step in range(steps)}
    assert run.data.tags["progress"] == str(steps - 1)
    content = stack.mlflow.artifact(run, "checkpoints/during.bin")
    assert hashlib.sha256(content).digest() == hashlib.sha256(content_of("during")).digest()
    assert not tracker.undelivered.folder.exists()


@pytest.mark.parametrize("away", ["mlflow", "postgres", "minio"])
def test_a_training_whose_server_stays_away_ends_and_names_the_command_that_delivers(
    away: str, stack: Stack, name: str, tmp_path: Path
) -> None:
    (tmp_path / "waiting.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(
        f"metadata: {{name: {name}}}\n"
        f"spec: {{model: {{module: 'waiting:Waiting'}}, training: {{epochs: {EPOCHS}}}, "
        f"tracking: {{experiment: {name}}}}}\n"
    )
    runs: list[str] = []
    words = train_and_deliver(
        IMPATIENT, stack, tmp_path, lambda training: runs.append(when_steps_arrive(stack, name, training)), away
    )

    (run_id,) = runs
    assert "checkpoint" in words
    assert f"of run {run_id} could not be delivered" in words
    client = stack.client()
    run = client.get_run(run_id)
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == list(range(EPOCHS))
    assert run.info.status == "FAILED"
    checkpoints = parse_checkpoints(run.data.tags[TAG_CHECKPOINTS])
    assert checkpoints[-1].step == EPOCHS
    for checkpoint in checkpoints:
        content = stack.mlflow.artifact(run, checkpoint.path)
        assert hashlib.sha256(content).hexdigest() == checkpoint.sha256


def test_a_model_whose_store_goes_away_while_it_is_logged_is_delivered_and_registered_later(
    stack: Stack, name: str, tmp_path: Path
) -> None:
    (tmp_path / "logging_module.py").write_text(LOGGING)
    (tmp_path / "run.yaml").write_text(
        f"metadata: {{name: {name}}}\n"
        f"spec: {{model: {{module: 'logging_module:Logging'}}, training: {{epochs: {EPOCHS}}}, "
        f"tracking: {{experiment: {name}}}, registration: {{model: {name}, aliases: [candidate]}}}}\n"
    )

    def logging(_: subprocess.Popen[str]) -> None:
        wait_until((tmp_path / "logging").exists, what="the model is about to be logged", timeout_s=TIMEOUT_S)

    words = train_and_deliver(IMPATIENT_FOR_THE_MODEL, stack, tmp_path, logging, "minio")

    assert f"1 model and the registration as {name} of run" in words
    client = stack.client()
    version = client.get_model_version_by_alias(name, "candidate")
    run = client.get_run(version.run_id)
    assert (str(version.version), run.info.status) == ("1", "FINISHED")
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert str(model.status) == "READY"
    key = f"{model.artifact_location.removeprefix('mlflow-artifacts:/')}/MLmodel"
    kept = stack.minio.s3.get_object(Bucket=stack.mlflow.bucket, Key=key)["Body"].read().decode()
    assert f"model_id: {model.model_id}\n" in kept


def train_and_deliver(
    program: str,
    stack: Stack,
    folder: Path,
    until: Callable[[subprocess.Popen[str]], None],
    away: str = "mlflow",
) -> str:
    """Train with a server gone for good from a moment on, and deliver what is left by the command that is named.

    Args:
        program: Starts the training, with little patience for a server that is away.
        stack: The servers, which are all there again afterwards.
        folder: Holds the run's file; a training that waits for it finds `go-on` there.
        until: Waits for the moment.
        away: Which one is gone.

    Returns:
        The training's last words.
    """
    training = start_training(program, stack, folder)
    try:
        until(training)
        (server,) = stack.servers(away)
        server.kill()
        (folder / "go-on").touch()
        printed, _ = training.communicate(timeout=TIMEOUT_S)
    finally:
        training.kill()
        training.wait()
    assert training.returncode == ExitCode.UNDELIVERED, printed
    (words,) = [line for line in printed.splitlines() if line.startswith("TrackingUnavailable: ")]
    command = shlex.split(words.rpartition("with: ")[2])
    assert command[:2] == ["heimdall-train", "deliver"]
    server.start()
    delivery = deliver(stack, command[2])
    told, _ = delivery.communicate(timeout=TIMEOUT_S)
    assert delivery.returncode == 0, told
    assert not Path(command[2]).exists()
    return words


def start_training(program: str, stack: Stack, folder: Path) -> subprocess.Popen[str]:
    """Train the folder's run.yaml with a program that has little patience for a server that is away."""
    return subprocess.Popen(
        [sys.executable, "-c", program, "run", "-f", "run.yaml", "--output-dir", "out"],
        cwd=folder,
        env={**os.environ, "MLFLOW_TRACKING_URI": stack.mlflow.url, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def when_steps_arrive(stack: Stack, experiment: str, training: subprocess.Popen[str]) -> str:
    """Wait for a training's first steps; the ID of its run."""
    client, found = stack.client(), list[str]()

    def some() -> bool:
        assert training.poll() is None, training.communicate()[0]
        held = client.get_experiment_by_name(experiment)
        runs = client.search_runs([held.experiment_id]) if held else []
        found[:] = [run.info.run_id for run in runs if "train/loss" in run.data.metrics]
        return bool(found)

    wait_until(some, what="the training's first steps are there", timeout_s=TIMEOUT_S)
    return found[0]
