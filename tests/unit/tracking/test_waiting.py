"""An answer is waited for as long as one has time."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("told", [None, "7"])
def test_where_no_thread_can_be_started_any_more_the_call_is_made_all_the_same_and_hurries(
    told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a handler of a process's end, since Python 3.12."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    names = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if told is not None:
            monkeypatch.setenv(name, told)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert in_time(lambda: [os.environ[name] for name in names], 12.5) == ["0", "12"]
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 / 0, PATIENCE_S)
    assert [os.environ.get(name) for name in names] == [told, told]
