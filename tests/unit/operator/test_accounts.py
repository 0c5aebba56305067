"""Accounts of attempts' ends are kept behind the looks: nothing waits for a slow store, and nothing is forgotten."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from heimdall_operator.accounts import AT_ONCE, RETRY_LIMIT_S, RETRY_S, Keeper
from heimdall_operator.controller import Controller
from tests.unit.operator.builders import NOW, attempt, ended_pod, observed, pod, status
from tests.unit.operator.fakes import KEY, STAMP, FakeKube, FakeMlflow, World, controller

RUNNING = {"phase": "Running", "running": {"startedAt": STAMP}}
SIGTERMED = {"phase": "Failed", "terminated": {"exitCode": 143, "startedAt": STAMP, "finishedAt": STAMP}}
SUCCEEDED = {"phase": "Succeeded", "terminated": {"exitCode": 0, "startedAt": STAMP, "finishedAt": STAMP}}
KEPT = "runs:/r1/attempts/1"


class SlowStore(FakeMlflow):
    """Takes artifacts when it is let."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.ready = asyncio.Event()
        self.uploads = 0

    async def keep_files(self, run_id: str, folder: str, files: dict[str, str]) -> str:
        self.uploads += 1
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


async def look(operator: Controller) -> None:
    await operator.refresh()
    await operator.look(KEY)


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
