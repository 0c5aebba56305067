from __future__ import annotations

import asyncio

import pytest

from heimdall_operator.workqueue import WorkQueue


def test_a_waiting_name_is_added_once() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    queue.add("a")

    assert len(queue) == 1


def test_a_name_added_while_it_is_looked_at_comes_once_more() -> None:
    async def scenario() -> None:
        queue: WorkQueue[str] = WorkQueue()
        queue.add("a")
        assert await queue.get() == "a"
        queue.add("a")
        queue.add("a")
        assert len(queue) == 0, "one name is never looked at twice at a time"
        queue.done("a")
        assert len(queue) == 1

    asyncio.run(scenario())


def test_the_sooner_of_two_delays_counts() -> None:
    async def scenario() -> None:
        queue: WorkQueue[str] = WorkQueue()
        queue.add_later("a", 3600)
        queue.add_later("a", 0)
        assert await asyncio.wait_for(queue.get(), 5) == "a"

    asyncio.run(scenario())


def test_delays_grow_with_failures_and_end_with_success() -> None:
    async def scenario() -> None:
        queue: WorkQueue[str] = WorkQueue()
        delays = [queue.add_after_failure("a") for _ in range(8)]
        assert delays == [1, 2, 4, 8, 16, 32, 60, 60]
        # A server that is away for a day: a delay that can't be computed would end the worker.
        assert {queue.add_after_failure("a") for _ in range(2000)} == {60}
        queue.forget_failures("a")
        assert queue.add_after_failure("a") == pytest.approx(1)
        queue.close()

    asyncio.run(scenario())
