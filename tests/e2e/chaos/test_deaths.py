"""The operator dies after each of its actions and writes: one run, one Job an attempt, one version.

With the other tests one life is walked through this way; `make chaos` walks through all, and further into what is
written again and again (HEIMDALL_CHAOS_LIVES, HEIMDALL_CHAOS_TIMES).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest

from heimdall_operator.actions import Action
from tests.e2e.chaos.checks import RUN_LABEL, is_final, violations_of
from tests.e2e.chaos.report import Report
from tests.e2e.cluster import Cluster, wait_for
from tests.e2e.conftest import DyingOperator, Mlflow, contract_run, kill_operator, wait_for_step
from tests.e2e.test_life_cycle import LIFE_S, check_whole

LIVES_WALKED = int(os.environ.get("HEIMDALL_CHAOS_LIVES", "1"))
TIMES = int(os.environ.get("HEIMDALL_CHAOS_TIMES", "2"))
"""After how many writes of the same fields of a status the operator dies: those of progress would have no end."""
EVERYTHING = {kind.__name__ for kind in get_args(Action)} - {"AskJob", "ParkRun"}
"""All that is done in these lives, without what a Job that makes no pod is asked, and what a poll brings."""


@dataclass(frozen=True)
class Walk:
    """A TrainingRun on its way, and what people do to it meanwhile."""

    release: Cluster
    mlflow: Mlflow
    name: str

    def train(self, *, attempt: int, step: int) -> None:
        """Wait until an attempt trains, and the run has made some steps."""

        def look() -> dict[str, Any] | None:
            status = self.release.status(self.name)
            return status if (status.get("attempt"), status.get("phase")) == (attempt, "Running") else None

        what = f"attempt {attempt} of {self.name}"
        running = wait_for(look, what=what, timeout_s=LIFE_S, tell=lambda: self.release.explain(self.name))
        wait_for_step(self.release, self.mlflow, running["runID"], step, LIFE_S)

    def suspend(self) -> None:
        self._patch('{"spec": {"suspend": true}}')
        self.resume()

    def resume(self) -> None:
        """Let a suspended run go on, once it is."""
        self.release.wait_for_phase(self.name, "Suspended", timeout_s=LIFE_S)
        self._patch('{"spec": {"suspend": false}}')

    def delete(self) -> None:
        self.release.kubectl("delete", "trainingrun", self.name, "--timeout=200s")

    def _patch(self, patch: str) -> None:
        self.release.kubectl("patch", "trainingrun", self.name, "--type=merge", "-p", patch)


def is_lost_once_and_suspended(walk: Walk) -> None:
    walk.train(attempt=2, step=5)
    walk.suspend()


def is_suspended_before_and_while_it_trains(walk: Walk) -> None:
    walk.resume()
    walk.train(attempt=1, step=3)
    walk.suspend()


def is_deleted_while_it_trains(walk: Walk) -> None:
    walk.train(attempt=1, step=3)
    walk.delete()


@dataclass(frozen=True)
class Life:
    """A TrainingRun, what becomes of it, and after which actions the operator dies."""

    phase: str
    """Its end; empty where it is deleted."""
    reasons: list[str]
    """How its attempts end."""
    actions: set[str]
    args: dict[str, Any]
    spec: dict[str, Any] = field(default_factory=dict)
    happens: Callable[[Walk], None] = lambda _: None
    events: set[str] = field(default_factory=set)


LIVES = {
    "lost once, suspended, resumed": Life(
        phase="Succeeded",
        reasons=["Unknown", "Suspended", "Completed"],
        actions=EVERYTHING,
        args={"steps": 20, "stepSeconds": 0.9, "fail": "crash", "failAt": 3, "failAttempt": 1},
        happens=is_lost_once_and_suspended,
        events={
            *("RunCreated", "AttemptStarted", "Training", "AttemptUnknown", "AttemptSuspended", "Suspended", "Resumed"),
            *("AttemptCompleted", "ModelRegistered", "Completed"),
        },
    ),
    "fails after a retry": Life(
        phase="Failed",
        reasons=["Unknown", "Unknown"],
        actions=EVERYTHING - {"DeleteJob", "RegisterModel"},
        args={"steps": 20, "stepSeconds": 0.4, "fail": "crash", "failAt": 3},
        spec={"retries": {"limit": 1}},
        events={"RunCreated", "AttemptStarted", "Training", "AttemptUnknown", "Failed"},
    ),
    "suspended before it begins, and while it trains": Life(
        phase="Succeeded",
        reasons=["Suspended", "Completed"],
        actions=EVERYTHING,
        args={"steps": 20, "stepSeconds": 0.8},
        spec={"suspend": True},
        happens=is_suspended_before_and_while_it_trains,
        events={"RunCreated", "AttemptSuspended", "Suspended", "Resumed", "Completed"},
    ),
    "deleted while it trains": Life(
        phase="",
        reasons=[],
        actions=EVERYTHING - {"KeepLogs", "RegisterModel"},
        args={"steps": 600, "stepSeconds": 0.2},
        happens=is_deleted_while_it_trains,
    ),
    "promoted": Life(
        phase="Succeeded",
        reasons=["Completed"],
        actions=EVERYTHING - {"DeleteJob"},
        args={"steps": 10, "stepSeconds": 0.4},
        spec={
            "registration": {
                "model": "walked",
                "aliases": ["candidate"],
                "promotion": {"alias": "champion", "metric": "val/loss", "mode": "min"},
            }
        },
        events={"RunCreated", "ModelRegistered", "Completed"},
    ),
    "two workers, lost once": Life(
        phase="Succeeded",
        reasons=["Unknown", "Completed"],
        actions=EVERYTHING - {"DeleteJob"},
        args={"steps": 20, "stepSeconds": 0.4, "fail": "crash", "failAt": 3, "failAttempt": 1},
        spec={"resources": {"workers": 2, "gpusPerWorker": 0, "cpu": "20m", "memory": "256Mi", "sharedMemory": "16Mi"}},
        events={"RunCreated", "AttemptStarted", "Training", "AttemptUnknown", "AttemptCompleted", "Completed"},
    ),
    "its Job expires": Life(
        phase="Succeeded",
        reasons=["Completed"],
        actions=EVERYTHING,
        args={"steps": 5, "stepSeconds": 0.4},
        spec={"ttlSecondsAfterFinished": 5},
        events={"RunCreated", "ModelRegistered", "Completed"},
    ),
}


@pytest.fixture
def walk(release: Cluster, mlflow: Mlflow, name: str) -> Walk:
    return Walk(release, mlflow, name)


@pytest.mark.parametrize("life", list(LIVES)[:LIVES_WALKED])
def test_an_operator_that_dies_after_everything_that_it_does(
    walk: Walk, dying: DyingOperator, report: Report, life: str
) -> None:
    """The operator is killed between every two of its actions and writes of a life."""
    release, mlflow, name, walked = walk.release, walk.mlflow, walk.name, LIVES[life]
    dying.arm(name, TIMES)
    with report.expecting(f"an operator that dies after everything comes through a life: {life}"):
        release.apply(contract_run(name, spec=walked.spec, **walked.args))
        uid = release.training_run(name)["metadata"]["uid"]
        walked.happens(walk)
        item = ended(release, name) if walked.phase else None
        wait_for(
            lambda: walked.actions <= {death.split("(")[0] for death in dying.deaths()},
            what="a death after every action",
            timeout_s=60,
            tell=lambda: str(dying.deaths()),
        )
        deaths = report.deaths[life] = dying.deaths()
        print(f"{life}: {len(deaths)} deaths: {'; '.join(deaths)}")
        report.runs += 1
    found = list(violations_of(uid, item, mlflow, release.list("jobs", RUN_LABEL)))
    report.violations += [f"{life}: {wrong}" for wrong in found]

    assert found == []
    if item is not None:
        status = item["status"]
        assert (status["phase"], [each["reason"] for each in status["attempts"]]) == (walked.phase, walked.reasons)
    wait_for(
        lambda: walked.events <= told(release, uid),
        what=f"the Events of {name}",
        timeout_s=60,
        tell=lambda: f"missing: {walked.events - told(release, uid)}",
    )


def ended(release: Cluster, name: str) -> dict[str, Any]:
    """The TrainingRun when it has ended, and nothing holds it any more."""
    return wait_for(
        lambda: is_final(item := release.training_run(name)) and item,
        what=f"the end of {name}",
        timeout_s=LIFE_S,
        tell=lambda: release.explain(name),
    )


def told(release: Cluster, uid: str) -> set[str]:
    """Reasons of the Events about a TrainingRun."""
    return {item["reason"] for item in release.list("events.events.k8s.io") if item["regarding"].get("uid") == uid}


def test_an_operator_killed_while_the_pod_works(release: Cluster, mlflow: Mlflow, name: str) -> None:
    release.apply(contract_run(name, steps=20, stepSeconds=0.9))
    release.wait_for_phase(name, "Running", timeout_s=LIFE_S)

    kill_operator(release)

    release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)
    check_whole(release, mlflow, name)
