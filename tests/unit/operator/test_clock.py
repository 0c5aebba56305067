"""The API server's clock, by which the operator decides."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from heimdall_operator.clock import TOLERANCE, ServerClock
from heimdall_operator.kube import Kube
from tests.unit.operator.test_kube import Server

NOW = datetime(2026, 3, 1, 12, 0, 0, 400_000, tzinfo=UTC)
MINUTES = timedelta(minutes=10)


class Node:
    """A node's clock."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


def date(time: datetime) -> str:
    return format_datetime(time.astimezone(UTC), usegmt=True)


@pytest.mark.parametrize("ahead", [MINUTES, -MINUTES], ids=["behind", "ahead"])
def test_a_node_whose_clock_is_wrong_is_put_right(ahead: timedelta) -> None:
    node = Node()
    clock = ServerClock(node)

    clock.hear(date(NOW + ahead), clock())
    node.now += timedelta(hours=1)

    assert abs(clock() - (NOW + ahead + timedelta(hours=1))) < timedelta(seconds=1)


def test_a_node_whose_clock_is_mended_is_believed_again() -> None:
    node = Node()
    clock = ServerClock(node)
    clock.hear(date(NOW + MINUTES), clock())

    node.now += MINUTES
    clock.hear(date(node.now), clock())

    assert abs(clock() - node.now) < timedelta(seconds=1)


def test_whole_seconds_and_the_way_of_an_answer_move_nothing() -> None:
    node = Node()
    clock = ServerClock(node)
    for off_s in (-4, -1, 0, 5):
        clock.hear(date(NOW + timedelta(seconds=off_s)), clock())
    assert clock() == NOW


def test_an_answer_that_was_long_on_its_way_tells_no_time() -> None:
    node = Node()
    clock = ServerClock(node)
    asked = clock()
    node.now += 2 * TOLERANCE
    clock.hear(date(NOW - MINUTES), asked)
    assert clock() == node.now


@pytest.mark.parametrize("ahead", [MINUTES, -MINUTES], ids=["behind", "ahead"])
def test_an_answer_that_was_asked_for_before_the_clock_was_put_right_moves_nothing(ahead: timedelta) -> None:
    clock, told = ServerClock(Node()), []
    asked = clock()
    for _ in range(2):
        clock.hear(date(NOW + ahead), asked)
        told.append(clock())
    assert told[0] == told[1] != NOW


@pytest.mark.parametrize("told", [None, "", "yesterday", "Sun, 01 Mar 2026 10:00:00 -0000"])
def test_an_answer_without_a_time_moves_nothing(told: str | None) -> None:
    clock = ServerClock(Node())
    clock.hear(told, clock())
    assert clock() == NOW


def test_every_answer_is_heard() -> None:
    server = Server(200, {"items": [], "metadata": {}})
    server.headers = {"Date": date(datetime.now(UTC) + MINUTES)}
    asyncio.run(server.list_jobs())
    assert timedelta(minutes=9) < server.clock() - datetime.now(UTC) < timedelta(minutes=11)


def test_a_new_client_goes_by_its_node() -> None:
    assert abs(Kube(timeout_s=1).clock() - datetime.now(UTC)) < timedelta(minutes=1)
