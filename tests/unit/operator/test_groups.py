"""Several workers are one attempt: it runs when all run, succeeds when all did, and fails for the first cause."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from heimdall_api.contract import Reason
from heimdall_operator.decide import decide
from heimdall_operator.failures import judge_group
from heimdall_operator.observe import LOST_POD_S, PodFacts
from tests.unit.operator.builders import NOW, ago, attempt, ended_pod, job, observed, pod, run, spec, status

TWO = {"resources": {"workers": 2}}


def worker(number: int, **more: Any) -> PodFacts:
    return pod(**{"name": f"run-a1-{number}-x", "worker": number, **more})


def ended(number: int, exit_code: int, **more: Any) -> PodFacts:
    return ended_pod(exit_code, **{"name": f"run-a1-{number}-x", "worker": number, **more})


def test_it_is_running_when_all_workers_run() -> None:
    waiting = worker(1, phase="Pending", running_since=None, unschedulable="0/3 nodes are available")
    half = decide(observed(spec=spec(**TWO), jobs=(job(),), pods=(worker(0), waiting)), NOW).status
    whole = decide(observed(spec=spec(**TWO), jobs=(job(),), pods=(worker(0), worker(1))), NOW).status

    assert half.phase == "Pending"
    assert "0/3 nodes" in half.conditions[0].message
    assert whole.phase == "Running"
    assert whole.attempts[-1].pod == "run-a1-0-x"


def test_a_worker_that_is_done_does_not_hide_that_the_other_hangs() -> None:
    group = observed(
        spec=spec(stallTimeoutSeconds=30, **TWO),
        status=status(attempt(running_time=ago(50)), phase="Running"),
        jobs=(job(),),
        pods=(worker(0), ended(1, 0, finished=ago(40))),
        run=run(),
        moved=ago(300),
    )

    assert decide(group, NOW).status.attempts[-1].reason == "Stalled"
    moving = decide(replace(group, moved=ago(5)), NOW)
    assert moving.status.phase == "Running"
    assert moving.requeue_after_s is not None, "no event tells of a hang"


def test_nothing_is_judged_while_a_worker_lives() -> None:
    assert judge_group((ended(0, 1), worker(1)), 2) is None
    assert judge_group((ended(0, 0), worker(1)), 2) is None


def test_success_takes_all_workers() -> None:
    assert judge_group((ended(0, 0),), 2) is None
    outcome = judge_group((ended(0, 0), ended(1, 0)), 2)

    assert outcome is not None
    assert outcome.reason == Reason.COMPLETED


BROKEN = '{"reason": "WorkerLost", "message": "The connection to another worker broke."}'
USER = '{"reason": "UserError", "message": "ValueError: the loss became NaN"}'
CAUSES: dict[str, tuple[PodFacts, PodFacts, Reason]] = {
    "killed, the other noticed first": (
        ended(0, 1, last_words=BROKEN, finished=ago(9)),
        ended(1, 137, finished=ago(8)),
        Reason.KILLED,
    ),
    "killed, the other blamed its code": (ended(0, 1, last_words=USER), ended(1, 137), Reason.KILLED),
    "out of memory": (
        ended(0, 1, last_words=USER),
        ended(1, 137, killed_for_memory=True),
        Reason.HOST_OUT_OF_MEMORY,
    ),
    "drained": (ended(0, 1, last_words=USER), ended(1, 143, disruption="EvictionByEvictionAPI"), Reason.PREEMPTED),
    "a user's error, the other asked to end": (
        ended(0, 1, last_words=USER),
        ended(1, 143, deleting=ago(3)),
        Reason.USER_ERROR,
    ),
    "a user's error, the other killed after its grace period": (
        ended(0, 1, last_words=USER),
        ended(1, 137, deleting=ago(3)),
        Reason.USER_ERROR,
    ),
    "all asked to end": (ended(0, 143), ended(1, 143), Reason.PREEMPTED),
}


@pytest.mark.parametrize(("one", "other", "reason"), CAUSES.values(), ids=CAUSES.keys())
def test_the_cause_comes_before_its_consequences(one: PodFacts, other: PodFacts, reason: Reason) -> None:
    for pods in ((one, other), (other, one)):
        outcome = judge_group(pods, 2)
        assert outcome is not None
        assert outcome.reason == reason


@pytest.mark.parametrize(
    ("two", "reason", "exit_code"),
    [
        (ended(1, 137, killed_for_memory=True, node="node2"), "HostOutOfMemory", 137),
        (worker(1, deleting=ago(LOST_POD_S + 1), node="node2"), "NodeLost", None),
        (
            worker(1, phase="Pending", running_since=None, waiting_reason="InvalidImageName", node="node2"),
            "ImagePull",
            None,
        ),
        (
            worker(1, phase="Pending", running_since=None, waiting_reason="ImagePullBackOff", node="node2"),
            "ImagePull",
            None,
        ),
    ],
    ids=["ended", "lost", "never to start", "not started in time"],
)
def test_the_attempt_names_the_worker_that_it_ended_for(two: PodFacts, reason: str, exit_code: int | None) -> None:
    """People read its log, and look at its node: the first worker's tells of a connection that broke."""
    one = worker(0) if two.alive else ended(0, 1, last_words=BROKEN)
    group = observed(spec=spec(pendingDeadlineSeconds=30, **TWO), jobs=(job(),), pods=(one, two))

    told = decide(group, NOW).status.attempts[0]

    assert (told.reason, told.exit_code) == (reason, exit_code)
    assert (told.pod, told.node, told.running_time) == ("run-a1-1-x", "node2", ago(50))


def test_a_replaced_pod_of_a_worker_does_not_count() -> None:
    old = ended(1, 143, created=ago(50))
    new = worker(1, name="run-a1-1-y", created=ago(10))

    assert decide(observed(spec=spec(**TWO), jobs=(job(),), pods=(worker(0), old, new)), NOW).status.phase == "Running"
