"""MLflowTracker, from the start of a run to its end, on a real store."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.async_logging.async_logging_queue import AsyncLoggingQueue
from structlog.testing import capture_logs

from heimdall_api.contract import TAG_ATTEMPT
from heimdall_tracking import registry, runs
from heimdall_tracking import tracker as module
from heimdall_tracking.errors import TrackingError
from heimdall_tracking.points import INFINITY, storable
from heimdall_tracking.queue import MetricQueue
from heimdall_tracking.settings import TrackingSettings
from heimdall_tracking.tracker import REGISTER_TIMEOUT_S, MLflowTracker, initialize_mlflow
from tests.unit.tracking.conftest import NewRun
from tests.unit.tracking.fakes import PATIENCE_S, join

# MLflow's own use of SQLAlchemy, not ours.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")


@pytest.fixture
def tracker(client: MlflowClient, store_uri: str, name: str, experiment: str) -> Iterator[MLflowTracker]:
    """Not started; its experiment is the test's own."""
    settings = TrackingSettings(tracking_uri=store_uri, experiment_name=name)
    tracker = MLflowTracker(settings, client)
    yield tracker
    tracker.close(0)


@pytest.fixture
def started(tracker: MLflowTracker) -> MLflowTracker:
    tracker.start_run("run")
    return tracker


def test_nothing_is_asked_of_the_server_before_it_is_needed(name: str) -> None:
    tracker = initialize_mlflow(TrackingSettings(tracking_uri="http://127.0.0.1:9", experiment_name=name))

    assert tracker.flush(0)
    assert tracker.close(0)


def test_without_a_run_the_error_says_what_to_do(tracker: MLflowTracker) -> None:
    calls = [lambda: tracker.run_id, lambda: tracker.log_params({"a": 1}), tracker.get_run_info]
    for call in (*calls, lambda: tracker.log_metrics({"a": 1.0}, 1)):
        with pytest.raises(TrackingError, match="call start_run first"):
            call()


def test_a_run_starts_with_name_and_tags_and_ends_finished(tracker: MLflowTracker, client: MlflowClient) -> None:
    run_id = tracker.start_run("mine", {"team": "rf"})
    assert client.get_run(run_id).info.status == "RUNNING"

    assert tracker.end_run()

    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name, run.data.tags["team"]) == ("FINISHED", "mine", "rf")
    with pytest.raises(TrackingError):
        _ = tracker.run_id


def test_a_second_run_is_refused_until_the_first_has_ended(tracker: MLflowTracker, new_run: NewRun) -> None:
    first = tracker.start_run("first")
    with pytest.raises(TrackingError, match=f"run {first} was started and has not ended: call end_run first"):
        tracker.start_run("second")
    with pytest.raises(TrackingError, match="call end_run first"):
        tracker.attach(new_run())
    tracker.end_run()
    assert tracker.start_run("second") != first
    tracker.end_run()


def test_what_is_delivered_is_there_whatever_mlflows_client_prefers(
    started: MLflowTracker, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With this variable MLflow's client makes calls in a thread of its own, which gives up what it can't deliver."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    monkeypatch.setattr(AsyncLoggingQueue, "activate", lambda _: pytest.fail("it was left to MLflow's own thread"))
    started.log_metrics({"loss": 1.0}, step=1)
    started.log_params({"width": 3})
    started.put_tag("behind", "b")
    started.set_tag("now", "n")
    assert started.flush(PATIENCE_S)
    run = client.get_run(started.run_id).data
    assert (run.metrics, run.params["width"], run.tags["behind"], run.tags["now"]) == ({"loss": 1.0}, "3", "b", "n")


def test_a_run_without_a_name_gets_the_prefix(tracker: MLflowTracker, client: MlflowClient) -> None:
    assert client.get_run(tracker.start_run()).info.run_name.startswith("rf-localization-")


def test_a_failed_run_ends_failed_with_everything_that_was_logged(started: MLflowTracker, client: MlflowClient) -> None:
    run_id = started.run_id
    started.log_params({"lr": 0.1})
    started.log_metrics({"loss": 1.5}, step=3)
    started.put_tag("note", "x")

    assert started.end_run("FAILED", PATIENCE_S)

    run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert (run.data.params, run.data.metrics, run.data.tags["note"]) == ({"lr": "0.1"}, {"loss": 1.5}, "x")


def test_a_run_is_taken_up_again_by_its_id(
    started: MLflowTracker, client: MlflowClient, store_uri: str, experiment: str
) -> None:
    run_id = started.run_id
    started.end_run("KILLED")
    later = MLflowTracker(TrackingSettings(tracking_uri=store_uri, experiment_name="another"), client)

    assert later.start_run(tags={"again": "yes"}, run_id=run_id) == run_id

    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["again"], later.experiment_id) == ("RUNNING", "yes", experiment)
    later.end_run()


def test_a_run_that_is_not_there_can_not_be_taken_up(tracker: MLflowTracker) -> None:
    with pytest.raises(MlflowException, match="not found"):
        tracker.start_run(run_id="0" * 32)
    with pytest.raises(MlflowException, match="not found"):
        tracker.attach("0" * 32)


def test_attaching_leaves_the_status_alone(tracker: MLflowTracker, client: MlflowClient, new_run: NewRun) -> None:
    run_id = new_run(status="FINISHED")

    tracker.attach(run_id)

    assert (tracker.run_id, client.get_run(run_id).info.status) == (run_id, "FINISHED")


def test_a_thousand_parameters_arrive(started: MLflowTracker) -> None:
    started.log_params({f"p{index}": index for index in range(1000)})

    assert started.flush(PATIENCE_S)
    assert started.get_run_info()["params"] == {f"p{index}": str(index) for index in range(1000)}


def test_a_parameter_keeps_its_first_value_and_does_not_take_the_others_along(started: MLflowTracker) -> None:
    started.log_params({"lr": 0.1, "epochs": 5})
    assert started.flush(PATIENCE_S)

    with capture_logs() as lines:
        started.log_params({"batch": 32, "lr": 0.2, "seed": 1, "epochs": 5})
        assert started.flush(PATIENCE_S)

    assert started.get_run_info()["params"] == {"lr": "0.1", "epochs": "5", "batch": "32", "seed": "1"}
    assert [line["name"] for line in lines if line["event"] == "a parameter was not logged"] == ["lr"]


def test_metrics_keep_order_steps_and_values(started: MLflowTracker, client: MlflowClient) -> None:
    for step in range(50):
        started.log_metrics({"loss": 1 / (step + 1), "lr": np.float32(0.5)}, step)

    assert started.flush_metrics(PATIENCE_S)
    history = client.get_metric_history(started.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / (step + 1)) for step in range(50)]
    assert started.get_run_info()["metrics"] == {"loss": 0.02, "lr": 0.5}


def test_values_that_are_no_numbers_are_left_out_or_kept_as_mlflow_can(started: MLflowTracker) -> None:
    logged: dict[str, Any] = {"nan": math.nan, "up": math.inf, "down": -math.inf, "text": "x", "none": None}
    logged |= {"list": [1, 2], "many": np.zeros(2), "huge": 10**400, "one": np.array(1.0), "a?b": 2, "true": True}
    started.log_metrics(logged, step=1)

    assert started.flush(PATIENCE_S)
    metrics = started.get_run_info()["metrics"]
    assert math.isnan(metrics.pop("nan"))
    assert metrics == {"up": INFINITY, "down": -INFINITY, "one": 1.0, "a_b": 2.0, "true": 1.0}


def test_metrics_that_mlflow_would_call_the_same_stay_apart(started: MLflowTracker) -> None:
    started.log_metrics({"a@b": 1, "a_b": 2, "a#b": 3}, step=1)
    started.log_metrics({"a?b": 4}, step=2)

    assert started.flush(PATIENCE_S)
    metrics = started.get_run_info()["metrics"]
    assert metrics["a_b"] == 2
    assert sorted(metrics.values()) == [1, 2, 3, 4]


def test_of_tags_that_wait_the_newest_is_sent_without_secrets(started: MLflowTracker) -> None:
    started.put_tag("endpoint", "s3://key:canary@minio")
    started.put_tag("long", "x" * 20_000)
    started.put_tag("progress", 1)
    started.put_tag("progress", "2\0")

    assert started.flush(PATIENCE_S)
    tags = started.get_run_info()["tags"]
    assert (tags["endpoint"], tags["progress"], len(tags["long"])) == ("s3://***@minio", "2\ufffd", module.TAG_LIMIT)


@pytest.mark.parametrize(
    "case",
    [(1, "2", 0.0, False), (2, "2", 0.0, True), (None, "2", 0.0, True), (1, "2", 3600.0, True)],
    ids=["given up", "the newest", "of nobody", "looked a moment ago"],
)
def test_an_attempt_that_was_given_up_says_nothing_more(
    started: MLflowTracker,
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[int | None, str, float, bool],
) -> None:
    attempt, newest, every_s, arrives = case
    monkeypatch.setattr(runs, "LOOK_EVERY_S", every_s)
    client.set_tag(started.run_id, TAG_ATTEMPT, newest)
    started.keep_undelivered_in(tmp_path / "kept", attempt=attempt)

    started.log_metrics({"loss": 1.0}, step=7)
    started.put_tag("heimdall.progress", "{}")
    started.flush(PATIENCE_S)

    run = client.get_run(started.run_id)
    assert ("loss" in run.data.metrics, "heimdall.progress" in run.data.tags) == (arrives, arrives)
    assert (started.overtaken is None) is arrives


def test_to_a_run_that_was_deleted_nothing_more_is_said(
    started: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "LOOK_EVERY_S", 0.0)
    started.keep_undelivered_in(tmp_path / "kept", attempt=1)
    client.delete_run(started.run_id)

    started.log_metrics({"loss": 1.0}, step=7)
    started.flush(PATIENCE_S)

    assert started.overtaken is not None
    assert "the run was deleted in MLflow" in str(started.overtaken)


@pytest.mark.parametrize("step", [None, float("nan"), float("inf"), "first", 2**63, -(2**63) - 1, 1e300])
def test_a_step_that_is_no_number_of_mlflow_s_raises_nothing(
    started: MLflowTracker, client: MlflowClient, step: Any
) -> None:
    with capture_logs() as lines:
        started.log_metrics({"loss": 1.0}, step=step)
    assert [line["log_level"] for line in lines] == ["warning"]
    started.log_metrics({"loss": 2.0}, step=3)

    assert started.flush(PATIENCE_S)
    assert [(item.step, item.value) for item in client.get_metric_history(started.run_id, "loss")] == [(3, 2.0)]


def test_the_largest_step_of_all_arrives(started: MLflowTracker, client: MlflowClient) -> None:
    for step in (2**63 - 1, -(2**63)):
        started.log_metrics({"loss": 1.0}, step=step)

    assert started.flush(PATIENCE_S)
    assert {item.step for item in client.get_metric_history(started.run_id, "loss")} == {2**63 - 1, -(2**63)}


def test_files_and_folders_become_artifacts(started: MLflowTracker, client: MlflowClient, tmp_path: Path) -> None:
    folder = tmp_path / "plots"
    folder.mkdir()
    (folder / "loss.txt").write_text("plot")

    upload = started.log_artifact(folder / "loss.txt", "single")
    started.log_artifacts_dir(folder, "all")

    assert upload.result(PATIENCE_S) is None
    assert started.flush(PATIENCE_S)
    found = [item.path for part in ("single", "all") for item in client.list_artifacts(started.run_id, part)]
    assert found == ["single/loss.txt", "all/loss.txt"]


def test_a_missing_artifact_is_named(started: MLflowTracker, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="missing"):
        started.log_artifact(tmp_path / "gone")


def test_what_was_given_up_is_not_called_delivered_when_the_end_is_tried_again(
    started: MLflowTracker, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object, **more: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(client, "log_batch", away)
        patch.setattr(client, "set_terminated", away)
        started.log_metrics({"loss": 1}, step=1)
        with pytest.raises(ConnectionError):
            started.end_run(timeout_s=0.02)

    assert not started.end_run(timeout_s=PATIENCE_S)


@pytest.mark.parametrize(("mode", "best"), [("min", 1.0), ("max", 3.0)])
def test_the_best_run_is_the_one_with_the_best_value(
    tracker: MLflowTracker, new_run: NewRun, mode: Any, best: float
) -> None:
    for value in (2.0, 1.0, 3.0, math.nan, storable(math.inf), storable(-math.inf)):
        new_run(model=False, loss=value)
    new_run(model=False, other=-9.0)

    found = tracker.get_best_run("loss", mode)

    assert found is not None
    assert found["metrics"] == {"loss": best}


@pytest.mark.parametrize("mode", ["min", "max"])
def test_of_equals_the_older_is_the_best(tracker: MLflowTracker, new_run: NewRun, mode: Any) -> None:
    new_run(model=False, loss=1.0, start_time=3000)
    older = new_run(model=False, loss=1.0, start_time=1000)
    new_run(model=False, loss=1.0, start_time=2000)

    found = tracker.get_best_run("loss", mode)

    assert found is not None
    assert found["run_id"] == older


@pytest.mark.parametrize("mode", ["min", "max"])
def test_there_is_no_best_run_where_none_finished_with_a_number(
    tracker: MLflowTracker, new_run: NewRun, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracker.get_best_run("loss", mode) is None

    monkeypatch.setattr(module, "SEARCH_PAGE", 2)
    for _ in range(3):
        new_run(model=False, loss=math.nan)
    new_run(model=False)
    for status in ("FAILED", "KILLED", "RUNNING"):
        new_run(model=False, status=status, loss=1.0)

    assert tracker.get_best_run("loss", mode) is None


def test_the_best_run_is_found_by_a_name_that_mlflow_had_to_change(tracker: MLflowTracker, new_run: NewRun) -> None:
    tracker.start_run("run")
    tracker.log_metrics({"loss [m]`": 1.0}, step=1)
    tracker.end_run()

    found = tracker.get_best_run("loss [m]`")

    assert found is not None
    assert found["run_name"] == "run"


@pytest.mark.parametrize("form", ["models:/{model_id}", "runs:/{run_id}/model"])
def test_a_runs_model_is_registered_once(
    tracker: MLflowTracker, client: MlflowClient, experiment: str, name: str, form: str
) -> None:
    run_id = tracker.start_run("run")
    model_id = client.create_logged_model(experiment, name="model", source_run_id=run_id).model_id
    client.finalize_logged_model(model_id, "READY")
    uri = form.format(model_id=model_id, run_id=run_id)

    assert tracker.register_model(name, uri) == "1"
    assert tracker.register_model(name, uri) == "1"

    versions = client.search_model_versions(f"name = '{name}'")
    assert [(str(item.version), item.run_id) for item in versions] == [("1", run_id)]


class Clock:
    """Time that passes where something sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("asked", "waited_s"), [({}, REGISTER_TIMEOUT_S), ({"timeout_s": 2.5}, 2.5)])
@pytest.mark.parametrize("again", [False, True], ids=["made", "found"])
def test_a_version_that_does_not_become_ready_is_waited_for_as_long_as_was_asked(
    asked: dict[str, Any],
    waited_s: float,
    *,
    again: bool,
    started: MLflowTracker,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if again:
        started.register_model(name, "file:///somewhere")
    clock = Clock()
    monkeypatch.setattr(registry, "time", clock)
    pending = SimpleNamespace(status="PENDING_REGISTRATION")
    monkeypatch.setattr(started.client, "get_model_version", lambda *_: pending)

    with pytest.raises(TrackingError, match=rf"version 1 of {name} is still PENDING_REGISTRATION after {waited_s} s"):
        started.register_model(name, "file:///somewhere", **asked)

    assert clock.now == 1000 + waited_s


def test_a_version_that_the_registry_could_not_make_is_an_error_with_its_reason(
    started: MLflowTracker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter(["PENDING_REGISTRATION", "FAILED_REGISTRATION"])
    monkeypatch.setattr(registry, "time", Clock())
    monkeypatch.setattr(
        started.client, "get_model_version", lambda *_: SimpleNamespace(status=next(states), status_message="no room")
    )

    with pytest.raises(TrackingError, match=f"version 1 of {name} can't be used: FAILED_REGISTRATION, no room"):
        started.register_model(name, "file:///somewhere")


def test_stages_become_aliases(started: MLflowTracker, client: MlflowClient, name: str) -> None:
    version = started.register_model(name, "file:///somewhere")

    started.transition_model_stage(name, version, "Staging")
    started.transition_model_stage(name, version, "Production")
    assert client.get_model_version(name, version).aliases == ["production", "staging"]

    started.transition_model_stage(name, version, "Archived")
    assert client.get_model_version(name, version).aliases == ["archived"]

    started.transition_model_stage(name, version, "Production")
    started.transition_model_stage(name, version, "None")
    assert "production" not in client.get_model_version(name, version).aliases


def test_archiving_one_version_leaves_the_stages_of_another(
    started: MLflowTracker, client: MlflowClient, name: str
) -> None:
    client.create_registered_model(name)
    for _ in range(2):
        client.create_model_version(name, "file:///somewhere")
    started.transition_model_stage(name, "2", "Production")

    started.transition_model_stage(name, "1", "Archived")

    assert str(client.get_model_version_by_alias(name, "production").version) == "2"


def test_a_stage_of_a_version_that_is_not_there_is_an_error(started: MLflowTracker, name: str) -> None:
    with pytest.raises(MlflowException, match="not found"):
        started.transition_model_stage(name, "1", "Production")


def test_what_is_discarded_is_neither_sent_nor_kept(
    started: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MetricQueue.__init__.__kwdefaults__, "memory_points", 10)
    run_id, hanging, called = started.run_id, threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> None:
        called.set()
        hanging.wait(PATIENCE_S)

    monkeypatch.setattr(started, "_given_client", SimpleNamespace(log_batch=hang, set_tag=hang, log_artifact=hang))
    started.keep_undelivered_in(tmp_path / "undelivered")
    (tmp_path / "file").touch()
    started.put_tag("first", 1)
    assert called.wait(PATIENCE_S)
    for step in range(100):
        started.log_metrics({"loss": step}, step)
    started.put_tag("second", 2)
    started.log_artifact(tmp_path / "file")
    assert started._metrics is not None
    assert started._metrics.rest(PATIENCE_S)
    assert (tmp_path / "undelivered").exists()
    threads = [part._thread for part in (started._metrics, started._outbox, started._uploader) if part is not None]

    started.discard()

    assert not (tmp_path / "undelivered").exists()
    assert started.close(0)
    assert started.undelivered is None
    hanging.set()
    for thread in threads:
        assert thread is not None
        join(thread)
    assert "second" not in client.get_run(run_id).data.tags
    assert not (tmp_path / "undelivered").exists()


def test_a_run_that_could_not_be_started_can_be_ended(
    tracker: MLflowTracker, client: MlflowClient, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise ConnectionError("the server is away")

    first, second = new_run(status="RUNNING"), new_run(status="RUNNING")
    for run_id in (first, second):
        with monkeypatch.context() as patch:
            patch.setattr(client, "get_run", away)
            with pytest.raises(ConnectionError):
                tracker.start_run(run_id=run_id)
        tracker.adopt(run_id)
        tracker.adopt("another")
        if run_id == first:
            assert tracker.end_run_in_time("FAILED")
            assert client.get_run(first).info.status == "FAILED"
    monkeypatch.setattr(client, "set_terminated", away)
    assert not tracker.end_run_in_time("KILLED")
    assert tracker.undelivered is not None
    assert f"the end (KILLED) of run {second} could not be delivered" in tracker.undelivered.sentence


def test_closing_without_time_waits_for_no_thread(
    started: MLflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, waits = threading.Event(), list[float | None]()
    monkeypatch.setattr(started.client, "log_batch", lambda *_, **__: hanging.wait(PATIENCE_S))
    monkeypatch.setattr(started.client, "set_tag", lambda *_, **__: hanging.wait(PATIENCE_S))
    monkeypatch.setattr(started.client, "log_artifact", lambda *_, **__: hanging.wait(PATIENCE_S))
    (tmp_path / "file").touch()
    started.log_metrics({"loss": 1}, 1)
    started.put_tag("tag", 1)
    started.log_artifact(tmp_path / "file")
    monkeypatch.setattr(threading.Thread, "join", lambda self, timeout=None: waits.append(timeout))

    assert not started.close(0)

    assert waits == [0, 0, 0, 0]
    hanging.set()
