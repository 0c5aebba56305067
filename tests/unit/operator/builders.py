"""Builders of observations: small, real values, of which a test changes what it is about."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from heimdall_api.types import Attempt, TrainingRunSpec, TrainingRunStatus
from heimdall_operator.observe import JobFacts, Observed, PodFacts, Podless
from heimdall_tracking.registry import Registration
from heimdall_tracking.runs import RunFacts

NOW = datetime(2026, 11, 1, 12, 0, 0, tzinfo=UTC)
UID = "5a1c8b6e-0000-4000-8000-000000000001"


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def spec(**more: Any) -> TrainingRunSpec:
    return TrainingRunSpec.model_validate(more)


def attempt(number: int = 1, **more: Any) -> Attempt:
    return Attempt(**{"number": number, "job": f"run-a{number}", "start_time": ago(60), **more})


def status(*attempts: Attempt, **more: Any) -> TrainingRunStatus:
    """The status of a run that was begun, with the given attempts (one, just asked for, by default)."""
    listed = list(attempts or (attempt(),))
    return TrainingRunStatus(
        **{
            "run_id": "r1",
            "run_url": "http://mlflow/#/experiments/1/runs/r1",
            "phase": "Pending",
            "start_time": ago(60),
            "attempt": listed[-1].number,
            "job_name": listed[-1].job,
            "attempts": listed,
            **more,
        }
    )


def job(number: int = 1, **more: Any) -> JobFacts:
    return JobFacts(**{"name": f"run-a{number}", "attempt": number, "created": ago(60), **more})


def pod(number: int = 1, **more: Any) -> PodFacts:
    return PodFacts(
        **{
            "name": f"run-a{number}-x",
            "attempt": number,
            "phase": "Running",
            "created": ago(60),
            "node": "node1",
            "running_since": ago(50),
            **more,
        }
    )


def ended_pod(exit_code: int, number: int = 1, **more: Any) -> PodFacts:
    phase = "Succeeded" if exit_code == 0 else "Failed"
    return pod(number, **{"phase": phase, "exit_code": exit_code, "finished": ago(5), **more})


def run(**more: Any) -> RunFacts:
    return RunFacts(**{"run_id": "r1", "experiment_id": "1", "status": "RUNNING", "attempt": 1, **more})


def registration() -> Registration:
    return Registration(name="localizer", version="7", message="Registered as version 7 of localizer.")


def observed(**more: Any) -> Observed:
    """A run that is under way: everything there but a Job."""
    return Observed(
        **{
            "name": "run",
            "namespace": "team",
            "uid": UID,
            "generation": 1,
            "created": ago(61),
            "has_finalizer": True,
            "spec": spec(),
            "status": status(),
            "logs": dict.fromkeys(range(1, 20), ""),
            "podless": Podless("", "", NOW),
            **more,
        }
    )
