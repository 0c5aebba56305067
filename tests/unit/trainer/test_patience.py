"""How long the end of a training waits for MLflow, added up with a clock of the test's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest

from heimdall_tracking.outstanding import Outstanding
from heimdall_trainer import patience
from heimdall_trainer.patience import SLOWEST_BYTES_PER_S, Patience

TIMEOUT_S = 600.0
VIT_L: int = 3600 * SLOWEST_BYTES_PER_S
"""A checkpoint of a large network, in bytes."""


class Line:
    """A way to MLflow, and the clock: how it is used is a story of looks, a second each, the last of which lasts."""

    def __init__(self, story: Iterator[Outstanding]) -> None:
        self.now = 1000.0
        self.story = story
        self.seen = next(story)
        self.done = False

    def monotonic(self) -> float:
        return self.now

    def look(self) -> Outstanding:
        return self.seen

    def settle(self, timeout_s: float) -> bool:
        """A second passes, or less, with what it brings."""
        self.now += timeout_s
        if timeout_s:
            self.seen = next(self.story, self.seen)
        return self.done


def nothing() -> Iterator[Outstanding]:
    """The server is away; what waits is small."""
    yield Outstanding(calls=0)


Started = Callable[[Iterator[Outstanding]], Line]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Started:
    def make(story: Iterator[Outstanding]) -> Line:
        line = Line(story)
        monkeypatch.setattr(patience, "time", line)
        return line

    return make


def waited_s(line: Line, *, timeout_s: float = TIMEOUT_S, at_most_s: float = math.inf) -> tuple[float, bool]:
    began = line.now
    settled = Patience(line.look, timeout_s).wait(line.settle, at_most_s)
    return line.now - began, settled


def test_what_does_not_arrive_is_waited_for_as_long_as_the_patience_lasts(start: Started) -> None:
    assert waited_s(start(nothing())) == (TIMEOUT_S, False)


def test_who_waits_is_heard_of(start: Started) -> None:
    line, beats = start(nothing()), []
    Patience(line.look, 10, lambda: beats.append(line.now)).wait(line.settle)
    assert len(beats) == 10


def test_a_wait_may_be_shorter(start: Started) -> None:
    assert waited_s(start(nothing()), at_most_s=60) == (60, False)


def test_a_file_of_hours_arrives_over_a_slow_line(start: Started) -> None:
    def upload() -> Iterator[Outstanding]:
        for _ in range(720):
            yield Outstanding(size=VIT_L, tries=1, under_way=VIT_L)
        line.done = True

    line = start(upload())
    assert waited_s(line) == (720, True)


def test_a_file_that_moves_more_slowly_than_is_worth_waiting_for_is_given_up(start: Started) -> None:
    line = start(iter([Outstanding(size=VIT_L, tries=1, under_way=VIT_L)]))
    took_s, settled = waited_s(line)
    assert (took_s, settled) == (VIT_L / SLOWEST_BYTES_PER_S, False)


def test_a_server_that_is_away_is_not_waited_for_longer_because_a_file_is_large(start: Started) -> None:
    """Each try takes its time to fail; the one that is under way when the patience is over is the last."""
    try_s = 250

    def fails() -> Iterator[Outstanding]:
        for number in range(1, 1000):
            for _ in range(try_s):
                yield Outstanding(size=VIT_L, tries=number, under_way=VIT_L)
            for _ in range(30):
                yield Outstanding(size=VIT_L, tries=number)

    took_s, settled = waited_s(start(fails()))
    assert not settled
    assert TIMEOUT_S <= took_s <= TIMEOUT_S + try_s + 1


def test_a_try_that_fails_at_once_does_not_begin_the_wait_anew(start: Started) -> None:
    """Two take turns, so that at each look something is under way."""
    story = (Outstanding(size=VIT_L, tries=number, under_way=VIT_L) for number in range(10**6))
    took_s, settled = waited_s(start(story))
    assert not settled
    assert took_s <= TIMEOUT_S + 1


def test_what_arrives_gives_the_patience_back(start: Started) -> None:
    def batches() -> Iterator[Outstanding]:
        for number in range(5):
            for _ in range(599):
                yield Outstanding(settled=number, calls=5000 - number)
        line.done = True

    line = start(batches())
    assert waited_s(line) == (5 * 599, True)


def test_even_what_arrives_for_ever_ends_by_its_size(start: Started) -> None:
    story = (Outstanding(settled=number, calls=50, size=50 * SLOWEST_BYTES_PER_S) for number in range(10**6))
    assert waited_s(start(story)) == (TIMEOUT_S + 100, False)


def test_all_waits_share_what_nothing_has_arrived_in(start: Started) -> None:
    line = start(nothing())
    shared = Patience(line.look, TIMEOUT_S)
    began = line.now
    assert [shared.wait(line.settle, 100) for _ in range(10)] == [False] * 10
    assert line.now - began == TIMEOUT_S
    line.seen = Outstanding(settled=1)
    assert not shared.wait(line.settle, 100)
    assert line.now - began == TIMEOUT_S + 100, "something has arrived between two waits"
    shared.wait(line.settle)
    line.done = True
    assert shared.wait(line.settle), "what is there already needs no patience"
