"""Accounts of attempts' ends are kept behind the looks: nothing waits for a slow store, and nothing is forgotten."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from kubernetes.aio.client.exceptions import ApiException
from structlog.testing import capture_logs

from heimdall_operator import accounts
from heimdall_operator.accounts import AT_ONCE, RETRY_LIMIT_S, RETRY_S, Keeper
from heimdall_operator.controller import Controller
from heimdall_operator.decide import KEEP_LOGS_LIMIT_S
from heimdall_operator.kube import ForbiddenError, LogGoneError, RefusedError
from heimdall_operator.observe import PodFacts
from tests.unit.operator.builders import NOW, UID, attempt, ended_pod, observed, pod, status
from tests.unit.operator.fakes import KEY, STAMP, FakeKube, FakeMlflow, World, controller

RUNNING = {"phase": "Running", "running": {"startedAt": STAMP}}
SIGTERMED = {"phase": "Failed", "terminated": {"exitCode": 143, "startedAt": STAMP, "finishedAt": STAMP}}
SUCCEEDED = {"phase": "Succeeded", "terminated": {"exitCode": 0, "startedAt": STAMP, "finishedAt": STAMP}}
KEPT = "runs:/r1/attempts/1"


class SlowStore(FakeMlflow):
    """Takes artifacts when it is let."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.ready, self.is_busy = asyncio.Event(), asyncio.Event()
        self.uploads = 0

    async def keep_files(self, run_id: str, folder: str, files: dict[str, str]) -> str:
        self.uploads += 1
        if self.uploads == AT_ONCE:
            self.is_busy.set()
        await self.ready.wait()
        return await super().keep_files(run_id, folder, files)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> Any:
        return self.now


def keeper(world: World, mlflow: Any = None, kube: Any = None, clock: Clock | None = None) -> Keeper:
    """One that waits for nothing for long."""
    return Keeper(kube or FakeKube(world), mlflow or FakeMlflow(world), clock or Clock(), wait_s=0.001)


def patient(kube: Any, mlflow: Any, clock: Clock) -> Keeper:
    """One that waits for as long as the operator's does."""
    return Keeper(kube, mlflow, clock)


async def look(operator: Controller) -> None:
    await operator.refresh()
    await operator.reconcile(KEY)


def logs(world: World) -> list[str | None]:
    assert world.run is not None
    return [each.get("logs") for each in world.run["status"]["attempts"]]


def test_the_next_attempt_begins_while_the_store_takes_its_time() -> None:
    world = World()
    world.apply({})

    async def scenario() -> None:
        operator = controller(world)
        store = SlowStore(world)
        operator._actor.keeper = keeper(world, store)
        await look(operator)
        for state in (RUNNING, SIGTERMED):
            world.pod_of(world.jobs["run-a1"], **state)
            await look(operator)
        assert list(world.jobs) == ["run-a1", "run-a2"]
        world.pod_of(world.jobs["run-a2"], **RUNNING)
        await look(operator)
        assert logs(world) == [None, None]

        store.ready.set()
        await until_settled(operator)
        await look(operator)

        assert logs(world) == [KEPT, None]
        assert store.uploads == 1

    asyncio.run(scenario())


def test_a_finished_run_is_told_where_its_log_is_once_that_is_known() -> None:
    world = World()
    world.apply({"ttlSecondsAfterFinished": 0})

    async def scenario() -> None:
        world.store_away = True
        operator = controller(world)
        await look(operator)
        world.pod_of(world.jobs["run-a1"], **SUCCEEDED)
        await look(operator)
        assert world.run is not None
        assert world.run["status"]["phase"] == "Succeeded"
        assert list(world.jobs) == ["run-a1"], "what is not kept is in its pod alone"

        world.store_away = False
        await look(controller(world))  # a new operator takes it up

        assert logs(world) == [KEPT]
        assert world.kept["attempts/1/run-a1-x.log"] == "log of run-a1-x\n"
        assert world.jobs == {}

    asyncio.run(scenario())


def test_a_store_that_is_away_is_tried_ever_more_seldom() -> None:
    world, clock, tries = World(), Clock(), 0
    world.store_away = True
    seen = observed(logs={}, pods=(ended_pod(0),))

    async def scenario() -> None:
        nonlocal tries
        keeps = keeper(world, clock=clock)
        pauses = []
        for _ in range(10):
            assert await keeps.keep(seen, 1, pods_go=False) is None
            before = clock.now
            while 1 in keeps.known(KEY, seen.uid, seen.status):
                clock.now += timedelta(seconds=1)
            pauses.append((clock.now - before).total_seconds())
        assert pauses == [min(RETRY_S * 2**number, RETRY_LIMIT_S) for number in range(10)]
        world.store_away = False
        world.mlflow_runs[seen.uid] = {}
        assert await keeps.keep(seen, 1, pods_go=False) == KEPT
        assert keeps.known(KEY, seen.uid, seen.status) == {1: KEPT}
        written = status(attempt(logs=KEPT))
        assert keeps.known(KEY, seen.uid, written) == {}
        assert KEY not in keeps._accounts, "what is written need not be remembered"

    asyncio.run(scenario())


def test_a_pod_that_is_to_be_ended_waits_until_its_log_is_read() -> None:
    world = World()
    reads: list[str] = []

    async def scenario() -> None:
        reading = asyncio.Event()

        class Kube(FakeKube):
            async def read_log(self, namespace: str, pod: str, container: str, limit: int) -> str:
                await reading.wait()
                reads.append(pod)
                return "its last words"

        store = SlowStore(world)
        keeps = keeper(world, store, Kube(world))
        waiting = asyncio.create_task(keeps.keep(observed(logs={}, pods=(pod(),)), 1, pods_go=True))
        done, _ = await asyncio.wait({waiting}, timeout=0.05)
        assert not done
        reading.set()
        assert await waiting is None
        assert (reads, store.uploads) == (["run-a1-x"], 1), "the upload goes on behind"
        keeps.close()

    asyncio.run(scenario())


class Unread(FakeKube):
    """Hands out a log after a number of errors."""

    def __init__(self, world: World, *errors: Exception) -> None:
        super().__init__(world)
        self.errors = list(errors)

    async def read_log(self, namespace: str, pod: str, container: str, limit: int) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "its last words"


UNANSWERED: list[Exception] = [TimeoutError(), ApiException(status=502, reason="the kubelet does not answer")]


async def kept(kube: Any, clock: Clock) -> str | None:
    """What is kept of a log, if anything is while its pod waits for that."""
    world = kube.world
    keeps = patient(kube, FakeMlflow(world), clock)
    seen = observed(logs={}, pods=(ended_pod(0),))
    while clock.now < NOW + timedelta(seconds=KEEP_LOGS_LIMIT_S):
        if 1 not in keeps.known(KEY, seen.uid, seen.status):
            where = await keeps.keep(seen, 1, pods_go=False)
            if where is not None:
                assert where == KEPT
                return str(world.kept["attempts/1/run-a1-x.log"])
        clock.now += timedelta(seconds=1)
    return None


def test_a_log_that_could_not_be_read_now_is_asked_for_again() -> None:
    clock = Clock()

    assert asyncio.run(kept(Unread(World(), *UNANSWERED), clock)) == "its last words"
    assert clock.now > NOW


@pytest.mark.parametrize(("takes_s", "tries"), [(0, 6), (30, 5)], ids=["refused at once", "not answered in time"])
def test_a_log_that_is_never_handed_out_is_given_up_before_its_pod_expires(takes_s: int, tries: int) -> None:
    clock = Clock()

    class Slow(Unread):
        async def read_log(self, namespace: str, pod: str, container: str, limit: int) -> str:
            clock.now += timedelta(seconds=takes_s)
            return await super().read_log(namespace, pod, container, limit)

    kube = Slow(World(), *(10 * [TimeoutError("no answer")]))

    assert asyncio.run(kept(kube, clock)) == "could not be read: TimeoutError: no answer\n"
    assert len(kube.errors) == 10 - tries


def test_a_pod_that_can_not_be_read_keeps_no_log_of_its_group_back() -> None:
    world, clock = World(), Clock()
    reads: list[str] = []

    class Kube(FakeKube):
        async def read_log(self, namespace: str, pod: str, container: str, limit: int) -> str:
            reads.append(pod)
            if reads.count(pod) == 1 and pod == "run-a1-0":
                raise TimeoutError
            return f"log of {pod}"

    pods = tuple(ended_pod(3, name=f"run-a1-{worker}", worker=worker) for worker in range(2))
    seen = observed(logs={}, pods=pods)

    async def scenario() -> None:
        keeps = patient(Kube(world), FakeMlflow(world), clock)
        assert await keeps.keep(seen, 1, pods_go=False) is None
        assert keeps.known(KEY, seen.uid, seen.status) == {1: None}
        assert sorted(world.kept) == ["attempts/1/events.jsonl", "attempts/1/run-a1-1.log"]
        clock.now += timedelta(seconds=RETRY_S)
        assert keeps.known(KEY, seen.uid, seen.status) == {}
        assert await keeps.keep(seen, 1, pods_go=False) == KEPT

    asyncio.run(scenario())
    assert world.kept["attempts/1/run-a1-0.log"] == "log of run-a1-0"
    assert reads == ["run-a1-0", "run-a1-1", "run-a1-0"], "what is kept is not read again"


class Removing(FakeKube):
    """Its nodes remove containers as soon as these have ended."""

    def __init__(self, world: World, *ends: Exception | bytes) -> None:
        super().__init__(world)
        self.ends = list(ends)
        """How each call that listens ends: with last lines, or an error."""
        self.has_ended, self.is_again = asyncio.Event(), asyncio.Event()
        self.listened: list[str] = []

    async def read_log(self, namespace: str, pod: str, container: str, limit: int) -> str:
        raise LogGoneError("unable to retrieve container logs for containerd://1")

    async def follow_log(
        self, namespace: str, pod: str, container: str, heard: bytearray, *, limit: int, timeout_s: float
    ) -> None:
        if pod in self.listened:
            self.is_again.set()
        self.listened.append(pod)
        heard += b"step 20\n"
        end = self.ends.pop(0) if self.ends else b"checkpoint\n"
        if isinstance(end, ConnectionError):
            raise end
        await self.has_ended.wait()
        if isinstance(end, Exception):
            raise end
        heard += end


def being_ended(number: int = 1, **more: Any) -> PodFacts:
    return pod(number, deleting=NOW + timedelta(seconds=30), **more)


def drained(**more: Any) -> PodFacts:
    """What a pod that was listened to is when it has ended."""
    return ended_pod(143, deleting=NOW, **more)


NOT_ALL = "\nWhat came after this could not be read.\n"
WHOLE = "step 20\ncheckpoint\n"


@pytest.mark.parametrize(
    ("ends", "wanted"),
    [
        ([], WHOLE),
        ([TimeoutError()], f"step 20\n{NOT_ALL}"),
        ([b"checkpoint\nrpc error: code = NotFound"], f"{WHOLE}{NOT_ALL}"),
        ([ConnectionResetError()], WHOLE),
    ],
    ids=["whole", "not to the end", "broken off by the node", "broken off, and listened to again"],
)
def test_a_pod_that_somebody_ends_is_listened_to_since_its_node_removes_it(
    monkeypatch: pytest.MonkeyPatch, ends: list[Exception | bytes], wanted: str
) -> None:
    world = World()
    # Of what is not heard to the end, the time is over.
    monkeypatch.setattr(accounts, "LISTEN_AGAIN_S", 3600.0 if wanted.startswith(f"step 20\n{NOT_ALL}") else 0.001)

    async def scenario() -> None:
        kube = Removing(world, *ends)
        keeps = keeper(world, kube=kube)
        for _ in range(2):
            keeps.listen(observed(logs={}, pods=(being_ended(),)))
            await asyncio.sleep(0)
        assert kube.listened == ["run-a1-x"], "once"
        if any(isinstance(end, ConnectionError) for end in ends):
            await asyncio.wait_for(kube.is_again.wait(), 30)
        kube.has_ended.set()
        world.mlflow_runs[UID] = {}
        assert await keeps.keep(observed(logs={}, pods=(drained(),)), 1, pods_go=False) == KEPT
        assert heard_of(keeps) == [], "what is kept is not held any longer"

    asyncio.run(scenario())
    assert world.kept["attempts/1/run-a1-x.log"] == wanted


def heard_of(keeps: Keeper) -> list[str]:
    return [name for known in keeps._accounts.values() for account in known.values() for name in account.heard]


def test_what_was_heard_is_held_until_it_is_kept() -> None:
    world, clock = World(), Clock()
    world.store_away = True

    async def scenario() -> None:
        kube = Removing(world)
        keeps = keeper(world, kube=kube, clock=clock)
        keeps.listen(observed(logs={}, pods=(being_ended(),)))
        await asyncio.sleep(0)
        kube.has_ended.set()
        seen = observed(logs={}, pods=(drained(),))
        assert await keeps.keep(seen, 1, pods_go=False) is None
        keeps.listen(seen)
        world.store_away = False
        world.mlflow_runs[UID] = {}
        clock.now += timedelta(seconds=RETRY_S)
        assert await keeps.keep(seen, 1, pods_go=False) == KEPT

    asyncio.run(scenario())
    assert world.kept["attempts/1/run-a1-x.log"] == WHOLE


@pytest.mark.parametrize(
    ("many", "logs"),
    [
        ([pod()], {}),
        ([being_ended(running_since=None)], {}),
        ([drained()], {}),
        ([being_ended()], {1: KEPT}),
    ],
    ids=["nobody ends it", "it has not begun", "it has ended", "it was read before"],
)
def test_no_other_pod_is_listened_to(many: list[PodFacts], logs: dict[int, str | None]) -> None:
    async def scenario() -> None:
        kube = Removing(World())
        keeps = keeper(kube.world, kube=kube)
        keeps.listen(observed(logs=logs, pods=tuple(many)))
        await asyncio.sleep(0)
        assert kube.listened == []

    asyncio.run(scenario())


def test_few_pods_are_listened_to_at_one_time_and_none_of_a_run_that_is_gone() -> None:
    async def scenario() -> None:
        kube = Removing(World())
        keeps = keeper(kube.world, kube=kube)
        many = tuple(being_ended(name=f"run-a1-{worker}", worker=worker) for worker in range(2 * accounts.LISTENED))
        keeps.listen(observed(logs={}, pods=many))
        await asyncio.sleep(0)
        assert len(kube.listened) == accounts.LISTENED
        tasks = [heard.task for account in keeps._accounts[KEY].values() for heard in account.heard.values()]
        keeps.forget(KEY)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)
        assert heard_of(keeps) == []

    asyncio.run(scenario())


@pytest.mark.parametrize("is_replaced", [True, False], ids=["replaced", "waiting to be"])
def test_pods_of_which_no_account_is_kept_make_room_for_others(is_replaced: bool) -> None:
    """A queue takes a group's pods away: others go on in the same attempt, and its account is kept of those."""
    workers = range(accounts.LISTENED)

    async def scenario() -> None:
        kube = Removing(World())
        keeps = keeper(kube.world, kube=kube)
        group = tuple(being_ended(name=f"run-a1-{worker}", worker=worker) for worker in workers)
        keeps.listen(observed(logs={}, pods=group))
        await asyncio.sleep(0)
        kube.has_ended.set()
        tasks = [heard.task for account in keeps._accounts[KEY].values() for heard in account.heard.values()]
        await asyncio.gather(*tasks)
        if is_replaced:
            after = tuple(pod(name=f"run-a1-{worker}-b", worker=worker, created=NOW) for worker in workers)
            keeps.listen(observed(logs={}, pods=(*group, *after)))
            assert heard_of(keeps) == []
        keeps.listen(observed(name="other", uid="another", logs={}, pods=(being_ended(name="other-a1"),)))
        await asyncio.sleep(0)
        assert kube.listened[-1] == "other-a1"

    asyncio.run(scenario())


def test_a_log_that_a_node_has_no_more_although_nobody_deleted_its_pod_is_asked_for_again() -> None:
    clock = Clock()
    gone = LogGoneError("unable to retrieve container logs for containerd://1")

    assert asyncio.run(kept(Unread(World(), gone), clock)) == "its last words"
    assert clock.now > NOW


def test_a_run_whose_pod_is_drained_is_listened_to_by_the_operator() -> None:
    world = World()
    world.apply({})

    async def scenario() -> None:
        operator = controller(world)
        kube = Removing(world)
        operator._actor.keeper = keeper(world, kube=kube)
        await look(operator)
        world.pod_of(world.jobs["run-a1"], **RUNNING)
        await look(operator)
        world.pods["run-a1-x"]["metadata"]["deletionTimestamp"] = STAMP
        world.stamp(world.pods["run-a1-x"])
        await look(operator)
        await asyncio.sleep(0)
        assert kube.listened == ["run-a1-x"]
        kube.has_ended.set()
        world.pod_of(world.jobs["run-a1"], **SIGTERMED)
        await look(operator)

    asyncio.run(scenario())
    assert world.kept["attempts/1/run-a1-x.log"] == WHOLE


@pytest.mark.parametrize(
    "error", [RefusedError("no container"), ForbiddenError("no right"), ApiException(status=404, reason="no pod")]
)
def test_a_log_that_is_not_there_is_asked_for_once(error: Exception) -> None:
    clock = Clock()

    text = asyncio.run(kept(Unread(World(), error), clock))

    assert (text or "").startswith("could not be read: ")
    assert clock.now == NOW


def test_a_pod_that_goes_is_asked_once() -> None:
    world = World()

    async def scenario() -> None:
        keeps = patient(Unread(world, *UNANSWERED), FakeMlflow(world), Clock())
        assert await keeps.keep(observed(logs={}, pods=(pod(),)), 1, pods_go=True) == KEPT

    asyncio.run(scenario())
    assert world.kept["attempts/1/run-a1-x.log"].startswith("could not be read: TimeoutError")


@pytest.mark.parametrize("away_s", [60, KEEP_LOGS_LIMIT_S + 1])
def test_the_log_of_a_pod_that_is_gone_is_held_until_it_is_kept_or_too_late(away_s: float) -> None:
    world, clock = World(), Clock()
    world.store_away = True
    kube = Counted(world)
    seen = observed(logs={}, pods=(pod(),))
    paused: list[float] = []

    async def scenario() -> dict[int, str | None]:
        goes_on = asyncio.Event()

        async def sleep(pause_s: float) -> None:
            await goes_on.wait()
            paused.append(pause_s)
            clock.now += timedelta(seconds=pause_s)
            world.store_away = clock.now < NOW + timedelta(seconds=away_s)

        keeps = Keeper(kube, FakeMlflow(world), clock, wait_s=3600, sleep=sleep)  # type: ignore[arg-type]
        async with asyncio.timeout(60):  # and not an hour
            assert await keeps.keep(seen, 1, pods_go=True) is None
        assert keeps.known(KEY, seen.uid, seen.status) == {1: None}, "decide need not ask again"
        (task,) = (each.task for each in keeps._accounts[KEY].values())
        assert task is not None
        goes_on.set()
        await task
        await asyncio.sleep(0)
        return keeps.known(KEY, seen.uid, seen.status)

    with capture_logs() as lines:
        known = asyncio.run(scenario())
    assert kube.reads == 1
    if away_s == 60:
        assert (known, paused) == ({1: KEPT}, [15, 30, 60])
        assert world.kept["attempts/1/run-a1-x.log"] == "its last words"
    else:
        assert known == {}, "it is asked again, if it should still be there"
        assert (world.kept, sum(paused)) == ({}, KEEP_LOGS_LIMIT_S)
        assert lines[-1]["event"] == "the attempt's log was not kept"
    assert [line["again_in_s"] for line in lines if "again_in_s" in line] == paused


def test_a_queued_account_is_read_at_once_where_its_pods_go() -> None:
    world = World()
    numbers = range(1, AT_ONCE + 2)
    many = {
        "logs": {},
        "status": status(*(attempt(number) for number in numbers)),
        "pods": tuple(pod(number, name=f"run-a{number}-x") for number in numbers),
    }
    seen = observed(**many)

    async def scenario() -> None:
        store, kube = SlowStore(world), Counted(world)
        keeps = Keeper(kube, store, Clock(), wait_s=0.001, turn_wait_s=0.001)  # type: ignore[arg-type]
        for number in numbers:
            await keeps.keep(seen, number, pods_go=False)
        await store.is_busy.wait()
        assert kube.reads == AT_ONCE
        assert keeps.unread(KEY, seen.uid) == {*numbers}, "who ends their pods has to ask first"

        for number in (1, AT_ONCE + 1):
            assert await keeps.keep(seen, number, pods_go=True) is None

        assert kube.reads == AT_ONCE + 1, "of one that is being kept, what was read is held from now on"
        assert keeps.unread(KEY, seen.uid) == {*numbers} - {1, AT_ONCE + 1}
        tasks = [each.task for each in keeps._accounts[KEY].values() if each.task is not None]
        store.ready.set()
        await asyncio.gather(*tasks)
        assert keeps.known(KEY, seen.uid, seen.status) == {n: f"runs:/r1/attempts/{n}" for n in numbers}

    asyncio.run(scenario())
    assert len([name for name in world.kept if name.endswith(".log")]) == len(numbers)


def test_only_the_first_look_that_ends_pods_waits_for_a_store_that_hangs() -> None:
    world = World()

    async def scenario() -> None:
        store, kube = SlowStore(world), Counted(world)
        keeps = keeper(world, store, kube)
        assert await keeps.keep(observed(name="one", logs={}, pods=(pod(),)), 1, pods_go=True) is None
        keeps._wait_s = 3600
        async with asyncio.timeout(60):  # and not an hour
            assert await keeps.keep(observed(name="two", logs={}, pods=(pod(),)), 1, pods_go=True) is None
        assert kube.reads == 2
        store.ready.set()
        await asyncio.gather(*(each[UID, 1].task for each in keeps._accounts.values() if each[UID, 1].task is not None))
        assert await keeps.keep(observed(name="three", logs={}, pods=(pod(),)), 1, pods_go=True) == KEPT

    asyncio.run(scenario())


class Counted(FakeKube):
    """Counts the logs that were read."""

    reads = 0

    async def read_log(self, namespace: str, pod: str, container: str, limit: int) -> str:
        self.reads += 1
        return "its last words"


def test_a_pod_that_goes_is_read_though_the_store_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within bounds: of many that go at once, some wait until others are kept."""
    monkeypatch.setattr(accounts, "LOG_BYTES", len("words"))  # which each log fills
    monkeypatch.setattr(accounts, "ROOM_BYTES", (AT_ONCE + 2) * len("words"))
    monkeypatch.setattr(accounts, "READ_WAIT_S", 0.001)
    numbers = range(1, AT_ONCE + 5)
    world = World()
    many = {
        "logs": {},
        "status": status(*(attempt(number) for number in numbers)),
        "pods": tuple(pod(number, name=f"run-a{number}-x") for number in numbers),
    }

    async def scenario() -> None:
        store, kube = SlowStore(world), Counted(world)
        keeps = keeper(world, store, kube)
        for number in numbers:
            await keeps.keep(observed(**many), number, pods_go=number > AT_ONCE)
        await store.is_busy.wait()
        assert (kube.reads, store.uploads) == (AT_ONCE + 2, AT_ONCE)

        tasks = [each.task for each in keeps._accounts[KEY].values() if each.task is not None]
        store.ready.set()
        await asyncio.gather(*tasks)

        assert (kube.reads, store.uploads) == (len(numbers), len(numbers))

    asyncio.run(scenario())
    assert len([name for name in world.kept if name.endswith(".log")]) == len(numbers)


def test_only_looks_whose_turn_it_is_wait_for_a_slow_store() -> None:
    """Many attempts may end together: those that queue would hold up the looks at everything else."""
    world = World()
    kube: Any = FakeKube(world)

    async def scenario() -> None:
        store: Any = SlowStore(world)
        keeps = Keeper(kube, store, Clock(), wait_s=3600, turn_wait_s=0.001)
        waiting = [asyncio.create_task(keeps.keep(of(number), 1, pods_go=False)) for number in range(AT_ONCE)]
        await store.is_busy.wait()

        async with asyncio.timeout(60):  # and not an hour
            for number in range(AT_ONCE, 10):
                assert await keeps.keep(of(number), 1, pods_go=False) is None
            assert not any(look.done() for look in waiting)
            keeps._turn_wait_s = 3600
            assert await keeps.keep(of(10), 1, pods_go=False) is None, "that the store is behind is known"

        store.ready.set()
        assert await asyncio.gather(*waiting) == [KEPT] * AT_ONCE
        await asyncio.gather(*(each[UID, 1].task for each in keeps._accounts.values() if each[UID, 1].task is not None))
        assert await keeps.keep(of(11), 1, pods_go=False) == KEPT, "and that it is well again"

    def of(number: int) -> Any:
        return observed(name=f"run{number}", logs={}, pods=(ended_pod(0),))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("ended", "container"),
    [
        (pod(phase="Failed", running_since=None, init_failed="fetch", init_error="It ended."), "fetch"),
        (ended_pod(1, init_failed="proxy", init_error="It ended."), "trainer"),
    ],
    ids=["before the trainer", "a sidecar"],
)
def test_the_log_of_an_init_container_that_failed_is_kept(ended: PodFacts, container: str) -> None:
    world = World()

    class Kube(FakeKube):
        async def read_log(self, namespace: str, pod: str, container: str, limit: int) -> str:
            return f"log of {container}"

    async def scenario() -> None:
        keeps = patient(Kube(world), FakeMlflow(world), Clock())
        assert await keeps.keep(observed(logs={}, pods=(ended,)), 1, pods_go=False) == KEPT

    asyncio.run(scenario())
    assert world.kept["attempts/1/run-a1-x.log"] == f"log of {container}"


def test_few_logs_are_in_memory_at_one_time() -> None:
    world, reads = World(), 0

    async def scenario() -> None:
        class Kube(FakeKube):
            async def read_log(self, namespace: str, pod: str, container: str, limit: int) -> str:
                nonlocal reads
                reads += 1
                return "words"

        store = SlowStore(world)
        keeps = keeper(world, store, Kube(world))
        seen = observed(logs={}, status=status(*(attempt(number) for number in range(1, 11))))
        pods = tuple(ended_pod(0, number) for number in range(1, 11))
        await asyncio.gather(
            *(keeps.keep(observed(logs={}, status=seen.status, pods=pods), n, pods_go=False) for n in range(1, 11))
        )
        assert (reads, store.uploads) == (AT_ONCE, AT_ONCE)
        keeps.close()

    asyncio.run(scenario())


async def until_settled(operator: Controller) -> None:
    """Wait for what the keeper has under way."""
    accounts = [each for known in operator._actor.keeper._accounts.values() for each in known.values()]
    await asyncio.gather(*(each.task for each in accounts if each.task is not None))
