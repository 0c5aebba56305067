"""Every order of events, losses and deaths.

A state machine drives the whole operator against stand-ins of API server, MLflow and what Kubernetes does by itself,
which keep their rules, and checks after each step what must always hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import pytest
import structlog
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from heimdall_api.contract import LABEL_QUEUE
from heimdall_operator.controller import Controller
from heimdall_operator.decide import DELETION_LIMIT_S, UNOWNED_LIMIT
from heimdall_operator.failures import FREE
from tests.unit.operator.builders import UID
from tests.unit.operator.cluster import NODES, Cluster, attempt_of, is_over, worker_of
from tests.unit.operator.fakes import KEY, CrashError, controller, is_given_up
from tests.unit.operator.watches import KINDS, Kind, Watches

RETRIES: Final = 3
PENDING_S: Final = 2000
STALL_S: Final = 900
ACTIVE_S: Final = 9000
OVERDUE: Final = timedelta(seconds=DELETION_LIMIT_S)
TERMINAL: Final = ("Succeeded", "Failed")
UNCOUNTED: Final = {str(reason) for reason in FREE} | {"Completed"}
ENDS: dict[str, dict[str, Any]] = {
    "success": {"exitCode": 0},
    "sigterm": {"exitCode": 143},
    "crash": {"exitCode": 3},
    "killed": {"exitCode": 137},
    "out of memory": {"exitCode": 137, "reason": "OOMKilled"},
    "configuration": {"exitCode": 78},
    "user": {"exitCode": 1, "message": '{"reason": "UserError", "message": "Boom."}'},
}
OFTEN: Final = ("success", "success", "sigterm", "sigterm", "crash", "crash", "killed", "killed", *sorted(ENDS))
"""What is followed by something comes more often than what is not."""
REASON: Final = re.compile(r"[A-Z][A-Za-z]*")
HELD: Final = ("ImagePullBackOff", "CreateContainerConfigError")
TAKEN: Final = ("EvictionByEvictionAPI", "PreemptionByScheduler", "for the disk", "for their own disk", "by hand")
WORKERS: Final = st.sampled_from((None, None, 0, 1))
"""Whom something happens to: all, or one worker of a group; of a run without a group, nobody is the second."""
SELDOM: Final = st.sampled_from((False, False, False, False, True))
SOME_KINDS: Final = st.lists(st.sampled_from(KINDS), unique=True, max_size=len(KINDS))
PAUSES_S: Final = (0, 0, 1, 30, 400, 1000, 5000)
ENOUGH: Final = 80
"""Looks that settle any life."""


@pytest.fixture(autouse=True, scope="module")
def without_logs() -> Iterator[None]:
    """Tens of thousands of looks: their logs are nobody's."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


class Life(RuleBasedStateMachine):
    """One TrainingRun, its world, and an operator that dies and comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.world = Cluster()
        self.runner = asyncio.Runner()
        self.operator: Controller | None = None
        self.watches: Watches | None = None
        """Of the operator that lives."""
        self.behind: Controller | None = None
        """An operator that was replaced and still works from what it saw."""
        self.final: dict[str, Any] | None = None
        self.final_jobs: set[str] = set()
        self.reasons: dict[int, str] = {}
        self.conditions: dict[str, dict[str, Any]] = {}
        """As they were seen last, by type."""
        self.was_suspended = False
        self.left_running = False
        """Whether a deletion has waited for MLflow for as long as it may, and let go."""

    # --- the world moves ----------------------------------------------------------------------------------------

    @initialize(
        suspended=SELDOM,
        growth=st.booleans(),
        registered=st.booleans(),
        queued=st.booleans(),
        stalls=st.booleans(),
        ends=st.booleans(),
        waits=SELDOM,
        group=st.sampled_from((False, False, True)),
    )
    def apply(self, **flags: bool) -> None:
        spec: dict[str, Any] = {
            "suspend": flags["suspended"],
            "retries": {"limit": RETRIES},
            "ttlSecondsAfterFinished": 1000,
            "pendingDeadlineSeconds": PENDING_S,
            "tracking": {"experiment": "lab"},
        }
        if flags["growth"]:
            spec["retries"]["memoryGrowth"] = {"max": "20Gi"}
        if flags["group"]:
            spec["resources"] = {"workers": 2}
        if flags["registered"]:
            spec["registration"] = {"model": "localizer"}
        if flags["stalls"]:
            spec["stallTimeoutSeconds"] = STALL_S
        if flags["ends"]:
            spec["activeDeadlineSeconds"] = ACTIVE_S
        self.world.apply(spec)
        if flags["queued"] and self.world.run is not None:
            self.world.run["metadata"]["labels"] = {LABEL_QUEUE: "team-queue"}
            self.world.stamp(self.world.run)
        if not flags["suspended"] and not flags["waits"]:
            # Much of what is tried begins here, and would be reached by chance too seldom.
            self.operator_looks(0)
            self.world.suspend_jobs(False)
            self.world.start_pods()
            self.operator_looks(0)

    @rule(only=WORKERS)
    def pods_start(self, only: int | None) -> None:
        self.world.start_pods(only=only)

    @rule(end=st.sampled_from(OFTEN), only=WORKERS)
    def pods_end(self, end: str, only: int | None) -> None:
        self.world.end_pods(ENDS[end], only=only)

    @rule(reason=st.sampled_from(HELD))
    def pods_are_held(self, reason: str) -> None:
        self.world.hold_pods(reason)

    @rule(how=st.sampled_from(TAKEN), only=WORKERS)
    def pods_are_taken_away(self, how: str, only: int | None) -> None:
        match how:
            case "for the disk" | "for their own disk":
                self.world.evict_for_disk(own=how == "for their own disk", only=only)
            case "by hand":
                self.world.delete_pods(only=only)
            case _:
                self.world.evict(how, only=only)

    @rule()
    def ended_pods_go(self) -> None:
        self.world.remove_ended_pods()

    @rule()
    def trainers_make_a_step(self) -> None:
        self.world.train()

    @rule(node=st.sampled_from(NODES), what=st.sampled_from(("drained", "uncordoned", "lost", "lost")))
    def a_node_is(self, node: str, what: str) -> None:
        match what:
            case "drained":
                self.world.cordoned.add(node)
                self.world.evict("EvictionByEvictionAPI", node=node)
            case "uncordoned":
                self.world.cordoned.discard(node)
                self.world.sync()
            case _:
                self.world.away.add(node)

    @rule(what=st.sampled_from(("are not heard of for long", "come back", "come back rebooted", "are removed")))
    def lost_nodes(self, what: str) -> None:
        match what:
            case "are not heard of for long":
                self.world.give_up_pods_of_lost_nodes()
            case "are removed":
                self.world.remove_lost_nodes()
            case _:
                self.world.nodes_come_back(rebooted=what.endswith("rebooted"))

    @rule(suspend=st.booleans())
    def jobs_are_suspended(self, suspend: bool) -> None:
        """By a queue, where the run has one; by somebody, where it has none."""
        self.world.suspend_jobs(suspend)

    @rule(pods_stay=SELDOM)
    def somebody_deletes_the_jobs(self, pods_stay: bool = False) -> None:
        """With `--cascade=orphan`, or by a call that asks for nothing else, their pods stay."""
        for name, job in self.world.jobs.items():
            if not is_over(job):
                self.world.could_be[attempt_of(job)].add("Preempted")
            if pods_stay:
                self.world.orphan(name)
            else:
                self.world.terminate(name, self.world.now)
        self.world.jobs.clear()

    @rule()
    def somebody_removes_pods_by_force(self) -> None:
        self.world.remove_pods_by_force()

    @rule(suspend=st.booleans())
    def suspend(self, suspend: bool) -> None:
        if self.world.run is not None:
            self.was_suspended |= suspend
            self.world.run["spec"]["suspend"] = suspend
            self.world.run["metadata"]["generation"] += 1
            self.world.stamp(self.world.run)

    @rule(really=SELDOM)
    def delete(self, really: bool) -> None:
        if really:
            self.world.ask_for_deletion(self.world.time())

    @rule(mlflow=st.booleans(), store=st.booleans(), quota=st.booleans(), refused=SELDOM)
    def there_is(self, mlflow: bool, store: bool, quota: bool, refused: bool) -> None:
        self.world.mlflow_away, self.world.store_away = not mlflow, not store
        self.world.is_full, self.world.refuses_status = not quota, refused

    # --- the operator looks -------------------------------------------------------------------------------------

    @rule(after_s=st.sampled_from(PAUSES_S), order=st.permutations(KINDS))
    def operator_looks(self, after_s: int, order: Sequence[Kind] = KINDS) -> None:
        self.world.now += timedelta(seconds=after_s)
        self._look(self._operator(order))

    @rule(after_s=st.sampled_from(PAUSES_S), first=SOME_KINDS)
    def operator_looks_also_then(self, after_s: int, first: Sequence[Kind]) -> None:
        """It does so more often than anything else happens, and while some of its watches may be behind."""
        if after_s == 0:
            self._look(self._operator(first))
        else:  # by then they have caught up
            self.operator_looks(after_s, [*first, *(kind for kind in KINDS if kind not in first)])

    @rule(kind=st.sampled_from(KINDS), events=st.integers(1, 3))
    def a_watch_is_ahead_of_the_others(self, kind: Kind, events: int) -> None:
        """Each event makes the operator look, whatever the others have still to tell."""
        operator = self._alive()
        assert self.watches is not None
        self.runner.run(self.watches.bring(kind, events))
        self._look(operator)

    @rule()
    def operator_lists_everything(self) -> None:
        """As it does every few minutes: what its watches bring afterwards may be older."""
        operator = self._alive()
        self.runner.run(operator.refresh())
        self._look(operator)

    @rule(writes=st.integers(1, 4), is_behind=SELDOM)
    def operator_dies_in_a_look(self, writes: int, is_behind: bool) -> None:
        self.world.crash_after = len(self.world.writes) + writes
        self._look(self._alive() if is_behind else self._operator())
        self.world.crash_after = None
        self.operator = None

    @rule(writes=st.integers(1, 4), is_behind=SELDOM)
    def an_answer_is_lost_in_a_look(self, writes: int, is_behind: bool) -> None:
        """What was written is there, and the operator lives on without knowing of it."""
        self.world.lost_answer = len(self.world.writes) + writes
        self._look(self._alive() if is_behind else self._operator())
        self.world.lost_answer = None

    @rule()
    def an_operator_falls_behind(self) -> None:
        """As when two run for a moment during an upgrade."""
        self.behind, self.operator = self._operator(), None

    @precondition(lambda self: self.behind is not None)
    @rule()
    def the_one_behind_looks(self) -> None:
        assert self.behind is not None
        self._look(self.behind)

    # --- what always holds --------------------------------------------------------------------------------------

    @invariant()
    def there_is_one_run_one_version_and_one_living_job(self) -> None:
        assert len(self.world.mlflow_runs) <= 1
        assert len(self.world.versions) <= 1
        living = [self.world.pods[name] for name in self.world.living(self.world.now)]
        assert len({attempt_of(pod) for pod in living}) <= 1
        assert len({worker_of(pod) for pod in living}) == len(living)
        assert self.world.overlaps == []

    @invariant()
    def nothing_older_publishes_beside_a_newer_attempt(self) -> None:
        assert self.world.unfenced == []
        assert self.world.late == []
        assert self.world.published == sorted(self.world.published)

    @invariant()
    def what_trains_is_not_called_scheduled(self) -> None:
        said = [item["status"] for item in self.world.mlflow_runs.values()]
        assert "SCHEDULED" not in said or not self.world.living(self.world.now)

    @invariant()
    def the_status_is_sound(self) -> None:
        status = self._status()
        if not status:
            return
        assert sum(
            item["status"] == "True" for item in status["conditions"] if item["type"] in ("Complete", "Failed")
        ) == (status["phase"] in TERMINAL)
        attempts = status.get("attempts", ())
        for attempt in attempts:
            known = self.reasons.get(attempt["number"])
            assert known in (None, attempt.get("reason")), "the reason of an attempt never changes"
            if known is None and attempt.get("reason"):
                self.reasons[attempt["number"]] = attempt["reason"]
                assert self._is_true(attempt, status), f"{attempt} is not what happened"
        numbers = [attempt["number"] for attempt in attempts]
        assert numbers == sorted(set(numbers))
        counted = [a for a in attempts if a.get("endTime") and a["reason"] not in UNCOUNTED]
        if len(numbers) == status.get("attempt"):
            assert status["failures"] == len(counted), "no retry is lost or counted twice"
        assert status.get("failures", 0) <= RETRIES + 1

    @invariant()
    def conditions_keep_to_kubernetes_conventions(self) -> None:
        status = self._status()
        conditions = {item["type"]: item for item in status.get("conditions", ())}
        for kind, item in conditions.items():
            assert REASON.fullmatch(item["reason"])
            assert item["message"].endswith("."), "what others say is sentences here, and so is what quotes them"
            assert item["observedGeneration"] == status["observedGeneration"], "all was looked at together"
            before = self.conditions.get(kind, item)
            # What can't be written may change there and back, seen by nobody.
            if item["status"] == before["status"] and not self.world.refusals:
                assert item["lastTransitionTime"] == before["lastTransitionTime"]
        self.conditions = conditions

    @invariant()
    def a_terminal_phase_is_final(self) -> None:
        status = self._status()
        if self.final is not None and self.world.run is not None:
            # That a later change was seen, and means nothing any more, is said.
            seen = status["observedGeneration"]
            assert without_places(status) == without_places(speaking_of(seen, self.final))
            assert self.final["observedGeneration"] <= seen <= self.world.run["metadata"]["generation"]
            assert set(self.world.jobs) <= self.final_jobs, "a finished run never trains again"
        elif status.get("phase") in TERMINAL:
            self.final, self.final_jobs = status, set(self.world.jobs)
            assert self.world.mlflow_runs or status["phase"] == "Failed"

    def teardown(self) -> None:
        """In the end, with everything there and nobody dying, all is settled and looking again writes nothing."""
        try:
            self._settle()
        finally:
            self.runner.close()

    def _settle(self) -> None:
        world = self.world
        world.mlflow_away = world.store_away = world.is_full = world.refuses_status = False
        self.behind = None
        world.nodes_come_back(rebooted=False)
        world.cordoned.clear()
        quiet = 0
        for _ in range(ENOUGH):
            written = len(world.writes)
            world.suspend_jobs(False)
            world.start_pods()
            world.end_pods(ENDS["success"])
            world.remove_ended_pods()
            world.now += timedelta(seconds=400)
            self._look(self._operator())
            quiet = quiet + 1 if len(world.writes) == written else 0
            if quiet > 6:  # the longest that is waited for is the time that Jobs are kept for
                break
        assert quiet > 1, f"no write without a change: {world.writes[-3:]}"
        self._check_end()

    def _check_end(self) -> None:
        run = self.world.run
        if run is None:
            assert self.left_running or all(
                item["status"] in ("KILLED", "FINISHED", "FAILED") for item in self.world.mlflow_runs.values()
            )
            return
        status = run["status"]
        assert status["phase"] in ("Succeeded", "Failed", "Suspended")
        assert status["observedGeneration"] == run["metadata"]["generation"], "every change was seen"
        assert self.world.living(self.world.now) == [], "what holds nothing keeps nothing"
        if status["phase"] in TERMINAL:
            assert not run["metadata"].get("finalizers")
            wanted = "FINISHED" if status["phase"] == "Succeeded" else "FAILED"
            assert self.world.mlflow_runs[UID]["status"] == wanted
            assert self.world.jobs == {}, "its time is over"
        else:
            assert all(map(is_over, self.world.jobs.values())), "nothing starts a pod while it is suspended"
        if status["phase"] == "Succeeded":
            assert status["attempts"][-1]["reason"] == "Completed"
            assert "registration" not in run["spec"] or status["modelVersion"] == "1"

    # --- helpers ------------------------------------------------------------------------------------------------

    def _is_true(self, attempt: dict[str, Any], status: dict[str, Any]) -> bool:
        """Whether an attempt really ended, or had to, for the reason that is given."""
        number, reason = attempt["number"], attempt["reason"]
        run, pods = self.world.run, self.world.pods.values()
        assert run is not None
        let_go, refused = self.world.let_go.get(number), self.world.refused.get(f"run-a{number}")
        match reason:
            case "NodeLost" if any(attempt_of(pod) == number and is_given_up(pod, self.world.now) for pod in pods):
                return True
            case "Suspended":
                # What can't be written is judged when it is seen, and told later.
                return bool(run["spec"]["suspend"]) or (self.was_suspended and self.world.refusals > 0)
            case "DeadlineExceeded":
                return self._age_s(status["startTime"]) >= ACTIVE_S
            case "Stalled":
                return (self.world.now - self.world.moved[number]).total_seconds() >= STALL_S
            case "Unschedulable" | "ImagePull" | "PodNotStarted":
                since = let_go or refused
                return since is not None and (self.world.now - since).total_seconds() >= PENDING_S
        return reason in self.world.could_be[number]

    def _age_s(self, time: str) -> float:
        return (self.world.now - datetime.fromisoformat(time)).total_seconds()

    def _status(self) -> dict[str, Any]:
        return (self.world.run or {}).get("status") or {}

    def _alive(self) -> Controller:
        """The operator, with what its watches have brought so far; a new one has listed everything."""
        if self.operator is None:
            self.operator = controller(self.world, clock=lambda: self.world.now)
            self.runner.run(self.operator.refresh())
            self.watches = Watches(self.world.history, self.operator)
        return self.operator

    def _operator(self, order: Sequence[Kind] = KINDS) -> Controller:
        """The operator when these of its watches have brought all that there is, one after the other."""
        operator = self._alive()
        assert self.watches is not None
        for kind in order:
            self.runner.run(self.watches.bring(kind))
        return operator

    def _look(self, operator: Controller) -> None:
        deleted = ((self.world.run or {}).get("metadata") or {}).get("deletionTimestamp")
        is_deaf = self.world.mlflow_away or self.world.lost_answer is not None
        if deleted and is_deaf and self.world.now - datetime.fromisoformat(deleted) > OVERDUE:
            self.left_running = True

        async def safely() -> None:
            # As it does every few seconds.
            try:
                await operator.progress.poll()
            except ConnectionError:
                operator.progress._is_deaf = True
            await operator._reconcile_safely(KEY)
            operator.queue.close()

        with contextlib.suppress(CrashError):
            self.runner.run(safely())


def without_places(status: dict[str, Any]) -> dict[str, Any]:
    """A status without where logs are kept: those of a finished run may still be on their way."""
    attempts = [{name: value for name, value in each.items() if name != "logs"} for each in status.get("attempts", ())]
    return {**status, "attempts": attempts}


def speaking_of(generation: int, status: dict[str, Any]) -> dict[str, Any]:
    """A status that says the same of another generation."""
    conditions = [{**each, "observedGeneration": generation} for each in status["conditions"]]
    return {**status, "observedGeneration": generation, "conditions": conditions}


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=500, stateful_step_count=40, deadline=None)


FLAGS: Final = ("suspended", "growth", "registered", "queued", "stalls", "ends", "waits", "group")


@pytest.fixture
def life(request: pytest.FixtureRequest) -> Iterator[Life]:
    """A life whose first attempt trains, with the flags that a test asks for."""
    life = Life()
    life.apply(**{flag: flag == getattr(request, "param", None) for flag in FLAGS})
    yield life
    life.teardown()


# What these orders show would be seen whatever examples are drawn.


def test_a_job_that_is_deleted_under_its_pod_is_not_made_again_beside_it(life: Life) -> None:
    life.somebody_deletes_the_jobs()

    life.operator_looks(0)

    assert life.world.pods
    assert (life.world.jobs, life.world.overlaps) == ({}, [])


def test_a_suspension_ends_a_pod_whose_job_was_deleted_without_it(life: Life) -> None:
    life.somebody_deletes_the_jobs(pods_stay=True)
    life.operator_looks(0)
    assert (life._status()["phase"], life.world.jobs) == ("Running", {}), "it may train to its end"

    life.suspend(True)
    life.operator_looks(0)
    life.operator_looks(400)
    life.trainers_make_a_step()

    assert (life._status()["phase"], life.world.published) == ("Suspended", [])
    assert [pod["status"]["phase"] for pod in life.world.pods.values()] == ["Failed"], "it was told that it is over"

    life.suspend(False)
    life.operator_looks(0)
    assert list(life.world.jobs) == ["run-a2"]


@pytest.mark.parametrize("life", ["stalls"], indirect=True)
def test_a_hang_of_a_pod_whose_job_was_deleted_without_it_is_noticed(life: Life) -> None:
    life.somebody_deletes_the_jobs(pods_stay=True)
    for after_s in (0, STALL_S, 400, 400):
        life.operator_looks(after_s)

    assert [attempt.get("reason") for attempt in life._status()["attempts"]] == ["Stalled", None]
    assert list(life.world.jobs) == ["run-a2"]


def test_a_pod_whose_job_was_deleted_without_it_may_train_to_its_end(life: Life) -> None:
    life.somebody_deletes_the_jobs(pods_stay=True)
    life.operator_looks(5000)
    life.pods_end("success", only=None)
    life.operator_looks(0)

    assert (life._status()["phase"], life._status()["attempt"]) == ("Succeeded", 1)


def test_a_pod_that_lost_its_job_after_that_was_held_ended_as_it_did(life: Life) -> None:
    life.jobs_are_suspended(suspend=True)
    life.pods_end("crash", only=None)
    life.somebody_deletes_the_jobs(pods_stay=True)
    life.operator_looks(0)

    life.the_status_is_sound()
    assert life.reasons == {1: "Unknown"}


def test_jobs_of_earlier_attempts_do_not_use_up_a_namespaces_quota(life: Life) -> None:
    life.world.most_jobs = 3
    for _ in range(6):
        life.pods_are_taken_away("PreemptionByScheduler", only=None)
        life.pods_end("sigterm", only=None)
        life.operator_looks(0)
        life.operator_looks(400)
        life.pods_start(only=None)
        life.operator_looks(0)

    assert (life._status()["phase"], list(life.world.jobs)) == ("Running", ["run-a6", "run-a7"])
    assert {attempt["logs"] for attempt in life._status()["attempts"][:6]} == {
        f"runs:/r1/attempts/{number}" for number in range(1, 7)
    }


def test_a_job_that_is_gone_with_its_pods_is_not_made_again_under_the_same_number(life: Life) -> None:
    """A lost node may train on for it, and would publish beside the new one."""
    life.a_node_is("node1", "lost")
    life.somebody_deletes_the_jobs()
    life.operator_looks(0)
    life.somebody_removes_pods_by_force()
    life.operator_looks(0)
    life.operator_looks(400)

    attempts = life._status()["attempts"]
    assert [attempt.get("reason") for attempt in attempts] == ["Preempted", None]
    assert (list(life.world.jobs), life.world.unfenced, life._status()["failures"]) == (["run-a2"], [], 0)


def test_a_job_that_is_deleted_before_its_pod_was_seen_is_not_made_again_beside_it(life: Life) -> None:
    """As an operator sees it that missed the pod's beginning, and reads the TrainingRun anew after a conflict."""
    life.operator = None
    unseen = life.world.pods
    life.world.pods = {}
    life.an_operator_falls_behind()
    life.world.pods = unseen
    job = life.world.jobs["run-a1"]
    life.somebody_deletes_the_jobs()
    assert life.behind is not None
    life.behind.store.drop_child("Job", job)

    life.the_one_behind_looks()
    life.the_one_behind_looks()

    assert life.world.pods
    assert (life.world.jobs, life.world.overlaps) == ({}, [])


def test_an_operator_that_fell_behind_does_not_give_up_a_job_that_another_one_has_created() -> None:
    """Nor does one that was stopped for as long as the deadline, and has not tried since."""
    life = Life()
    life.apply(**{flag: flag == "waits" for flag in FLAGS})
    life.there_is(mlflow=True, store=True, quota=False, refused=False)
    life.operator_looks(0)
    life.there_is(mlflow=True, store=True, quota=True, refused=False)
    life.an_operator_falls_behind()
    life.operator_looks(PENDING_S)
    life.the_one_behind_looks()

    assert [attempt.get("reason") for attempt in life._status()["attempts"]] == [None]
    life.teardown()


def test_a_job_that_somebody_suspended_goes_on_as_the_same_attempt(life: Life) -> None:
    life.jobs_are_suspended(suspend=True)
    life.pods_end("sigterm", only=None)
    life.operator_looks(0)
    life.jobs_are_suspended(suspend=False)
    life.operator_looks(0)

    assert [attempt.get("reason") for attempt in life._status()["attempts"]] == [None]
    assert len(life.world.living(life.world.now)) == 1


def test_the_end_of_a_pod_that_waited_may_be_heard_of_before_that_its_job_was_held() -> None:
    life = Life()
    life.apply(**{flag: flag == "waits" for flag in FLAGS})
    life.operator_looks(0)
    life.jobs_are_suspended(suspend=True)
    life.a_watch_is_ahead_of_the_others("Pod", events=9)

    life.the_status_is_sound()
    assert life.reasons == {1: "Preempted"}
    life.teardown()


def test_a_pod_of_before_its_job_was_held_says_nothing_of_the_one_that_follows_it(life: Life) -> None:
    """The watch of pods may be behind that of Jobs; who has held the Job is no queue, and no pod of it has run."""
    life.pods_end("sigterm", only=None)
    life.operator_looks(30)
    life.jobs_are_suspended(suspend=True)
    life.operator_looks(0)
    life.jobs_are_suspended(suspend=False)
    life.a_watch_is_ahead_of_the_others("Job", events=9)

    assert [attempt.get("reason") for attempt in life._status()["attempts"]] == ["Preempted", None]
    assert list(life.world.jobs) == ["run-a1", "run-a2"]


def test_a_job_that_was_held_does_not_train_beside_the_attempt_after_it(life: Life) -> None:
    """The watch of pods may be ahead of that of Jobs: their end is seen before that their Job is held."""
    life.jobs_are_suspended(suspend=True)
    life.pods_end("sigterm", only=None)
    life.a_watch_is_ahead_of_the_others("Pod", events=9)
    life.operator_looks(0)
    life.jobs_are_suspended(suspend=False)

    assert [attempt.get("reason") for attempt in life._status()["attempts"]] == ["Preempted", None]
    assert list(life.world.jobs) == ["run-a2"]
    assert len(life.world.living(life.world.now)) == 1


def test_a_pod_that_is_deleted_before_it_starts_costs_no_retry(life: Life) -> None:
    life.pods_end("sigterm", only=None)
    life.operator_looks(30)
    life.pods_are_taken_away("by hand", only=None)
    life.operator_looks(0)

    assert (life._status()["attempts"][1]["reason"], life._status()["failures"]) == ("Preempted", 0)


def test_a_trainer_that_is_asked_to_end_whenever_it_starts_fails_in_the_end(life: Life) -> None:
    for _ in range(20):
        life.pods_end("sigterm", only=None)
        life.operator_looks(400)
        life.pods_start(only=None)
        life.operator_looks(0)

    assert (life._status()["phase"], life._status()["attempt"]) == ("Failed", UNOWNED_LIMIT + RETRIES + 1)


def test_one_that_gets_further_each_time_goes_on(life: Life) -> None:
    for _ in range(20):
        life.trainers_make_a_step()
        life.pods_end("sigterm", only=None)
        life.operator_looks(400)
        life.pods_start(only=None)
        life.operator_looks(0)

    assert (life._status()["phase"], life._status()["failures"]) == ("Running", 0)


@pytest.mark.parametrize("end", ["success", "configuration"])
def test_a_finished_run_whose_job_is_deleted_never_trains_again(life: Life, end: str) -> None:
    life.pods_end(end, only=None)
    life.operator_looks(0)
    before = life._status()
    life.somebody_deletes_the_jobs()
    life.operator_looks(0)
    life.operator = None
    life.operator_looks(400)

    assert before["phase"] in TERMINAL
    assert (life._status(), life.world.jobs, life.world.pods) == (before, {}, {})


@pytest.mark.parametrize("life", ["ends"], indirect=True)
def test_a_trainer_that_is_cut_off_says_nothing_to_a_run_that_was_ended(life: Life) -> None:
    life.a_node_is("node1", "lost")
    life.operator_looks(ACTIVE_S)
    life.trainers_make_a_step()
    life.operator_looks(400)
    life.trainers_make_a_step()

    assert life.world.mlflow_runs[UID]["status"] == "FAILED"
    assert (life.world.published, life.world.late) == ([1], []), "until its run was ended, nobody knew"


@pytest.mark.parametrize("life", ["group"], indirect=True)
def test_a_crash_in_a_held_group_counts_once_its_other_pod_is_gone_by_force(life: Life) -> None:
    life.jobs_are_suspended(suspend=True)
    life.pods_end(end="crash", only=0)
    life.somebody_removes_pods_by_force()
    life.operator_lists_everything()

    life.the_status_is_sound()
    assert [item["reason"] for item in life._status()["attempts"]] == ["Unknown"]


@pytest.mark.parametrize("life", ["group"], indirect=True)
def test_the_other_workers_of_a_lost_node_end_with_it(life: Life) -> None:
    life.a_node_is("node2", "lost")
    life.lost_nodes("are not heard of for long")
    life.operator_looks(400)
    life.pods_end("sigterm", only=0)
    life.operator_looks(0)
    life.lost_nodes("come back")
    life.operator_looks(0)

    attempts = life._status()["attempts"]
    assert [attempt.get("reason") for attempt in attempts] == ["NodeLost", None]
    assert len(life.world.living(life.world.now)) == 2
    assert life._status()["failures"] == 0
