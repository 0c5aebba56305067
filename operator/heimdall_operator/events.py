"""Events: one for each transition, read off what a status tells."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from heimdall_api.contract import Reason
from heimdall_api.types import Attempt, Condition, TrainingRunStatus

_EXPECTED: Final = frozenset({Reason.COMPLETED, Reason.SUSPENDED, Reason.PREEMPTED, Reason.FENCED})
_COME_AND_GO: Final = frozenset({"Suspended", "Admitted"})
"""Conditions of which it is news as well that they do not hold."""


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event to be."""

    kind: Literal["Normal", "Warning"]
    reason: str
    message: str
    key: str
    """Tells this transition from every other of the run: the same transition makes the same Event."""
    time: datetime | None = None
    """When it happened; None where the status does not tell."""


def events_of(status: TrainingRunStatus) -> list[Event]:
    """Every transition that a status still tells of, in the order in which things happened.

    Args:
        status: The status.
    """
    events: list[Event] = []
    if status.run_id is not None:
        message = f"MLflow run {status.run_id} belongs to this TrainingRun: {status.run_url or 'see status.runID'}"
        events.append(Event("Normal", "RunCreated", message, "run", status.start_time))
    for attempt in status.attempts:
        events.extend(_attempt_events(attempt))
    # The end of everything comes last.
    for condition in sorted(status.conditions, key=lambda item: item.type in ("Complete", "Failed")):
        events.extend(_condition_events(condition))
    return events


def events_between(old: TrainingRunStatus, new: TrainingRunStatus) -> list[Event]:
    """The transitions from one status to the next.

    Args:
        old: The status before.
        new: The status after.

    Returns:
        Events, in the order in which things happened.
    """
    told = {event.key for event in events_of(old)}
    return [event for event in events_of(new) if event.key not in told]


def _attempt_events(attempt: Attempt) -> list[Event]:
    number = attempt.number
    events = [
        Event(
            "Normal",
            "AttemptStarted",
            f"Attempt {number} is Job {attempt.job}",
            f"attempt-{number}",
            attempt.start_time,
        )
    ]
    since = attempt.running_time
    # Anew where a queue took its place back and gave it again.
    if since is not None:
        message = f"Attempt {number} is training in pod {attempt.pod} on node {attempt.node}"
        events.append(Event("Normal", "Training", message, f"training-{number}-{since.timestamp():.0f}", since))
    if attempt.reason is not None:
        kind: Literal["Normal", "Warning"] = "Normal" if attempt.reason in _EXPECTED else "Warning"
        message = f"Attempt {number} ended: {attempt.message}"
        events.append(Event(kind, f"Attempt{attempt.reason}", message, f"ended-{number}", attempt.end_time))
    return events


def _condition_events(condition: Condition) -> list[Event]:
    time = condition.last_transition_time
    since = f"{condition.type}-{time.timestamp():.0f}"
    if condition.status == "False":
        told = condition.type in _COME_AND_GO
        return [Event("Normal", condition.reason, condition.message, f"not-{since}", time)] if told else []
    kind: Literal["Normal", "Warning"] = "Warning" if condition.type == "Failed" else "Normal"
    reason = condition.type if condition.type != "Complete" else "Completed"
    return [Event(kind, reason, condition.message, since, time)]
