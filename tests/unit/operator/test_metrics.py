"""What a scrape tells: runs by phase and reason, waits, attempts by reason."""

from __future__ import annotations

import asyncio
import urllib.request
from datetime import timedelta
from typing import Any

import pytest

from heimdall_api.contract import Progress
from heimdall_operator import metrics
from tests.integration.servers import free_port
from tests.unit.operator.builders import NOW, UID
from tests.unit.operator.fakes import KEY, World, controller, look
from tests.unit.operator.test_controller import RUNNING, SPEC, SUCCEEDED, live


@pytest.fixture
def world() -> World:
    world = World()
    world.apply(SPEC)
    asyncio.run(live(world, SUCCEEDED))
    return world


def sample(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


def test_attempts_are_counted_once_by_reason() -> None:
    before = sample("heimdall_attempts_total", reason="Completed")
    world = World()
    world.apply(SPEC)
    asyncio.run(live(world, SUCCEEDED))
    asyncio.run(look(world))

    assert sample("heimdall_attempts_total", reason="Completed") == before + 1


def test_a_run_that_nobody_has_looked_at_has_a_name_in_each_picture() -> None:
    assert metrics._state({}) == ("New", "New")


def test_the_first_job_is_timed_and_later_ones_are_not() -> None:
    before = sample("heimdall_job_seconds_count")
    world = World()
    world.apply(SPEC)
    asyncio.run(look(world))
    world.pod_of(world.jobs["run-a1"], **RUNNING)
    asyncio.run(look(world))

    assert sample("heimdall_job_seconds_count") == before + 1


def test_the_first_step_is_timed_once_and_by_when_it_was_made() -> None:
    before = sample("heimdall_first_step_seconds_count"), sample("heimdall_first_step_seconds_sum")
    world = World()
    world.apply({**SPEC, "tracking": {"experiment": "lab"}})

    async def scenario() -> None:
        await look(world)
        world.pod_of(world.jobs["run-a1"], **RUNNING)
        operator = await look(world)
        first = NOW + timedelta(seconds=40)
        for step, made in enumerate((first + timedelta(seconds=9), first + timedelta(seconds=20)), start=1):
            progress = Progress(epoch=0, epochs=1, step=step, time=made, first_step_time=first)
            world.mlflow_runs[UID]["progress"] = progress
            await operator.progress.poll()
            await operator.reconcile(KEY)
        # A new operator finds the progress on the status.
        await (await look(world)).progress.poll()

    asyncio.run(scenario())

    assert world.run is not None
    assert world.run["status"]["progress"]["step"] == 2
    after = sample("heimdall_first_step_seconds_count"), sample("heimdall_first_step_seconds_sum")
    assert after == (before[0] + 1, before[1] + 40)


def test_a_look_and_a_reading_that_fail_are_counted_by_what_failed() -> None:
    """By these an alert tells that MLflow or the API server is away."""
    before = [sample("heimdall_errors_total", what=what) for what in ("ConnectionError", "reading progress")]
    world = World()
    world.apply({"tracking": {"experiment": "lab"}})

    async def scenario() -> None:
        await look(world)
        world.pod_of(world.jobs["run-a1"], **RUNNING)
        operator = await look(world)
        world.mlflow_away = True
        asked, reading = asyncio.Event(), operator._mlflow.active_facts

        async def active_facts(active: Any) -> Any:
            asked.set()
            return await reading(active)

        operator._mlflow.active_facts = active_facts  # type: ignore[method-assign]
        following = asyncio.create_task(operator.progress.follow(0))
        await asyncio.wait_for(asked.wait(), 10)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        world.pod_of(world.jobs["run-a1"], **SUCCEEDED)
        await operator.refresh()
        await operator._reconcile_safely(KEY)
        operator.queue.close()

    asyncio.run(scenario())

    assert sample("heimdall_errors_total", what="ConnectionError") == before[0] + 1
    assert sample("heimdall_errors_total", what="reading progress") > before[1]


def test_what_only_needs_another_look_is_no_error() -> None:
    """Conflicts are everyday: an alert on them would cry wolf."""
    before = sample("heimdall_errors_total", what="ConflictError")
    world = World()
    world.apply(SPEC)

    async def scenario() -> None:
        behind = controller(world)
        await behind.refresh()
        await look(world)
        await behind._reconcile_safely(KEY)
        behind.queue.close()

    asyncio.run(scenario())

    assert sample("heimdall_errors_total", what="ConflictError") == before


def test_a_scrape_counts_runs_by_phase_and_reason(world: World) -> None:
    async def scrape() -> str:
        operator = controller(world)
        await operator.refresh()
        served = metrics.serve(operator, port := free_port())
        try:
            url = f"http://127.0.0.1:{port}/metrics"
            text: bytes = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read())
        finally:
            served.shutdown()
        assert len(operator.queue) == 1, "it waits to be looked at"
        assert KEY in operator.store.known()
        return text.decode()

    text = asyncio.run(scrape())

    assert 'heimdall_trainingruns{phase="Succeeded",reason="Completed"} 1.0' in text
    assert "heimdall_queue_depth 1.0" in text
