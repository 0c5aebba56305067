"""An answer is waited for as long as one has time."""

from __future__ import annotations

import threading

import pytest

from heimdall_tracking.errors import AwayError
from heimdall_tracking.waiting import in_time
from tests.unit.tracking.fakes import PATIENCE_S


def test_an_answer_in_time_is_given_and_an_error_raised() -> None:
    assert in_time(lambda: 42, PATIENCE_S) == 42
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 / 0, PATIENCE_S)


def test_a_timeout_of_the_call_s_own_is_raised_as_it_is() -> None:
    def call() -> None:
        raise TimeoutError("of the call")

    with pytest.raises(TimeoutError, match="of the call"):
        in_time(call, PATIENCE_S)


def test_a_server_that_does_not_answer_is_left() -> None:
    open_again = threading.Event()
    with pytest.raises(AwayError, match=r"within 0\.01 s"):
        in_time(open_again.wait, 0.01)
    open_again.set()
