"""Decide: the life of a TrainingRun, in one place, as a pure function of what was observed.

    (new) ── finalizer ── MLflow run ── Pending ── Job ── Running ── attempt ends ─┬─ model registered ── Succeeded
                                           ▲                                       ├─ may come right ──▶ next attempt
                                           └────────── Suspended ◀── suspend ──────┘  otherwise ── Failed

Each call names the next actions and the status that holds while they are outstanding. Whoever acts calls again with
what is then known, until nothing is left to do. An attempt goes through three stages, all on the status, so that a
new operator goes on where the last one died: asked for (no reason), ending (a reason, but its pod may still live),
ended (an end time).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Final, Literal

from heimdall_api.contract import LABEL_EXECUTION_LIMIT, ExitCode, Reason
from heimdall_api.quantity import parse_quantity
from heimdall_api.types import (
    Attempt,
    TrainingRunSpec,
    TrainingRunStatus,
)
from heimdall_operator.actions import (
    Action,
    AddFinalizer,
    AskJob,
    CreateJob,
    DeleteJob,
    EndRun,
    EnsureRun,
    KeepLogs,
    OpenAttempt,
    ParkRun,
    RegisterModel,
    RemoveFinalizer,
)
from heimdall_operator.failures import FINAL, FREE, Outcome, is_image_gone, judge_group, shorten, with_last_words
from heimdall_operator.observe import JobFacts, Observed, PodFacts
from heimdall_operator.statuses import ConditionValue, age_s, waiting, with_conditions, with_facts
from heimdall_tracking.pauses import doubled_s
from heimdall_tracking.runs import FINAL_STATUSES

ATTEMPTS_KEPT: Final = 10
"""How many attempts a status lists."""
RETRY_DELAY_S: Final = 10
RETRY_DELAY_LIMIT_S: Final = 300
FRUITLESS_S: Final = 60
"""An attempt that trained for less has hardly got further."""
UNOWNED_LIMIT: Final = 3
"""How many attempts in a row SIGTERM may end without a checkpoint, before one that nobody owns up to costs a retry."""
MEBIBYTE: Final = 2**20
POLL_S: Final = 5
"""How soon to look again where no event may tell of a change."""
PENDING_REPORT_S: Final = 10
"""A pod that waits for less is not worth a write."""
IMAGE_REASONS: Final = frozenset({"ErrImagePull", "ImagePullBackOff"})
"""Why a container waits whose image could not be pulled, and is tried again."""
IMAGE_DEADLINE_S: Final = 300
"""How long a pod that holds its node's GPUs may wait for an image that is not there or may not be pulled."""
PODLESS_POLL_S: Final = 60
"""How soon a Job that creates no pod is asked again why."""
POD_VANISHED_S: Final = 20
"""How long a Job may have ended before its pod's own account is given up."""
KEEP_LOGS_LIMIT_S: Final = 600
"""How long the expiry of pods waits for MLflow to keep their logs."""
KEPT_POLL_S: Final = 30
"""How soon to look whether a log was kept, or to try it again."""
STALL_S: Final = 3600
"""After what silence a training is taken for hung whose trainer tells of all that it does, unless the spec says."""
HELD_S: Final = 10
"""How long a pod may go on without its trainer before what it holds is needed by the next attempt."""
LINGER_S: Final = 60
"""How long the pods of a finished run may take to end by themselves: a sidecar may not know that training is over."""
DELETION_LIMIT_S: Final = 600
"""How long a deletion waits for MLflow before the run is left as it is."""


@dataclass(frozen=True)
class Decision:
    """What to do next."""

    actions: tuple[Action, ...]
    """In order; after them, decide again."""
    status: TrainingRunStatus
    """The status that holds now: written when there is no action, or when an action could not be carried out."""
    requeue_after_s: float | None = None
    """Look again after this many seconds even if nothing happens."""


def decide(observed: Observed, now: datetime) -> Decision:
    """The next step in the life of a TrainingRun.

    Args:
        observed: All that is known of it.
        now: The time.

    Returns:
        What to do, and the status that holds meanwhile.
    """
    if observed.deleted is not None:
        return _delete(observed, observed.deleted, now)
    observed = replace(observed, status=_with_logs(observed))
    if unkept := [attempt.number for attempt in observed.status.attempts if _is_unkept(observed, attempt)]:
        # What was learned of an attempt is kept before what keeps it may go.
        return Decision(tuple(map(KeepLogs, unkept)), observed.status)
    decision = _live(observed, now)
    if not _keeps_logs(observed):
        return decision
    return replace(decision, requeue_after_s=min(decision.requeue_after_s or KEPT_POLL_S, KEPT_POLL_S))


def _live(observed: Observed, now: datetime) -> Decision:
    if observed.status.phase in ("Succeeded", "Failed"):
        return _stay_finished(observed, now)
    if observed.spec is None:
        message = f"The spec can't be read: {observed.spec_error}. Correct it in a new TrainingRun."
        return _fail(observed, Reason.INVALID_CONFIGURATION, message, now)
    if observed.spec.suspend and observed.status.run_id is None:
        return Decision((), _suspended(observed, now))
    if not observed.has_finalizer:
        return Decision((AddFinalizer(),), observed.status)
    if observed.status.run_id is None or not observed.status.attempts:
        return _open_run(observed, observed.spec, now)
    return _attempt(observed, observed.spec, now)


# --- beginning ---------------------------------------------------------------------------------------------------


def _open_run(observed: Observed, spec: TrainingRunSpec, now: datetime) -> Decision:
    """The MLflow run comes before the Job, so that its ID is on the status before a GPU is taken."""
    unopened = waiting(observed.status, observed, "TrackingUnavailable", "Waiting for MLflow to create the run.", now)
    if observed.refusal:
        return _fail(observed, Reason.INVALID_CONFIGURATION, observed.refusal, now)
    if observed.run is None:
        return Decision((EnsureRun(),), unopened)
    status = observed.status.model_copy(
        update={
            "run_id": observed.run.run_id,
            "start_time": observed.status.start_time or now,
            "gpus": spec.resources.workers * spec.resources.gpus_per_worker,
        }
    )
    status = _next_attempt(status, observed.name, now)
    return Decision((), waiting(status, observed, "Pending", "The training pod is being created.", now))


def _next_attempt(status: TrainingRunStatus, name: str, now: datetime, memory: str | None = None) -> TrainingRunStatus:
    number = status.attempt + 1
    attempt = Attempt(number=number, job=job_name(name, number), start_time=now, memory=memory)
    return status.model_copy(
        update={
            "attempt": number,
            "job_name": attempt.job,
            "attempts": [*status.attempts, attempt][-ATTEMPTS_KEPT:],
        }
    )


def job_name(name: str, attempt: int) -> str:
    """The name of an attempt's Job: the same at every try, so that it is never created twice."""
    return f"{name}-a{attempt}"


# --- an attempt --------------------------------------------------------------------------------------------------


def _attempt(observed: Observed, spec: TrainingRunSpec, now: datetime) -> Decision:
    attempt = observed.status.attempts[-1]
    if held := [job.name for job in observed.jobs if _is_held_for_nothing(job, attempt)]:
        # Who lets it go again would have its pods train beside those of the next attempt.
        return Decision(_read_and_delete(observed, held), observed.status)
    if attempt.end_time is not None:
        return _after_attempt(observed, spec, attempt, now)
    if attempt.reason is not None:
        return _ending(observed, spec, attempt, now)
    if (job := _silent_job(observed, spec, now)) is not None:
        return Decision((AskJob(job.name),), observed.status)
    outcome = _outcome(observed, spec, attempt, now)
    if outcome is not None:
        ended = _record(observed, outcome, now)
        if outcome.ended is None:
            # On the status first: once its Job is being deleted, nobody could tell why any more.
            return Decision((), ended)
        return decide(replace(observed, status=ended), now)
    if (left := _left_pod(observed)) is not None:
        return _without_job(observed, spec, left, now)
    if observed.job is None:
        return _create_job(observed, spec, attempt, now)
    return _watch(observed, spec, now)


def _is_held_for_nothing(job: JobFacts, newest: Attempt) -> bool:
    """Whether a Job is suspended whose attempt is over: its pods' end was seen before what had ended them."""
    is_over = job.attempt < newest.number or newest.end_time is not None
    return is_over and job.suspended and job.finished is None and not job.deleting


def _create_job(observed: Observed, spec: TrainingRunSpec, attempt: Attempt, now: datetime) -> Decision:
    message = "The training pod is being created."
    if observed.job_trouble is not None:
        message = f"The attempt's Job could not be created yet: {observed.job_trouble.message}"
    # What opening the attempt has read is newer than any poll: nobody polls a run that waits.
    status = waiting(_with_progress(observed.status, observed), observed, "Pending", message, now)
    if observed.is_unwritten:
        # Who looks next without this memory would make it a second time, or under a number that is not its own.
        return Decision((), status)
    if _living(observed, now):
        # Two attempts never overlap, not even two Jobs of one attempt.
        return Decision((), status, POLL_S)
    held = _held_by_others(observed)
    if held is not None:
        job, since = held
        # A pod whose containers have all ended says so a moment after them, and stays; one with a sidecar never does.
        if age_s(since, now) < HELD_S:
            return Decision((), status, POLL_S)
        return Decision(_read_and_delete(observed, [job.name]), status)
    if observed.run is None or observed.run.attempt < attempt.number or observed.run.status != "RUNNING":
        message = f"Waiting for MLflow to open attempt {attempt.number}."
        unopened = waiting(status, observed, "TrackingUnavailable", message, now)
        return Decision((OpenAttempt(attempt.number),), unopened)
    actions: tuple[Action, ...] = (*map(DeleteJob, _done_with(observed)), CreateJob(attempt.number))
    return Decision(actions, status, _until_deadline(observed, spec, now))


def _done_with(observed: Observed) -> list[str]:
    """Jobs of earlier attempts that nobody needs: a namespace's quota counts them, until there is no room for another.

    That of the last one stays, for who wants to look at its pods, and those whose logs are not kept, as long as the
    status lists their attempts.
    """
    newest, unkept = observed.status.attempt, {item.number for item in observed.status.attempts if item.logs is None}
    older = (job for job in observed.jobs if job.attempt < newest - 1 and job.attempt not in unkept)
    return [job.name for job in older if job.finished is not None and not job.deleting]


def _held_by_others(observed: Observed) -> tuple[JobFacts, datetime | None] | None:
    """An older attempt's Job whose trainer has ended while its pod goes on, and since when: the pod holds its GPUs."""
    ended = {
        pod.attempt: pod.finished
        for pod in observed.pods
        if pod.exit_code is not None and pod.phase not in ("Succeeded", "Failed")
    }
    older = (job for job in observed.jobs if job.attempt < observed.status.attempt and job.attempt in ended)
    held = next((job for job in older if not job.deleting and job.finished is None), None)
    return (held, ended[held.attempt]) if held is not None else None


def _outcome(observed: Observed, spec: TrainingRunSpec, attempt: Attempt, now: datetime) -> Outcome | None:
    """Why the attempt has ended or must end; None while it goes on."""
    judged = judge_group(observed.attempt_pods, spec.resources.workers)
    if judged is not None and not _evicted(observed):
        return _unless_in_vain(observed, judged)
    if observed.refusal:
        return Outcome(reason=Reason.INVALID_CONFIGURATION, message=shorten(observed.refusal), ended=now)
    if spec.suspend:
        return Outcome(reason=Reason.SUSPENDED, message="Suspended by spec.suspend.")
    if _until_active_deadline(observed, spec, now) <= 0:
        return Outcome(reason=Reason.DEADLINE_EXCEEDED, message=_too_long(spec))
    return _job_outcome(observed, now) or _pod_outcome(observed, spec, attempt, now)


def _unless_in_vain(observed: Observed, outcome: Outcome) -> Outcome:
    """A SIGTERM of nobody's is a preemption, unless it comes again and again and training gets nowhere."""
    pod = next((pod for pod in observed.attempt_pods if pod.name == outcome.pod), None)
    if outcome.reason != Reason.PREEMPTED or pod is None or pod.deleting is not None or pod.disruption is not None:
        return outcome
    before = observed.status.attempts[:-1][-UNOWNED_LIMIT:]
    ends = [(item.reason, item.exit_code) for item in before]
    asked = [(reason, ExitCode.SIGTERM) for reason in (Reason.PREEMPTED, Reason.KILLED)]
    if len(before) < UNOWNED_LIMIT or any(end not in asked for end in ends):
        return outcome
    made = _with_progress(observed.status, observed).last_checkpoint
    # Both by nodes' clocks, but no container starts before its pod was made: on a node whose clock is far behind,
    # checkpoints seem older than they are. That may cost a retry.
    if made is not None and (since := before[0].running_time) is not None and made.time >= since:
        return outcome
    words = "It was asked to end (SIGTERM) once more by nobody who owns up to it, and no checkpoint was made since"
    # Not behind what is said of other such ends: that it made one.
    message = with_last_words(f"{words} attempt {before[0].number}.", pod)
    return replace(outcome, reason=Reason.KILLED, message=shorten(message))


def _until_active_deadline(observed: Observed, spec: TrainingRunSpec, now: datetime) -> float:
    """Seconds that are left to the run in all; without end where the spec sets none."""
    return (spec.active_deadline_seconds or math.inf) - age_s(observed.status.start_time, now)


def _too_long(spec: TrainingRunSpec) -> str:
    return f"The run took longer than spec.activeDeadlineSeconds ({spec.active_deadline_seconds} s)."


def _evicted(observed: Observed) -> bool:
    """Whether a queue or somebody took the pods away: the Job goes on when it may, and it is still the same attempt."""
    job = observed.job
    if job is None or job.finished is not None or job.deleting:
        return False
    comes_back = bool(job.queue) or _was_let_go_again(observed, job)
    return job.suspended or any(
        pod.deleting is not None and (comes_back or _is_of_before(pod, job)) for pod in observed.attempt_pods
    )


def _is_of_before(pod: PodFacts, job: JobFacts) -> bool:
    """Whether a pod was made before its Job was held: the one that follows it may not be known of yet."""
    return job.started is not None and pod.created < job.started


def _was_let_go_again(observed: Observed, job: JobFacts) -> bool:
    """Whether a Job was held and let go since its pods ran: new ones follow."""
    ran = observed.status.attempts[-1].running_time
    return ran is not None and job.started is not None and job.started > ran


def _job_outcome(observed: Observed, now: datetime) -> Outcome | None:
    """What the Job alone says, once its pod's own account can no longer be expected."""
    job = observed.job
    message = "The pod or its Job was deleted while it was training."
    if job is None:
        # Not made again under the same number: a container that its node still runs would publish beside the new one.
        ran, living = observed.status.attempts[-1].running_time is not None, _living(observed, now)
        # What is left of a group without its Job would wait for the others for ever.
        is_over = ran and (not living or (_left_pod(observed) is not None and not observed.is_running))
        return Outcome(reason=Reason.PREEMPTED, message=message, ended=None if living else now) if is_over else None
    if job.finished is None and not job.deleting:
        return None
    if job.finished is not None and age_s(job.finished, now) < POD_VANISHED_S:
        return None
    if job.succeeded:
        # Exit 0 is not enough: a Job counts a pod that was deleted and then exited 0, and nothing else tells of that.
        message = "Its Job succeeded, but the pod is gone: nobody saw whether it was deleted while it was training."
    return Outcome(reason=Reason.PREEMPTED, message=message, ended=None if _living(observed, now) else now)


def _pod_outcome(observed: Observed, spec: TrainingRunSpec, attempt: Attempt, now: datetime) -> Outcome | None:
    """What a pod that lives gives reason to end it for: it does not start, or it hangs."""
    lost = next((pod for pod in observed.attempt_pods if _is_lost(observed, pod, now)), None)
    if lost is not None:
        message = f"The node {lost.node} did not end the pod in time; its attempt was given up."
        # Its Job goes with it: it would make another pod one day, and the other workers of a group wait for this one.
        return Outcome(reason=Reason.NODE_LOST, message=message, pod=lost.name, node=lost.node)
    if not observed.is_running:
        return _not_started(observed, spec, attempt, now)
    # Silence counts only while it can be heard: MLflow away, or an operator that has just started, is no hang. Nor is
    # the grace period of pods that were told to end, when nobody follows them any more.
    ends = any(pod.deleting is not None for pod in observed.attempt_pods)
    timeout_s = _stall_timeout_s(observed, spec)
    if timeout_s is None or observed.moved is None or ends:
        return None
    progress = observed.run.progress if observed.run else observed.status.progress
    # A node whose clock is ahead is not taken at its word: a hang would be noticed that much later.
    started = [since for pod in observed.attempt_pods if (since := pod.running_since) is not None and since <= now]
    moved = max([observed.moved, *started])
    if age_s(moved, now) < timeout_s:
        return None
    step = f"step {progress.step}" if progress else "its start"
    return Outcome(
        reason=Reason.STALLED, message=f"No training step since {step} for {timeout_s} s (spec.stallTimeoutSeconds)."
    )


def _stall_timeout_s(observed: Observed, spec: TrainingRunSpec) -> int | None:
    """After what silence the training is taken for hung; None where it never is."""
    if spec.stall_timeout_seconds is not None:
        return spec.stall_timeout_seconds or None
    # Others may be silent for as long as an epoch takes, and well; so may this attempt, until it has told of something.
    told = observed.run.activity.partition("/")[0] if observed.run is not None else ""
    return STALL_S if told == str(observed.status.attempt) else None


def _is_lost(observed: Observed, pod: PodFacts, now: datetime) -> bool:
    """Whether a deleted pod took so long to end that its node must be gone; the next attempt's number fences it."""
    return pod.alive and age_s(pod.deleting, now) > observed.lost_pod_s


def _is_abandoned(observed: Observed, pod: PodFacts, now: datetime) -> bool:
    """Whether nobody has ended a pod for as long whose attempt is to end: its Job is gone, and it stays."""
    if pod.deleting is not None or any(job.attempt == pod.attempt for job in observed.jobs):
        return False
    attempt = next((item for item in observed.status.attempts if item.number == pod.attempt), None)
    if attempt is None:
        return pod.attempt < observed.status.attempt  # so long ago that it is listed no more
    return age_s(attempt.ending_time or attempt.end_time, now) > observed.lost_pod_s


def _left_pod(observed: Observed) -> PodFacts | None:
    """A pod of the newest attempt whose Job was deleted without it: nobody owns it any more, and nobody ends it."""
    if observed.job is not None:
        return None
    return next((pod for pod in observed.attempt_pods if pod.alive and not pod.job_uid and pod.deleting is None), None)


def _living(observed: Observed, now: datetime) -> list[PodFacts]:
    """Pods of any attempt that may still be training and were not given up."""
    return [
        pod
        for pod in observed.pods
        if pod.alive and not _is_lost(observed, pod, now) and not _is_abandoned(observed, pod, now)
    ]


def _not_started(observed: Observed, spec: TrainingRunSpec, attempt: Attempt, now: datetime) -> Outcome | None:
    if observed.job is None and _left_pod(observed) is None:
        return _no_job(observed, spec, now)
    if not _is_starting(observed):
        return None
    pod = _waiting_pod(observed)
    if pod is not None and pod.waiting_reason == "InvalidImageName":
        why = f"{pod.waiting_image} is no valid image name: {pod.waiting_message}"
        message = f"{why}. Correct it in a new TrainingRun."
        return Outcome(reason=Reason.IMAGE_PULL, message=message, pod=pod.name, node=pod.node)
    if (lacking := _without_image(observed, now)) is not None and lacking[1] >= IMAGE_DEADLINE_S:
        pod, tried = lacking
        reason, why = _waiting_for(observed, pod)
        message = shorten(f"The image is not there or may not be pulled, for {tried:.0f} s by now. {why}")
        return Outcome(reason=reason, message=message, pod=pod.name, node=pod.node)
    waited = age_s(_pending_since(observed, attempt), now)
    if waited < spec.pending_deadline_seconds:
        return None
    reason, why = _waiting_for(observed, pod)
    return Outcome(
        reason=reason,
        message=shorten(f"The pod did not start within spec.pendingDeadlineSeconds ({waited:.0f} s). {why}"),
        pod=pod.name if pod is not None else None,
        node=pod.node if pod is not None else None,
    )


def _without_image(observed: Observed, now: datetime) -> tuple[PodFacts, float] | None:
    """A pod that holds its node's GPUs and waits for an image that is not there or may not be pulled, and its seconds.

    Kubelets before Kubernetes 1.32 say so only at the moment when they try again: every five minutes at the latest.
    """
    lacking = [
        (pod, age_s(pod.scheduled or pod.created, now))
        for pod in observed.attempt_pods
        if pod.node is not None and pod.waiting_reason in IMAGE_REASONS and is_image_gone(pod.waiting_message)
    ]
    return max(lacking, key=lambda item: item[1], default=None)


def _is_starting(observed: Observed) -> bool:
    """Whether the newest attempt's pods are still to start; a pod that is gone since is for its Job to tell of."""
    job = observed.job
    if job is None:
        return observed.status.attempts[-1].running_time is None and _left_pod(observed) is not None
    if job.finished is not None or job.suspended:
        return False
    return observed.status.attempts[-1].running_time is None or _was_let_go_again(observed, job)


def _no_job(observed: Observed, spec: TrainingRunSpec, now: datetime) -> Outcome | None:
    """A Job that can't be created is not waited for without end either, once it was tried."""
    # From the first try to the last: MLflow or the operator may have been away for longer than the deadline before it,
    # and this operator for as long since, while another one has created it.
    trouble = observed.job_trouble
    if trouble is None or trouble.tried is None:
        return None
    if (waited := age_s(trouble.since, trouble.tried)) < spec.pending_deadline_seconds:
        return None
    why = f"The Job could not be created within spec.pendingDeadlineSeconds ({waited:.0f} s): {trouble.message}"
    return Outcome(reason=Reason.POD_NOT_STARTED, message=shorten(why), ended=now)


def _pending_since(observed: Observed, attempt: Attempt) -> datetime | None:
    """When the wait for pods began: time in a queue is the queue's business, and so is what came before the Job."""
    job = observed.job
    if job is None:
        left = _left_pod(observed)
        return left.created if left is not None else attempt.start_time
    if job.started is None:
        return None if job.queue else job.created
    return job.started


def _waiting_pod(observed: Observed) -> PodFacts | None:
    """A pod that has not started, rather one that says why; None where it does not even exist."""
    waiting = [pod for pod in observed.attempt_pods if pod.running_since is None]
    telling = [pod for pod in waiting if pod.unschedulable or pod.waiting_reason]
    return next(iter(telling or waiting), None)


def _lacks_pods(observed: Observed, spec: TrainingRunSpec) -> bool:
    """Whether a Job that may have pods has not created all of them, and those that are there run."""
    job = observed.job
    if job is None or job.deleting or not _is_starting(observed):
        return False
    pods = [pod for pod in observed.attempt_pods if not _is_of_before(pod, job)]
    return len(pods) < spec.resources.workers and all(pod.alive and pod.running_since is not None for pod in pods)


def _silent_job(observed: Observed, spec: TrainingRunSpec, now: datetime) -> JobFacts | None:
    """A Job that has lacked pods for a while, and was not asked lately why."""
    job, known = observed.job, observed.job_podless
    if job is None or not _lacks_pods(observed, spec):
        return None
    waited = age_s(_pending_since(observed, observed.status.attempts[-1]), now)
    if waited < min(PENDING_REPORT_S, spec.pending_deadline_seconds):
        return None
    return job if known is None or age_s(known.asked, now) >= PODLESS_POLL_S else None


def _waiting_for(observed: Observed, pod: PodFacts | None) -> tuple[Reason, str]:
    """What a pod that does not run waits for, and what to do about it."""
    if pod is None:
        text = "Its Job could create no pod: see the Job's events (kubectl describe job)."
        said = observed.job_podless.message if observed.job_podless is not None else ""
        return Reason.POD_NOT_STARTED, f"{text} {said}".rstrip()
    if pod.unschedulable:
        return Reason.UNSCHEDULABLE, f"No node fits: {pod.unschedulable}"
    if pod.waiting_reason in {*IMAGE_REASONS, "ErrImageNeverPull", "InvalidImageName"}:
        return Reason.IMAGE_PULL, f"The image can't be pulled, check {pod.waiting_image}: {pod.waiting_message}"
    if pod.waiting_reason and pod.waiting_reason != "ContainerCreating":
        return Reason.POD_NOT_STARTED, f"{pod.waiting_reason}: {pod.waiting_message}"
    return (
        Reason.POD_NOT_STARTED,
        f"Its container is being created (kubectl describe pod {pod.name} tells what it lacks).",
    )


def _watch(observed: Observed, spec: TrainingRunSpec, now: datetime) -> Decision:
    """The attempt goes on: tell how far it is, and look again when something is due."""
    status = _with_progress(_with_admission(observed, now), observed)
    due = _until_deadline(observed, spec, now)
    if observed.job is not None and observed.job.suspended:
        return Decision((), _queued(status, observed, now), due)
    if not observed.is_running and not _is_starting(observed):
        return Decision((), status, due)
    if not observed.is_running or _evicted(observed):
        waited = age_s(_pending_since(observed, status.attempts[-1]), now)
        if waited < PENDING_REPORT_S and status.conditions == observed.status.conditions:
            return Decision((), status, PENDING_REPORT_S - waited + 1)
        reason, why = _waiting_for(observed, _waiting_pod(observed))
        return Decision((), waiting(status, observed, str(reason), why, now), due)
    attempt = status.attempts[-1].model_copy(update=_place(observed))
    status = status.model_copy(update={"attempts": [*status.attempts[:-1], attempt], "phase": "Running"})
    message = f"Attempt {attempt.number} is training."
    status = with_conditions(status, observed, now, Complete=(False, "Running", message), Suspended=None)
    return Decision((), status, due)


def _without_job(observed: Observed, spec: TrainingRunSpec, pod: PodFacts, now: datetime) -> Decision:
    """The attempt goes on although its Job is gone: only who may delete pods can end it before its training does."""
    decision = _watch(observed, spec, now)
    message = f"Its Job was deleted, and its pod {pod.name} goes on without it: delete the pod for another attempt."
    status = with_conditions(decision.status, observed, now, Complete=(False, "JobDeleted", message))
    return replace(decision, status=status)


def _with_progress(status: TrainingRunStatus, observed: Observed) -> TrainingRunStatus:
    """The status with what MLflow says, unless that was read before the newest attempt was opened."""
    is_old = observed.run is not None and observed.run.attempt < status.attempt
    return status if is_old else with_facts(status, observed.run)


def _place(observed: Observed) -> dict[str, object]:
    """Where and since when the newest attempt trains, for its entry on the status."""
    pod = observed.lead
    return {"pod": pod.name, "node": pod.node, "running_time": pod.running_since} if pod else {}


def _with_admission(observed: Observed, now: datetime) -> TrainingRunStatus:
    """Whether the attempt's Job was let go by its queue (Kueue), as a condition."""
    job = observed.job
    if job is None or not job.queue:
        return observed.status
    ran = observed.status.attempts[-1].running_time is not None
    if not job.suspended:
        value = (True, "Admitted", f"Queue {job.queue} has admitted Job {job.name}.")
    elif ran:
        message = f"Queue {job.queue} took the place back; it goes on when admitted again."
        if job.execution_limit:
            limit = f"{LABEL_EXECUTION_LIMIT} ({job.execution_limit})"
            message += f" Where {limit} is used up, it is not: set spec.suspend to true and back for another attempt."
        value = (False, "Evicted", message)
    else:
        value = (False, "Queued", f"Job {job.name} waits for queue {job.queue} to admit it.")
    return with_conditions(observed.status, observed, now, Admitted=value)


def _queued(status: TrainingRunStatus, observed: Observed, now: datetime) -> TrainingRunStatus:
    admission = next((condition for condition in status.conditions if condition.type == "Admitted"), None)
    if admission is None:
        message = "Somebody has suspended the attempt's Job, which no queue holds: resume it (spec.suspend of the Job)."
        return waiting(status, observed, "JobSuspended", message, now)
    return waiting(status, observed, admission.reason, admission.message, now)


def _record(observed: Observed, outcome: Outcome, now: datetime) -> TrainingRunStatus:
    """Write an outcome into the newest attempt: ended where its pod has, otherwise ending."""
    status = observed.status
    attempt, ended = status.attempts[-1], outcome.ended
    if ended is not None:
        # A node's clock may be wrong, and what comes next waits by this time.
        ended = min(max(ended, attempt.start_time or ended), now)
    place = _place(observed)
    if outcome.pod is not None:
        place |= {"pod": outcome.pod, "node": outcome.node}
    attempt = attempt.model_copy(
        update={
            "reason": str(outcome.reason),
            "message": outcome.message,
            "exit_code": outcome.exit_code,
            "ending_time": now if ended is None else None,
            "end_time": ended,
            **place,
        }
    )
    counted = outcome.ended is not None and outcome.reason not in FREE and outcome.reason != Reason.COMPLETED
    status = status.model_copy(
        update={"attempts": [*status.attempts[:-1], attempt], "failures": status.failures + int(counted)}
    )
    # Afterwards: at the pace of an attempt that has ended nothing is estimated.
    return _with_progress(status, observed)


def _ending(observed: Observed, spec: TrainingRunSpec, attempt: Attempt, now: datetime) -> Decision:
    """The attempt must end: its Job is deleted, and its pods get their grace period."""
    message = f"Attempt {attempt.number} is being ended: {attempt.message}"
    if (left := _left_pod(observed)) is not None:
        message += f" Its Job was deleted before, and nothing ends its pod {left.name}: delete the pod."
    status = with_conditions(observed.status, observed, now, Complete=(False, "Ending", message))
    if observed.job is not None and not observed.job.deleting:
        return Decision(_read_and_delete(observed, [observed.job.name]), status)
    if _living(observed, now):
        return Decision((), status, POLL_S)
    counted = attempt.reason not in FREE
    # A pod that is gone before anybody looked takes its exit code along, and its last words.
    judged = judge_group(observed.attempt_pods, spec.resources.workers)
    pod = next((pod for pod in observed.attempt_pods if judged is not None and pod.name == judged.pod), None)
    update: dict[str, object] = {"end_time": now, "exit_code": pod.exit_code if pod is not None else None}
    if counted and pod is not None:
        update["message"] = shorten(with_last_words(attempt.message or "", pod))
    ended = observed.status.attempts[-1].model_copy(update=update)
    status = observed.status.model_copy(
        update={
            "attempts": [*observed.status.attempts[:-1], ended],
            "failures": observed.status.failures + int(counted),
        }
    )
    return _after_attempt(replace(observed, status=status), spec, ended, now)


# --- after an attempt --------------------------------------------------------------------------------------------


def _after_attempt(observed: Observed, spec: TrainingRunSpec, attempt: Attempt, now: datetime) -> Decision:
    reason = Reason(attempt.reason or Reason.UNKNOWN)
    message = attempt.message or ""
    if reason == Reason.COMPLETED:
        return _succeed(observed, spec, now)
    memory = _next_memory(spec, attempt)
    if reason == Reason.HOST_OUT_OF_MEMORY and memory is None and spec.retries.memory_growth is not None:
        message += f" It had all that spec.retries.memoryGrowth.max allows ({spec.retries.memory_growth.max})."
    if reason in FINAL and not (reason == Reason.HOST_OUT_OF_MEMORY and memory is not None):
        return _fail(observed, reason, message, now)
    if reason not in FREE and observed.status.failures > spec.retries.limit:
        tries = f"{observed.status.failures} attempts failed (spec.retries.limit is {spec.retries.limit}). Last: "
        return _fail(observed, reason, tries + message, now)
    if spec.suspend:
        return _suspend(observed, attempt, now)
    return _retry(observed, spec, attempt, memory, now)


def _read_and_delete(observed: Observed, names: list[str]) -> tuple[Action, ...]:
    """The end of Jobs with their pods, whose logs are read before: that much at a time."""
    numbers = {job.attempt for job in observed.jobs if job.name in names}
    return _to_be_read(observed, numbers) or tuple(map(DeleteJob, names))


def _to_be_read(observed: Observed, numbers: Collection[int]) -> tuple[Action, ...]:
    """What is to be read before the pods of attempts go."""
    known = (item for item in observed.status.attempts if item.number in numbers)
    return tuple(KeepLogs(item.number, pods_go=True) for item in known if _has_account(observed, item, pods_go=True))


def _has_account(observed: Observed, attempt: Attempt, *, pods_go: bool = False) -> bool:
    """Whether a pod of an attempt has run, or failed before it could, and its log is to be kept now."""
    counts_on_pods = pods_go and attempt.number in observed.unread
    if attempt.logs is not None or (attempt.number in observed.logs and not counts_on_pods):
        return False
    return any(pod.running_since is not None or pod.phase == "Failed" for pod in observed.pods_of(attempt.number))


def _is_unkept(observed: Observed, attempt: Attempt) -> bool:
    """Whether an attempt has ended whose account is to be kept now."""
    return attempt.end_time is not None and _has_account(observed, attempt)


def _keeps_logs(observed: Observed) -> bool:
    """Whether an account is being kept, or is to be tried again."""
    return any(item.logs is None and observed.logs.get(item.number, "") is None for item in observed.status.attempts)


def _with_logs(observed: Observed) -> TrainingRunStatus:
    """The status with what was learned of where attempts' logs are kept."""
    if not any(observed.logs.values()):
        return observed.status
    attempts = [
        item.model_copy(update={"logs": observed.logs[item.number]}) if observed.logs.get(item.number) else item
        for item in observed.status.attempts
    ]
    return observed.status.model_copy(update={"attempts": attempts})


def _next_memory(spec: TrainingRunSpec, attempt: Attempt) -> str | None:
    """Memory of the attempt after this one: more after an attempt that ran out of it, else the same.

    None where it is the spec's, or can't grow any more.
    """
    growth = spec.retries.memory_growth
    if attempt.reason != Reason.HOST_OUT_OF_MEMORY or growth is None:
        return attempt.memory
    had, most = parse_quantity(attempt.memory or spec.resources.memory), parse_quantity(growth.max)
    if had >= most:
        return None
    wanted = had * Decimal(growth.factor)
    return str(growth.max) if wanted >= most else f"{math.ceil(wanted / MEBIBYTE)}Mi"


def _retry(observed: Observed, spec: TrainingRunSpec, attempt: Attempt, memory: str | None, now: datetime) -> Decision:
    reason = Reason(attempt.reason or Reason.UNKNOWN)
    failures = _fruitless(observed.status) - 1 if reason in FREE else observed.status.failures
    delay = doubled_s(RETRY_DELAY_S, failures - 1, RETRY_DELAY_LIMIT_S) if failures > 0 else 0.0
    left = delay - age_s(attempt.end_time, now)
    message = f"Attempt {attempt.number} ended ({reason}); the next one goes on from the last checkpoint."
    in_all = _until_active_deadline(observed, spec, now)
    if in_all <= 0:
        return _fail(observed, Reason.DEADLINE_EXCEEDED, _too_long(spec), now)
    if left > 0:
        return Decision((), waiting(observed.status, observed, "Retrying", message, now), min(left, in_all))
    status = _next_attempt(observed.status, observed.name, now, memory)
    return Decision((), waiting(status, observed, "Retrying", message, now))


def _fruitless(status: TrainingRunStatus) -> int:
    """How many attempts in a row ended early though nobody is to blame: what comes back at once may do so for ever."""
    count = 0
    for attempt in reversed(status.attempts):
        if attempt.end_time is None or attempt.reason not in FREE - {Reason.SUSPENDED}:
            break
        if age_s(attempt.running_time, attempt.end_time) >= FRUITLESS_S:
            break
        count += 1
    return count


def _succeed(observed: Observed, spec: TrainingRunSpec, now: datetime) -> Decision:
    """Complete means that all that was asked for is done, the registered version included."""
    status = observed.status
    if spec.registration is not None and observed.registration is None:
        if observed.refusal:
            return _fail(observed, Reason.USER_ERROR, observed.refusal, now)
        message = "Training finished; waiting for MLflow to register the model."
        return Decision((RegisterModel(),), waiting(status, observed, "Registering", message, now))
    if observed.run is None or observed.run.status != "FINISHED":
        message = "Training finished; waiting for MLflow to end the run."
        return Decision((EndRun("FINISHED"),), waiting(status, observed, "EndingRun", message, now))
    done = "Training finished."
    conditions: dict[str, ConditionValue] = {"Suspended": None}
    if observed.registration is not None:
        done = f"Training finished. {observed.registration.message}"
        conditions["ModelRegistered"] = (True, "ModelRegistered", observed.registration.message)
        status = status.model_copy(
            update={
                "model_name": observed.registration.name,
                "model_version": observed.registration.version,
                "model_uri": observed.registration.uri,
            }
        )
    conditions["Complete"] = (True, "Completed", done)
    status = _finish(with_facts(status, observed.run), "Succeeded", now)
    return Decision((), with_conditions(status, observed, now, **conditions))


def _fail(observed: Observed, reason: Reason, message: str, now: datetime) -> Decision:
    status, message = observed.status, shorten(message)
    if status.run_id is not None and (observed.run is None or observed.run.status != "FAILED"):
        words = f"{message.rstrip('.')}. Waiting for MLflow to end the run."
        return Decision(
            (EndRun("FAILED", fence=_may_go_on(observed)),), waiting(status, observed, str(reason), words, now)
        )
    status = _finish(with_facts(status, observed.run), "Failed", now)
    return Decision(
        (),
        with_conditions(
            status,
            observed,
            now,
            Failed=(True, str(reason), message),
            Complete=(False, str(reason), message),
            Suspended=None,
        ),
    )


def _may_go_on(observed: Observed) -> bool:
    """Whether a trainer of the newest attempt may still write to the run, cut off with its node: nobody saw it end."""
    if any(pod.alive for pod in observed.pods):
        return True
    attempt = next(reversed(observed.status.attempts), None)
    if attempt is None or attempt.running_time is None or attempt.exit_code is not None:
        return False
    workers = observed.spec.resources.workers if observed.spec is not None else 1
    return sum(pod.exit_code is not None for pod in observed.attempt_pods) < workers


def _finish(status: TrainingRunStatus, phase: Literal["Succeeded", "Failed"], now: datetime) -> TrainingRunStatus:
    return status.model_copy(update={"phase": phase, "completion_time": now})


def _stay_finished(observed: Observed, now: datetime) -> Decision:
    """A terminal phase is final, whatever is done to the Job; it frees GPUs and carries no finalizer."""
    going: list[str] = []
    left = _until_expiry(observed, now)
    for job in observed.jobs:
        alive = job.finished is None and any(pod.attempt == job.attempt for pod in _living(observed, now))
        if not job.deleting and (alive or _lingers(observed, job, now) or (left is not None and left <= 0)):
            going.append(job.name)
    actions = [*_read_and_delete(observed, going)]
    if observed.has_finalizer and not observed.is_unwritten:
        actions.append(RemoveFinalizer())
    due = [left] if left is not None and left > 0 else []
    due += [POLL_S] if any(job.finished is None for job in observed.jobs) else []
    # Who waits for a change to be seen (Flux and kubectl do) would wait for ever.
    status = with_conditions(observed.status, observed, now)
    return Decision(tuple(actions), status, min(due, default=None))


def _lingers(observed: Observed, job: JobFacts, now: datetime) -> bool:
    """Whether a Job is not over although its trainer is: it still holds its GPUs."""
    if observed.is_unwritten:
        return False  # its pod alone tells how it ended
    return job.finished is None and age_s(observed.status.completion_time, now) > LINGER_S


def _until_expiry(observed: Observed, now: datetime) -> float | None:
    """Seconds until Jobs and pods of a finished run may go; None where there are none."""
    ttl = observed.spec.ttl_seconds_after_finished if observed.spec is not None else None
    if ttl is None or observed.is_unwritten or not observed.jobs or observed.status.completion_time is None:
        return None
    left = ttl - age_s(observed.status.completion_time, now)
    return left + KEEP_LOGS_LIMIT_S if _keeps_logs(observed) else left


# --- suspension and deletion -------------------------------------------------------------------------------------


def _suspend(observed: Observed, attempt: Attempt, now: datetime) -> Decision:
    status = _suspended(observed, now)
    if any(pod.alive for pod in observed.attempt_pods):
        is_fenced = observed.run is not None and observed.run.attempt > attempt.number
        # A pod that was given up may train on: by the number that comes next, its trainer hears that it is over.
        return Decision(() if is_fenced or observed.refusal else (OpenAttempt(attempt.number + 1),), status)
    # Afterwards: MLflow away must not keep anybody waiting for the suspension.
    is_told = observed.status.phase == "Suspended"
    is_running = observed.run is not None and observed.run.status == "RUNNING"
    return Decision((ParkRun(),) if is_told and is_running else (), status)


def _suspended(observed: Observed, now: datetime) -> TrainingRunStatus:
    # Its last checkpoint was made after the suspension was asked for.
    status = with_facts(observed.status, observed.run).model_copy(update={"phase": "Suspended"})
    message = "Suspended by spec.suspend; set it to false to go on."
    conditions: dict[str, ConditionValue] = {
        "Suspended": (True, "Suspended", message),
        "Complete": (False, "Suspended", message),
    }
    if any(condition.type == "Admitted" for condition in status.conditions):
        # Its Job is gone, and with it what the queue had given it.
        conditions["Admitted"] = (False, "Released", "Suspended by spec.suspend; its place is given back to the queue.")
    return with_conditions(status, observed, now, **conditions)


def _delete(observed: Observed, deleted: datetime, now: datetime) -> Decision:
    """Ended in this order: pods (they may make a last checkpoint), MLflow run, resource."""
    if not observed.has_finalizer:
        return Decision((), observed.status)
    overdue = age_s(deleted, now) > DELETION_LIMIT_S
    reads = _to_be_read(observed, [item.number for item in observed.status.attempts])
    if reads and not overdue:
        return Decision(reads, observed.status)
    if observed.job is not None and not observed.job.deleting:
        return Decision((DeleteJob(observed.job.name),), observed.status)
    if _living(observed, now) and not overdue:
        return Decision((), observed.status, POLL_S)
    ended = observed.run is not None and observed.run.status in FINAL_STATUSES
    if observed.status.phase in ("Succeeded", "Failed") or ended:
        return Decision((RemoveFinalizer(),), observed.status)
    # An operator that was away all that time has not even tried: it does so once before it lets go.
    return Decision((EndRun("KILLED", insist=not overdue, fence=_may_go_on(observed)),), observed.status)


def _until_deadline(observed: Observed, spec: TrainingRunSpec, now: datetime) -> float | None:
    """Seconds until the next deadline that no event announces."""
    left: list[float] = []
    running = observed.is_running
    if not running and _is_starting(observed):
        waited = age_s(_pending_since(observed, observed.status.attempts[-1]), now)
        left.append(spec.pending_deadline_seconds - waited)
        if (known := observed.job_podless) is not None and _lacks_pods(observed, spec):
            left.append(PODLESS_POLL_S - age_s(known.asked, now))
        if (lacking := _without_image(observed, now)) is not None:
            left.append(IMAGE_DEADLINE_S - lacking[1])
    if spec.active_deadline_seconds is not None:
        left.append(_until_active_deadline(observed, spec, now))
    if running and (timeout_s := _stall_timeout_s(observed, spec)) is not None:
        left.append(min(timeout_s / 4, 60))
    if observed.job is not None and observed.job.finished is not None:
        left.append(POLL_S)
    return max(1.0, min(left)) if left else None
