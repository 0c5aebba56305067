"""Tracking against a real MLflow server, PostgreSQL and MinIO, that also go away in mid-training."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException

from heimdall_api.contract import TAG_CHECKPOINTS, parse_checkpoints
from heimdall_api.types import PromotionSpec, RegistrationSpec
from heimdall_tracking import MLflowTracker, registry, runs
from heimdall_tracking.experiments import ensure_experiment
from heimdall_tracking.params import flatten
from heimdall_tracking.points import INFINITY
from heimdall_tracking.queue import MetricQueue
from heimdall_trainer.checkpoints import CheckpointPublisher
from tests.integration.conftest import Stack
from tests.unit.tracking.test_params import texts, values

OUTAGE_S = float(os.environ.get("HEIMDALL_OUTAGE_S", "8"))
"""How long a server stays away in mid-training; HEIMDALL_OUTAGE_S=180 for minutes."""
STEP_S = 0.05
"""How long a step of the training takes that goes on meanwhile."""
DELIVERY_TIMEOUT_S = 180 + 2 * OUTAGE_S
"""Within a call MLflow's client waits ever longer before it tries again, up to two minutes."""
GIVE_UP_S = 2
PARAMETERS = 10_000
"""Logged in one call."""
PROCESSES = 4

ENSURE = """
import sys
from heimdall_tracking import MLflowTracker, load_settings
tracker = MLflowTracker(load_settings(tracking_uri=sys.argv[1], experiment_name=sys.argv[2]))
assert tracker.client
print("ready", flush=True)
sys.stdin.readline()
print(tracker.experiment_id)
"""


def found_by_processes(stack: Stack, experiment: str) -> list[str]:
    """IDs that processes find for an experiment, which all ask for it at the same moment."""
    command = [sys.executable, "-c", ENSURE, stack.mlflow.url, experiment]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate(timeout=DELIVERY_TIMEOUT_S)[0].strip() for process in processes]


def test_an_experiment_made_by_many_at_once_is_one(stack: Stack, name: str) -> None:
    ids = found_by_processes(stack, name)

    (made,) = stack.client().search_experiments(filter_string=f"name = '{name}'")
    assert ids == [made.experiment_id] * PROCESSES


def test_a_deleted_experiment_is_restored_by_many_at_once_with_its_runs(stack: Stack, name: str) -> None:
    client = stack.client()
    experiment = ensure_experiment(client, name)
    run_id = client.create_run(experiment).info.run_id
    client.delete_experiment(experiment)

    ids = found_by_processes(stack, name)

    assert ids == [experiment] * PROCESSES
    assert client.get_experiment(experiment).lifecycle_stage == "active"
    assert client.get_run(run_id).info.lifecycle_stage == "active"


def test_a_training_is_found_whole_at_its_end(stack: Stack, name: str, tmp_path: Path) -> None:
    tracker = stack.tracker(name)
    run_id = tracker.start_run("run", {"team": "rf"})
    odd = {"tensor": torch.ones(2), "nul": "a\0b", "half": "\ud800", "long": "é" * 10_000, "model": {"lr": 1e-3}}
    tracker.log_params(odd)
    tracker.log_params({f"p{index}": index for index in range(PARAMETERS)})
    for step in range(100):
        tracker.log_metrics({"loss": step, "nan": math.nan, "up": math.inf, "metrik/ö": 1}, step)
    tracker.put_tag("note", "a\0b")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots/loss.txt").write_text("plot")
    tracker.log_artifact(tmp_path / "plots/loss.txt")
    tracker.log_artifacts_dir(tmp_path / "plots", "plots")

    assert tracker.end_run(timeout_s=DELIVERY_TIMEOUT_S)

    run = stack.client().get_run(run_id)
    assert (run.info.status, run.data.tags["team"], run.data.tags["note"]) == ("FINISHED", "rf", "a\ufffdb")
    expected = {f"p{index}": str(index) for index in range(PARAMETERS)}
    expected |= {"tensor": "[1.0, 1.0]", "nul": "a\ufffdb", "half": "?", "model.lr": "0.001", "long": "é" * 5999 + "…"}
    assert run.data.params == expected
    assert arrivals(stack, run_id, "loss") == list(range(100))
    assert math.isnan(run.data.metrics["nan"])
    assert run.data.metrics["up"] == INFINITY
    assert run.data.metrics["metrik/ö"] == 1
    assert stack.mlflow.artifact(run, "loss.txt") == b"plot"
    assert stack.mlflow.artifact(run, "plots/loss.txt") == b"plot"


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(texts, values, min_size=20, max_size=40))
def test_whatever_a_configuration_holds_is_in_the_database_as_text(
    stack: Stack, name: str, params: dict[str, Any]
) -> None:
    tracker = stack.tracker(name)
    run_id = tracker.start_run("run")
    tracker.log_params(params)

    assert tracker.end_run(timeout_s=DELIVERY_TIMEOUT_S)

    assert stack.client().get_run(run_id).data.params == flatten(params)


def test_the_best_run_is_the_older_of_the_best_numbers(stack: Stack, name: str) -> None:
    tracker, client = stack.tracker(name), stack.client()
    assert tracker.get_best_run("loss") is None
    made = list[str]()
    for number, (status, loss) in enumerate(
        [
            *(("FINISHED", value) for value in (math.nan, 2.0, 1.0, 1.0, 2.0, math.inf, -math.inf, None)),
            *((status, value) for status in ("RUNNING", "FAILED") for value in (0.5, 3.0)),
        ]
    ):
        made.append(client.create_run(tracker.experiment_id, start_time=1000 + number).info.run_id)
        if loss is not None:
            client.log_metric(made[-1], "loss", loss)
        client.update_run(made[-1], status=status)

    best = [tracker.get_best_run("loss", mode) for mode in ("min", "max")]

    assert [found and found["run_id"] for found in best] == [made[2], made[1]]
    assert tracker.get_best_run("accuracy") is None


@pytest.mark.parametrize(
    "away", [("mlflow",), ("postgres",), ("minio",), ("mlflow", "postgres", "minio")], ids="+".join
)
def test_what_is_logged_while_servers_are_away_arrives_once_and_in_order(
    stack: Stack, name: str, tmp_path: Path, away: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few that most points of a short outage wait on disk, as those of a long one do.
    monkeypatch.setitem(MetricQueue.__init__.__kwdefaults__, "memory_points", 20)
    tracker = stack.tracker(name)
    tracker.keep_undelivered_in(tmp_path / "undelivered")
    run_id = tracker.start_run("run")
    publisher = CheckpointPublisher(tracker, attempt=1, keep=3, mode="min", fenced=False)
    uploads = [upload(tracker, tmp_path, "before")]
    tracker.log_metrics({"loss": 0}, 0)
    assert tracker.flush(DELIVERY_TIMEOUT_S)

    servers = stack.servers(*away)
    for server in reversed(servers):
        server.kill()
    uploads.append(upload(tracker, tmp_path, "during"))
    (tmp_path / "step-1.ckpt").write_bytes(content_of("checkpoint"))
    publisher.submit(tmp_path / "step-1.ckpt", step=1, epoch=0, metric=None)
    steps = train(tracker, first=1, duration_s=OUTAGE_S)
    for server in servers:
        server.start()
    tracker.log_metrics({"loss": steps}, steps)
    uploads.append(upload(tracker, tmp_path, "after"))

    assert publisher.flush(DELIVERY_TIMEOUT_S)
    assert publisher.close() == []
    assert tracker.end_run(timeout_s=DELIVERY_TIMEOUT_S)

    client = stack.client()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert arrivals(stack, run_id, "loss") == list(range(steps + 1))
    assert run.data.params == {f"p{step}": str(step) for step in range(1, steps)}
    assert run.data.tags["progress"] == str(steps - 1)
    for label, done in zip(("before", "during", "after"), uploads, strict=True):
        assert done.result(0) is None
        content = stack.mlflow.artifact(run, f"checkpoints/{label}.bin")
        assert hashlib.sha256(content).digest() == hashlib.sha256(content_of(label)).digest()
    (checkpoint,) = parse_checkpoints(run.data.tags[TAG_CHECKPOINTS])
    assert hashlib.sha256(stack.mlflow.artifact(run, checkpoint.path)).hexdigest() == checkpoint.sha256
    assert sorted(item.path for item in client.list_artifacts(run_id, "checkpoints")) == [
        *(f"checkpoints/{label}.bin" for label in ("after", "before", "during")),
        "checkpoints/step-1.ckpt",
    ]
    assert not (tmp_path / "undelivered").exists()


def test_with_the_server_gone_for_good_training_ends_and_says_what_is_missing(
    stack: Stack, name: str, tmp_path: Path
) -> None:
    tracker = stack.tracker(name)
    tracker.keep_undelivered_in(tmp_path / "undelivered")
    run_id = tracker.start_run("run")
    stack.mlflow.kill()
    train(tracker, first=1, duration_s=1)
    lost = upload(tracker, tmp_path, "during")

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(tracker.flush, GIVE_UP_S).result(DELIVERY_TIMEOUT_S)
        with pytest.raises(MlflowException):
            pool.submit(tracker.end_run, "FAILED", GIVE_UP_S).result(DELIVERY_TIMEOUT_S)
    with pytest.raises(Exception, match="not uploaded in time"):
        lost.result(DELIVERY_TIMEOUT_S)

    stack.mlflow.start()
    assert not tracker.end_run("FAILED", GIVE_UP_S), "what was given up is not delivered by a server that is back"
    assert stack.client().get_run(run_id).info.status == "FAILED"


def test_a_run_and_its_version_are_made_once_however_often_they_are_asked_for(stack: Stack, name: str) -> None:
    client = stack.client()
    spec = RegistrationSpec(model=name, aliases=["candidate"], promotion=PromotionSpec(metric="loss"))
    for _ in range(2):
        facts = runs.ensure_run(client, uid="u1", experiment=name, name="run")
        runs.open_attempt(client, facts, 1)
    client.log_metric(facts.run_id, "loss", 0.5)
    model = client.create_logged_model(facts.experiment_id, name="model", source_run_id=facts.run_id)
    client.finalize_logged_model(model.model_id, "READY")
    runs.end_run(client, facts.run_id, "FINISHED")

    for _ in range(2):
        ended = runs.read_facts(client, facts.run_id)
        assert ended is not None
        done = registry.register(client, ended, spec)

    assert done.version == "1"
    assert [item.run_id for item in client.search_model_versions(f"name = '{name}'")] == [facts.run_id]
    assert client.get_registered_model(name).aliases == {"candidate": "1", "champion": "1"}
    tracker = stack.tracker(name)
    tracker.attach(facts.run_id)
    assert tracker.register_model(name, f"models:/{model.model_id}") == "1"
    best = tracker.get_best_run("loss")
    assert best is not None
    assert (best["run_id"], best["status"], best["metrics"]) == (facts.run_id, "FINISHED", {"loss": 0.5})
    assert tracker.get_run_info() == stack.tracker(name).get_run_info(facts.run_id) == best


def test_stages_are_aliases_of_a_model_s_versions(stack: Stack, name: str) -> None:
    tracker, client = stack.tracker(name), stack.client()
    for number in ("1", "2"):
        run_id = tracker.start_run("run")
        model = client.create_logged_model(tracker.experiment_id, name="model", source_run_id=run_id)
        client.finalize_logged_model(model.model_id, "READY")
        assert tracker.register_model(name, f"models:/{model.model_id}") == number
        tracker.end_run()

    stages: list[tuple[str, Any, list[set[str]]]] = [
        ("1", "Staging", [{"staging"}, set()]),
        ("1", "Production", [{"staging", "production"}, set()]),
        ("2", "Production", [{"staging"}, {"production"}]),
        ("1", "Archived", [{"archived"}, {"production"}]),
        ("2", "None", [{"archived"}, set()]),
    ]
    for version, stage, aliases in stages:
        tracker.transition_model_stage(name, version, stage)
        assert [set(client.get_model_version(name, each).aliases) for each in ("1", "2")] == aliases
    with pytest.raises(MlflowException, match="not found"):
        tracker.transition_model_stage(name, "3", "Staging")


def train(tracker: MLflowTracker, *, first: int, duration_s: float) -> int:
    """Log as a training does, step by step, for a while; the number of the step after the last."""
    deadline = time.monotonic() + duration_s
    step = first
    while time.monotonic() < deadline:
        tracker.log_metrics({"loss": step}, step)
        tracker.log_params({f"p{step}": step})
        tracker.put_tag("progress", step)
        step += 1
        time.sleep(STEP_S)
    return step


def content_of(label: str) -> bytes:
    return label.encode() * 100_000


def upload(tracker: MLflowTracker, folder: Path, label: str) -> Future[None]:
    file = folder / f"{label}.bin"
    file.write_bytes(content_of(label))
    return tracker.log_artifact(file, "checkpoints")


def arrivals(stack: Stack, run_id: str, metric: str) -> list[int]:
    """Steps of a metric in the order in which its points came into the database; the value of each is its step.

    Transactions are numbered in their order. Points of one transaction came together; where a row lies says nothing.
    """
    rows = stack.postgres.execute(
        "SELECT step, value FROM metrics "
        f"WHERE run_uuid = '{run_id}' AND key = '{metric}' ORDER BY xmin::text::bigint, step",
        "mlflow",
    )
    assert all(step == value for step, value in rows)
    return [step for step, _ in rows]
