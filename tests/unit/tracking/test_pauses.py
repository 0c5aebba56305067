"""Pauses double up to their limit, however often."""

from __future__ import annotations

from itertools import islice

from heimdall_tracking.pauses import doubled_s, doubling_s


def test_each_pause_is_twice_the_one_before_up_to_the_limit() -> None:
    assert list(islice(doubling_s(0.5, 15), 7)) == [0.5, 1, 2, 4, 8, 15, 15]


def test_of_failures_without_end_the_limit_is_what_is_left() -> None:
    assert doubled_s(1, 10**6, 30) == 30
