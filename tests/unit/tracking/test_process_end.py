"""A process that ends whatever is on its way, and the tracker as a context manager."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from heimdall_tracking import MLflowTracker, TrackingSettings
from heimdall_tracking.deliver import deliver
from tests.unit.tracking.conftest import NewRun

# MLflow's own use of SQLAlchemy, not ours.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

TIMEOUT_S = 120
"""Only so that a test that hangs ends."""
BEGIN = """
import sys
from pathlib import Path
from heimdall_tracking import initialize_mlflow, load_settings, tracker as module
tracker = initialize_mlflow(load_settings(tracking_uri=sys.argv[1], experiment_name=sys.argv[2]))
Path("file.txt").write_text("artifact")
def log():
    tracker.log_metrics({"loss": 1.0}, step=1)
    tracker.put_tag("note", "waits")
    tracker.log_artifact("file.txt")
def away(*_, **__):
    raise ConnectionError("the server is away")
"""


def end(program: str, store_uri: str, experiment: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BEGIN + program, store_uri, experiment, *more],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def only_run(client: MlflowClient, experiment: str) -> str:
    (run,) = client.search_runs([experiment])
    return str(run.info.run_id)


def check_whole(client: MlflowClient, run_id: str, status: str, said: str) -> None:
    """All that a process logged is there, and its run has this status."""
    run = client.get_run(run_id)
    artifacts = [item.path for item in client.list_artifacts(run_id)]
    there = (run.data.metrics, run.data.tags.get("note"), artifacts)
    assert there == ({"loss": 1.0}, "waits", ["file.txt"]), said
    assert run.info.status == status


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        ("tracker.start_run(); log(); raise ValueError", 1, "FAILED"),
        ("tracker.start_run(); log()", 0, "FAILED"),
        ("with tracker: tracker.start_run(); log(); raise ValueError", 1, "FAILED"),
        ("with tracker: tracker.start_run(); log()", 0, "FINISHED"),
        ("tracker.start_run(); log(); tracker.end_run('KILLED')", 0, "KILLED"),
        ("tracker.start_run(); log(); tracker.close()", 0, "RUNNING"),
    ],
    ids=["raises", "forgets it", "raises within", "leaves the block", "ends it", "leaves it as it is"],
)
def test_what_waits_when_a_process_ends_is_delivered_and_the_run_ends(
    case: tuple[str, int, str], client: MlflowClient, store_uri: str, name: str, experiment: str
) -> None:
    program, code, status = case
    done = end(program, store_uri, name)

    assert done.returncode == code, done.stderr
    check_whole(client, only_run(client, experiment), status, done.stdout)
    assert ("was not closed" in done.stdout) is not any(word in program for word in ("with", "end_run", "close"))


@pytest.mark.slow
def test_a_run_of_somebody_else_keeps_its_status_when_the_process_ends(
    client: MlflowClient, store_uri: str, name: str, new_run: NewRun
) -> None:
    run_id = new_run(model=False, status="RUNNING")

    done = end("tracker.attach(sys.argv[3]); log()", store_uri, name, run_id)

    assert done.returncode == 0, done.stderr
    check_whole(client, run_id, "RUNNING", done.stdout)


@pytest.mark.slow
def test_what_a_process_can_not_deliver_in_its_last_seconds_is_put_away_and_named(
    client: MlflowClient, store_uri: str, name: str, experiment: str
) -> None:
    program = """
module.EXIT_TIMEOUT_S = 0.01
tracker.start_run()
for call in ("log_batch", "set_tag", "log_artifact", "set_terminated"):
    setattr(tracker.client, call, away)
log()
"""
    done = end(program, store_uri, name)

    run_id = only_run(client, experiment)
    assert done.returncode == 0, done.stderr
    left = "1 metric point, 1 call for tags and parameters, 1 artifact and the end (FAILED)"
    assert f"{left} of run {run_id} could not be delivered" in done.stdout
    deliver(Path(f"undelivered-{run_id}"), TrackingSettings(tracking_uri=store_uri))
    check_whole(client, run_id, "FAILED", done.stdout)


@pytest.mark.slow
def test_uploads_that_are_made_in_pools_are_still_made_when_the_process_ends(
    client: MlflowClient, store_uri: str, name: str, experiment: str
) -> None:
    """As boto3's and MLflow's own are; Python lets no pool take anything new before it calls `atexit`."""
    program = """
from concurrent.futures import ThreadPoolExecutor
module.EXIT_TIMEOUT_S = 10
tracker.start_run()
upload = tracker.client.log_artifact
def in_pool(*arguments):
    with ThreadPoolExecutor() as pool:
        pool.submit(upload, *arguments).result()
further = __import__("threading").Event()
def late(*arguments):
    further.wait()
    in_pool(*arguments)
tracker.client.log_artifact = late
log()
flush = tracker.flush
def flushed(*arguments):
    further.set()
    return flush(*arguments)
tracker.flush = flushed
"""
    done = end(program, store_uri, name)

    assert done.returncode == 0, done.stderr
    check_whole(client, only_run(client, experiment), "FAILED", done.stdout)


@pytest.mark.slow
def test_a_thread_that_a_process_still_waits_for_logs_to_its_end(
    client: MlflowClient, store_uri: str, name: str, experiment: str
) -> None:
    program = """
import threading
tracker.start_run()
log()
def last():
    threading.main_thread().join()
    tracker.put_tag("note", "waits")
    tracker.end_run()
threading.Thread(target=last).start()
"""
    done = end(program, store_uri, name)

    assert done.returncode == 0, done.stderr
    assert client.get_run(only_run(client, experiment)).info.status == "FINISHED"
    assert "was not closed" not in done.stdout


@pytest.mark.slow
def test_a_run_ends_where_no_thread_can_be_started_any_more(
    client: MlflowClient, store_uri: str, name: str, experiment: str
) -> None:
    """As since Python 3.12."""
    program = """
import atexit, threading
tracker.start_run()
log()
def refuse(thread):
    raise RuntimeError("can't create new thread at interpreter shutdown")
def no_more():
    threading.Thread.start = refuse
atexit.register(no_more)
threading._register_atexit(no_more)
"""
    done = end(program, store_uri, name)

    check_whole(client, only_run(client, experiment), "FAILED", done.stdout)
    assert "could not be told" not in done.stdout


@pytest.mark.slow
def test_a_forked_child_leaves_the_run_alone(client: MlflowClient, store_uri: str, name: str, experiment: str) -> None:
    program = """
import os
tracker.start_run()
child = os.fork()
if child == 0:
    sys.exit()
os.waitpid(child, 0)
print("status:", tracker.get_run_info()["status"])
tracker.end_run()
"""
    done = end(program, store_uri, name)

    assert "status: RUNNING" in done.stdout, done.stderr
    assert client.get_run(only_run(client, experiment)).info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in a block", "without one"])
def test_what_a_forked_child_logs_is_dropped_with_one_warning_and_waits_for_nothing(
    where: str, client: MlflowClient, store_uri: str, name: str, experiment: str
) -> None:
    """Its parent's threads are not there, and one of them may have held a lock."""
    program = """
import os, threading
def child():
    log()
    log()
    tracker.log_params({"of": "the child"})
    print("not uploaded:", tracker.log_artifact("file.txt").exception(0))
    print("flushed:", tracker.flush(), tracker.flush_metrics(), tracker.settle(), tracker.close())
    print("outstanding:", tracker.outstanding().calls)
    print("ended:", tracker.end_run(), tracker.end_run_in_time("FAILED"))
    sys.exit(7)
def track():
    tracker.start_run()
    log()
    held, free = threading.Event(), threading.Event()
    def hold():
        with tracker._metrics._changed, tracker._outbox._changed, tracker._uploader._changed:
            held.set()
            free.wait()
    threading.Thread(target=hold, daemon=True).start()
    held.wait()
    sys.stdout.flush()
    forked = os.fork()
    if forked == 0:
        child()
    free.set()
    print("child:", os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]))
    print("status:", tracker.get_run_info()["status"])
    tracker.log_metrics({"later": 2.0}, step=2)
"""
    program += "with tracker: track()" if where == "in a block" else "track(); tracker.end_run()"
    done = end(program, store_uri, name)

    assert done.returncode == 0, done.stderr
    assert "child: 7" in done.stdout, done.stdout
    assert "status: RUNNING" in done.stdout
    assert done.stdout.count("this process was forked") == 1
    for line in (
        "not uploaded: file.txt was not uploaded: the process that tracks is another one",
        "flushed: False False True False",
        "outstanding: 0",
        "ended: False False",
    ):
        assert line in done.stdout
    run = client.get_run(only_run(client, experiment))
    assert (run.data.metrics, run.data.params) == ({"loss": 1.0, "later": 2.0}, {})
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 1


def test_a_block_that_starts_no_run_ends_none(store_uri: str, name: str, new_run: NewRun, client: MlflowClient) -> None:
    settings, run_id = TrackingSettings(tracking_uri=store_uri, experiment_name=name), new_run(status="RUNNING")
    with MLflowTracker(settings, client) as nothing:
        assert not nothing.outstanding().calls
    with MLflowTracker(settings, client) as attached:
        attached.attach(run_id)
        attached.log_metrics({"loss": 2.0}, step=1)

    run = client.get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("RUNNING", {"loss": 2.0})


def test_the_exception_of_a_block_goes_on_though_the_end_can_not_be_told(
    tracker: MLflowTracker, own: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise ConnectionError("the server is away")

    monkeypatch.setattr(own, "set_terminated", away)
    with pytest.raises(ZeroDivisionError), tracker:
        _ = 1 / 0

    assert tracker.undelivered is not None
    assert "the end (FAILED)" in tracker.undelivered.sentence


def test_an_end_that_only_could_not_be_told_stays_as_it_is(
    tracker: MLflowTracker, own: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise ConnectionError("the server is away")

    monkeypatch.setattr(own, "set_terminated", away)
    with pytest.raises(ConnectionError), tracker:
        tracker.end_run("FINISHED")

    assert tracker.undelivered is not None
    assert "the end (FINISHED)" in tracker.undelivered.sentence
