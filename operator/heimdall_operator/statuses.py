"""The parts of a status: conditions by Kubernetes' conventions, and what MLflow says of progress. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal

from heimdall_api.types import (
    BestMetricStatus,
    CheckpointStatus,
    Condition,
    ProgressStatus,
    TrainingRunStatus,
)
from heimdall_operator.failures import shorten
from heimdall_operator.observe import Observed
from heimdall_tracking.runs import RunFacts

ConditionValue = tuple[bool, str, str] | None
"""Status, reason, message; None takes an existing condition back (status False)."""


def waiting(
    status: TrainingRunStatus, observed: Observed, reason: str, message: str, now: datetime
) -> TrainingRunStatus:
    """Pending: nothing trains, and the condition says what is waited for."""
    status = status.model_copy(update={"phase": "Pending"})
    return with_conditions(status, observed, now, Complete=(False, reason, shorten(message)), Suspended=None)


def with_conditions(
    status: TrainingRunStatus, observed: Observed, now: datetime, **values: ConditionValue
) -> TrainingRunStatus:
    """The status with conditions set.

    Args:
        status: The status before.
        observed: The run, for its generation.
        now: The time of a transition.
        values: Condition by type.
    """
    conditions = {condition.type: condition for condition in status.conditions}
    for kind, value in values.items():
        old = conditions.get(kind)
        if value is None and (old is None or old.status == "False"):
            continue
        wanted = value or (False, "Resumed", "Training goes on.")
        conditions[kind] = _condition(kind, wanted, old, observed.generation, now)
    # What is not said anew still holds: kubectl waits for a condition until it speaks of the newest generation.
    seen = {"observed_generation": observed.generation}
    current = [condition.model_copy(update=seen) for condition in conditions.values()]
    return status.model_copy(update={"conditions": current, **seen})


def _condition(
    kind: str, value: tuple[bool, str, str], old: Condition | None, generation: int, now: datetime
) -> Condition:
    truth, reason, message = value
    state: Literal["True", "False"] = "True" if truth else "False"
    return Condition(
        type=kind,
        status=state,
        reason=reason,
        message=message,
        last_transition_time=old.last_transition_time if old is not None and old.status == state else now,
        observed_generation=generation,
    )


def with_facts(status: TrainingRunStatus, run: RunFacts | None) -> TrainingRunStatus:
    """What MLflow says of progress, best metric and checkpoint, where it was asked."""
    if run is None:
        return status
    update: dict[str, object] = {}
    if run.progress is not None:
        update["progress"] = ProgressStatus(
            epoch=run.progress.epoch,
            epochs=run.progress.epochs,
            step=run.progress.step,
            percent=_percent(run),
            time=run.progress.time,
            estimated_completion_time=_estimate(status, run),
        )
    if run.best is not None:
        update["best_metric"] = BestMetricStatus(name=run.best.name, value=f"{run.best.value:.6g}")
    if run.last_checkpoint is not None:
        checkpoint = run.last_checkpoint
        update["last_checkpoint"] = CheckpointStatus(
            step=checkpoint.step, uri=f"runs:/{run.run_id}/{checkpoint.path}", time=checkpoint.time
        )
    return status.model_copy(update=update)


def _estimate(status: TrainingRunStatus, run: RunFacts) -> datetime | None:
    """When training ends at the pace of the attempt under way; None where the pace is not known."""
    progress = run.progress
    newest = status.attempts[-1] if status.attempts else None
    since = newest.running_time if newest is not None and newest.reason is None else None
    if progress is None or progress.time is None or progress.steps is None or since is None:
        return None
    done, left = progress.step - progress.first_step, progress.steps - progress.step
    if done <= 0 or left <= 0 or progress.time <= since:
        return None
    try:
        estimate = progress.time + (progress.time - since) * (left / done)
    except OverflowError:
        return None  # further away than a calendar goes
    return estimate.replace(microsecond=0)


def _percent(run: RunFacts) -> int:
    progress = run.progress
    if progress is None:
        return 0
    if run.status == "FINISHED":
        return 100
    share = progress.step / progress.steps if progress.steps else progress.epoch / max(progress.epochs, 1)
    return max(0, min(99, int(100 * share)))


def age_s(since: datetime | None, now: datetime) -> float:
    """Seconds since a time; 0 where it is not known."""
    return (now - since) / timedelta(seconds=1) if since is not None else 0.0
