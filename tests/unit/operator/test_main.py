"""How the operator begins: it reads what the API server takes, and logs its own mistakes without secrets."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from kubernetes.aio.client.exceptions import ApiException
from mlflow.exceptions import MlflowException

from heimdall_operator.act import NameTakenError
from heimdall_operator.main import _configure_logging, _read_settings
from heimdall_operator.mlflow_gateway import MlflowSilentError
from tests.unit.operator.builders import UID
from tests.unit.operator.fakes import KEY, World, controller

PASSWORD = "hunter2"


@pytest.fixture
def logs(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Reads what was logged, and puts back how that is done."""
    root, chatty = logging.getLogger(), [logging.getLogger(name) for name in ("kopf", "aiohttp.access")]
    before = root.handlers[:], root.level, [logger.level for logger in chatty]
    yield lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    structlog.reset_defaults()
    root.handlers[:], level, levels = before
    root.setLevel(level)
    for logger, known in zip(chatty, levels, strict=True):
        logger.setLevel(known)


def line_of(error: Exception, logs: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is logged of a look that an error ends."""
    _configure_logging()
    world = World()
    world.apply({})

    async def fails(*_: object) -> None:
        local = PASSWORD  # noqa: F841 - no traceback may show it
        raise error

    async def scenario() -> None:
        operator = controller(world)
        await operator.refresh()
        monkeypatch.setattr(operator._mlflow, "ensure_run", fails)
        await operator._reconcile_safely(KEY)
        operator.queue.close()

    asyncio.run(scenario())
    lines: list[dict[str, Any]] = logs()
    return lines[-1]


def test_a_mistake_of_our_own_leaves_a_traceback_without_secrets(logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = line_of(KeyError(f"http://user:{PASSWORD}@mlflow/x"), logs, monkeypatch)

    assert line["event"] == "looking at the run failed; trying again"
    assert (line["uid"], line["trainingrun"]) == (UID, "run")
    assert "in fails" in line["exception"]
    assert "KeyError: 'http://***@mlflow/x'" in line["exception"]
    assert PASSWORD not in json.dumps(line)


@pytest.mark.parametrize(
    "error",
    [
        ApiException(status=500, reason="away"),
        MlflowException("away"),
        MlflowSilentError("away"),
        NameTakenError("taken"),
        ConnectionError("away"),
        TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_server_does_leaves_none(error: Exception, logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = line_of(error, logs, monkeypatch)

    assert line["event"] == "looking at the run failed; trying again"
    assert "exception" not in line


def test_a_traceback_of_a_library_holds_no_secret_either(logs: Any) -> None:
    _configure_logging()
    try:
        int(f"http://user:{PASSWORD}@mlflow/x")
    except ValueError:
        logging.getLogger("library").exception("it failed")

    assert logs()[-1]["exception"].endswith("'http://***@mlflow/x'")


DEEP = """
import asyncio, sys, threading, kopf
from heimdall_operator import main
from heimdall_operator.kube import Kube

class Server(Kube):
    levels, status = 0, 200
    async def _send(self, *_, **__):
        return self
    async def read(self):
        spec = b'{"a":[' * (self.levels // 2) + b'1' + b']}' * (self.levels // 2)
        return b'{"metadata": {}, "items": [{"metadata": {}, "spec": ' + spec + b'}, {"metadata": {"name": "other"}}]}'

def read():
    for Server.levels in (2_000, 9_000, 10_000):
        items = asyncio.run(Server(timeout_s=1.0).list_training_runs())
        print(Server.levels, items[-1]["metadata"]["name"])

def run(**_):
    read()
    thread = threading.Thread(target=read)
    thread.start()
    thread.join()

kopf.run = run
main.main()
"""


def test_a_resource_of_as_many_levels_as_the_api_server_takes_keeps_no_other_from_being_read() -> None:
    """In a process of its own: a stack that is too small for them ends it."""
    needed = {"HEIMDALL_OPERATOR_TRACKING_URI": "http://mlflow", "HEIMDALL_OPERATOR_TRAINER_IMAGE": "trainer:1"}
    done = subprocess.run(
        [sys.executable, "-c", DEEP], env=os.environ | needed, capture_output=True, text=True, timeout=120, check=False
    )

    lines = [f"{levels} other" for levels in (2_000, 9_000, 10_000)]
    assert (done.returncode, done.stdout.splitlines()) == (0, lines * 2), done.stderr[-2000:]


def test_wrong_settings_are_named_by_their_variables_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEIMDALL_OPERATOR_TRAINER_IMAGE", raising=False)
    monkeypatch.setenv("HEIMDALL_OPERATOR_TRACKING_URI", f"http://user:{PASSWORD}@mlflow")
    monkeypatch.setenv("HEIMDALL_OPERATOR_WORKERS", "0")

    with pytest.raises(SystemExit) as ended:
        _read_settings()

    _, *problems = str(ended.value).splitlines()
    assert [problem.split()[0] for problem in problems] == [
        "HEIMDALL_OPERATOR_TRACKING_URI",
        "HEIMDALL_OPERATOR_TRAINER_IMAGE:",
        "HEIMDALL_OPERATOR_WORKERS:",
    ]
    assert "must hold no user and no password" in problems[0]
    assert PASSWORD not in str(ended.value)
