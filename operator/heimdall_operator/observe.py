"""Observe: one TrainingRun, its Job, its pods and its MLflow run become one frozen value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from pydantic import ValidationError

from heimdall_api.base import explain
from heimdall_api.contract import FINALIZER, LABEL_ATTEMPT, LABEL_EXECUTION_LIMIT, LABEL_QUEUE, LABEL_UID, QUEUE_LABELS
from heimdall_api.types import TrainingRunSpec, TrainingRunStatus
from heimdall_operator.store import Manifest, owner_uid
from heimdall_tracking.registry import Registration
from heimdall_tracking.runs import RunFacts

LOST_POD_S: Final = 300.0
NESTING_LIMIT: Final = 200
"""Levels of a spec: pydantic writes no JSON of more than 255, and what follows them one by one has its end too."""
_LOST_TRACK: Final = frozenset({"Unknown", "ContainerStatusUnknown"})
"""Reasons of a terminated container that the kubelet gives when it does not know."""
_NOT_STARTED: Final = frozenset({"StartError", "ContainerCannotRun"})
"""Reasons of a terminated container that never ran; its start is given as 1970."""
_OWN_STORAGE: Final = re.compile(
    r"Pod ephemeral local storage usage exceeds|exceeded its local ephemeral storage limit|Usage of EmptyDir volume"
)
"""How the kubelet begins to tell that a pod is over a limit of its own: pkg/kubelet/eviction/eviction_manager.go."""
CONTAINER: Final = "trainer"
"""Name of the container that trains."""
COMPLETION_INDEX: Final = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True, kw_only=True)
class PodFacts:
    """What a pod says of its attempt."""

    name: str
    attempt: int
    job_uid: str = ""
    """UID of its Job; empty where it does not tell."""
    phase: str
    created: datetime
    deleting: datetime | None = None
    """When its grace period after a deletion ends; None while nobody deleted it."""
    node: str | None = None
    scheduled: datetime | None = None
    """When it was given its node; None where it does not tell."""
    running_since: datetime | None = None
    """When its container started; None while it has not."""
    waiting_reason: str | None = None
    """Why its container does not start: ImagePullBackOff, CreateContainerConfigError …"""
    waiting_message: str = ""
    waiting_image: str = "spec.image"
    """Which field names the image that it waits for."""
    init_error: str = ""
    """Which init container failed, and how: its container never ran."""
    init_failed: str = ""
    """Name of that init container."""
    unschedulable: str | None = None
    """The scheduler's words where no node fits."""
    exit_code: int | None = None
    """Exit code of its container; None while it has not ended."""
    killed_for_memory: bool = False
    exceeded_storage: str = ""
    """The kubelet's words where it evicted the pod for what the pod itself wrote, and not for its node's sake."""
    lost_track: bool = False
    """Whether its node came back and does not know what became of the container."""
    start_error: str = ""
    """Why the container could not even be started: its command is not in the image, say."""
    last_words: str = ""
    """Termination message, or the last lines of the log."""
    finished: datetime | None = None
    worker: int = 0
    """Its place in a group of workers."""
    refusal: str = ""
    """Why its node did not take it."""
    disruption: str | None = None
    """Why Kubernetes ended it (reason of DisruptionTarget, or the pod's own): preemption, eviction, lost node."""

    @property
    def alive(self) -> bool:
        """Whether it may still be training."""
        return self.phase not in {"Succeeded", "Failed"} and self.exit_code is None


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What a Job says of its attempt."""

    name: str
    attempt: int
    created: datetime
    uid: str = ""
    deleting: bool = False
    finished: datetime | None = None
    """When it ended; None while it has not."""
    succeeded: bool = False
    started: datetime | None = None
    """When it was last let go: a queue may have held it before."""
    suspended: bool = False
    """Whether it must not have pods now: a queue decides."""
    queue: str = ""
    """The queue (Kueue) that suspends and resumes it; it may be one that Kueue gives to Jobs without any."""
    execution_limit: str = ""
    """After how many seconds its queue takes its place back for good; empty where that is never."""


@dataclass(frozen=True)
class Trouble:
    """Why an attempt's Job could not be created."""

    uid: str
    """Of the TrainingRun: another one of the same name has troubles of its own."""
    attempt: int
    message: str
    since: datetime | None
    """When its creation was refused for the first time, later by all time since in which nobody could decide about it;
    None while it was not."""
    tried: datetime | None
    """When it was tried last; None while it was not refused."""

    def is_of(self, uid: str, attempt: int) -> bool:
        """Whether it is an attempt's."""
        return (self.uid, self.attempt) == (uid, attempt)


@dataclass(frozen=True)
class Podless:
    """What a Job that creates no pod has said of it."""

    job_uid: str
    message: str
    """The Job controller's words; empty where there are none."""
    asked: datetime


@dataclass(frozen=True, kw_only=True)
class Observed:
    """All that is known of one TrainingRun at one moment."""

    name: str
    namespace: str
    uid: str
    generation: int
    version: str = ""
    """The resourceVersion that this speaks of: every write is conditional on it."""
    created: datetime
    deleted: datetime | None = None
    """When its deletion was asked for."""
    has_finalizer: bool
    lost_pod_s: float = LOST_POD_S
    """How long a pod may take to end after its grace period, before it counts as lost with its node."""
    queue_labels: tuple[tuple[str, str], ...] = ()
    """Kueue's labels of the TrainingRun, which its Jobs get too."""
    spec: TrainingRunSpec | None
    """None where it can't be read; then spec_error says why."""
    spec_error: str = ""
    status: TrainingRunStatus
    is_unwritten: bool = False
    """Whether the API server has refused this status: it is in the operator's memory alone."""
    attempt_seen: int = 0
    """Number of the newest attempt when this was observed: of a later one nobody else can have made the Job yet."""
    jobs: tuple[JobFacts, ...] = ()
    """Jobs of every attempt that still exist."""
    pods: tuple[PodFacts, ...] = ()
    """Pods of every attempt that still exist."""
    is_fresh: bool = False
    """Whether this look itself added the finalizer: before that nobody can have created an MLflow run."""
    moved: datetime | None = None
    """When its step was last seen to change, or since when it is followed, by the operator's own clock; time in which
    nobody could hear of it left out. None while that is so."""
    trouble: Trouble | None = None
    """What kept a Job from being created at the last try; it may have been another attempt's."""
    podless: Podless | None = None
    """What a Job without pods has said when it was asked last; it may have been another attempt's."""
    run: RunFacts | None = None
    """What MLflow says; None while nobody asked."""
    registration: Registration | None = None
    """The version that was registered; None while nobody asked."""
    logs: Mapping[int, str | None] = field(default_factory=dict)
    """Where attempts' logs and events were kept, by number: empty where they never can be, None while that goes on or
    is to be tried again later. Those that are to be kept now are not in it."""
    unread: frozenset[int] = frozenset()
    """Attempts of which that counts on their pods: whoever ends these has their logs read before."""
    refusal: str = ""
    """Why the attempt's Job or the model's registration can never work, where it was refused for good."""

    @property
    def job_trouble(self) -> Trouble | None:
        """What keeps the newest attempt's Job from being created."""
        trouble = self.trouble
        return trouble if trouble is not None and trouble.is_of(self.uid, self.status.attempt) else None

    @property
    def job(self) -> JobFacts | None:
        """Job of the newest attempt."""
        return next((job for job in self.jobs if job.attempt == self.status.attempt), None)

    @property
    def job_podless(self) -> Podless | None:
        """What the newest attempt's Job has said of its having no pod; None where it was not asked."""
        podless, job = self.podless, self.job
        return podless if podless is not None and job is not None and podless.job_uid == job.uid else None

    @property
    def attempt_pods(self) -> tuple[PodFacts, ...]:
        """The newest pod of each worker of the newest attempt, in the workers' order."""
        return self.pods_of(self.status.attempt)

    def pods_of(self, number: int) -> tuple[PodFacts, ...]:
        """The newest pod of each worker of an attempt, in the workers' order; none of a Job of before of its name."""
        uids = {"", *(job.uid for job in self.jobs if job.attempt == number)}
        pods = [pod for pod in self.pods if pod.attempt == number and (uids <= {""} or pod.job_uid in uids)]
        newest = {pod.worker: pod for pod in sorted(pods, key=lambda pod: (pod.created, pod.alive))}
        return tuple(newest[worker] for worker in sorted(newest))

    @property
    def lead(self) -> PodFacts | None:
        """The pod that speaks for the attempt: the first worker's."""
        return next(iter(self.attempt_pods), None)

    @property
    def is_running(self) -> bool:
        """Whether every worker of the newest attempt has started, and is there or was done before the others."""
        workers = self.spec.resources.workers if self.spec is not None else 1
        started = [pod for pod in self.attempt_pods if pod.alive and pod.running_since is not None]
        return bool(started) and len(started) + sum(pod.exit_code == 0 for pod in self.attempt_pods) >= workers


def observe(
    resource: Manifest,
    jobs: Iterable[Manifest] = (),
    pods: Iterable[Manifest] = (),
    run: RunFacts | None = None,
    *,
    lost_pod_s: float = LOST_POD_S,
    moved: datetime | None = None,
    trouble: Trouble | None = None,
    podless: Podless | None = None,
) -> Observed:
    """Read what is known of one TrainingRun.

    Args:
        resource: The TrainingRun.
        jobs: Its Jobs: those of other owners are left out.
        pods: Its pods: those of an older TrainingRun of the same name are left out.
        run: What MLflow says of it, if somebody asked.
        lost_pod_s: See Observed.
        moved: See Observed.
        trouble: See Observed.
        podless: See Observed.

    Returns:
        The observation.
    """
    metadata = resource["metadata"]
    spec, error = _spec(resource.get("spec") or {})
    status = read_status(resource)
    return Observed(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 1),
        version=metadata.get("resourceVersion", ""),
        created=_time(metadata["creationTimestamp"]),
        deleted=_time_or_none(metadata.get("deletionTimestamp")),
        lost_pod_s=lost_pod_s,
        moved=moved,
        trouble=trouble,
        podless=podless,
        has_finalizer=FINALIZER in metadata.get("finalizers", ()),
        queue_labels=tuple(
            (name, value) for name, value in (metadata.get("labels") or {}).items() if name in QUEUE_LABELS
        ),
        spec=spec,
        spec_error=error,
        status=status,
        attempt_seen=status.attempt,
        jobs=tuple(job_facts(job) for job in jobs if owner_uid(job) == metadata["uid"] and not _is_orphaning(job)),
        pods=tuple(pod_facts(pod) for pod in pods if _label(pod, LABEL_UID) == metadata["uid"]),
        run=run if run is not None and run.run_id == status.run_id else None,
    )


def read_status(resource: Manifest) -> TrainingRunStatus:
    """The status that a TrainingRun holds."""
    return TrainingRunStatus.model_validate(resource.get("status") or {}, extra="ignore")


def _is_orphaning(job: Manifest) -> bool:
    """Whether a Job is being deleted without its pods: to them it is gone already, and no reason to end."""
    return "deletionTimestamp" in job["metadata"] and "orphan" in job["metadata"].get("finalizers", ())


def job_facts(job: Manifest) -> JobFacts:
    """What a Job says of its attempt."""
    metadata, status = job["metadata"], job.get("status") or {}
    ended = [item for item in status.get("conditions", ()) if _is_final(item)]
    return JobFacts(
        name=metadata["name"],
        attempt=_attempt(metadata),
        created=_time(metadata["creationTimestamp"]),
        uid=metadata.get("uid", ""),
        deleting="deletionTimestamp" in metadata,
        finished=_time(ended[0]["lastTransitionTime"]) if ended else None,
        succeeded=any(item["type"] == "Complete" for item in ended),
        started=_time_or_none(status.get("startTime")),
        suspended=bool((job.get("spec") or {}).get("suspend")),
        queue=_label(job, LABEL_QUEUE) or "",
        execution_limit=_label(job, LABEL_EXECUTION_LIMIT) or "",
    )


def pod_facts(pod: Manifest) -> PodFacts:
    """What a pod says of its attempt."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    # Other containers of the pod are the user's own and say nothing of the training.
    containers = {item.get("name", CONTAINER): item for item in status.get("containerStatuses", ())}
    container: Mapping[str, Any] = containers.get(CONTAINER, {})
    state = container.get("state") or {}
    terminated = state.get("terminated") or {}
    before, init_failed, init_error = _initialisation(status.get("initContainerStatuses") or ())
    waiting = before or state.get("waiting") or {}
    conditions = {item["type"]: item for item in status.get("conditions", ())}
    scheduled = conditions.get("PodScheduled", {})
    message = status.get("message") or ""
    reason = terminated.get("reason")
    not_started = reason in _NOT_STARTED
    started = None if not_started else (state.get("running") or terminated).get("startedAt")
    return PodFacts(
        name=metadata["name"],
        attempt=_attempt(metadata),
        job_uid=owner_uid(pod) or "",
        phase=status.get("phase", "Pending"),
        created=_time(metadata["creationTimestamp"]),
        deleting=_time_or_none(metadata.get("deletionTimestamp")),
        node=(pod.get("spec") or {}).get("nodeName"),
        scheduled=_time_or_none(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else None,
        running_since=_not_before(_time_or_none(started), _time(metadata["creationTimestamp"])),
        waiting_reason=waiting.get("reason"),
        waiting_message=waiting.get("message", ""),
        waiting_image="the image of the init container in spec.podTemplate" if before else "spec.image",
        init_error=init_error,
        init_failed=init_failed,
        unschedulable=scheduled.get("message") if scheduled.get("reason") == "Unschedulable" else None,
        exit_code=terminated.get("exitCode"),
        killed_for_memory=reason == "OOMKilled",
        lost_track=reason in _LOST_TRACK,
        start_error=(terminated.get("message") or str(reason)) if not_started else "",
        exceeded_storage=message if status.get("reason") == "Evicted" and _OWN_STORAGE.search(message) else "",
        last_words=terminated.get("message", ""),
        finished=_time_or_none(terminated.get("finishedAt")) or _ended(status, conditions.values()),
        worker=_number((metadata.get("annotations") or {}).get(COMPLETION_INDEX)),
        refusal=": ".join(part for part in (status.get("reason"), message) if part),
        disruption=_disruption(conditions, status),
    )


def refused_pods(events: Iterable[Manifest], job: JobFacts) -> str:
    """Why a Job could create no pod.

    Args:
        events: Events about Jobs of its name.
        job: The Job.

    Returns:
        The Job controller's newest words; empty where it has not said any.
    """
    told = [item for item in events if item.get("reason") == "FailedCreate" and _is_about(item, job)]
    newest = max(told, key=_last_time, default=None)
    words = str(newest.get("message") or "") if newest is not None else ""
    # Each try has a pod's name of its own, for which a status would be written anew each time.
    return re.sub(rf'"{re.escape(job.name)}-[^"]*"', f'"{job.name}-…"', words)


def _is_about(event: Manifest, job: JobFacts) -> bool:
    """Whether an event is about a Job, and not about one of before of its name."""
    return bool((event.get("involvedObject") or {}).get("uid", job.uid) == job.uid)


def _last_time(event: Manifest) -> str:
    """When an event was told of last."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp"))


def _initialisation(containers: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], str, str]:
    """What an init container waits for, which one failed, and how: nothing of them where all is well."""
    for container in containers:
        state = container.get("state") or {}
        terminated, waiting = state.get("terminated") or {}, state.get("waiting") or {}
        if terminated.get("exitCode"):
            words = terminated.get("message") or terminated.get("reason") or ""
            name, code = container.get("name", ""), terminated["exitCode"]
            return {}, name, f"The init container {name} ended with exit code {code}. {words}".strip()
        if waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
            return waiting, "", ""
    return {}, "", ""


def _spec(raw: Mapping[str, Any]) -> tuple[TrainingRunSpec | None, str]:
    if _is_deeper(raw, NESTING_LIMIT):
        return None, f"it is nested more than {NESTING_LIMIT} levels deep"
    try:
        # The API server has refused or removed what the CRD does not know. What is left and unknown here is of a newer
        # CRD, in the minutes of an upgrade: no reason to fail every run that trains.
        return TrainingRunSpec.model_validate(raw, extra="ignore"), ""
    except ValidationError as error:
        return None, explain(error, "spec")


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether a value of JSON has more levels; level by level, so that none is too deep to be looked at."""
    level = [value]
    for _ in range(levels):
        inner = (item.values() if isinstance(item, Mapping) else item for item in level)
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _ended(status: Mapping[str, Any], conditions: Iterable[Mapping[str, Any]]) -> datetime | None:
    """When a pod ended whose container does not say: when it last changed."""
    if status.get("phase") not in {"Succeeded", "Failed"}:
        return None
    return max(
        (_time(item["lastTransitionTime"]) for item in conditions if item.get("lastTransitionTime")), default=None
    )


def _disruption(conditions: Mapping[str, Any], status: Mapping[str, Any]) -> str | None:
    target = conditions.get("DisruptionTarget", {})
    if target.get("status") == "True":
        return str(target.get("reason") or "Disrupted")
    # Set by the kubelet (Evicted, NodeShutdown …) and by the node controller (NodeLost).
    reason = status.get("reason")
    return str(reason) if reason in {"Evicted", "NodeLost", "NodeShutdown", "Terminated", "Shutdown"} else None


def _is_final(condition: Mapping[str, Any]) -> bool:
    return condition["type"] in {"Complete", "Failed"} and condition["status"] == "True"


def _label(manifest: Manifest, name: str) -> str | None:
    label: str | None = (manifest["metadata"].get("labels") or {}).get(name)
    return label


def _attempt(metadata: Mapping[str, Any]) -> int:
    return _number(metadata.get("labels", {}).get(LABEL_ATTEMPT))


def _number(text: str | None) -> int:
    """A number that Kubernetes or the operator wrote; what somebody else wrote in its place counts as 0."""
    try:
        return int(text or 0)
    except ValueError:
        return 0


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _not_before(time: datetime | None, earliest: datetime) -> datetime | None:
    """A time that a node tells, whose clock may be behind those by which it is compared."""
    return None if time is None else max(time, earliest)


def _time_or_none(text: str | None) -> datetime | None:
    return _time(text) if text else None
