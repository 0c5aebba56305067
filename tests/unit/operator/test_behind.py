"""An operator that fell behind at any moment of a life, and looks at any later one, as two do during an upgrade."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import structlog

from tests.unit.operator.builders import NOW, UID
from tests.unit.operator.fakes import KEY, STAMP, CrashError, World, controller

ENOUGH = 12
"""Looks that end any of these lives from any moment."""
TOO_MANY = 100
STEP = timedelta(minutes=10)
"""Between two looks: more than a retry waits, less than a pod may be pending."""
Event = Callable[[World], None]


@pytest.fixture(autouse=True, scope="module")
def without_logs() -> Iterator[None]:
    """Thousands of looks: their logs are nobody's."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


def starts(world: World) -> None:
    for job in world.jobs.values():
        world.pod_of(job, phase="Running", running={"startedAt": STAMP})


def ends(code: int, phase: str = "Failed") -> Event:
    def end(world: World) -> None:
        for job in world.jobs.values():
            if world.pods[f"{job['metadata']['name']}-x"]["status"]["phase"] == "Running":
                world.pod_of(job, phase=phase, terminated={"startedAt": STAMP, "finishedAt": STAMP, "exitCode": code})

    return end


def is_deleted(world: World) -> None:
    world.ask_for_deletion(STAMP)


succeeds = ends(0, "Succeeded")
LIVES: dict[str, tuple[list[Event], str]] = {
    "succeeds": ([starts, ends(3), starts, succeeds], "FINISHED"),
    "fails": ([starts, ends(3), starts, ends(78)], "FAILED"),
    "is deleted": ([starts, ends(3), starts, is_deleted], "KILLED"),
    "is deleted before it starts": ([is_deleted], "KILLED"),
}


def look(operator: Any) -> None:
    async def once() -> None:
        await operator._reconcile_safely(KEY)
        operator.queue.close()

    with contextlib.suppress(CrashError):
        asyncio.run(once())


def knowing(world: World, steps: float) -> Any:
    """An operator that has listed everything, so many steps into the life."""
    operator = controller(world, clock=lambda: NOW + STEP * steps)
    asyncio.run(operator.refresh())
    return operator


def moments(events: list[Event]) -> list[World]:
    """The world after each write of the operator and each event of a life."""
    world = World()
    world.apply({"retries": {"limit": 3}, "registration": {"model": "localizer"}, "ttlSecondsAfterFinished": 1000})
    left = list(events)
    seen = [copy.deepcopy(world)]
    while len(seen) < TOO_MANY:
        written = len(world.writes)
        world.crash_after = written + 1
        look(knowing(world, steps=len(seen)))
        world.crash_after = None
        if len(world.writes) == written:
            if not left:
                return seen
            left.pop(0)(world)
        seen.append(copy.deepcopy(world))
    raise AssertionError(f"the operator does not come to rest: {world.writes[-5:]}")


@pytest.mark.parametrize("life", LIVES)
def test_one_that_fell_behind_harms_nothing_at_any_later_moment(life: str) -> None:
    events, ended = LIVES[life]
    seen = moments(events)
    assert seen[-1].mlflow_runs[UID]["status"] == ended

    for then, past in enumerate(seen):
        for now, present in enumerate(seen[then + 1 :], then + 1):
            world = copy.deepcopy(present)
            behind = knowing(copy.deepcopy(past), steps=now)
            behind._kube.world = behind._mlflow.world = behind._actor._kube.world = behind._actor._mlflow.world = world

            look(behind)

            for step in range(ENOUGH):
                starts(world)
                succeeds(world)
                look(knowing(world, steps=now + step))
            when = f"behind since moment {then}, looking at moment {now} of {len(seen)}"
            statuses = [item["status"] for item in world.mlflow_runs.values()]
            assert "RUNNING" not in statuses, when
            if now == len(seen) - 1:
                assert statuses == [ended], when
            assert len(world.versions) <= 1, when
            assert world.run is None or world.run["status"]["phase"] in ("Succeeded", "Failed"), when
            assert world.jobs == {}, when
