"""What is read from objects as the API server gives them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heimdall_api.contract import Reason
from heimdall_operator.decide import decide
from heimdall_operator.failures import judge_pod, parse_last_words
from heimdall_operator.observe import NESTING_LIMIT, job_facts, observe, pod_facts, refused_pods

STAMP = "2026-11-01T12:00:00Z"


def raw_pod(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "run-a1-x",
            "namespace": "team",
            "creationTimestamp": STAMP,
            "labels": {"training.heimdall.dev/attempt": "1"},
        },
        "spec": {"nodeName": "node1"},
        "status": status,
    }


def deleted(pod: dict[str, Any]) -> dict[str, Any]:
    return {**pod, "metadata": {**pod["metadata"], "deletionTimestamp": STAMP}}


def terminated(**state: Any) -> list[dict[str, Any]]:
    return [{"state": {"terminated": {"startedAt": STAMP, "finishedAt": STAMP, **state}}}]


CASES = {
    "OOMKilled": (
        raw_pod(phase="Failed", containerStatuses=terminated(exitCode=137, reason="OOMKilled")),
        Reason.HOST_OUT_OF_MEMORY,
    ),
    "evicted before it ran": (raw_pod(phase="Failed", reason="Evicted"), Reason.PREEMPTED),
    "deleted before it ran": (deleted(raw_pod(phase="Failed")), Reason.PREEMPTED),
    "evicted for its node's sake": (
        raw_pod(
            phase="Failed", reason="Evicted", message="The node was low on resource: memory. Threshold quantity: 1"
        ),
        Reason.PREEMPTED,
    ),
    **{
        f"evicted for {what}": (
            raw_pod(
                phase="Failed",
                reason="Evicted",
                message=words,
                conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}],
                containerStatuses=terminated(exitCode=137),
            ),
            Reason.STORAGE_EXCEEDED,
        )
        for what, words in {
            "what all wrote": "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ",
            "what one wrote": 'Container trainer exceeded its local ephemeral storage limit "1Gi". ',
            "what is in a volume": 'Usage of EmptyDir volume "scratch" exceeds the limit "1Gi". ',
        }.items()
    },
    "a node that crashed and came back": (
        raw_pod(
            phase="Failed",
            containerStatuses=[{"state": {"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown"}}}],
            conditions=[{"type": "Ready", "status": "False", "lastTransitionTime": STAMP}],
        ),
        Reason.NODE_LOST,
    ),
    "a command that is not in the image": (
        raw_pod(
            phase="Failed",
            containerStatuses=terminated(
                exitCode=128, reason="StartError", message='exec: "trainn": executable file not found.'
            ),
        ),
        Reason.POD_NOT_STARTED,
    ),
    "a driver that does not answer": (
        raw_pod(
            phase="Failed",
            containerStatuses=terminated(exitCode=128, reason="StartError", message="nvml error: driver mismatch."),
        ),
        Reason.UNKNOWN,
    ),
    "its node is gone": (
        raw_pod(
            phase="Failed",
            conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}],
        ),
        Reason.NODE_LOST,
    ),
    "the trainer's own reason": (
        raw_pod(
            phase="Failed",
            containerStatuses=terminated(exitCode=1, message='{"reason": "UserError", "message": "boom"}'),
        ),
        Reason.USER_ERROR,
    ),
    "done, it said, and then it failed": (
        raw_pod(
            phase="Failed",
            containerStatuses=terminated(exitCode=1, message='{"reason": "Completed", "message": "Done."}'),
        ),
        Reason.UNKNOWN,
    ),
    "an unknown exit code": (raw_pod(phase="Failed", containerStatuses=terminated(exitCode=3)), Reason.UNKNOWN),
    "success": (raw_pod(phase="Succeeded", containerStatuses=terminated(exitCode=0)), Reason.COMPLETED),
}


@pytest.mark.parametrize(("pod", "reason"), CASES.values(), ids=CASES.keys())
def test_from_pod_to_reason(pod: dict[str, Any], reason: Reason) -> None:
    outcome = judge_pod(pod_facts(pod))

    assert outcome is not None
    assert outcome.reason == reason
    assert outcome.message.endswith((".", "boom", "write less."))


def test_a_pod_that_does_not_say_when_it_ended_ended_when_it_last_changed() -> None:
    later = "2026-11-01T13:00:00Z"
    raw, _ = CASES["a node that crashed and came back"]
    raw = raw | {"status": raw["status"] | {"conditions": [{"type": "Ready", "lastTransitionTime": later}]}}

    outcome = judge_pod(pod_facts(raw))

    assert outcome is not None
    assert outcome.ended is not None
    assert outcome.ended.isoformat() == "2026-11-01T13:00:00+00:00"


def test_a_container_did_not_start_before_its_pod_was_made_whatever_its_node_says() -> None:
    behind = raw_pod(phase="Running", containerStatuses=[{"state": {"running": {"startedAt": "2026-11-01T11:59:55Z"}}}])

    facts = pod_facts(behind)

    assert facts.running_since == facts.created


def test_a_container_that_could_not_be_started_never_ran() -> None:
    raw, _ = CASES["a command that is not in the image"]

    assert pod_facts(raw).running_since is None


def test_fields_of_a_newer_crd_fail_nobody() -> None:
    metadata = {"name": "run", "namespace": "team", "uid": "u", "creationTimestamp": STAMP}
    spec = {"newer": 1, "retries": {"limit": 1, "newer": {}}, "training": {"newer": []}}
    seen = observe({"metadata": metadata, "spec": spec, "status": {"phase": "Running", "newer": 1}})

    assert seen.spec is not None
    assert seen.spec.retries.limit == 1
    assert seen.status.phase == "Running"


def test_an_init_container_that_fails_is_named_with_its_code_and_words() -> None:
    init = [
        {"name": "first", "state": {"terminated": {"exitCode": 0}}},
        {"name": "fetch", "state": {"terminated": {"exitCode": 3, "message": "no such bucket"}}},
    ]
    facts = pod_facts(raw_pod(phase="Failed", initContainerStatuses=init))
    outcome = judge_pod(facts)

    assert facts.init_failed == "fetch"
    assert outcome is not None
    assert outcome.message == "The init container fetch ended with exit code 3. no such bucket"


def test_what_an_init_container_waits_for_is_what_the_pod_waits_for() -> None:
    waits = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    main = [{"name": "trainer", "state": {"waiting": {"reason": "PodInitializing"}}}]
    status = {"phase": "Pending", "containerStatuses": main}
    facts = pod_facts(raw_pod(**status, initContainerStatuses=[{"name": "fetch", "state": waits}]))

    assert (facts.waiting_reason, facts.waiting_message) == ("ImagePullBackOff", "no such image")
    assert "init container" in facts.waiting_image


@pytest.mark.parametrize("text", ['{"reason": "UserError", "message": "no file \\udce9"}', "[" * 3000])
def test_last_words_that_no_status_can_hold_are_made_so_that_it_can(text: str) -> None:
    _, words = parse_last_words(text)
    words.encode()


def test_a_running_pod_has_no_outcome() -> None:
    running = raw_pod(phase="Running", containerStatuses=[{"state": {"running": {"startedAt": STAMP}}}])

    assert judge_pod(pod_facts(running)) is None


def test_a_job_of_another_owner_is_not_ours() -> None:
    resource = {
        "metadata": {"name": "run", "namespace": "team", "uid": "new", "creationTimestamp": STAMP},
        "status": {"attempt": 1},
    }
    job = {
        "metadata": {
            "name": "run-a1",
            "creationTimestamp": STAMP,
            "labels": {"training.heimdall.dev/attempt": "1"},
            "ownerReferences": [{"uid": "old", "controller": True}],
        }
    }

    assert observe(resource, [job]).job is None


def test_an_unreadable_spec_names_its_field() -> None:
    resource = {
        "metadata": {"name": "run", "namespace": "team", "uid": "u", "creationTimestamp": STAMP},
        "spec": {"training": {"epochs": -1}},
    }

    seen = observe(resource)

    assert seen.spec is None
    assert "spec.training.epochs" in seen.spec_error


@pytest.mark.parametrize("levels", [NESTING_LIMIT - 2, 2_000, 9_000, 10_000])
def test_a_spec_that_is_nested_too_deeply_is_unreadable(levels: int) -> None:
    resource = {
        "metadata": {"name": "run", "namespace": "team", "uid": "u", "creationTimestamp": STAMP},
        "spec": {"model": {"module": "team.model:Net", "args": nested(levels)}},
    }

    seen = observe(resource)

    assert (seen.spec, seen.spec_error) == (None, "it is nested more than 200 levels deep")
    failed = decide(seen, seen.created).status
    assert (failed.phase, failed.conditions[0].reason) == ("Failed", "InvalidConfiguration")


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = {"a": value} if level % 2 else [value]
    return {"a": value}


def test_what_somebody_wrote_over_the_operators_numbers_keeps_nobody_from_looking() -> None:
    pod = raw_pod(phase="Running")
    pod["metadata"]["labels"]["training.heimdall.dev/attempt"] = "first"
    pod["metadata"]["annotations"] = {"batch.kubernetes.io/job-completion-index": "²"}

    facts = pod_facts(pod)

    assert (facts.attempt, facts.worker) == (0, 0)


@given(st.text())
def test_any_last_words_are_read(text: str) -> None:
    parse_last_words(text)


def test_a_pod_of_an_older_run_of_the_same_name_is_not_ours() -> None:
    resource = {
        "metadata": {"name": "run", "namespace": "team", "uid": "new", "creationTimestamp": STAMP},
        "status": {"attempt": 1},
    }
    pods = [raw_pod(phase="Failed", containerStatuses=terminated(exitCode=78)) for _ in ("old", "new")]
    for pod, uid in zip(pods, ("old", "new"), strict=True):
        pod["metadata"]["labels"]["training.heimdall.dev/uid"] = uid

    assert [pod.name for pod in observe(resource, pods=pods[:1]).pods] == []
    assert len(observe(resource, pods=pods).pods) == 1


@pytest.mark.parametrize(
    ("finalizers", "there"),
    [(["orphan"], False), (["foregroundDeletion"], True)],
    ids=["without its pods", "with them"],
)
def test_a_job_that_is_deleted_without_its_pods_ends_no_attempt(finalizers: list[str], there: bool) -> None:
    """As `kubectl delete --cascade=orphan` does: for a moment it is there, being deleted."""
    owner = {"kind": "TrainingRun", "uid": "u", "controller": True}
    job = {
        "metadata": {
            "name": "run-a1",
            "creationTimestamp": STAMP,
            "deletionTimestamp": STAMP,
            "finalizers": finalizers,
            "ownerReferences": [owner],
            "labels": {"training.heimdall.dev/attempt": "1"},
        }
    }
    metadata = {"name": "run", "namespace": "team", "uid": "u", "creationTimestamp": STAMP}
    assert bool(observe({"metadata": metadata, "spec": {}}, [job]).jobs) is there


def test_what_a_queue_reads_goes_to_the_jobs_and_nothing_else() -> None:
    wanted = {
        "kueue.x-k8s.io/queue-name": "team",
        "kueue.x-k8s.io/priority-class": "high",
        "kueue.x-k8s.io/max-exec-time-seconds": "3600",
    }
    metadata = {
        "name": "run",
        "namespace": "team",
        "uid": "1",
        "resourceVersion": "1",
        "generation": 1,
        "creationTimestamp": STAMP,
        "labels": {**wanted, "kueue.x-k8s.io/managed": "true", "team": "radio"},
    }

    seen = observe({"metadata": metadata, "spec": {}})

    assert dict(seen.queue_labels) == wanted


def test_a_jobs_queue_is_the_one_that_it_waits_for_itself() -> None:
    """The TrainingRun's label may have changed since, and Kueue gives a queue to Jobs that name none."""
    own = {"training.heimdall.dev/attempt": "1"}
    of_kueue = {"kueue.x-k8s.io/queue-name": "default", "kueue.x-k8s.io/max-exec-time-seconds": "30"}

    free, queued = (
        job_facts({"metadata": {"name": "run-a1", "creationTimestamp": STAMP, "labels": labels}})
        for labels in (own, own | of_kueue)
    )

    assert (free.queue, free.execution_limit) == ("", "")
    assert (queued.queue, queued.execution_limit) == ("default", "30")


def test_a_job_says_last_why_it_creates_no_pod() -> None:
    def event(reason: str, message: str, uid: str = "j1", **when: str) -> dict[str, Any]:
        return {"metadata": {}, "involvedObject": {"uid": uid}, "reason": reason, "message": message, **when}

    job = job_facts({"metadata": {"name": "run-a1", "uid": "j1", "creationTimestamp": STAMP}})
    events = [
        event("FailedCreate", 'pods "run-a1-0-x7" is forbidden: quota', lastTimestamp="2026-11-01T12:00:09Z"),
        event("FailedCreate", "status unknown for quota", eventTime="2026-11-01T12:00:01.5Z"),
        event("SuccessfulCreate", "Created pod: run-a1-y", lastTimestamp="2026-11-01T13:00:00Z"),
        event("FailedCreate", "of the Job before", "j0", lastTimestamp="2026-11-01T14:00:00Z"),
    ]

    assert refused_pods(events, job) == 'pods "run-a1-…" is forbidden: quota'
    assert refused_pods(events[2:], job) == ""


def test_a_pod_tells_since_when_it_has_a_node() -> None:
    def since(status: str) -> Any:
        condition = {"type": "PodScheduled", "status": status, "lastTransitionTime": "2026-11-01T12:00:09Z"}
        return pod_facts(raw_pod(phase="Pending", conditions=[condition])).scheduled

    assert (since("False"), str(since("True"))) == (None, "2026-11-01 12:00:09+00:00")
