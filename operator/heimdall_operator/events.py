"""Events: one for each transition, read off the difference between two statuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from heimdall_api.contract import Reason
from heimdall_api.types import Attempt, Condition, TrainingRunStatus


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event to be."""

    kind: Literal["Normal", "Warning"]
    reason: str
    message: str
    key: str
    """Tells this transition from every other of the run: the same transition makes the same Event."""


def events_between(old: TrainingRunStatus, new: TrainingRunStatus) -> list[Event]:
    """The transitions from one status to the next.

    Args:
        old: The status before.
        new: The status after.

    Returns:
        Events, in the order in which things happened.
    """
    events: list[Event] = []
    if new.run_id is not None and old.run_id is None:
        message = f"MLflow run {new.run_id} belongs to this TrainingRun: {new.run_url or 'see status.runID'}"
        events.append(Event("Normal", "RunCreated", message, "run"))
    before = {attempt.number: attempt for attempt in old.attempts}
    for attempt in new.attempts:
        events.extend(_attempt_events(before.get(attempt.number), attempt))
    known = {condition.type: condition for condition in old.conditions}
    # The end of everything comes last.
    for condition in sorted(new.conditions, key=lambda item: item.type in ("Complete", "Failed")):
        events.extend(_condition_events(known.get(condition.type), condition))
    return events


def _attempt_events(old: Attempt | None, new: Attempt) -> list[Event]:
    events: list[Event] = []
    number = new.number
    if old is None:
        events.append(Event("Normal", "AttemptStarted", f"Attempt {number} is Job {new.job}", f"attempt-{number}"))
    # Anew where a queue took its place back and gave it again.
    if new.running_time is not None and (old is None or old.running_time != new.running_time):
        message = f"Attempt {number} is training in pod {new.pod} on node {new.node}"
        events.append(Event("Normal", "Training", message, f"training-{number}-{new.running_time.timestamp():.0f}"))
    if new.reason is not None and (old is None or old.reason is None):
        kind: Literal["Normal", "Warning"] = "Normal" if new.reason in _EXPECTED else "Warning"
        message = f"Attempt {number} ended: {new.message}"
        events.append(Event(kind, f"Attempt{new.reason}", message, f"ended-{number}"))
    return events


_EXPECTED = frozenset({Reason.COMPLETED, Reason.SUSPENDED, Reason.PREEMPTED, Reason.FENCED})


def _condition_events(old: Condition | None, new: Condition) -> list[Event]:
    if (old.status if old is not None else "False") == new.status:
        return []
    since = f"{new.type}-{new.last_transition_time.timestamp():.0f}"
    if new.status == "False":
        return [Event("Normal", new.reason, new.message, f"not-{since}")]
    kind: Literal["Normal", "Warning"] = "Warning" if new.type == "Failed" else "Normal"
    reason = new.type if new.type != "Complete" else "Completed"
    return [Event(kind, reason, new.message, since)]
