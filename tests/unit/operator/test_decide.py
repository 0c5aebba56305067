"""The life of a TrainingRun as a table: every phase, and every way out of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from heimdall_api.contract import MESSAGE_LIMIT, BestMetric, Checkpoint, Progress, Reason
from heimdall_api.types import BestMetricStatus, CheckpointStatus, Condition, TrainingRunStatus
from heimdall_operator.decide import (
    DELETION_LIMIT_S,
    IMAGE_DEADLINE_S,
    KEEP_LOGS_LIMIT_S,
    KEPT_POLL_S,
    PENDING_REPORT_S,
    POD_VANISHED_S,
    PODLESS_POLL_S,
    POLL_S,
    RETRY_DELAY_S,
    STALL_S,
    AddFinalizer,
    AskJob,
    CreateJob,
    Decision,
    DeleteJob,
    EndRun,
    EnsureRun,
    KeepLogs,
    OpenAttempt,
    ParkRun,
    RegisterModel,
    RemoveFinalizer,
    decide,
)
from heimdall_operator.events import events_between
from heimdall_operator.failures import is_image_gone, judge_pod
from heimdall_operator.observe import LOST_POD_S, Observed, PodFacts, Podless, Trouble
from tests.unit.operator.builders import (
    NOW,
    UID,
    ago,
    attempt,
    ended_pod,
    job,
    observed,
    pod,
    registration,
    run,
    spec,
    status,
)

NEW = TrainingRunStatus()
REGISTERED = {"registration": {"model": "localizer"}}


def ended(reason: Reason, number: int = 1, **more: Any) -> TrainingRunStatus:
    """A status whose newest attempt has ended."""
    return status(attempt(number, reason=str(reason), end_time=ago(1), message="because"), **more)


KEPT = {"end_time": ago(9), "logs": "runs:/r1/attempts/2"}

ACTIONS = {
    "new: finalizer first": (observed(status=NEW, has_finalizer=False), (AddFinalizer(),)),
    "then the MLflow run": (observed(status=NEW), (EnsureRun(),)),
    "then its ID on the status, before any Job": (observed(status=NEW, run=run()), ()),
    "then the attempt is opened": (observed(), (OpenAttempt(1),)),
    "then its Job": (observed(run=run()), (CreateJob(1),)),
    "a run that MLflow has ended is opened again": (observed(run=run(status="FAILED")), (OpenAttempt(1),)),
    "a run opened for an older attempt is opened anew": (
        observed(status=status(attempt(2)), run=run(attempt=1)),
        (OpenAttempt(2),),
    ),
    "no second Job while a pod of an older attempt lives": (
        observed(status=status(attempt(1, end_time=ago(1)), attempt(2)), run=run(attempt=2), pods=(pod(1),)),
        (),
    ),
    "a pod that its lost node never ended is given up": (
        observed(status=status(attempt(2)), run=run(attempt=2), pods=(pod(1, deleting=ago(LOST_POD_S + 1)),)),
        (CreateJob(2),),
    ),
    "a pod that lost its Job before its attempt was to end is waited for": (
        observed(
            status=status(attempt(reason="Suspended", ending_time=ago(LOST_POD_S))),
            run=run(),
            pods=(pod(),),
        ),
        (),
    ),
    "and given up": (
        observed(
            status=status(attempt(1, reason="Stalled", ending_time=ago(900), end_time=ago(LOST_POD_S + 1)), attempt(2)),
            run=run(attempt=2),
            pods=(pod(1),),
        ),
        (CreateJob(2),),
    ),
    "also when its attempt is listed no more": (
        observed(status=status(attempt(12)), run=run(attempt=12), pods=(pod(1),)),
        (CreateJob(12),),
    ),
    "Jobs of earlier attempts go when their accounts are kept": (
        observed(
            status=status(attempt(2, **KEPT), attempt(3, end_time=ago(9)), attempt(4, **KEPT), attempt(5), attempt(6)),
            run=run(attempt=6),
            jobs=(*(job(number, finished=ago(9)) for number in (1, 2, 3, 5)), job(4)),
        ),
        (DeleteJob("run-a1"), DeleteJob("run-a2"), CreateJob(6)),
    ),
    "training goes on": (observed(jobs=(job(),), pods=(pod(),)), ()),
    "success without registration ends the run": (observed(jobs=(job(),), pods=(ended_pod(0),)), (EndRun("FINISHED"),)),
    "success registers before the run ends": (
        observed(spec=spec(**REGISTERED), jobs=(job(),), pods=(ended_pod(0),)),
        (RegisterModel(),),
    ),
    "registered: the run ends": (
        observed(spec=spec(**REGISTERED), jobs=(job(),), pods=(ended_pod(0),), registration=registration()),
        (EndRun("FINISHED"),),
    ),
    "a user's error ends the run": (
        observed(jobs=(job(),), pods=(ended_pod(1, last_words='{"reason": "UserError", "message": "boom"}'),)),
        (EndRun("FAILED"),),
    ),
    "a configuration error ends the run": (observed(jobs=(job(),), pods=(ended_pod(78),)), (EndRun("FAILED"),)),
    "a killed pod waits before the next attempt": (observed(jobs=(job(),), pods=(ended_pod(137),)), ()),
    "suspension deletes the Job": (
        observed(spec=spec(suspend=True), status=status(attempt(reason="Suspended")), jobs=(job(),), pods=(pod(),)),
        (DeleteJob("run-a1"),),
    ),
    "an ending attempt waits for its pod": (
        observed(status=status(attempt(reason="Stalled")), jobs=(job(deleting=True),), pods=(pod(deleting=ago(1)),)),
        (),
    ),
    "a finished run lets go of the resource": (observed(status=status(phase="Succeeded")), (RemoveFinalizer(),)),
    "a finished run with nothing to do": (observed(status=status(phase="Succeeded"), has_finalizer=False), ()),
    "a finished run never trains again": (observed(status=status(phase="Failed"), has_finalizer=False), ()),
    "a finished run frees what is left": (
        observed(status=status(phase="Failed"), jobs=(job(),), pods=(pod(),)),
        (DeleteJob("run-a1"), RemoveFinalizer()),
    ),
    "deletion: pods first": (observed(deleted=ago(1), jobs=(job(),), pods=(pod(),)), (DeleteJob("run-a1"),)),
    "deletion: the log before its pod": (
        observed(deleted=ago(1), jobs=(job(),), pods=(pod(),), logs={}),
        (KeepLogs(1, pods_go=True),),
    ),
    "deletion: the log of an attempt that has ended": (
        observed(deleted=ago(1), jobs=(job(finished=ago(9)),), pods=(ended_pod(1),), logs={}),
        (KeepLogs(1, pods_go=True),),
    ),
    "deletion: a log that is not to be had keeps nothing": (
        observed(deleted=ago(1), jobs=(job(),), pods=(pod(),), logs={1: None}),
        (DeleteJob("run-a1"),),
    ),
    "deletion waits for the pods": (observed(deleted=ago(1), jobs=(job(deleting=True),), pods=(pod(),)), ()),
    "deletion: then the MLflow run": (observed(deleted=ago(1)), (EndRun("KILLED"),)),
    "deletion right after the run was created": (observed(status=NEW, deleted=ago(1)), (EndRun("KILLED"),)),
    "deletion: then the resource": (observed(deleted=ago(1), run=run(status="KILLED")), (RemoveFinalizer(),)),
    "deletion of a finished run": (observed(deleted=ago(1), status=status(phase="Succeeded")), (RemoveFinalizer(),)),
    "deletion does not wait for MLflow for ever": (
        observed(deleted=ago(DELETION_LIMIT_S + 1)),
        (EndRun("KILLED", insist=False),),
    ),
    "deletion with the finalizer gone": (observed(deleted=ago(1), has_finalizer=False), ()),
    "suspended before it began: nothing is made": (
        observed(spec=spec(suspend=True), status=NEW, has_finalizer=False),
        (),
    ),
}


@pytest.mark.parametrize(("seen", "actions"), ACTIONS.values(), ids=ACTIONS.keys())
def test_the_next_actions(seen: Observed, actions: tuple[Any, ...]) -> None:
    assert decide(seen, NOW).actions == actions


def settled(seen: Observed) -> TrainingRunStatus:
    """The status after everything that was asked of MLflow was done, without any new pod."""
    for _ in range(10):
        decision = decide(seen, NOW)
        for action in decision.actions:
            match action:
                case EndRun(final):
                    seen = replace(seen, run=run(status=final))
                case ParkRun() if seen.run is not None:
                    seen = replace(seen, run=replace(seen.run, status="SCHEDULED"))
                case RegisterModel():
                    seen = replace(seen, registration=registration())
                case _:
                    return decision.status
        if not decision.actions:
            if decision.status == seen.status:
                return seen.status
            seen = replace(seen, status=decision.status)
            if seen.status.phase in ("Succeeded", "Failed"):
                return seen.status
    raise AssertionError("decide does not settle")


def condition_of(of: TrainingRunStatus, kind: str) -> Condition:
    return next(item for item in of.conditions if item.type == kind)


def condition(of: TrainingRunStatus, kind: str) -> tuple[str, str] | None:
    return next(((item.status, item.reason) for item in of.conditions if item.type == kind), None)


def test_the_run_id_is_on_the_status_before_a_job_is() -> None:
    decision = decide(observed(status=NEW, run=run()), NOW)

    assert decision.status.run_id == "r1"
    assert decision.status.job_name == "run-a1"
    assert decision.status.phase == "Pending"
    assert decision.status.start_time == NOW


@pytest.mark.parametrize(("resources", "gpus"), [({}, 1), ({"workers": 4, "gpusPerWorker": 8}, 32)])
def test_the_gpus_of_all_workers_are_told_with_the_run(resources: dict[str, Any], gpus: int) -> None:
    decision = decide(observed(spec=spec(resources=resources), status=NEW, run=run()), NOW)

    assert (decision.status.run_id, decision.status.gpus) == ("r1", gpus)


def test_running_tells_pod_and_node() -> None:
    result = settled(observed(jobs=(job(),), pods=(pod(),)))

    assert result.phase == "Running"
    assert (result.attempts[-1].pod, result.attempts[-1].node) == ("run-a1-x", "node1")
    assert condition(result, "Complete") == ("False", "Running")


def test_success_is_complete_with_the_version_on_the_status() -> None:
    result = settled(observed(spec=spec(**REGISTERED), jobs=(job(),), pods=(ended_pod(0),)))

    assert result.phase == "Succeeded"
    assert condition(result, "Complete") == ("True", "Completed")
    assert condition(result, "ModelRegistered") == ("True", "ModelRegistered")
    assert (result.model_version, result.model_uri) == ("7", "models:/localizer/7")
    assert result.completion_time == NOW


def test_complete_waits_for_the_registry() -> None:
    decision = decide(observed(spec=spec(**REGISTERED), jobs=(job(),), pods=(ended_pod(0),)), NOW)

    assert condition(decision.status, "Complete") == ("False", "Registering")
    assert decision.status.attempts[-1].reason == "Completed", "the outcome is kept even if MLflow is away"


def test_a_missing_model_fails_the_run() -> None:
    result = settled(observed(spec=spec(**REGISTERED), status=ended(Reason.COMPLETED), refusal="no model"))

    assert condition(result, "Failed") == ("True", "UserError")


FINAL_REASONS = {
    "user error": (ended_pod(1, last_words='{"reason": "UserError", "message": "boom"}'), "UserError"),
    "configuration": (ended_pod(78), "InvalidConfiguration"),
    "CUDA memory": (ended_pod(80), "CudaOutOfMemory"),
    "host memory": (ended_pod(137, killed_for_memory=True), "HostOutOfMemory"),
}


@pytest.mark.parametrize(("seen", "reason"), FINAL_REASONS.values(), ids=FINAL_REASONS.keys())
def test_what_would_come_back_is_not_tried_again(seen: Any, reason: str) -> None:
    result = settled(observed(jobs=(job(),), pods=(seen,)))

    assert result.phase == "Failed"
    assert condition(result, "Failed") == ("True", reason)
    assert condition(result, "Complete") == ("False", reason)
    assert result.attempt == 1


FREE_REASONS = {
    "SIGTERM": ended_pod(143),
    "preempted": ended_pod(137, disruption="PreemptionByScheduler"),
    "evicted": ended_pod(1, disruption="EvictionByEvictionAPI"),
    "node lost": ended_pod(1, disruption="DeletionByTaintManager"),
    "exit 0 while it was deleted": ended_pod(0, deleting=ago(3)),
}


@pytest.mark.parametrize("seen", FREE_REASONS.values(), ids=FREE_REASONS.keys())
def test_what_nobody_is_to_blame_for_costs_no_retry(seen: Any) -> None:
    result = settled(observed(jobs=(job(),), pods=(seen,)))

    assert result.attempt == 2
    assert result.failures == 0
    assert result.phase == "Pending"


def test_an_unknown_end_costs_a_retry_and_backs_off() -> None:
    first = decide(observed(jobs=(job(),), pods=(ended_pod(137, finished=NOW),)), NOW)
    assert first.status.failures == 1
    assert first.status.attempt == 1
    assert first.requeue_after_s == pytest.approx(10)

    later = settled(observed(status=ended(Reason.KILLED, failures=1, start_time=ago(100))))
    assert later.attempt == 1, "one second is too early"

    due = status(attempt(reason="Killed", end_time=ago(11)), failures=1)
    assert settled(observed(status=due)).attempt == 2


def test_retries_are_limited() -> None:
    result = settled(observed(spec=spec(retries={"limit": 2}), status=ended(Reason.KILLED, failures=3)))

    assert condition(result, "Failed") == ("True", "Killed")
    assert "spec.retries.limit is 2" in next(item.message for item in result.conditions if item.type == "Failed")


PENDING = {
    "no node": (pod(phase="Pending", running_since=None, unschedulable="0/3 nodes"), "Unschedulable"),
    "no image": (
        pod(phase="Pending", running_since=None, waiting_reason="ImagePullBackOff", waiting_message="not found"),
        "ImagePull",
    ),
    "no secret": (
        pod(phase="Pending", running_since=None, waiting_reason="CreateContainerConfigError"),
        "PodNotStarted",
    ),
}


def withdrawn(seen: Observed) -> Decision:
    """An attempt that must end: why is on the status before its Job is deleted, and stays when the Job is going."""
    first = decide(seen, NOW)
    assert first.actions == ()
    assert first.status.attempts[-1].reason is not None
    second = decide(replace(seen, status=first.status), NOW)
    assert second.actions == (DeleteJob("run-a1"),)
    going = decide(replace(seen, status=first.status, jobs=(job(deleting=True),)), NOW)
    assert going.status.attempts[-1].reason == first.status.attempts[-1].reason
    return first


@pytest.mark.parametrize(("seen", "reason"), PENDING.values(), ids=PENDING.keys())
def test_a_pod_that_does_not_start_says_why_and_is_withdrawn_at_the_deadline(seen: Any, reason: str) -> None:
    waiting = decide(observed(jobs=(job(),), pods=(seen,)), NOW)
    assert condition(waiting.status, "Complete") == ("False", reason)

    late = withdrawn(observed(spec=spec(pendingDeadlineSeconds=30), jobs=(job(),), pods=(seen,)))
    assert late.status.attempts[-1].reason == reason

    gone = settled(observed(status=late.status))
    assert condition(gone, "Failed") == ("True", reason)


GONE = 'Back-off pulling image "x:1": ErrImagePull: failed to resolve image: docker.io/library/x:1: not found'
AWAY = 'failed to do request: Head "https://x/v2/": dial tcp: lookup x on 10.96.0.10:53: no such host'
IMAGES: dict[str, tuple[dict[str, Any], bool]] = {
    "not there": ({}, True),
    "told at the next try only": ({"waiting_reason": "ErrImagePull"}, True),
    "not for long": ({"scheduled": ago(IMAGE_DEADLINE_S - 1)}, False),
    "scheduled before anybody says when": ({"scheduled": None, "created": ago(IMAGE_DEADLINE_S)}, True),
    "the network": ({"waiting_message": AWAY}, False),
    "nobody says why": ({"waiting_message": 'Back-off pulling image "x:1"'}, False),
    "no node": ({"node": None}, False),
    "something else": ({"waiting_reason": "CreateContainerConfigError"}, False),
}


@pytest.mark.parametrize(("how", "is_over"), IMAGES.values(), ids=IMAGES.keys())
def test_an_image_that_is_not_there_is_not_waited_for_as_long_as_a_gpu(how: dict[str, Any], is_over: bool) -> None:
    waits = {"phase": "Pending", "running_since": None, "created": ago(2000), "scheduled": ago(IMAGE_DEADLINE_S)}
    waits |= {"waiting_reason": "ImagePullBackOff", "waiting_message": GONE, **how}
    seen = observed(jobs=(job(created=ago(2000)),), pods=(pod(**waits),))

    if is_over:
        told = withdrawn(seen).status.attempts[-1]
        assert told.reason == "ImagePull"
        assert told.message == (
            "The image is not there or may not be pulled, for 300 s by now. "
            f"The image can't be pulled, check spec.image: {waits['waiting_message']}"
        )
    else:
        assert decide(seen, NOW).status.attempts[-1].reason is None


def test_an_image_that_is_not_there_is_looked_for_again_when_its_time_is_over() -> None:
    waits = {"phase": "Pending", "running_since": None, "waiting_reason": "ErrImagePull", "waiting_message": GONE}
    seen = observed(jobs=(job(),), pods=(pod(**waits, scheduled=ago(10)),))

    assert decide(seen, NOW).requeue_after_s == IMAGE_DEADLINE_S - 10
    shorter = decide(replace(seen, spec=spec(pendingDeadlineSeconds=100)), NOW)
    assert shorter.requeue_after_s == 40, "the user's, from the Job's creation"


PULLS = {
    # containerd, which names the image outside of quotes as well
    "a tag": (
        (
            'failed to pull and unpack image "docker.io/library/busybox:nosuch": failed to resolve reference '
            '"docker.io/library/busybox:nosuch": docker.io/library/busybox:nosuch: not found'
        ),
        True,
    ),
    "a repository": (
        (
            'failed to resolve reference "docker.io/no/such:1": pull access denied, repository does not exist or may '
            "require authorization: server message: insufficient_scope: authorization failed"
        ),
        True,
    ),
    "no login": (
        (
            "failed to authorize: failed to fetch anonymous token: unexpected status from GET request to "
            "https://ghcr.io/token?scope=repository%3Ateam%2Fx%3Apull&service=ghcr.io: 403 Forbidden"
        ),
        True,
    ),
    "a login that is over": ("unexpected status from HEAD request to https://x/v2/y: 401 Unauthorized", True),
    # CRI-O
    "a tag, CRI-O": ("reading manifest nosuch in docker.io/library/busybox: manifest unknown", True),
    "no login, CRI-O": (
        "initializing source docker://x/y:1: reading manifest 1 in x/y: unauthorized: access to the resource is denied",
        True,
    ),
    "a bearer, CRI-O": ("Requesting bearer token: invalid status code from registry 401 (Unauthorized)", True),
    "no such host": (AWAY, False),
    "refused": ('Head "https://x/v2/": dial tcp 10.0.0.1:443: connect: connection refused', False),
    "too late": ('Get "https://x/v2/": net/http: TLS handshake timeout', False),
    "deadline": ('Get "https://x/v2/": context deadline exceeded', False),
    "a registry that is not well": ("unexpected status from HEAD request to https://x/v2/y: 503 Unavailable", False),
    "too many": ("429 Too Many Requests - Server message: toomanyrequests: pull rate limit", False),
    "a proxy that is not there": ('proxyconnect tcp: dial tcp: lookup proxy: no such host: "x" not found', False),
    "cut off": ("failed to copy: httpReadSeeker: failed open: unexpected EOF", False),
    "an older kubelet": ('Back-off pulling image "unauthorized/denied:401"', False),
    "a name like a verdict": ("registry.local/team/denied:403: something went wrong", False),
    "a name like an outage": ("registry.local/team/timeout:503: not found", True),
    "nothing": ("", False),
}


@pytest.mark.parametrize(("words", "is_gone"), PULLS.values(), ids=PULLS.keys())
def test_an_image_that_is_not_there_is_told_from_a_registry_that_is_away(words: str, is_gone: bool) -> None:
    assert is_image_gone(words) == is_gone


def test_an_impossible_image_name_is_not_waited_for() -> None:
    seen = pod(phase="Pending", running_since=None, waiting_reason="InvalidImageName", waiting_message="bad")

    assert withdrawn(observed(jobs=(job(),), pods=(seen,))).status.attempts[-1].reason == "ImagePull"


def test_an_unreadable_spec_fails_at_once() -> None:
    result = settled(observed(spec=None, spec_error="spec.x: bad", status=NEW, has_finalizer=False))

    assert condition(result, "Failed") == ("True", "InvalidConfiguration")


def test_the_active_deadline_ends_the_run() -> None:
    late = withdrawn(observed(spec=spec(activeDeadlineSeconds=30), jobs=(job(),), pods=(pod(),)))

    assert late.status.attempts[-1].reason == "DeadlineExceeded"


QUEUED = job(queue="team-queue", suspended=True)
PAUSED = status(attempt(reason="Killed", end_time=ago(1)), failures=3)
LIMITED = {
    "in a queue": (observed(spec=spec(activeDeadlineSeconds=90), jobs=(QUEUED,)), 30),
    "in a queue, without end": (observed(jobs=(QUEUED,)), None),
    "held by somebody": (observed(jobs=(job(suspended=True, created=ago(90_000)),)), None),
    "between attempts": (observed(spec=spec(activeDeadlineSeconds=90), status=PAUSED), 30),
    "between attempts, pausing for less": (observed(spec=spec(activeDeadlineSeconds=9000), status=PAUSED), 39),
}


@pytest.mark.parametrize(("seen", "again_s"), LIMITED.values(), ids=LIMITED.keys())
def test_what_waits_is_looked_at_when_its_time_is_over(seen: Observed, again_s: float | None) -> None:
    decision = decide(seen, NOW)

    assert (decision.actions, decision.requeue_after_s) == ((), again_s)


def test_the_active_deadline_ends_a_run_between_attempts() -> None:
    over = settled(observed(spec=spec(activeDeadlineSeconds=30), status=PAUSED))

    assert (over.attempt, condition(over, "Failed")) == (1, ("True", "DeadlineExceeded"))


def test_a_run_that_is_resumed_after_its_time_fails() -> None:
    suspended = settled(observed(spec=spec(suspend=True), status=ended(Reason.SUSPENDED)))

    over = settled(observed(spec=spec(activeDeadlineSeconds=30), status=suspended))

    assert (over.attempt, condition(over, "Failed")) == (1, ("True", "DeadlineExceeded"))
    assert condition(over, "Suspended") == ("False", "Resumed")


def test_a_hang_is_noticed_by_steps_that_stop() -> None:
    seen = observed(
        spec=spec(stallTimeoutSeconds=20),
        jobs=(job(),),
        pods=(pod(running_since=ago(40)),),
        moved=ago(40),
        # The trainer's clock may be wrong by anything.
        run=run(progress=Progress(epoch=0, epochs=1, step=3, time=ago(100_000))),
    )

    assert decide(replace(seen, moved=ago(5)), NOW).status.attempts[-1].reason is None
    assert withdrawn(replace(seen, moved=ago(25))).status.attempts[-1].reason == "Stalled"


@pytest.mark.parametrize(
    ("spec_part", "activity", "silent_s", "stalled"),
    [
        ({}, "1/7", STALL_S + 1, True),
        ({}, "1/7", STALL_S - 1, False),
        ({}, "", 100 * STALL_S, False),
        ({}, "0/7", 100 * STALL_S, False),
        ({"stallTimeoutSeconds": 0}, "1/7", 100 * STALL_S, False),
        ({"stallTimeoutSeconds": 20}, "", 25, True),
        ({"stallTimeoutSeconds": 7200}, "1/7", STALL_S + 1, False),
    ],
    ids=[
        *("by itself", "not yet", "who tells nothing may be silent", "an earlier attempt has told", "never"),
        *("asked for", "later"),
    ],
)
def test_who_tells_of_all_activity_is_taken_for_hung_without_being_asked_to(
    spec_part: dict[str, Any], activity: str, silent_s: int, stalled: bool
) -> None:
    since = ago(silent_s)
    seen = observed(
        spec=spec(**spec_part),
        jobs=(job(),),
        pods=(pod(running_since=since),),
        moved=since,
        run=run(activity=activity),
    )
    found = decide(seen, NOW)
    assert found.status.attempts[-1].reason == ("Stalled" if stalled else None)
    is_followed = activity.startswith("1/") and spec_part != {"stallTimeoutSeconds": 0}
    assert stalled or found.requeue_after_s == (60 if is_followed else None)


def test_a_hang_is_noticed_though_a_nodes_clock_is_ahead() -> None:
    ahead = observed(
        spec=spec(stallTimeoutSeconds=20), jobs=(job(),), pods=(pod(running_since=ago(-5000)),), moved=ago(25)
    )
    assert withdrawn(ahead).status.attempts[-1].reason == "Stalled"


def test_a_refusal_of_any_length_fits_into_a_status() -> None:
    result = settled(observed(refusal="x" * 100_000))

    assert len(result.attempts[-1].message or "") <= MESSAGE_LIMIT
    assert max(len(item.message) for item in result.conditions) <= MESSAGE_LIMIT


def test_suspend_and_resume() -> None:
    suspended = settled(observed(spec=spec(suspend=True), status=ended(Reason.SUSPENDED)))
    assert suspended.phase == "Suspended"
    assert condition(suspended, "Suspended") == ("True", "Suspended")

    resumed = settled(observed(status=suspended))
    assert resumed.attempt == 2
    assert events(suspended, resumed) == ["AttemptStarted", "Resumed"]
    assert resumed.failures == 0
    assert condition(resumed, "Suspended") == ("False", "Resumed")


@pytest.mark.parametrize(
    ("phase", "said", "parked"),
    [("Suspended", "RUNNING", True), ("Running", "RUNNING", False), ("Suspended", "SCHEDULED", False)],
    ids=["as it says", "the suspension is told first", "once"],
)
def test_the_run_of_a_suspended_training_does_not_stay_running(phase: str, said: str, parked: bool) -> None:
    over = attempt(running_time=ago(50), end_time=ago(1), reason="Suspended")
    seen = observed(spec=spec(suspend=True), status=status(over, phase=phase), run=run(status=said))
    decision = decide(seen, NOW)
    assert decision.actions == ((ParkRun(),) if parked else ())
    assert decision.status.phase == "Suspended"


def test_a_suspended_run_tells_of_the_checkpoint_that_it_made_last() -> None:
    """It is delivered while the pod ends, so nothing that was read before that tells of it."""
    checkpoint = Checkpoint(step=70, epoch=3, path="checkpoints/a.ckpt", sha256="0" * 64, size=1, time=ago(3))
    progress = Progress(epoch=3, epochs=9, step=70, steps=200, time=ago(2))
    status_before = status(attempt(running_time=ago(50), end_time=ago(1), reason="Suspended"), phase="Suspended")

    suspended = settled(
        observed(spec=spec(suspend=True), status=status_before, run=run(progress=progress, checkpoints=(checkpoint,)))
    )

    assert suspended.phase == "Suspended"
    assert suspended.last_checkpoint is not None
    assert suspended.last_checkpoint.step == 70
    assert suspended.progress is not None
    assert (suspended.progress.step, suspended.progress.estimated_completion_time) == (70, None)


def test_what_opening_an_attempt_has_read_is_told_also_where_its_job_can_not_be_made() -> None:
    checkpoint = Checkpoint(step=70, epoch=3, path="checkpoints/a.ckpt", sha256="0" * 64, size=1, time=ago(3))
    facts = run(attempt=2, checkpoints=(checkpoint,))

    told = decide(observed(status=status(attempt(2)), run=facts), NOW).status.last_checkpoint

    assert told is not None
    assert told.step == 70


@pytest.mark.parametrize(("pods", "exit_code"), [((ended_pod(143),), 143), ((), None)], ids=["seen", "gone"])
def test_an_attempt_that_was_ended_keeps_its_exit_code(pods: tuple[PodFacts, ...], exit_code: int | None) -> None:
    asked = status(attempt(reason="Stalled", message="No training step."))

    after = decide(observed(status=asked, jobs=(job(deleting=True),), pods=pods), NOW).status

    assert (after.attempts[0].reason, after.attempts[0].exit_code) == ("Stalled", exit_code)
    assert after.attempts[0].end_time == NOW


def test_a_place_that_a_queue_takes_back_and_gives_again_is_told() -> None:
    trained = status(attempt(running_time=ago(50)), phase="Running")
    admitted = settled(observed(status=trained, jobs=(job(queue="team-queue"),), pods=(pod(),)))
    evicted = settled(observed(status=admitted, jobs=(job(queue="team-queue", suspended=True),)))
    again = settled(
        observed(status=evicted, jobs=(job(queue="team-queue", started=ago(3)),), pods=(pod(running_since=ago(1)),))
    )

    assert events(admitted, evicted) == ["Evicted"]
    assert events(evicted, again) == ["Training", "Admitted"]
    first, second = (
        next(event.key for event in events_between(*pair) if event.reason == "Training")
        for pair in ((status(attempt()), admitted), (evicted, again))
    )
    assert first != second, "each is an Event of its own"


def events(old: TrainingRunStatus, new: TrainingRunStatus) -> list[str]:
    return [event.reason for event in events_between(old, new)]


def test_a_deleted_job_is_taken_for_preemption_once_its_pod_is_gone() -> None:
    vanished = job(finished=ago(POD_VANISHED_S + 1))

    result = settled(observed(jobs=(vanished,)))

    assert result.attempts[0].reason == "Preempted"
    assert result.attempt == 2


@pytest.mark.parametrize("there", [(), (pod(worker=0),)], ids=["one worker", "of two, one is left"])
def test_a_pod_that_goes_after_hours_is_not_taken_for_one_that_does_not_start(there: tuple[PodFacts, ...]) -> None:
    training = status(attempt(start_time=ago(7300), running_time=ago(7200), pod="run-a1-x"), phase="Running")
    seen = observed(
        spec=spec(resources={"workers": 1 + len(there)}),
        status=training,
        jobs=(job(created=ago(7300), started=ago(7290)),),
        pods=there,
    )

    decision = decide(seen, NOW)

    assert decision.actions == ()
    assert decision.status.phase == "Running"
    assert decision.status.attempts[-1].reason is None


def test_what_a_queue_has_evicted_hangs_no_more_than_it_trains() -> None:
    gone = ended_pod(143, running_since=ago(500), deleting=ago(100))
    waits = observed(
        spec=spec(stallTimeoutSeconds=20),
        status=status(attempt(running_time=ago(500)), phase="Pending"),
        jobs=(job(queue="team-queue", suspended=True, started=ago(510)),),
        pods=(gone,),
        moved=ago(400),
    )

    assert decide(waits, NOW).status.attempts[-1].reason is None


def test_what_a_queue_evicts_does_not_hang_in_its_grace_period() -> None:
    """It is Pending by then, and progress is read of those that run only."""
    ending = observed(
        spec=spec(stallTimeoutSeconds=20),
        status=status(attempt(running_time=ago(500)), phase="Pending"),
        jobs=(job(queue="team-queue", suspended=True, started=ago(510)),),
        pods=(pod(running_since=ago(500), deleting=ago(-30)),),
        moved=ago(400),
    )

    assert decide(ending, NOW).status.attempts[-1].reason is None


def test_what_a_queue_has_admitted_again_and_can_not_be_made_is_given_up() -> None:
    gone = ended_pod(143, running_since=ago(500), deleting=ago(100))
    again = observed(
        spec=spec(pendingDeadlineSeconds=60),
        status=status(attempt(running_time=ago(500)), phase="Pending"),
        jobs=(job(queue="team-queue", started=ago(61)),),
        pods=(gone,),
    )

    assert withdrawn(again).status.attempts[-1].reason == "PodNotStarted"


def test_a_queued_group_whose_pods_go_after_hours_is_not_taken_for_one_that_does_not_start() -> None:
    training = status(attempt(start_time=ago(7300), running_time=ago(7200)), phase="Running")
    seen = observed(
        spec=spec(resources={"workers": 2}),
        status=training,
        jobs=(job(created=ago(7300), started=ago(7290), queue="team-queue"),),
        pods=(pod(worker=0, deleting=ago(1)),),
    )

    assert decide(seen, NOW).status.attempts[-1].reason is None


def test_what_a_queue_has_admitted_again_has_the_pending_deadline_anew() -> None:
    again = observed(
        spec=spec(pendingDeadlineSeconds=60),
        status=status(attempt(running_time=ago(500)), phase="Pending"),
        jobs=(job(queue="team-queue", started=ago(61)),),
    )

    assert withdrawn(again).status.attempts[-1].reason == "PodNotStarted"


def test_a_job_that_somebody_suspended_says_so() -> None:
    held = settled(observed(jobs=(job(suspended=True),)))

    assert condition(held, "Complete") == ("False", "JobSuspended")


def test_a_job_that_somebody_suspended_is_still_the_same_attempt() -> None:
    trained = status(attempt(running_time=ago(50)), phase="Running")
    gone = ended_pod(143, deleting=ago(3))
    held = settled(observed(status=trained, jobs=(job(suspended=True),), pods=(gone,)))
    assert (condition(held, "Complete"), held.attempts[-1].reason) == (("False", "JobSuspended"), None)

    for pods in ((gone,), (gone, pod(name="run-a1-y", created=ago(2), phase="Pending", running_since=None))):
        resumed = settled(observed(status=held, jobs=(job(started=ago(2)),), pods=pods))
        assert (resumed.attempt, resumed.attempts[-1].reason) == (1, None), "its Job makes another pod"


def test_a_group_that_lost_a_node_is_ended_whole() -> None:
    """The other workers wait for the lost one, and hold their GPUs."""
    lost = pod(1, worker=1, deleting=ago(LOST_POD_S + 1))
    group = observed(spec=spec(resources={"workers": 2}), run=run(), jobs=(job(),), pods=(pod(1), lost))

    told = replace(group, status=decide(group, NOW).status)
    assert told.status.attempts[-1].reason == "NodeLost"
    assert decide(told, NOW).actions == (DeleteJob("run-a1"),)
    ending = replace(told, jobs=(job(deleting=True),))
    assert decide(ending, NOW).status.attempts[-1].end_time is None, "the other one may make a checkpoint"
    over = replace(ending, pods=(lost,))
    assert decide(over, NOW).status.attempts[0].end_time == NOW


@pytest.mark.parametrize("wrong", [-3600, 3600], ids=["ahead", "behind"])
def test_a_nodes_clock_that_is_wrong_holds_nothing_up(wrong: int) -> None:
    """What is ahead by an hour must not make the next attempt wait for an hour."""
    result = decide(observed(jobs=(job(),), pods=(ended_pod(3, finished=ago(wrong)),)), NOW)

    ended = result.status.attempts[0]
    assert ended.start_time is not None
    assert ended.end_time is not None
    assert ended.start_time <= ended.end_time <= NOW
    assert (result.requeue_after_s or 0) <= RETRY_DELAY_S


def test_progress_best_metric_and_checkpoint_come_from_mlflow() -> None:
    facts = run(
        progress=Progress(epoch=1, epochs=4, step=10, steps=40, time=ago(1)),
        best=BestMetric(name="val/loss", value=0.25, step=9),
        checkpoints=(Checkpoint(step=8, path="checkpoints/8.ckpt", sha256="", size=1, time=ago(2), last=True),),
    )

    result = settled(observed(jobs=(job(),), pods=(pod(),), run=facts))

    assert result.phase == "Running"
    assert result.progress is not None
    assert (result.progress.step, result.progress.percent) == (10, 25)
    assert result.best_metric == BestMetricStatus(name="val/loss", value="0.25")
    assert result.last_checkpoint == CheckpointStatus(step=8, uri="runs:/r1/checkpoints/8.ckpt", time=ago(2))


def test_deciding_changes_nothing_twice() -> None:
    for name, (seen, _) in ACTIONS.items():
        decision = decide(seen, NOW)
        if not decision.actions:
            again = decide(replace(seen, status=decision.status), NOW)
            assert again.status == decision.status, name


# --- logs, memory, queues, expiry ---------------------------------------------------------------------------------

GROWTH = {"retries": {"memoryGrowth": {"factor": 2, "max": "40Gi"}}}


def test_the_log_of_an_attempt_is_kept_before_anything_else_is_done_about_its_end() -> None:
    seen = observed(logs={}, jobs=(job(),), pods=(ended_pod(0),))

    assert decide(seen, NOW).actions == (KeepLogs(1),)
    kept = decide(replace(seen, logs={1: "runs:/r1/attempts/1"}), NOW)
    assert kept.actions == (EndRun("FINISHED"),)
    assert kept.status.attempts[-1].logs == "runs:/r1/attempts/1"


def test_a_gpu_is_freed_even_if_the_log_can_not_be_kept() -> None:
    seen = observed(logs={}, status=status(attempt(reason="Stalled")), jobs=(job(),), pods=(pod(),))

    assert decide(seen, NOW).actions == (KeepLogs(1, pods_go=True),)
    for kept in ("", None, "runs:/r1/attempts/1"):
        assert decide(replace(seen, logs={1: kept}), NOW).actions == (DeleteJob("run-a1"),)


def test_a_pod_that_never_ran_has_no_log() -> None:
    waiting = pod(phase="Pending", running_since=None)
    seen = observed(logs={}, status=status(attempt(reason="Unschedulable")), jobs=(job(),), pods=(waiting,))

    assert decide(seen, NOW).actions == (DeleteJob("run-a1"),)


def out_of_memory(**more: Any) -> Observed:
    lost = attempt(reason="HostOutOfMemory", end_time=ago(60), message="because", **more)
    return observed(spec=spec(**GROWTH), status=status(lost, failures=1))


def test_memory_grows_after_it_ran_out() -> None:
    grown = decide(out_of_memory(), NOW).status

    assert (grown.attempt, grown.attempts[-1].memory) == (2, "32768Mi")


def test_memory_grows_up_to_its_bound_and_no_further() -> None:
    assert decide(out_of_memory(memory="32Gi"), NOW).status.attempts[-1].memory == "40Gi"

    end = decide(out_of_memory(memory="40Gi"), NOW)
    assert end.actions == (EndRun("FAILED"),)
    failed = decide(replace(out_of_memory(memory="40Gi"), run=run(status="FAILED")), NOW).status
    assert "spec.retries.memoryGrowth.max allows (40Gi)" in condition_of(failed, "Failed").message


def test_memory_that_grew_stays_for_the_attempts_after() -> None:
    lost = attempt(reason="Killed", end_time=ago(60), memory="32Gi")

    assert decide(observed(status=status(lost, failures=1)), NOW).status.attempts[-1].memory == "32Gi"


def test_a_job_in_a_queue_waits_without_a_deadline() -> None:
    old = status(attempt(start_time=ago(100_000)), start_time=ago(100_000))
    decision = decide(observed(status=old, jobs=(QUEUED,)), NOW)

    assert (decision.status.phase, decision.actions) == ("Pending", ())
    admitted = condition_of(decision.status, "Admitted")
    assert (admitted.status, admitted.reason) == ("False", "Queued")
    assert "queue team-queue" in admitted.message


def test_the_deadline_of_an_admitted_job_counts_from_its_admission() -> None:
    old = status(attempt(start_time=ago(100_000)), start_time=ago(100_000))
    admitted = job(queue="team-queue", started=ago(10))
    decision = decide(observed(status=old, jobs=(admitted,), pods=(pod(phase="Pending", running_since=None),)), NOW)

    assert decision.status.phase == "Pending"
    assert condition_of(decision.status, "Admitted").status == "True"


def test_an_evicted_job_is_still_the_same_attempt() -> None:
    before = status(attempt(running_time=ago(50)), phase="Running")
    gone = ended_pod(143, deleting=ago(3))
    for seen in (
        observed(status=before, jobs=(QUEUED,), pods=(gone,)),
        observed(status=before, jobs=(QUEUED,)),
    ):
        decision = decide(seen, NOW)
        assert (decision.actions, decision.status.attempt, decision.status.phase) == ((), 1, "Pending")
        assert decision.status.attempts[-1].reason is None
        assert condition_of(decision.status, "Admitted").reason == "Evicted"
    back = decide(observed(status=before, jobs=(job(queue="team-queue"),), pods=(pod(),)), NOW).status
    assert (back.phase, condition_of(back, "Admitted").status) == ("Running", "True")


def test_what_a_queue_may_not_admit_again_says_how_it_goes_on() -> None:
    before = status(attempt(running_time=ago(50)), phase="Running")
    limited = replace(QUEUED, execution_limit="30")

    told = condition_of(settled(observed(status=before, jobs=(limited,))), "Admitted").message
    unlimited = condition_of(settled(observed(status=before, jobs=(QUEUED,))), "Admitted").message

    assert told.startswith(unlimited)
    assert "kueue.x-k8s.io/max-exec-time-seconds (30)" in told
    assert "spec.suspend" in told


def test_a_suspended_run_has_given_its_place_back_to_the_queue() -> None:
    before = status(attempt(running_time=ago(50)), phase="Running")
    admitted = settled(observed(status=before, jobs=(job(queue="team-queue"),), pods=(pod(),)))
    over = admitted.attempts[-1].model_copy(update={"reason": "Suspended", "end_time": ago(1)})
    gone = admitted.model_copy(update={"attempts": [over]})

    suspended = settled(observed(spec=spec(suspend=True), status=gone))

    assert condition(suspended, "Admitted") == ("False", "Released")
    assert events(gone, suspended) == ["Released", "Suspended"]


def test_a_suspended_run_of_no_queue_says_nothing_of_one() -> None:
    suspended = settled(observed(spec=spec(suspend=True), status=ended(Reason.SUSPENDED)))

    assert all(item.type != "Admitted" for item in suspended.conditions)


def test_a_finished_run_loses_its_jobs_after_its_time() -> None:
    done = status(phase="Succeeded", completion_time=ago(100))
    jobs = (job(finished=ago(100)),)
    seen = observed(spec=spec(ttlSecondsAfterFinished=100), status=done, jobs=jobs, has_finalizer=False)

    assert decide(seen, NOW).actions == (DeleteJob("run-a1"),)
    later = decide(replace(seen, spec=spec(ttlSecondsAfterFinished=150)), NOW)
    assert (later.actions, later.requeue_after_s) == ((), 50)
    assert decide(replace(seen, jobs=()), NOW) == Decision((), done.model_copy(update={"observed_generation": 1}))


def test_a_change_of_a_finished_run_is_acknowledged() -> None:
    """Also by its conditions: kubectl waits for one that speaks of the newest generation."""
    done = settled(observed(status=ended(Reason.COMPLETED)))

    decision = decide(observed(status=done, generation=2, has_finalizer=False), NOW)

    told = [item.model_copy(update={"observed_generation": 2}) for item in done.conditions]
    assert told
    assert decision == Decision((), done.model_copy(update={"observed_generation": 2, "conditions": told}))


def test_the_completion_is_estimated_at_the_pace_of_the_attempt() -> None:
    progress = Progress(epoch=1, epochs=4, step=60, steps=110, first_step=10, time=NOW)
    seen = observed(
        status=status(attempt(running_time=ago(50)), phase="Running"),
        jobs=(job(),),
        pods=(pod(),),
        run=run(progress=progress),
    )

    estimated = decide(seen, NOW).status.progress
    assert estimated is not None
    assert estimated.estimated_completion_time == ago(-50)


STILL = {"spec": spec(stallTimeoutSeconds=20), "jobs": (job(),), "pods": (pod(running_since=ago(500)),)}


@pytest.mark.parametrize("since", [None, ago(5)], ids=["MLflow is away", "it has only just come back"])
def test_silence_that_nobody_could_hear_is_no_hang(since: Any) -> None:
    assert decide(observed(**STILL, moved=since), NOW).status.attempts[-1].reason is None


def test_an_operator_that_has_just_started_takes_nothing_for_hung() -> None:
    moved = Progress(epoch=0, epochs=1, step=3, time=ago(400))
    known = status(attempt(running_time=ago(500)), phase="Running")
    first = decide(observed(**STILL, status=known, moved=ago(1), run=run(progress=moved)), NOW)

    assert first.status.attempts[-1].reason is None


def trouble(**more: Any) -> Trouble:
    return Trouble(**{"uid": UID, "attempt": 1, "message": "exceeded quota: team", "tried": NOW, **more})


def test_a_job_that_can_not_be_created_says_why_and_is_not_waited_for_for_ever() -> None:
    seen = observed(run=run(), trouble=trouble(since=NOW))
    waiting = decide(seen, NOW)
    assert waiting.actions == (CreateJob(1),)
    assert "exceeded quota: team" in condition_of(waiting.status, "Complete").message

    bounded = replace(seen, spec=spec(pendingDeadlineSeconds=30), status=status(attempt(start_time=ago(9000))))
    assert decide(replace(bounded, trouble=trouble(since=ago(5))), NOW).actions == (CreateJob(1),), (
        "what came before is none"
    )
    for another in ({"attempt": 2}, {"uid": "another run of this name"}):
        assert decide(replace(bounded, trouble=trouble(since=ago(9000), **another)), NOW).actions == (CreateJob(1),)
    late = settled(replace(bounded, trouble=trouble(since=ago(31))))
    assert condition(late, "Failed") == ("True", "PodNotStarted")
    assert "exceeded quota: team" in condition_of(late, "Failed").message


def test_a_job_is_tried_once_even_if_the_operator_was_away_for_long() -> None:
    seen = observed(run=run(), spec=spec(pendingDeadlineSeconds=30), status=status(attempt(start_time=ago(9000))))

    assert decide(seen, NOW).actions == (CreateJob(1),)


def test_mlflow_that_is_away_before_an_attempt_is_said_to_be_waited_for() -> None:
    decision = decide(observed(status=status(attempt(2)), run=run(attempt=1)), NOW)

    assert decision.actions == (OpenAttempt(2),)
    (condition,) = decision.status.conditions
    assert (condition.reason, condition.message) == ("TrackingUnavailable", "Waiting for MLflow to open attempt 2.")


LEFT = "Its Job was deleted, and its pod run-a1-x goes on without it: delete the pod for another attempt."


def test_a_pod_whose_job_was_deleted_without_it_is_followed() -> None:
    decision = decide(observed(run=run(), pods=(pod(),)), NOW)

    assert (decision.actions, decision.status.phase, decision.status.attempts[0].node) == ((), "Running", "node1")
    (condition,) = decision.status.conditions
    assert (condition.status, condition.reason, condition.message) == ("False", "JobDeleted", LEFT)
    again = decide(observed(run=run(), pods=(pod(),), status=decision.status), NOW)
    assert (again.actions, again.status) == ((), decision.status)
    own = decide(observed(run=run(), pods=(pod(job_uid="j1"),)), NOW)
    assert (own.status.phase, own.requeue_after_s) == ("Pending", POLL_S), (
        "the garbage collector deletes it in a moment"
    )


def test_it_is_ended_for_what_ends_others() -> None:
    hangs = {
        "status": status(attempt(running_time=ago(5000))),
        "pods": (pod(running_since=ago(5000)),),
        "moved": ago(5000),
    }
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("Stalled", {"stallTimeoutSeconds": 600}, hangs),
        ("DeadlineExceeded", {"activeDeadlineSeconds": 30}, {}),
        ("Suspended", {"suspend": True}, {}),
        ("PodNotStarted", {"pendingDeadlineSeconds": 30}, {"pods": (pod(phase="Pending", running_since=None),)}),
        ("Preempted", {"resources": {"workers": 2}}, {"status": status(attempt(running_time=ago(50)))}),
    ]
    for reason, wanted, seen in cases:
        decision = decide(observed(**{"spec": spec(**wanted), "pods": (pod(),), **seen}), NOW)
        attempt_ = decision.status.attempts[0]
        assert (attempt_.reason, attempt_.ending_time, attempt_.end_time) == (reason, NOW, None)
        waits = decide(observed(spec=spec(**wanted), pods=(pod(),), status=decision.status), NOW)
        assert "Its Job was deleted before, and nothing ends its pod run-a1-x" in waits.status.conditions[0].message


def test_a_suspension_tells_a_trainer_that_was_given_up_that_it_is_over() -> None:
    seen = observed(
        spec=spec(suspend=True),
        status=status(attempt(reason="Suspended", message="Suspended.", ending_time=ago(LOST_POD_S + 1))),
        pods=(pod(),),
    )
    decision = decide(seen, NOW)
    assert (decision.actions, decision.status.phase) == ((OpenAttempt(2),), "Suspended")

    for known in ({"run": run(attempt=2)}, {"refusal": "the run was deleted"}, {"pods": ()}):
        after = decide(replace(seen, **known), NOW)
        assert (after.actions, after.status.phase) == ((), "Suspended")


def test_a_job_just_created_is_not_late_however_long_that_took() -> None:
    """MLflow was away for longer than the deadline before the attempt could be opened."""
    waited = status(attempt(start_time=ago(9000)))
    seen = observed(run=run(), spec=spec(pendingDeadlineSeconds=30), status=waited, jobs=(job(created=ago(1)),))

    assert decide(seen, NOW).status.attempts[-1].reason is None
    late = decide(replace(seen, jobs=(job(created=ago(31)),)), NOW)
    assert late.status.attempts[-1].reason == "PodNotStarted"
    queued = decide(replace(seen, jobs=(job(created=ago(9000), queue="team-queue"),)), NOW)
    assert queued.status.attempts[-1].reason is None, "its queue has just let it go"


GROUP = {"spec": spec(resources={"workers": 2})}
WITHOUT_PODS: dict[str, tuple[dict[str, Any], bool]] = {
    "for a while": ({}, True),
    "not for long": ({"jobs": (job(created=ago(PENDING_REPORT_S - 1)),)}, False),
    "for as long as it may": (
        {"spec": spec(pendingDeadlineSeconds=5), "jobs": (job(created=ago(PENDING_REPORT_S - 1)),)},
        True,
    ),
    "one of two": ({**GROUP, "pods": (pod(worker=0),)}, True),
    "a pod that waits says so itself": ({"pods": (pod(phase="Pending", running_since=None),)}, False),
    "one of two waits": ({**GROUP, "pods": (pod(worker=0, phase="Pending", running_since=None),)}, False),
    "both run": ({**GROUP, "pods": (pod(worker=0), pod(worker=1))}, False),
    "a pod that has ended says so itself": ({"pods": (ended_pod(3),)}, False),
    "held": ({"jobs": (QUEUED,)}, False),
    "its pod is gone after hours": ({"status": status(attempt(running_time=ago(9000)))}, False),
    "let go again, and its pod of before is still known": (
        {
            "status": status(attempt(running_time=ago(500)), phase="Pending"),
            "jobs": (job(queue="team-queue", started=ago(61)),),
            "pods": (ended_pod(143, created=ago(510), deleting=ago(100)),),
        },
        True,
    ),
}


@pytest.mark.parametrize(("seen", "is_asked"), WITHOUT_PODS.values(), ids=WITHOUT_PODS.keys())
def test_a_job_that_lacks_pods_is_asked_why(seen: dict[str, Any], is_asked: bool) -> None:
    actions = decide(observed(**{"jobs": (job(),), "podless": None, **seen}), NOW).actions

    assert (actions == (AskJob("run-a1"),)) == is_asked, actions


def test_what_a_job_has_said_is_told_until_it_is_asked_again_or_given_up() -> None:
    silent = observed(jobs=(job(uid="j1"),), podless=Podless("j1", "exceeded quota: team", NOW))
    told = decide(silent, NOW)
    assert (told.actions, told.requeue_after_s) == ((), PODLESS_POLL_S)
    waits = condition_of(told.status, "Complete")
    assert (waits.reason, waits.message.endswith(" exceeded quota: team")) == ("PodNotStarted", True)

    for other in (Podless("j1", "", ago(PODLESS_POLL_S)), Podless("the one before", "", NOW)):
        assert decide(replace(silent, podless=other), NOW).actions == (AskJob("run-a1"),)
    late = withdrawn(replace(silent, spec=spec(pendingDeadlineSeconds=30)))
    assert "exceeded quota: team" in (late.status.attempts[-1].message or "")


def test_a_run_that_mlflow_refuses_fails() -> None:
    refused = settled(observed(status=NEW, refusal="MLflow refuses the run: bad tag"))

    assert condition(refused, "Failed") == ("True", "InvalidConfiguration")


def test_a_trainer_that_nobody_saw_end_is_kept_from_the_run_that_is_ended() -> None:
    def end(*pods: PodFacts, **more: Any) -> tuple[Any, ...]:
        late = attempt(reason="DeadlineExceeded", running_time=ago(900), end_time=ago(1), **more)
        return decide(observed(run=run(), status=status(late), pods=pods), NOW).actions

    assert end(pod(deleting=ago(LOST_POD_S + 1))) == (EndRun("FAILED", fence=True),), "its node was lost"
    assert end() == (EndRun("FAILED", fence=True),), "its pod was removed by force"
    assert end(ended_pod(143)) == end(exit_code=143) == (EndRun("FAILED"),)
    deleted = observed(deleted=ago(LOST_POD_S + 10), run=run(), pods=(pod(deleting=ago(LOST_POD_S + 1)),))
    assert decide(deleted, NOW).actions == (EndRun("KILLED", fence=True),)


def test_a_job_that_succeeded_is_no_sign_of_success_once_its_pod_is_gone() -> None:
    done = job(finished=ago(POD_VANISHED_S), succeeded=True)
    gone = decide(observed(run=run(), jobs=(done,)), NOW).status

    assert gone.attempts[0].reason == "Preempted"
    assert gone.failures == 0
    seen = decide(observed(run=run(), jobs=(done,), pods=(ended_pod(0),)), NOW)
    assert seen.actions == (EndRun("FINISHED"),)


def test_the_next_attempt_waits_for_no_log() -> None:
    ended = status(attempt(reason="Preempted", running_time=ago(900), end_time=ago(60)))
    seen = observed(logs={1: None}, status=ended, jobs=(job(),), pods=(ended_pod(143),))

    assert decide(seen, NOW).status.attempt == 2
    later = observed(logs={1: "runs:/r1/attempts/1"}, run=run(attempt=2), status=decide(seen, NOW).status)
    assert [each.logs for each in decide(later, NOW).status.attempts] == ["runs:/r1/attempts/1", None]


def test_what_an_operator_left_unkept_is_kept_by_the_next_one() -> None:
    old = status(*(attempt(number, reason="Preempted", end_time=ago(60)) for number in (1, 2)), attempt(3))
    pods = (ended_pod(143), ended_pod(143, 2), pod(3))
    seen = observed(logs={}, run=run(attempt=3), status=old, jobs=(job(1), job(2), job(3)), pods=pods)

    assert decide(seen, NOW).actions == (KeepLogs(1), KeepLogs(2))
    trains = decide(replace(seen, logs={1: None, 2: ""}), NOW)
    assert trains.status.phase == "Running"
    assert trains.requeue_after_s == KEPT_POLL_S
    assert decide(replace(seen, logs={1: "", 2: ""}), NOW).requeue_after_s != KEPT_POLL_S


def test_pods_do_not_expire_before_their_log_is_kept_but_not_never_either() -> None:
    def expiry(finished_s: float, log: str | None) -> tuple[Any, ...]:
        ended = attempt(reason="Completed", end_time=ago(finished_s))
        done = status(ended, phase="Succeeded", completion_time=ago(finished_s))
        more: dict[str, Any] = {"jobs": (job(finished=ago(finished_s)),), "pods": (ended_pod(0),)}
        spec_ = spec(ttlSecondsAfterFinished=0)
        return decide(observed(spec=spec_, status=done, logs={1: log}, has_finalizer=False, **more), NOW).actions

    gone = (DeleteJob("run-a1"),)
    assert expiry(KEEP_LOGS_LIMIT_S - 1, None) == ()
    assert expiry(KEEP_LOGS_LIMIT_S, None) == gone
    assert expiry(1, "") == expiry(1, "runs:/r1/attempts/1") == gone


ENDED = attempt(reason="Completed", end_time=ago(60))
BEFORE = attempt(reason="Preempted", end_time=ago(60))
KEEPING: dict[str, Any] = {
    "deletion": {"deleted": ago(1), "status": status(ENDED)},
    "deletion of a run whose next attempt trains": {"deleted": ago(1), "status": status(BEFORE, attempt(2))},
    "expiry": {
        "status": status(ENDED, phase="Succeeded", completion_time=ago(KEEP_LOGS_LIMIT_S)),
        "has_finalizer": False,
    },
    "a Job that is held though its attempt is over": {"status": status(BEFORE), "jobs": (job(suspended=True),)},
    "a suspension": {"status": status(attempt(reason="Suspended")), "jobs": (job(),), "pods": (pod(),)},
    "a sidecar in the next attempt's way": {
        "status": status(BEFORE, attempt(2)),
        "run": run(attempt=2),
        "jobs": (job(),),
        "pods": (pod(exit_code=143, finished=ago(11)),),
    },
}


@pytest.mark.parametrize("seen", KEEPING.values(), ids=KEEPING.keys())
def test_an_account_that_only_queues_is_read_before_its_pods_go(seen: dict[str, Any]) -> None:
    there = {"jobs": (job(finished=ago(60)),), "pods": (ended_pod(0),)}
    spec_ = spec(ttlSecondsAfterFinished=0)
    queued = observed(**{"spec": spec_, "logs": {1: None}, "unread": frozenset({1}), **there, **seen})

    assert decide(queued, NOW).actions == (KeepLogs(1, pods_go=True),)
    then = decide(replace(queued, unread=frozenset()), NOW).actions
    assert not any(isinstance(action, KeepLogs) for action in then), "asked for once"


def test_a_sidecar_does_not_keep_the_gpu_of_a_finished_run() -> None:
    done = status(phase="Succeeded", completion_time=ago(61))
    seen = observed(status=done, jobs=(job(),), pods=(pod(exit_code=0),), has_finalizer=False)

    assert decide(seen, NOW).actions == (DeleteJob("run-a1"),)
    soon = decide(replace(seen, status=status(phase="Succeeded", completion_time=ago(5))), NOW)
    assert soon.actions == ()
    assert soon.requeue_after_s is not None


def test_a_sidecar_does_not_keep_the_gpu_from_the_next_attempt() -> None:
    ended = attempt(1, reason="Unknown", end_time=ago(60))
    beside = pod(1, exit_code=3, finished=ago(11))
    seen = observed(run=run(attempt=2), status=status(ended, attempt(2)), jobs=(job(1),), pods=(beside,))

    assert decide(seen, NOW).actions == (DeleteJob("run-a1"),)
    going = decide(replace(seen, jobs=(job(1, deleting=True),)), NOW)
    assert going.actions == (CreateJob(2),)
    soon = decide(replace(seen, pods=(replace(beside, finished=ago(1)),)), NOW)
    assert (soon.actions, soon.requeue_after_s) == ((), POLL_S), "it may be about to say that it has ended"
    over = decide(replace(seen, pods=(ended_pod(3),)), NOW)
    assert over.actions == (CreateJob(2),), "its Job stays, with its pod's log"


def test_what_comes_back_at_once_is_tried_again_ever_later() -> None:
    """A node whose disk is full takes the pod, evicts it, and takes it again."""

    def wait(*ends: Any) -> float | None:
        return decide(observed(run=run(), status=status(*ends)), NOW).requeue_after_s

    def preempted(number: int, trained_s: float) -> Any:
        return attempt(number, reason="Preempted", running_time=ago(1 + trained_s), end_time=ago(1))

    assert wait(preempted(1, 5)) is None, "the first time at once"
    assert wait(preempted(1, 5), preempted(2, 5)) == 9
    assert wait(*(preempted(number, 5) for number in range(1, 5))) == 39
    assert wait(*(preempted(number, 5) for number in range(1, 10))) == 299
    assert wait(preempted(1, 5), preempted(2, 3600)) is None, "it got further"


def asked_to_end(*numbers: int, **more: Any) -> list[Any]:
    """Attempts that SIGTERM has ended."""
    known = {"reason": "Preempted", "exit_code": 143, "end_time": ago(100), "running_time": ago(900)}
    return [attempt(number, **{**known, **more}) for number in numbers]


def made(seconds_ago: float) -> CheckpointStatus:
    return CheckpointStatus(step=70, uri="runs:/r1/checkpoints/a.ckpt", time=ago(seconds_ago))


IN_VAIN = (*asked_to_end(1, 2, 3), attempt(4))
SIGTERMS: dict[str, tuple[TrainingRunStatus, PodFacts, str]] = {
    "again and again": (status(*IN_VAIN), ended_pod(143, 4), "Killed"),
    "also after it was called so": (
        status(*asked_to_end(1, 2), *asked_to_end(3, reason="Killed"), attempt(4)),
        ended_pod(143, 4),
        "Killed",
    ),
    "no checkpoint since": (status(*IN_VAIN, last_checkpoint=made(901)), ended_pod(143, 4), "Killed"),
    "a checkpoint since": (status(*IN_VAIN, last_checkpoint=made(899)), ended_pod(143, 4), "Preempted"),
    "not that often": (status(*asked_to_end(1, 2), attempt(3)), ended_pod(143, 3), "Preempted"),
    "not in a row": (
        status(*asked_to_end(1, 2), *asked_to_end(3, reason="Unknown", exit_code=3), attempt(4)),
        ended_pod(143, 4),
        "Preempted",
    ),
    "deleted": (status(*IN_VAIN), ended_pod(143, 4, deleting=ago(1)), "Preempted"),
    "evicted": (status(*IN_VAIN), ended_pod(143, 4, disruption="EvictionByEvictionAPI"), "Preempted"),
}


@pytest.mark.parametrize(("known", "over", "reason"), SIGTERMS.values(), ids=SIGTERMS.keys())
def test_a_sigterm_that_nobody_owns_up_to_costs_a_retry_once_it_comes_in_vain(
    known: TrainingRunStatus, over: PodFacts, reason: str
) -> None:
    """A probe that a user has added ends the trainer at every start, say: nothing may loop."""
    after = decide(observed(status=known, jobs=(job(over.attempt),), pods=(over,)), NOW).status

    assert (after.attempts[-1].reason if after.attempt == over.attempt else after.attempts[-2].reason) == reason
    assert after.failures == (reason == "Killed")


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ("", ""),
        ("Epoch 3: loss 0.2\n", " Epoch 3: loss 0.2"),
        (json.dumps({"reason": "Preempted", "message": "Asked to end before step 1."}), " Asked to end before step 1."),
    ],
    ids=["nothing", "a log", "words"],
)
def test_a_sigterm_in_vain_is_told_in_the_pods_words_or_the_logs(left: str, told: str) -> None:
    after = decide(observed(status=status(*IN_VAIN), jobs=(job(4),), pods=(ended_pod(143, 4, last_words=left),)), NOW)

    killed = next(item for item in after.status.attempts if item.number == 4)
    words = "It was asked to end (SIGTERM) once more by nobody who owns up to it, and no checkpoint was made since"
    assert killed.message == f"{words} attempt 1.{told}"


def test_a_pod_of_an_earlier_job_of_its_name_is_not_how_an_attempt_ends() -> None:
    """As of one that was deleted before its pod ran, and made again."""
    gone = ended_pod(143, job_uid="first")
    seen = observed(run=run(), jobs=(job(uid="second"),), pods=(gone,))

    assert [item.reason for item in decide(seen, NOW).status.attempts] == [None]
    for of in (replace(seen, pods=(replace(gone, job_uid="second"),)), replace(seen, jobs=(job(),))):
        assert decide(of, NOW).status.attempts[0].reason == "Preempted", "its own, or nobody can tell"


def test_a_pod_that_its_node_refused_says_so() -> None:
    refused = pod(phase="Failed", running_since=None, refusal="OutOfcpu: Node didn't have enough resource: cpu")
    judged = judge_pod(refused)

    assert judged is not None
    assert "OutOfcpu: Node didn't have enough resource" in judged.message


def test_a_password_in_last_words_does_not_reach_the_status() -> None:
    words = "could not connect to postgresql://reader:hunter2@db/heimdall"
    judged = judge_pod(ended_pod(1, last_words=words))

    assert judged is not None
    assert "hunter2" not in judged.message
    assert "db/heimdall" in judged.message


WORDLESS: dict[str, dict[str, Any]] = {
    **{f"exit code {code}": {"exit_code": code} for code in (78, 79, 80, 81, 137, 143)},
    "out of memory": {"exit_code": 137, "killed_for_memory": True},
    "its own storage": {"exit_code": 137, "exceeded_storage": "Usage of EmptyDir volume exceeds the limit. "},
    "a lost node": {"exit_code": 137, "disruption": "DeletionByTaintManager"},
    "an eviction": {"exit_code": 143, "disruption": "EvictionByEvictionAPI"},
    "not within its grace period": {"exit_code": 137, "deleting": ago(1)},
}


@pytest.mark.parametrize("how", WORDLESS.values(), ids=WORDLESS.keys())
@pytest.mark.parametrize("limit", [1, 500], ids=["short", "long"])
def test_the_last_lines_of_the_log_stand_behind_what_is_known(how: dict[str, Any], limit: int) -> None:
    known = judge_pod(ended_pod(**how))
    log = limit * "step 7\n" + "RuntimeError: NCCL timeout at nccl://me:hunter2@node1"
    told = judge_pod(ended_pod(**how, last_words=f"{log}\n"))

    assert known is not None
    assert told is not None
    assert told.reason == known.reason
    assert told.message.startswith(f"{known.message} step 7\n"), "what is known is not cut"
    assert told.message.endswith("step 7\nRuntimeError: NCCL timeout at nccl://***@node1")
    assert len(told.message) <= MESSAGE_LIMIT


def test_what_a_node_says_that_lost_track_is_no_last_word() -> None:
    words = "The container could not be located when the pod was terminated"
    how = {"disruption": "TerminationByKubelet", "lost_track": True}

    assert judge_pod(ended_pod(137, last_words=words, **how)) == judge_pod(ended_pod(137, **how))


@pytest.mark.parametrize(("reason", "told"), [("Stalled", " watchdog: rank 3 hangs"), ("Suspended", "")])
def test_an_attempt_that_was_ended_for_its_fault_tells_what_its_pod_said(reason: str, told: str) -> None:
    asked = status(attempt(reason=reason, message="No training step."))
    over = ended_pod(137, last_words="watchdog: rank 3 hangs\n")

    after = decide(observed(status=asked, jobs=(job(deleting=True),), pods=(over,)), NOW).status

    assert after.attempts[0].message == f"No training step.{told}"
