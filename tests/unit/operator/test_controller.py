"""Looks at a run from its beginning to its end, with the operator dying after every single write."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from datetime import datetime, timedelta
from typing import Any

import pytest
import structlog
from kubernetes.aio.client.exceptions import ApiException
from structlog.testing import capture_logs

from heimdall_api.contract import Checkpoint, Progress
from heimdall_api.types import Condition
from heimdall_operator import act
from heimdall_operator.controller import Controller, merge_patch, with_words
from heimdall_operator.decide import PENDING_REPORT_S
from heimdall_operator.event_recorder import event_manifest
from heimdall_operator.events import Event
from heimdall_operator.handlers import Handlers
from heimdall_operator.kube import ConflictError, ForbiddenError, RefusedError
from heimdall_operator.mlflow_gateway import RunGoneError
from heimdall_operator.settings import OperatorSettings
from heimdall_operator.store import Key
from heimdall_operator.workqueue import WorkQueue
from heimdall_tracking.runs import RunFacts
from tests.unit.operator.builders import NOW, UID, observed, run, status
from tests.unit.operator.fakes import KEY, STAMP, CrashError, World, controller, look

SPEC: dict[str, Any] = {"registration": {"model": "localizer"}}
RUNNING = {"phase": "Running", "running": {"startedAt": STAMP}}
SUCCEEDED = {"phase": "Succeeded", "terminated": {"exitCode": 0, "startedAt": STAMP, "finishedAt": STAMP}}
COMPLETE = Condition(
    type="Complete",
    status="False",
    reason="Ending",
    message="Waiting.",
    last_transition_time=NOW,
    observed_generation=1,
)
OF_THE_RUN = {"namespace": "team", "trainingrun": "run", "uid": UID}
"""What every line about a run tells."""
SIGTERMED = {"phase": "Failed", "terminated": {"exitCode": 143, "startedAt": STAMP, "finishedAt": STAMP}}


async def live(world: World, *ends: dict[str, Any]) -> None:
    """A whole life: each attempt runs and then ends as given. A dead operator is followed by a new one."""
    await settle(world)
    for number, end in enumerate(ends, start=1):
        job = world.jobs[f"run-a{number}"]
        for state in (RUNNING, end):
            world.pod_of(job, **state)
            await settle(world)


async def settle(world: World) -> None:
    try:
        await look(world)
    except CrashError:
        world.crash_after = None
        await look(world)


def check(world: World, attempts: int) -> None:
    """What must hold at the end of a successful life."""
    assert world.run is not None
    status = world.run["status"]
    assert status["phase"] == "Succeeded"
    assert status["attempt"] == attempts
    assert len(world.jobs) == attempts
    assert len(world.mlflow_runs) == 1
    assert world.mlflow_runs[UID]["status"] == "FINISHED"
    assert world.versions == ["1"]
    assert world.run["metadata"]["finalizers"] == []


def lived(*ends: dict[str, Any]) -> World:
    """The world after a life in which nobody died."""
    world = World()
    world.apply(SPEC)
    asyncio.run(live(world, *ends))
    return world


def test_a_life_takes_few_writes() -> None:
    assert lived(SUCCEEDED).writes == [
        "patch finalizers",
        "create mlflow run",
        "patch status",
        "create job run-a1",
        "patch status",
        "keep attempts/1",
        "create version",
        "end run FINISHED",
        "patch status",
        "patch finalizers",
    ]


@pytest.mark.parametrize("ends", [(SUCCEEDED,), (SIGTERMED, SUCCEEDED)], ids=["one attempt", "two attempts"])
def test_an_operator_that_dies_after_any_write_makes_nothing_twice(ends: tuple[dict[str, Any], ...]) -> None:
    undisturbed = lived(*ends)
    for moment in range(1, len(undisturbed.writes) + 1):
        world = World()
        world.apply(SPEC)
        world.crash_after = moment
        asyncio.run(live(world, *ends))
        check(world, attempts=len(ends))
        assert sorted(world.events) == sorted(undisturbed.events), f"dead after {undisturbed.writes[moment - 1]}"


def test_a_run_deleted_while_training_ends_killed() -> None:
    world = World()
    world.apply(SPEC)

    async def scenario() -> None:
        await look(world)
        world.pod_of(world.jobs["run-a1"], **RUNNING)
        await look(world)
        world.ask_for_deletion(STAMP)
        await look(world)
        assert world.mlflow_runs[UID]["status"] == "RUNNING", "its pod may still make a checkpoint"
        world.pods.clear()
        await look(world)

    asyncio.run(scenario())

    assert world.run is None
    assert world.jobs == {}
    assert world.mlflow_runs[UID]["status"] == "KILLED"


def test_an_outcome_is_kept_while_mlflow_is_away() -> None:
    world = World()
    world.apply(SPEC)

    async def scenario() -> None:
        await look(world)
        world.pod_of(world.jobs["run-a1"], **SUCCEEDED)
        world.mlflow_away = True
        with pytest.raises(ConnectionError):
            await look(world)
        assert world.run is not None
        complete = next(item for item in world.run["status"]["conditions"] if item["type"] == "Complete")
        assert (complete["status"], complete["reason"]) == ("False", "Registering")
        # The pod goes, and with it its exit code; then MLflow comes back.
        world.jobs.clear()
        world.pods.clear()
        world.mlflow_away = False
        await look(world)

    asyncio.run(scenario())

    assert world.run is not None
    assert world.run["status"]["phase"] == "Succeeded"
    assert world.writes.count("create job run-a1") == 1


@pytest.mark.parametrize(
    ("code", "told"), [("PERMISSION_DENIED", True), ("TEMPORARILY_UNAVAILABLE", False)], ids=["refused", "away"]
)
def test_what_mlflow_refuses_is_told_once(code: str, told: bool) -> None:
    world = World()
    world.apply(SPEC)

    async def scenario() -> None:
        await look(world)
        world.pod_of(world.jobs["run-a1"], **SUCCEEDED)
        operator = controller(world)

        async def refuses(*_: object) -> None:
            error = ConnectionError("alice:hunter2 may not: http://alice:hunter2@mlflow")
            error.error_code = code  # type: ignore[attr-defined]
            raise error

        operator._mlflow.register = operator._actor._mlflow.register = refuses  # type: ignore[method-assign, assignment]
        for _ in range(3):
            await operator.refresh()
            with pytest.raises(ConnectionError):
                await operator.reconcile(KEY)

    asyncio.run(scenario())

    assert world.run is not None
    complete = next(item for item in world.run["status"]["conditions"] if item["type"] == "Complete")
    assert complete["message"].startswith("Training finished; waiting for MLflow to register the model.")
    assert ("MLflow says: alice:hunter2 may not: http://***@mlflow" in complete["message"]) is told
    assert len([write for write in world.writes if "Registering" in write or write.startswith("status")]) < 8


def test_an_events_note_is_counted_in_bytes() -> None:
    event = Event(key="k", kind="Warning", reason="Failed", message="…" + "ü" * 2000)
    note = event_manifest(event, observed(), NOW)["note"]
    assert 1020 < len(note.encode()) <= 1024


def test_a_namespace_that_is_gone_keeps_nobody_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.apply(SPEC)
    operator = controller(world)
    listing = operator._kube.list_training_runs

    async def list_training_runs(namespace: str | None = None) -> Any:
        if namespace == "gone":
            raise ForbiddenError("may not list in gone")
        return await listing(namespace)

    monkeypatch.setattr(operator._kube, "list_training_runs", list_training_runs)
    operator._namespaces = ["gone", KEY.namespace]
    other = copy.deepcopy(world.run)
    assert other is not None
    other["metadata"]["namespace"] = "gone"
    operator.store.put(other)
    asyncio.run(operator.refresh())
    assert operator.store.known() == [Key("gone", KEY.name), KEY], "what can't be read may still be there"


def test_what_mlflow_says_is_told_once_also_where_nothing_else_is_said() -> None:
    said = with_words(status(conditions=[COMPLETE]), "MLflow says: no.")
    assert said.conditions[0].message == "Waiting. MLflow says: no."
    assert with_words(said, "MLflow says: no.") == said


def test_a_run_moves_when_its_step_epoch_or_activity_does(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.apply({"tracking": {"experiment": "e"}})
    asyncio.run(look(world))
    times = [NOW + timedelta(seconds=10 * number) for number in range(7)]
    now = times[0]
    operator = controller(world, clock=lambda: now)
    places = [(0, 3, ""), (0, 3, ""), (0, 4, ""), (1, 4, ""), (1, 4, ""), (1, 4, "1"), (1, 4, "1")]
    seen = []

    async def scenario() -> None:
        nonlocal now
        await operator.refresh()
        operator.store.get(KEY)["status"]["phase"] = "Running"  # type: ignore[index]
        for at, (epoch, step, activity) in zip(times, places, strict=True):
            # What the trainer's clock says is no matter, and changes each time.
            progress = Progress(epoch=epoch, epochs=2, step=step, time=at - timedelta(days=1))
            facts = run(progress=progress, activity=activity)

            async def active_facts(_: object, facts: RunFacts = facts) -> dict[str, RunFacts]:
                return {"r1": facts}

            now = at
            monkeypatch.setattr(operator._mlflow, "active_facts", active_facts)
            await operator.progress.poll()
            seen.append(operator.progress._moved["r1"])

    asyncio.run(scenario())
    assert seen == [times[0], times[0], times[2], times[3], times[3], times[5], times[5]]


def polled(monkeypatch: pytest.MonkeyPatch, polls: list[tuple[float, int | None]]) -> list[float | None]:
    """An active run's progress at given seconds: its step, or None where MLflow is away.

    Returns:
        Since how many seconds it is taken to stand still, after each poll; None where nobody can tell.
    """
    world = World()
    world.apply({"tracking": {"experiment": "e"}})
    asyncio.run(look(world))
    now = NOW
    operator = controller(world, clock=lambda: now)
    still: list[float | None] = []

    async def scenario() -> None:
        nonlocal now
        await operator.refresh()
        resource: Any = operator.store.get(KEY)
        resource["status"]["phase"] = "Running"
        for at, step in polls:

            async def active_facts(_: object, step: int | None = step) -> dict[str, RunFacts]:
                if step is None:
                    raise ConnectionError("away")
                return {"r1": run(progress=Progress(epoch=0, epochs=1, step=step, time=NOW))}

            now = NOW + timedelta(seconds=at)
            monkeypatch.setattr(operator._mlflow, "active_facts", active_facts)
            await one_round(operator)
            moved = operator._observe(KEY, resource).moved
            still.append(None if moved is None else (now - moved).total_seconds())

    asyncio.run(scenario())
    return still


async def one_round(operator: Controller) -> None:
    """One round of what it does every few seconds."""
    rounds = iter([0.0])

    async def sleep(_: float) -> None:
        if next(rounds, None) is None:
            raise StopAsyncIteration

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(StopAsyncIteration):
        patch.setattr(asyncio, "sleep", sleep)
        await operator.progress.follow(1)


def test_time_in_which_mlflow_could_not_be_asked_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one question that fails begin the count anew: then no hang would ever be noticed."""
    polls = [(0, 3), (10, 3), (20, None), (30, 3), (40, None), (5000, None), (5010, 3), (5020, 4), (5030, 4)]
    assert polled(monkeypatch, polls) == [0, 10, None, 10, None, None, 10, 0, 10]


def test_a_run_that_begins_to_train_again_is_followed_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two attempts it is Pending: that an image is pulled for long is no silence, whatever its node says."""
    world = World()
    world.apply({"tracking": {"experiment": "e"}})
    asyncio.run(look(world))
    now = NOW
    operator = controller(world, clock=lambda: now)

    async def scenario() -> list[datetime | None]:
        nonlocal now
        await operator.refresh()
        other: Any = copy.deepcopy(operator.store.get(KEY))
        other["metadata"] |= {"name": "other", "uid": "another"}
        other["status"] |= {"phase": "Running", "runID": "r2"}
        operator.store.put(other)
        seen = []
        for phase in ("Running", "Pending", "Running"):
            resource: Any = operator.store.get(KEY)
            resource["status"]["phase"] = phase
            # MLflow calls it RUNNING all the time, and tells of it as long as any other is asked for.
            await operator.progress.poll()
            seen.append(operator._observe(KEY, resource).moved)
            now += timedelta(seconds=1000)
        return seen

    assert asyncio.run(scenario()) == [NOW, None, NOW + timedelta(seconds=2000)]


def test_the_checkpoint_of_a_drained_pod_is_told_while_the_next_one_waits() -> None:
    """It is delivered after the last poll, and no poll asks for a run that waits."""
    world = World()
    world.apply({"tracking": {"experiment": "e"}})
    now = NOW

    async def scenario() -> None:
        nonlocal now
        operator = controller(world, clock=lambda: now)

        async def look_again() -> tuple[str, int | None]:
            await operator.refresh()
            await operator.reconcile(KEY)
            assert world.run is not None
            status = world.run["status"]
            return status["phase"], status.get("lastCheckpoint", {}).get("step")

        assert await look_again() == ("Pending", None)
        world.pod_of(world.jobs["run-a1"], **RUNNING)
        assert await look_again() == ("Running", None)
        make_checkpoint(world, 10)
        await operator.progress.poll()
        assert await look_again() == ("Running", 10)
        make_checkpoint(world, 20)
        world.pod_of(world.jobs["run-a1"], **SIGTERMED)
        assert await look_again() == ("Pending", 20)
        assert list(world.jobs) == ["run-a1", "run-a2"]
        written = len(world.writes)
        assert await look_again() == ("Pending", 20)
        assert len(world.writes) == written
        now += timedelta(seconds=60)
        assert await look_again() == ("Pending", 20), "what the last poll knew is older"

    asyncio.run(scenario())


def test_the_checkpoint_of_an_evicted_pod_is_told_while_it_waits_in_its_queue() -> None:
    """It is still the same attempt, which nothing opens anew; and that it makes no steps is no silence."""
    world = World()
    world.apply({"tracking": {"experiment": "e"}})

    async def scenario() -> None:
        operator = controller(world)

        async def look_again() -> dict[str, Any]:
            await operator.refresh()
            await operator.reconcile(KEY)
            assert world.run is not None
            status: dict[str, Any] = world.run["status"]
            return status

        await look_again()
        world.pod_of(world.jobs["run-a1"], **RUNNING)
        assert (await look_again())["phase"] == "Running"
        await operator.progress.poll()
        world.jobs["run-a1"]["spec"]["suspend"] = True
        world.stamp(world.jobs["run-a1"])
        world.pods.clear()
        assert (await look_again())["phase"] == "Pending"
        make_checkpoint(world, 20)
        operator.queue = operator.progress._queue = WorkQueue()
        await operator.progress.poll()
        assert len(operator.queue) == 1
        status = await look_again()
        assert (status["phase"], status["lastCheckpoint"]["step"]) == ("Pending", 20)
        assert operator._observe(KEY, world.run or {}).moved is None

    asyncio.run(scenario())


def make_checkpoint(world: World, step: int) -> None:
    made = Checkpoint(step=step, path=f"checkpoints/{step}", sha256="0" * 64, size=1, time=NOW, last=True)
    world.mlflow_runs[UID]["checkpoints"] = (made,)


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_run_that_mlflow_has_made_twice_is_taken_back(monkeypatch: pytest.MonkeyPatch, is_refused: bool) -> None:
    """The server carried out a creation long after its answer was given up."""
    world = World()
    world.apply({"tracking": {"experiment": "e"}})
    asyncio.run(look(world))
    operator = controller(world)
    discarded: list[str] = []

    async def active_facts(_: object) -> dict[str, RunFacts]:
        others = [run(run_id="of another resource", uid="another"), run(run_id="of nobody")]
        return {item.run_id: item for item in (run(uid=UID), run(run_id="late", uid=UID), *others)}

    async def discard_run(run_id: str) -> None:
        discarded.append(run_id)
        if is_refused:
            raise ConnectionError("no rights")

    async def scenario() -> None:
        await operator.refresh()
        resource: Any = operator.store.get(KEY)
        resource["status"]["phase"] = "Running"
        monkeypatch.setattr(operator._mlflow, "active_facts", active_facts)
        monkeypatch.setattr(operator._mlflow, "discard_run", discard_run, raising=False)
        await one_round(operator)
        assert operator._observe(KEY, resource).moved == NOW, "hangs are noticed all the same"

    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        asyncio.run(scenario())
    assert discarded == ["late"]
    assert len(lines) == 1 + is_refused
    assert all(OF_THE_RUN.items() <= line.items() for line in lines)


@pytest.mark.parametrize(
    ("number", "words", "phase"),
    [
        (1, "Job is invalid: spec.template: Invalid value", "Failed"),
        (1, 'admission webhook "images" denied the request: the registry does not answer', "Pending"),
        (2, "Job is invalid: spec.template: Invalid value", "Pending"),
    ],
    ids=["of itself", "by a policy", "though its like was taken"],
)
def test_a_refused_job_is_final_where_only_the_spec_can_be_the_cause(
    monkeypatch: pytest.MonkeyPatch, number: int, words: str, phase: str
) -> None:
    world = World()
    world.apply(SPEC)

    async def scenario() -> None:
        operator = controller(world)
        if number > 1:
            await look(world)
            world.pod_of(world.jobs["run-a1"], **SIGTERMED)

        async def refuses(*_: object) -> None:
            raise RefusedError(words)

        monkeypatch.setattr(operator._kube, "create_job", refuses)
        await operator.refresh()
        for _ in ("tried", "told"):
            await operator._reconcile_safely(KEY)
        operator.queue.close()

    asyncio.run(scenario())
    assert world.run is not None
    status = world.run["status"]
    assert (status["phase"], status["attempt"]) == (phase, number)
    assert words in next(item["message"] for item in status["conditions"] if item["type"] == "Complete")


def test_a_spec_of_which_no_job_can_be_built_fails_and_leaves_one_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.apply(SPEC)

    def fails(*_: object) -> None:
        raise ValueError("Circular reference detected (depth exceeded)")

    monkeypatch.setattr(act, "build_job", fails)
    with capture_logs() as lines:
        asyncio.run(look(world))
        asyncio.run(look(world))

    assert [line["event"] for line in lines if line.get("exc_info")] == [
        "the attempt's Job can't be built from the spec"
    ]
    assert world.run is not None
    assert world.run["status"]["phase"] == "Failed"
    failed = next(item for item in world.run["status"]["conditions"] if item["type"] == "Failed")
    assert failed["reason"] == "InvalidConfiguration"
    assert "(ValueError: Circular reference detected (depth exceeded)): correct it in a new" in failed["message"]
    assert world.mlflow_runs[UID]["status"] == "FAILED"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionError("away"), "The training pod is being created."),
        (
            ApiException(status=500, reason="failed calling webhook"),
            "The attempt's Job could not be created yet: failed calling webhook",
        ),
    ],
    ids=["the API server", "a webhook"],
)
def test_what_is_away_for_longer_than_the_pending_deadline_fails_no_run(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    world = World()
    world.apply({"pendingDeadlineSeconds": 30})
    now = NOW

    async def scenario() -> None:
        nonlocal now
        operator = controller(world, clock=lambda: now)

        async def fails(*_: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(operator._kube, "create_job", fails)
            for _ in range(3):
                await operator.refresh()
                await operator._reconcile_safely(KEY)
                now += timedelta(seconds=1000)
        assert world.run is not None
        assert [item["message"] for item in world.run["status"]["conditions"]] == [told]
        await operator.refresh()
        await operator._reconcile_safely(KEY)
        operator.queue.close()

    asyncio.run(scenario())
    assert list(world.jobs) == ["run-a1"]


@pytest.mark.parametrize(
    ("errors", "phase"),
    [
        ({"create_job": ApiException(status=500, reason="failed calling webhook")}, "Pending"),
        ({"create_job": ConnectionError("away"), "get_training_run": ConnectionError("away")}, "Pending"),
        ({"create_job": ForbiddenError("no quota")}, "Failed"),
    ],
    ids=["a webhook", "the API server", "refused all the time"],
)
def test_an_outage_between_two_refusals_is_no_refusal(
    monkeypatch: pytest.MonkeyPatch, errors: dict[str, Exception], phase: str
) -> None:
    world = World()
    world.apply({"pendingDeadlineSeconds": 1800})
    now = NOW

    async def scenario() -> None:
        nonlocal now
        operator = controller(world, clock=lambda: now)
        await operator.refresh()

        async def look_with(errors: dict[str, Exception], times: int) -> None:
            nonlocal now
            with monkeypatch.context() as patch:
                for name, error in errors.items():
                    patch.setattr(operator._actor._kube, name, failing(error))
                for _ in range(times):
                    now += timedelta(seconds=60)
                    await operator._reconcile_safely(KEY)

        refused: dict[str, Exception] = {"create_job": ForbiddenError("no quota")}
        await look_with(refused, 2)
        await look_with(errors, 60)
        await look_with(refused, 2)
        operator.queue.close()

    asyncio.run(scenario())
    assert world.run is not None
    assert world.run["status"]["phase"] == phase


def failing(error: Exception) -> Any:
    async def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("is_made", [True, False])
def test_a_write_whose_answer_is_lost_is_told_of_once(monkeypatch: pytest.MonkeyPatch, is_made: bool) -> None:
    world = World()
    world.apply(SPEC)

    async def scenario() -> None:
        operator = controller(world)
        await operator.refresh()
        write = operator._kube.patch_status

        async def lost(*words: Any) -> Any:
            if is_made:
                await write(*words)
            raise TimeoutError

        with monkeypatch.context() as patch:
            patch.setattr(operator._kube, "patch_status", lost)
            await operator._reconcile_safely(KEY)
        for _ in range(3):
            await operator._reconcile_safely(KEY)
        await operator.events.record_waiting()
        operator.queue.close()

    asyncio.run(scenario())
    assert sorted(world.events) == ["AttemptStarted", "RunCreated"]
    assert world.writes.count("create mlflow run") == 1


def test_a_stale_observation_writes_nothing() -> None:
    world = World()
    world.apply(SPEC)

    async def scenario() -> None:
        behind = controller(world)
        await behind.refresh()
        await look(world)
        before = list(world.writes)
        # It works from what it saw before the other one wrote; the API server refuses.
        await behind._reconcile_safely(KEY)
        assert world.writes == before
        # Then it has read the run again.
        await behind.reconcile(KEY)
        assert world.writes == before

    asyncio.run(scenario())


def test_a_run_made_for_a_resource_that_another_operator_let_go_is_ended() -> None:
    """The other one saw no run to end: this one made it a moment later."""
    world = World()
    world.apply(SPEC)

    async def scenario() -> None:
        world.mlflow_away = True
        with pytest.raises(ConnectionError):
            await look(world)
        world.mlflow_away = False
        behind = controller(world)
        await behind.refresh()
        world.ask_for_deletion(STAMP)
        await look(world)
        assert (world.run, world.mlflow_runs) == (None, {})

        await behind._reconcile_safely(KEY)

        assert world.mlflow_runs[UID]["status"] == "KILLED"
        assert behind.store.get(KEY) is None

    asyncio.run(scenario())


def test_one_event_for_each_transition() -> None:
    world = World()
    world.apply(SPEC)
    asyncio.run(live(world, SUCCEEDED))

    assert world.events == [
        "RunCreated",
        "AttemptStarted",
        "Training",
        "AttemptCompleted",
        "ModelRegistered",
        "Completed",
    ]


def test_what_the_api_server_has_forgotten_is_not_told_again() -> None:
    world = lived(SUCCEEDED)
    world.events.clear()
    world.event_names.clear()

    async def recalled(later: timedelta) -> list[str]:
        operator = controller(world, clock=lambda: NOW + later)
        await operator.refresh()
        await operator.events.recall()
        await operator.events.record_waiting()
        return world.events

    assert asyncio.run(recalled(timedelta(hours=2))) == []
    assert "Completed" in asyncio.run(recalled(timedelta(minutes=50)))


def test_events_of_a_namespace_that_can_not_be_read_keep_no_others_back() -> None:
    world = lived(SUCCEEDED)
    world.events.clear()
    world.event_names.clear()

    async def scenario() -> None:
        operator = controller(world)
        operator.events._namespaces = ["gone", "team"]
        names = operator._kube.event_names

        async def listed(namespace: str | None, kind: str) -> set[tuple[str, str]]:
            if namespace == "gone":
                raise ForbiddenError("events is forbidden")
            return await names(namespace, kind)

        operator._kube.event_names = listed  # type: ignore[method-assign]
        await operator.refresh()
        await operator.events.recall()
        await operator.events.record_waiting()

    asyncio.run(scenario())
    assert "Completed" in world.events


def test_what_is_gone_is_forgotten() -> None:
    """Nothing else may come of it: a run whose Job had gone before, or that never had one."""
    world = World()
    world.apply(SPEC)

    async def scenario() -> dict[Key, Any]:
        operator = controller(world)
        handlers = Handlers(OperatorSettings(tracking_uri="http://mlflow:5000", trainer_image="trainer:1"))
        handlers._started = operator
        await operator.refresh()
        operator._note_trouble(operator._observe(KEY, operator.store.get(KEY) or {}), 1, ForbiddenError("no quota"))
        assert list(operator._troubles) == [KEY]
        await handlers.training_run({"type": "DELETED", "object": operator.store.get(KEY)})  # type: ignore[typeddict-item]
        assert await asyncio.wait_for(operator.queue.get(), 10) == KEY
        await operator.reconcile(KEY)
        return operator._troubles

    assert asyncio.run(scenario()) == {}


def test_what_went_while_no_watch_was_there_to_tell_is_forgotten() -> None:
    world = World()
    world.apply(SPEC)

    async def scenario() -> dict[Key, Any]:
        operator = controller(world)
        await operator.refresh()
        operator._note_trouble(operator._observe(KEY, operator.store.get(KEY) or {}), 1, ForbiddenError("no quota"))
        world.run = None
        operator.queue = WorkQueue()
        await operator.refresh()
        assert await asyncio.wait_for(operator.queue.get(), 10) == KEY
        await operator.reconcile(KEY)
        return operator._troubles

    assert asyncio.run(scenario()) == {}


def test_a_run_whose_end_is_told_before_its_finalizer_is_answered_for_stays_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.apply(SPEC)

    async def scenario() -> None:
        await look(world)
        world.ask_for_deletion(STAMP)
        world.jobs.clear()
        world.pods.clear()
        operator = controller(world)
        await operator.refresh()
        patch = operator._actor._kube.patch_finalizers

        async def told_first(*words: Any) -> dict[str, Any]:
            patched = await patch(*words)
            operator.store.drop(KEY, UID)
            return patched

        monkeypatch.setattr(operator._actor._kube, "patch_finalizers", told_first)
        await operator.reconcile(KEY)
        assert world.run is None
        assert operator.store.get(KEY) is None

    asyncio.run(scenario())


def test_trouble_with_a_job_that_was_made_after_all_is_over() -> None:
    """Its answer was lost: hours later, the first failure of the next try would be taken for the last of many."""
    world = World()
    world.apply(SPEC)

    async def scenario() -> dict[Key, Any]:
        operator = controller(world)
        await operator.refresh()
        await operator.reconcile(KEY)
        operator._note_trouble(operator._observe(KEY, operator.store.get(KEY) or {}), 1, ForbiddenError("no quota"))
        assert list(operator._troubles) == [KEY]
        await operator.refresh()
        await operator.reconcile(KEY)
        return operator._troubles

    assert asyncio.run(scenario()) == {}


def test_a_job_that_may_create_no_pod_says_why_and_is_not_asked_at_every_look() -> None:
    world, now = World(), NOW
    world.apply(SPEC | {"pendingDeadlineSeconds": 90})
    world.takes_no_pods = "exceeded quota: none"

    async def scenario() -> None:
        nonlocal now
        operator = controller(world, lambda: now)
        await operator.refresh()
        for seconds, asked in ((0, 0), (PENDING_REPORT_S, 1), (PENDING_REPORT_S + 50, 1), (PENDING_REPORT_S + 60, 2)):
            now = NOW + timedelta(seconds=seconds)
            await operator.reconcile(KEY)
            assert len(world.asked) == asked, seconds
        assert said_last(world) == WITHOUT_PODS + ' Error creating: pods "run-a1-…" is forbidden: exceeded quota: none'
        now = NOW + timedelta(seconds=91)
        await operator.reconcile(KEY)

    asyncio.run(scenario())
    assert world.run is not None
    assert world.run["status"]["attempts"][0]["reason"] == "PodNotStarted"
    assert "exceeded quota: none" in said_last(world)


def test_a_job_whose_events_may_not_be_read_is_given_up_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    world, now = World(), NOW
    world.apply(SPEC | {"pendingDeadlineSeconds": 90})
    world.takes_no_pods = "exceeded quota: none"

    async def scenario() -> None:
        nonlocal now
        operator = controller(world, lambda: now)
        monkeypatch.setattr(operator._actor._kube, "list_events", failing(ForbiddenError("not your events")))
        await operator.refresh()
        for seconds in (0, PENDING_REPORT_S):
            now = NOW + timedelta(seconds=seconds)
            await operator.reconcile(KEY)
        assert said_last(world) == WITHOUT_PODS
        now = NOW + timedelta(seconds=91)
        await operator.reconcile(KEY)

    asyncio.run(scenario())
    assert world.run is not None
    assert world.run["status"]["attempts"][0]["reason"] == "PodNotStarted"


WITHOUT_PODS = "Its Job could create no pod: see the Job's events (kubectl describe job)."


def said_last(world: World) -> str:
    """The message of the condition Complete."""
    assert world.run is not None
    return next(str(item["message"]) for item in world.run["status"]["conditions"] if item["type"] == "Complete")


def test_an_event_is_tried_again_behind_the_others_unless_it_is_refused() -> None:
    world = World()
    world.apply(SPEC)
    failures = {"RunCreated": [ConnectionError("away"), ConnectionError("away")], "Training": [RefusedError("never")]}

    async def scenario() -> list[bool]:
        operator = controller(world)
        create = operator._kube.create_event

        async def sometimes(namespace: str, event: dict[str, Any]) -> None:
            if failures.get(event["reason"]):
                raise failures[event["reason"]].pop()
            await create(namespace, event)

        operator._kube.create_event = sometimes  # type: ignore[method-assign]
        await operator.refresh()
        await operator.reconcile(KEY)
        world.pod_of(world.jobs["run-a1"], **RUNNING)
        await operator.refresh()
        await operator.reconcile(KEY)
        return [await operator.events.record_waiting() for _ in range(3)]

    with capture_logs() as lines:
        assert asyncio.run(scenario()) == [False, False, True]
    assert world.events == ["AttemptStarted", "RunCreated"]
    lost = [line for line in lines if line["event"] == "an Event could not be recorded"]
    assert len(lost) == 1
    assert OF_THE_RUN.items() <= lost[0].items()


def test_a_patch_takes_away_what_is_gone_at_every_depth() -> None:
    old = {"a": 1, "progress": {"step": 1, "estimated": "soon"}, "list": [1, 2]}
    new = {"progress": {"step": 2}, "list": [1]}

    assert merge_patch(old, new) == {"a": None, "progress": {"step": 2, "estimated": None}, "list": [1]}
    assert merge_patch(new, new) == {}


def test_a_state_that_arrives_in_the_middle_of_a_look_is_not_written_over() -> None:
    """As when two operators are at work: the other one's status comes by the watch while this one waits for MLflow."""
    world = World()
    world.apply(SPEC)

    async def scenario() -> None:
        behind = controller(world)
        await behind.refresh()
        original = behind._mlflow.ensure_run

        async def slowly(observed: Any) -> Any:
            facts = await original(observed)
            world.run = world.stamp({**(world.run or {}), "status": {"phase": "Pending", "runID": "theirs"}})
            behind.store.put(copy.deepcopy(world.run))
            return facts

        behind._mlflow.ensure_run = slowly  # type: ignore[method-assign]
        with pytest.raises(ConflictError):
            await behind.reconcile(KEY)

    asyncio.run(scenario())

    assert world.run is not None
    assert world.run["status"]["runID"] == "theirs"
    assert world.jobs == {}


def test_a_run_whose_mlflow_run_somebody_deleted_fails_and_says_so() -> None:
    world = World()
    world.apply(SPEC)

    async def scenario() -> None:
        operator = controller(world)
        await operator.refresh()

        async def gone(run_id: str, attempt: int) -> Any:
            raise RunGoneError(f"the MLflow run {run_id} was deleted: create a new TrainingRun")

        operator._mlflow.open_attempt = gone  # type: ignore[method-assign]
        world.mlflow_runs[UID] = {"id": "r1", "status": "FINISHED", "attempt": 0}
        await operator.reconcile(KEY)

    asyncio.run(scenario())

    assert world.run is not None
    failed = next(item for item in world.run["status"]["conditions"] if item["type"] == "Failed")
    assert (failed["status"], failed["reason"]) == ("True", "InvalidConfiguration")
    assert "was deleted: create a new TrainingRun" in failed["message"]
    assert world.jobs == {}


def test_the_probe_tells_an_operator_that_looks_from_one_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> list[str | None]:
        operator = controller(World())
        clock = time.monotonic()
        said = [operator.stuck_reason(300)]
        monkeypatch.setattr(time, "monotonic", lambda: clock + 700)
        said.append(operator.stuck_reason(300))
        operator._last_reconciled = clock + 700
        operator.queue.add(KEY)
        monkeypatch.setattr(time, "monotonic", lambda: clock + 1100)
        operator._last_reconciled = clock + 1100
        said.append(operator.stuck_reason(300))
        operator._last_end = clock + 1000
        return [*said, operator.stuck_reason(300)]

    fine, silent, waiting, busy = asyncio.run(scenario())

    assert fine is None
    assert silent is not None
    assert "nothing was looked at for 700 s" in silent
    assert waiting is not None
    assert "has waited for 400 s" in waiting
    assert busy is None, "a long queue moves"


def test_an_attempt_that_hangs_is_stalled_and_not_preempted_by_its_own_end() -> None:
    world = World()
    world.apply({"stallTimeoutSeconds": 20, "retries": {"limit": 0}})
    later = NOW + timedelta(seconds=60)

    async def scenario() -> None:
        await look(world)
        world.pod_of(world.jobs["run-a1"], **RUNNING)
        await look(world)
        for _ in ("its end is asked for", "its pod is gone"):
            operator = controller(world, clock=lambda: later)
            operator.progress._moved = {"r1": NOW}
            await operator.refresh()
            await operator.reconcile(KEY)
            assert not world.jobs
            world.pods.clear()

    asyncio.run(scenario())

    assert world.run is not None
    status = world.run["status"]
    assert (status["phase"], status["attempts"][0]["reason"]) == ("Failed", "Stalled")
    assert world.kept["attempts/1/run-a1-x.log"] == "log of run-a1-x\n"


def test_the_run_of_a_suspended_training_is_parked_though_nothing_else_happens() -> None:
    world = World()
    world.apply({"tracking": {"experiment": "e"}})

    async def scenario() -> None:
        await look(world)
        world.pod_of(world.jobs["run-a1"], **RUNNING)
        assert world.run is not None
        world.run["spec"]["suspend"] = True
        world.stamp(world.run)
        await look(world)
        world.pods.clear()
        operator = await look(world)
        assert world.run["status"]["phase"] == "Suspended"
        assert world.mlflow_runs[UID]["status"] == "RUNNING", "nobody knew then what it says"
        for _ in range(2):
            operator.queue = operator.progress._queue = WorkQueue()
            await operator.progress.poll()
            assert len(operator.queue) == (world.mlflow_runs[UID]["status"] == "RUNNING")
            await operator.reconcile(KEY)
            assert world.mlflow_runs[UID]["status"] == "SCHEDULED"

    asyncio.run(scenario())


def test_a_checkpoint_that_arrives_after_a_suspension_is_looked_at() -> None:
    world = World()
    world.apply({"suspend": True})
    assert world.run is not None
    world.run["status"] = {"phase": "Suspended", "runID": "r1", "attempt": 1}
    world.run["spec"]["tracking"] = {"experiment": "lab"}

    async def scenario() -> bool:
        operator = controller(world)
        operator.store.put(copy.deepcopy(world.run) or {})
        asked: list[dict[str, str]] = []

        async def facts(active: dict[str, str]) -> dict[str, RunFacts]:
            asked.append(active)
            return {"r1": run()}

        operator._mlflow.active_facts = facts  # type: ignore[method-assign, assignment]
        await operator.progress.poll()
        assert asked == [{"r1": "lab"}]
        return len(operator.queue) == 1

    assert asyncio.run(scenario())
