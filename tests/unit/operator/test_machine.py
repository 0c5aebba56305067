"""Every order of events, losses and deaths.

A state machine drives the whole operator against stand-ins of API server and MLflow that keep their rules, and checks
after each step what must always hold.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
import structlog
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from heimdall_operator.decide import DELETION_LIMIT_S
from tests.unit.operator.builders import NOW, UID
from tests.unit.operator.fakes import KEY, STAMP, CrashError, World, controller

RETRIES = 2
ENDS: dict[str, dict[str, Any]] = {
    "success": {"exitCode": 0},
    "sigterm": {"exitCode": 143},
    "crash": {"exitCode": 3},
    "killed": {"exitCode": 137},
    "out of memory": {"exitCode": 137, "reason": "OOMKilled"},
    "configuration": {"exitCode": 78},
    "user": {"exitCode": 1, "message": '{"reason": "UserError", "message": "boom"}'},
}
OVERDUE = timedelta(seconds=DELETION_LIMIT_S)
TERMINAL = ("Succeeded", "Failed")


@pytest.fixture(autouse=True, scope="module")
def without_logs() -> Iterator[None]:
    """Tens of thousands of looks: their logs are nobody's."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


class Life(RuleBasedStateMachine):
    """One TrainingRun, its world, and an operator that dies and comes back."""

    ends: Bundle[str] = Bundle("ends")

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.now = NOW
        self.behind: Any = None
        """An operator that was replaced and still works from what it saw."""
        self.final: dict[str, Any] | None = None
        self.final_jobs: set[str] = set()
        self.failures: dict[str, str] = {}
        self.left_running = False
        """Whether a deletion has waited for MLflow for as long as it may, and let go."""

    # --- the world moves ----------------------------------------------------------------------------------------

    @initialize(suspended=st.booleans(), growth=st.booleans(), registered=st.booleans())
    def apply(self, suspended: bool, growth: bool, registered: bool) -> None:
        spec: dict[str, Any] = {"suspend": suspended, "retries": {"limit": RETRIES}, "ttlSecondsAfterFinished": 1000}
        if growth:
            spec["retries"]["memoryGrowth"] = {"max": "20Gi"}
        if registered:
            spec["registration"] = {"model": "localizer"}
        self.world.apply(spec)

    @rule()
    def pods_start(self) -> None:
        for name, pod in list(self.world.pods.items()):
            if pod["status"]["phase"] == "Pending":
                self.world.pod_of(self._job_of(name), phase="Running", running={"startedAt": STAMP})

    @rule(end=st.sampled_from(sorted(ENDS)))
    def pods_end(self, end: str) -> None:
        for name, pod in list(self.world.pods.items()):
            if "deletionTimestamp" in pod["metadata"]:
                del self.world.pods[name]
            elif pod["status"]["phase"] == "Running":
                phase = "Succeeded" if end == "success" else "Failed"
                terminated = {"startedAt": STAMP, "finishedAt": self._stamp(), **ENDS[end]}
                self.world.pod_of(self._job_of(name), phase=phase, terminated=terminated)

    @rule()
    def somebody_deletes_the_jobs(self) -> None:
        for job in list(self.world.jobs):
            self.world.terminate(job, self.now)
        self.world.jobs.clear()

    @rule(suspend=st.booleans())
    def suspend(self, suspend: bool) -> None:
        if self.world.run is not None:
            self.world.run["spec"]["suspend"] = suspend
            self.world.run["metadata"]["generation"] += 1
            self.world.stamp(self.world.run)

    @rule()
    def delete(self) -> None:
        run = self.world.run
        if run is None:
            return
        if not run["metadata"].get("finalizers"):
            self.world.run = None
        elif "deletionTimestamp" not in run["metadata"]:
            run["metadata"]["deletionTimestamp"] = self._stamp()
            self.world.stamp(run)

    @rule(away=st.booleans())
    def mlflow_goes_or_comes(self, away: bool) -> None:
        self.world.mlflow_away = away

    @rule(seconds=st.sampled_from([1, 30, 600, 5000]))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    # --- the operator looks -------------------------------------------------------------------------------------

    @rule()
    def operator_looks(self) -> None:
        self._look(self._operator())

    @rule(after=st.integers(1, 4))
    def operator_dies_in_a_look(self, after: int) -> None:
        self.world.crash_after = len(self.world.writes) + after
        self._look(self._operator())
        self.world.crash_after = None

    @rule()
    def an_operator_falls_behind(self) -> None:
        """As when two run for a moment during an upgrade."""
        self.behind = self._operator()

    @precondition(lambda self: self.behind is not None)
    @rule()
    def the_one_behind_looks(self) -> None:
        self._look(self.behind)

    # --- what always holds --------------------------------------------------------------------------------------

    @invariant()
    def there_is_one_run_one_version_and_one_living_job(self) -> None:
        assert len(self.world.mlflow_runs) <= 1
        assert len(self.world.versions) <= 1
        assert len(self.world.living(self.now)) <= 1
        assert self.world.overlaps == []

    @invariant()
    def the_status_is_sound(self) -> None:
        status = (self.world.run or {}).get("status") or {}
        if not status:
            return
        assert sum(
            item["status"] == "True" for item in status["conditions"] if item["type"] in ("Complete", "Failed")
        ) == (status["phase"] in TERMINAL)
        for attempt in status.get("attempts", ()):
            reason = self.failures.setdefault(f"{attempt['number']}", attempt.get("reason") or "")
            if reason:
                assert attempt["reason"] == reason, "the reason of an attempt never changes"
            elif attempt.get("reason"):
                self.failures[f"{attempt['number']}"] = attempt["reason"]
        numbers = [attempt["number"] for attempt in status.get("attempts", ())]
        assert numbers == sorted(set(numbers))
        free = {"Completed", "Preempted", "NodeLost", "Suspended", "Fenced"}
        counted = [a for a in status.get("attempts", ()) if a.get("endTime") and a["reason"] not in free]
        if len(numbers) == status.get("attempt"):
            assert status["failures"] == len(counted), "no retry is lost or counted twice"
        assert status.get("failures", 0) <= RETRIES + 1

    @invariant()
    def a_terminal_phase_is_final(self) -> None:
        status = (self.world.run or {}).get("status") or {}
        if self.final is not None and self.world.run is not None:
            # That a later change was seen, and means nothing any more, is said.
            seen = status["observedGeneration"]
            assert status == self.final | {"observedGeneration": seen}
            assert self.final["observedGeneration"] <= seen <= self.world.run["metadata"]["generation"]
            assert set(self.world.jobs) <= self.final_jobs, "a finished run never trains again"
        elif status.get("phase") in TERMINAL:
            self.final, self.final_jobs = status, set(self.world.jobs)
            assert self.world.mlflow_runs or status["phase"] == "Failed"

    def teardown(self) -> None:
        """In the end, with MLflow there and nobody dying, everything is settled and looking again writes nothing."""
        self.world.mlflow_away = False
        self.behind = None
        for _ in range(60):
            self.pods_start()
            self.pods_end("success")
            self.now += timedelta(seconds=400)
            self._look(self._operator())
        before = list(self.world.writes)
        self._look(self._operator())
        assert self.world.writes == before, "no write without a change"
        run = self.world.run
        if run is None:
            assert self.left_running or all(
                item["status"] in ("KILLED", "FINISHED", "FAILED") for item in self.world.mlflow_runs.values()
            )
            return
        status = run["status"]
        assert status["phase"] in ("Succeeded", "Failed", "Suspended")
        if status["phase"] in TERMINAL:
            assert not run["metadata"].get("finalizers")
            wanted = "FINISHED" if status["phase"] == "Succeeded" else "FAILED"
            assert self.world.mlflow_runs[UID]["status"] == wanted
            assert self.world.jobs == {}, "its time is over"
        if status["phase"] == "Succeeded" and "registration" in run["spec"]:
            assert status["modelVersion"] == "1"

    # --- helpers ------------------------------------------------------------------------------------------------

    def _operator(self) -> Any:
        operator = controller(self.world, clock=lambda: self.now)
        asyncio.run(operator.refresh())
        return operator

    def _look(self, operator: Any) -> None:
        deleted = ((self.world.run or {}).get("metadata") or {}).get("deletionTimestamp")
        if deleted and self.world.mlflow_away and self.now - datetime.fromisoformat(deleted) > OVERDUE:
            self.left_running = True

        async def safely() -> None:
            await operator._look_safely(KEY)
            operator.queue.close()

        try:
            asyncio.run(safely())
        except CrashError:
            return

    def _job_of(self, pod: str) -> dict[str, Any]:
        labels = self.world.pods[pod]["metadata"]["labels"]
        return {"metadata": {"name": pod.removesuffix("-x"), "labels": labels}}

    def _stamp(self) -> str:
        return self.now.isoformat().replace("+00:00", "Z")


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_job_that_is_deleted_under_its_pod_is_not_made_again_beside_it() -> None:
    """The order that a missing look at living pods would show in, whatever examples are drawn."""
    life = Life()
    life.apply(suspended=False, growth=False, registered=False)
    life.operator_looks()
    life.pods_start()
    life.operator_looks()
    life.somebody_deletes_the_jobs()

    life.operator_looks()

    assert life.world.pods
    assert (life.world.jobs, life.world.overlaps) == ({}, [])
