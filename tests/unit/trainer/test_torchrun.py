"""The process that starts a group's processes, and outlives them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing import SignalException

from heimdall_tracking import MLflowTracker, TrackingSettings
from heimdall_trainer import torchrun
from heimdall_trainer.commands.training import LOCAL_RUN_ID
from tests.integration.servers import free_port, wait_until

# MLflow's own use of SQLAlchemy, not ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")]
CLOSE_S = 120
"""Only so that a test that hangs ends: on a busy machine processes take long to import torch."""
CHILD = RuntimeError("a process has failed")


def ended_as(error: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> BaseException | None:
    """How it ends where its processes end so."""

    def start() -> None:
        if error is not None:
            raise error

    run: Any = SimpleNamespace(main=start)
    monkeypatch.setitem(sys.modules, "torch.distributed.run", run)
    with nullcontext() if error is None else pytest.raises(BaseException) as caught:
        torchrun.main()
    return None if caught is None else caught.value


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[MLflowTracker]:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for name in torchrun.HURRIED:
        monkeypatch.setenv(name, "0")
    made = MLflowTracker(TrackingSettings(tracking_uri=uri, experiment_name="group"))
    yield made
    assert made.close(CLOSE_S)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CHILD, "FAILED"),
        (SignalException("told", signal.SIGTERM), "KILLED"),
        (SystemExit(128 + signal.SIGINT), "KILLED"),
        (None, "RUNNING"),
    ],
    ids=["failed", "told", "told before there were processes", "the first process has ended it"],
)
def test_a_run_without_an_operator_is_ended_by_whoever_is_left(
    error: BaseException | None, status: str, tracker: MLflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = tracker.start_run()
    monkeypatch.setenv(LOCAL_RUN_ID, run_id)

    raised = ended_as(error, monkeypatch)

    assert tracker.client.get_run(run_id).info.status == status
    assert raised is error or (isinstance(raised, SystemExit) and raised.code == 128 + signal.SIGTERM)


def test_how_the_first_process_has_ended_it_stays(tracker: MLflowTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = tracker.start_run()
    monkeypatch.setenv(LOCAL_RUN_ID, run_id)
    tracker.end_run("KILLED")

    assert ended_as(CHILD, monkeypatch) is CHILD
    assert tracker.client.get_run(run_id).info.status == "KILLED"


def test_an_operators_run_is_left_to_it(tracker: MLflowTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = tracker.start_run()

    ended_as(CHILD, monkeypatch)

    assert tracker.client.get_run(run_id).info.status == "RUNNING"
    tracker.end_run()


def test_a_server_that_is_away_hides_no_other_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(torchrun.HURRIED, "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv(LOCAL_RUN_ID, "a" * 32)

    assert ended_as(CHILD, monkeypatch) is CHILD
    assert f"run {'a' * 32} has ended" in capsys.readouterr().err


DEAF = """
import os, signal, sys, threading
rank, folder = os.environ["RANK"], sys.argv[1]
signal.signal(signal.SIGINT, lambda *_: open(f"{folder}/told-{rank}", "w").close())
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"{folder}/began-{rank}", "w").write(str(os.getpid()))
while True:
    signal.pause()
"""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_group_at_once(tmp_path: Path) -> None:
    """The first one tells its processes, each of which may take its time."""
    (tmp_path / "deaf.py").write_text(DEAF)
    command = [sys.executable, "-m", "heimdall_trainer.torchrun", "--standalone", "--nproc-per-node=2"]
    group = subprocess.Popen([*command, str(tmp_path / "deaf.py"), str(tmp_path)])
    began, told = ([tmp_path / f"{what}-{rank}" for rank in range(2)] for what in ("began", "told"))
    try:
        wait_until(
            lambda: all(file.exists() and file.read_text() for file in began), what="it trains", timeout_s=CLOSE_S
        )
        group.send_signal(signal.SIGINT)
        wait_until(lambda: all(file.exists() for file in told), what="all are told", timeout_s=CLOSE_S)
        group.send_signal(signal.SIGINT)
        assert group.wait(CLOSE_S) == 128 + signal.SIGINT
        pids = [int(file.read_text()) for file in began]
        wait_until(lambda: all(map(has_ended, pids)), what="all have ended", timeout_s=CLOSE_S)
    finally:
        group.kill()
        group.wait()
        for file in began:
            if file.exists() and not has_ended(int(file.read_text())):
                os.kill(int(file.read_text()), signal.SIGKILL)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for somebody to hear of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
