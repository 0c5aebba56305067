"""The contract between the operator and a trainer pod: every name that both sides must agree on.

Any image that reads what is given here and leaves behind what is asked for can be the trainer of a
TrainingRun. docs/contract.md tells it in prose; this module is its only home in code.
"""

from __future__ import annotations

import enum
import json
from datetime import UTC, datetime
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from heimdall_api.base import Model

GROUP: Final = "training.heimdall.dev"
VERSION: Final = "v1alpha1"
KIND: Final = "TrainingRun"
PLURAL: Final = "trainingruns"
API_VERSION: Final = f"{GROUP}/{VERSION}"

# What a pod is given: environment variables.
ENV_RUN_FILE: Final = "HEIMDALL_RUN_FILE"
"""Path of the TrainingRun as JSON (apiVersion, kind, metadata.name/namespace/uid, spec)."""
ENV_ATTEMPT: Final = "HEIMDALL_ATTEMPT"
"""This attempt's number, from 1."""
ENV_GRACE_PERIOD: Final = "HEIMDALL_GRACE_PERIOD_S"
"""Seconds between SIGTERM and SIGKILL."""
ENV_TERMINATION_MESSAGE: Final = "HEIMDALL_TERMINATION_MESSAGE"
"""Path that a termination message is written to."""
ENV_TRACKING_URI: Final = "MLFLOW_TRACKING_URI"
ENV_MLFLOW_RUN_ID: Final = "MLFLOW_RUN_ID"

RUN_FILE: Final = "/etc/heimdall/trainingrun.json"
TERMINATION_MESSAGE_FILE: Final = "/dev/termination-log"
SCRATCH_DIR: Final = "/scratch"
"""A writable folder (emptyDir); everything else is read-only. Gone with the pod."""

# Labels and annotations on what the operator creates.
LABEL_RUN: Final = f"{GROUP}/run"
LABEL_UID: Final = f"{GROUP}/uid"
"""UID of the TrainingRun: a new one of the same name has other pods."""
LABEL_ATTEMPT: Final = f"{GROUP}/attempt"
LABEL_QUEUE: Final = "kueue.x-k8s.io/queue-name"
"""Kueue's: on a TrainingRun, its Jobs wait until this queue admits them."""
LABEL_EXECUTION_LIMIT: Final = "kueue.x-k8s.io/max-exec-time-seconds"
"""Kueue's: how long an attempt may run before its queue takes the place back for good."""
QUEUE_LABELS: Final = (
    LABEL_QUEUE,
    "kueue.x-k8s.io/priority-class",
    LABEL_EXECUTION_LIMIT,
)
"""Labels that are copied from a TrainingRun to its Jobs."""
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGED_BY: Final = "heimdall-operator"
ANNOTATION_RUN_FILE: Final = f"{GROUP}/run-file"
"""The pod annotation that the downward API mounts as RUN_FILE."""
FINALIZER: Final = f"{GROUP}/mlflow-run"

# Tags of an MLflow run.
TAG_UID: Final = "heimdall.uid"
"""UID of the TrainingRun: the key by which its MLflow run is found again."""
TAG_NAME: Final = "heimdall.trainingrun"
TAG_NAMESPACE: Final = "heimdall.namespace"
TAG_ATTEMPT: Final = "heimdall.attempt"
"""Number of the newest attempt, written by the operator: the fence against an attempt that comes back."""
TAG_PROGRESS: Final = "heimdall.progress"
"""JSON of Progress, written by the trainer every few seconds and at every epoch's end."""
TAG_ACTIVITY: Final = "heimdall.activity"
"""The attempt's number, a slash, and what changes: written by the trainer every few seconds while it does something
that is no training step (reads its data, validates, tests, waits for MLflow). Who writes it leaves no longer silence,
so silence is a hang."""
TAG_CHECKPOINTS: Final = "heimdall.checkpoints"
"""JSON list of Checkpoint, newest last, written by the trainer after a checkpoint's upload is whole."""
TAG_BEST: Final = "heimdall.best"
"""JSON of BestMetric, written by the trainer whenever the monitored metric improves."""

MODEL_NAME: Final = "model"
"""Name of the logged model (MLflow 3 LoggedModel) that the operator registers."""
ATTEMPTS_DIR: Final = "attempts"
"""Artifact folder of the run that keeps each attempt's log and events."""
CHECKPOINT_DIR: Final = "checkpoints"
"""Artifact folder of the run that holds checkpoints."""
ONNX_FILE: Final = "onnx/model.onnx"
"""Where the model as ONNX lies, if spec.export.onnx asks for it: in the run's artifacts and in the logged model."""
PLOTS_DIR: Final = "plots"
"""Artifact folder of the run that holds the localizer's plots."""

MESSAGE_LIMIT: Final = 1024
"""Longest message, in characters, that a termination message or a status carries."""


class ExitCode(enum.IntEnum):
    """Exit codes of a trainer with a meaning of their own."""

    SUCCESS = 0
    """Training finished and everything was delivered to the run."""
    ERROR = 1
    """An exception in training or in the user's code."""
    CONFIGURATION = 78
    """The spec can't work (EX_CONFIG of sysexits.h). Not tried again."""
    FENCED = 79
    """A newer attempt exists: nothing was published."""
    CUDA_OUT_OF_MEMORY = 80
    """The device's memory does not suffice. Not tried again."""
    UNDELIVERED = 81
    """Training finished, but something could not be delivered to MLflow in bounded time."""
    SIGTERM = 143
    """Ended on SIGTERM, after a checkpoint was delivered."""


class Reason(enum.StrEnum):
    """Why an attempt or a run ended: a fixed list, the machine-readable half of every failure."""

    COMPLETED = "Completed"
    USER_ERROR = "UserError"
    INVALID_CONFIGURATION = "InvalidConfiguration"
    HOST_OUT_OF_MEMORY = "HostOutOfMemory"
    CUDA_OUT_OF_MEMORY = "CudaOutOfMemory"
    STORAGE_EXCEEDED = "StorageExceeded"
    """The pod wrote more to its node's disk than its own limits allow, or more than a disk has room for."""
    PREEMPTED = "Preempted"
    NODE_LOST = "NodeLost"
    KILLED = "Killed"
    """Ended by a signal that nobody owned up to."""
    IMAGE_PULL = "ImagePull"
    UNSCHEDULABLE = "Unschedulable"
    POD_NOT_STARTED = "PodNotStarted"
    """Neither scheduling nor the image explains why the pod never ran (a missing Secret, a quota …)."""
    WORKER_LOST = "WorkerLost"
    """Another worker of the group ended: the connection to it broke."""
    STALLED = "Stalled"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    TRACKING_UNAVAILABLE = "TrackingUnavailable"
    SUSPENDED = "Suspended"
    FENCED = "Fenced"
    UNKNOWN = "Unknown"


class TerminationMessage(Model):
    """What a trainer writes to its termination message path when it does not succeed."""

    reason: Reason
    message: str = Field(max_length=MESSAGE_LIMIT)

    def to_json(self) -> str:
        """The message as a single line of JSON."""
        return self.model_dump_json()


def _in_utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time


Moment = Annotated[datetime, AfterValidator(_in_utc)]
"""A time with its zone; one that names none is taken for UTC."""


Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""A number of something, as the API server can hold it: a status that it refuses would never be written."""


class Progress(Model):
    """How far training is."""

    epoch: Count = Field(description="Epochs finished.")
    epochs: Count = Field(description="Epochs asked for.")
    step: Count = Field(description="Optimizer steps done.")
    steps: Count | None = Field(default=None, description="Optimizer steps expected in all, if known.")
    first_step: Count = Field(default=0, description="Step that this attempt went on from.")
    first_step_time: Moment | None = Field(default=None, description="When this attempt's first step ended.")
    time: Moment | None = Field(default=None, description="When the last step ended.")


class Checkpoint(Model):
    """A checkpoint whose upload is whole."""

    step: Count = Field(description="Optimizer step it was made at.")
    epoch: Count = Field(default=0, description="Epoch it was made in, counted from 0.")
    path: str = Field(description="Artifact path within the run.")
    sha256: str = Field(description="Checksum of its bytes, hexadecimal.")
    size: Count = Field(description="Length in bytes.")
    time: Moment = Field(description="When its upload was whole.")
    metric: float | None = Field(default=None, description="The monitored metric's value, if there is one.")
    last: bool = Field(default=False, description="Whether it is the one a next attempt goes on from.")


class BestMetric(Model):
    """The best value of the monitored metric so far."""

    name: str
    value: float
    step: Count


def parse_checkpoints(tag: str | None) -> list[Checkpoint]:
    """Read TAG_CHECKPOINTS.

    Args:
        tag: The tag's value, or None where the run has none.

    Returns:
        The checkpoints, newest last; empty where there are none or the tag can't be read.
    """
    if not tag:
        return []
    try:
        return [Checkpoint.model_validate(item) for item in json.loads(tag)]
    except (ValueError, TypeError, RecursionError):
        return []


def format_checkpoints(checkpoints: list[Checkpoint]) -> str:
    """The value of TAG_CHECKPOINTS for a list of checkpoints."""
    return json.dumps([item.model_dump(mode="json", exclude_none=True) for item in checkpoints])
