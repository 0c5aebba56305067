"""What a scrape tells: runs by phase and reason, waits, attempts by reason."""

from __future__ import annotations

import asyncio
import urllib.request

import pytest

from heimdall_operator import metrics
from tests.integration.servers import free_port
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


def test_the_first_job_is_timed_and_later_ones_are_not() -> None:
    before = sample("heimdall_job_seconds_count")
    world = World()
    world.apply(SPEC)
    asyncio.run(look(world))
    world.pod_of(world.jobs["run-a1"], **RUNNING)
    asyncio.run(look(world))

    assert sample("heimdall_job_seconds_count") == before + 1


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
