"""Questions to a server that may be away: the answer is not waited for longer than one has time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from heimdall_tracking.errors import AwayError

T = TypeVar("T")


def in_time(call: Callable[[], T], timeout_s: float) -> T:
    """Make a call in a thread of its own, which is left to itself when the time is over.

    MLflow's client tries again for minutes before it says that a server is away.

    Args:
        call: What to ask.
        timeout_s: How long to wait for the answer.

    Returns:
        The answer.

    Raises:
        AwayError: There was none in time.
        BaseException: What the call raised.
    """
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is raised where the answer is waited for
            answer.set_exception(error)

    threading.Thread(target=ask, name="heimdall-question", daemon=True).start()
    try:
        return answer.result(timeout_s)
    except TimeoutError:
        if answer.done():
            raise
        raise AwayError(f"the server did not answer within {timeout_s:g} s") from None
