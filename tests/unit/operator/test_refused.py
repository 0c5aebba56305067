"""What the API server calls invalid is said once, tried again slowly, and keeps nothing from being ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from heimdall_operator import metrics
from heimdall_operator.controller import REFUSED_PAUSE_S, Controller
from heimdall_operator.kube import RefusedError, _answer
from tests.unit.operator.builders import NOW, UID
from tests.unit.operator.fakes import KEY, STAMP, World, controller

RUNNING = {"phase": "Running", "running": {"startedAt": STAMP}}
SUCCEEDED = {"phase": "Succeeded", "terminated": {"exitCode": 0, "startedAt": STAMP, "finishedAt": STAMP}}


class Watch:
    """An operator and its clock, on a world whose first attempt trains."""

    def __init__(self, **spec: Any) -> None:
        self.now = NOW
        self.world = World()
        self.world.apply(spec)
        self.operator: Controller | None = None
        self.runner = asyncio.Runner()
        self.look()
        self.pod(RUNNING)
        self.world.refuses_status = True

    def pod(self, state: dict[str, Any]) -> None:
        self.world.pod_of(self.world.jobs["run-a1"], **state)
        self.look()

    def look(self, after_s: float = 0) -> None:
        self.now += timedelta(seconds=after_s)
        if self.operator is None:
            self.operator = controller(self.world, clock=lambda: self.now)
        operator = self.operator

        async def safely() -> None:
            await operator.refresh()
            await operator._reconcile_safely(KEY)
            await operator.events.record_waiting()

        self.runner.run(safely())

    def close(self) -> None:
        self.runner.close()

    @property
    def status(self) -> dict[str, Any]:
        assert self.world.run is not None
        status: dict[str, Any] = self.world.run["status"]
        return status


@pytest.fixture
def watching() -> Iterator[Callable[..., Watch]]:
    """Makes watches, with the given specs."""
    with contextlib.ExitStack() as stack:
        yield lambda **spec: stack.enter_context(contextlib.closing(Watch(**spec)))


def refused() -> float:
    return metrics.ERRORS.labels("RefusedError")._value.get()


def test_a_status_that_is_refused_is_tried_again_slowly_and_said_once(watching: Callable[..., Watch]) -> None:
    watch = watching()
    before = refused()

    with capture_logs() as lines:
        watch.pod(SUCCEEDED)
        for _ in range(5):
            watch.look(after_s=1)
        assert watch.world.refusals == 1
        watch.look(after_s=REFUSED_PAUSE_S)
        watch.look(after_s=1)
        assert (watch.world.refusals, refused() - before) == (2, 2)
        assert watch.world.run is not None
        watch.world.stamp(watch.world.run)  # as when somebody changes it
        watch.look(after_s=1)
        assert watch.world.refusals == 3

    said = [line for line in lines if line["log_level"] == "error"]
    assert [line["fields"] for line in said] == [("status.phase",)]
    assert watch.world.events.count("WriteRefused") == 1
    assert watch.status["phase"] == "Running"

    watch.world.refuses_status = False
    watch.look(after_s=REFUSED_PAUSE_S)

    assert watch.status["phase"] == "Succeeded"
    assert watch.world.events[-2:] == ["AttemptCompleted", "Completed"], "told when it was written"


def test_a_refused_status_keeps_nothing_from_being_ended(watching: Callable[..., Watch]) -> None:
    watch = watching(activeDeadlineSeconds=600)

    watch.look(after_s=600)
    assert watch.world.jobs == {}
    watch.world.pods.clear()
    watch.look(after_s=1)

    assert watch.world.mlflow_runs[UID]["status"] == "FAILED"
    assert watch.status["phase"] == "Running"


def test_nothing_is_begun_or_let_go_on_a_status_that_was_refused(watching: Callable[..., Watch]) -> None:
    """An operator that is started anew would do it again, or train what has ended."""
    watch = watching(ttlSecondsAfterFinished=10, registration={"model": "localizer"})
    watch.pod({"phase": "Failed", "terminated": {"exitCode": 3, "startedAt": STAMP, "finishedAt": STAMP}})
    watch.look(after_s=60)
    assert list(watch.world.jobs) == ["run-a1"]

    watch = watching(ttlSecondsAfterFinished=10, registration={"model": "localizer"})
    watch.pod(SUCCEEDED)
    watch.look(after_s=60)
    watch.operator = None
    watch.look(after_s=60)

    assert watch.world.writes.count("create job run-a1") == 1
    assert list(watch.world.jobs) == ["run-a1"]
    assert watch.world.versions == ["1"]
    assert watch.world.run is not None
    assert watch.world.run["metadata"]["finalizers"]


def test_a_hang_is_not_read_out_of_a_status_that_could_not_be_written(watching: Callable[..., Watch]) -> None:
    watch = watching(stallTimeoutSeconds=100, tracking={"experiment": "lab"})
    watch.world.run["status"]["phase"] = "Pending"  # type: ignore[index]
    watch.operator = None
    watch.look()
    assert watch.operator is not None

    watch.runner.run(watch.operator.progress.poll())

    assert list(watch.operator.progress._facts) == ["r1"]


def test_a_finalizer_that_is_refused_waits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.apply({})
    operator = controller(world)
    later: list[float] = []

    async def refuse(*_: object) -> None:
        raise RefusedError("spec.image: Invalid value", ("spec.image",))

    monkeypatch.setattr(operator._kube, "patch_finalizers", refuse)
    monkeypatch.setattr(operator._actor._kube, "patch_finalizers", refuse)
    monkeypatch.setattr(operator.queue, "add_later", lambda key, delay_s: later.append(delay_s))

    async def scenario() -> None:
        await operator.refresh()
        await operator._reconcile_safely(KEY)

    asyncio.run(scenario())
    assert later == [REFUSED_PAUSE_S]


def test_what_is_refused_and_why_is_told_in_the_api_servers_words() -> None:
    cause = {"reason": "FieldValueNotSupported", "field": "status.phase"}
    status = {"message": "invalid", "reason": "Invalid", "details": {"causes": [cause, {"reason": "?"}, cause]}}

    assert _answer(json.dumps(status).encode()) == ("invalid", "Invalid", ("status.phase",))
    assert _answer(b'{"message": "gone", "details": {}}') == ("gone", "", ())
    for page in (
        b"a proxy's page",
        b"[1]",
        b'{"error": "bad gateway"}',
        b'{"message": "x", "details": {"causes": [1]}}',
    ):
        assert _answer(page) == (page.decode(), "", ()), "of something in between"
