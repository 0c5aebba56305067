"""What can be done about a TrainingRun. Each can be done again after a crash, and then finds what it did."""

from __future__ import annotations

from dataclasses import dataclass

from heimdall_tracking.runs import FinalStatus


@dataclass(frozen=True)
class AddFinalizer:
    """Keep the resource until its MLflow run was ended."""


@dataclass(frozen=True)
class RemoveFinalizer:
    """Let the resource go."""


@dataclass(frozen=True)
class EnsureRun:
    """Find the MLflow run by the resource's UID, or create it."""


@dataclass(frozen=True)
class OpenAttempt:
    """Make an attempt the MLflow run's newest, which fences every older one."""

    number: int


@dataclass(frozen=True)
class CreateJob:
    """Create the attempt's Job."""

    number: int


@dataclass(frozen=True)
class AskJob:
    """Ask why a Job creates no pod: its events tell."""

    name: str


@dataclass(frozen=True)
class KeepLogs:
    """Keep an attempt's log and events with the MLflow run, or begin to: nothing waits for more than a moment."""

    number: int
    pods_go: bool = False
    """Whether its pods are ended next: their logs have to be read before."""


@dataclass(frozen=True)
class DeleteJob:
    """Delete the attempt's Job; its pods get their grace period to make a checkpoint."""

    name: str


@dataclass(frozen=True)
class RegisterModel:
    """Register the run's model, or find the version that was registered."""


@dataclass(frozen=True)
class ParkRun:
    """Have the MLflow run of a suspended TrainingRun say that nothing trains."""


@dataclass(frozen=True)
class EndRun:
    """End the MLflow run."""

    status: FinalStatus
    insist: bool = True
    """Whether it is tried again while MLflow is away: not where a deletion has waited for long enough."""
    fence: bool = False
    """Whether the newest attempt must be kept from publishing: nobody has seen its trainer end."""


Action = (
    AddFinalizer
    | RemoveFinalizer
    | EnsureRun
    | OpenAttempt
    | CreateJob
    | AskJob
    | KeepLogs
    | DeleteJob
    | RegisterModel
    | ParkRun
    | EndRun
)
