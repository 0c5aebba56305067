"""Questions to a server that may be away: the answer is not waited for longer than one has time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from heimdall_tracking.errors import AwayError

T = TypeVar("T")


@contextmanager
def _hurried(timeout_s: float) -> Iterator[None]:
    """Have MLflow's client, which reads these variables at each call, try once."""
    hurry = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, int(timeout_s)))}
    before = {name: os.environ.get(name) for name in hurry}
    os.environ.update(hurry)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def in_time(call: Callable[[], T], timeout_s: float) -> T:
    """Make a call in a thread of its own, which is left to itself when the time is over.

    MLflow's client tries again for minutes before it says that a server is away. Where no thread can be started any
    more, as in a process that ends (Python 3.12), the call is made here, with MLflow told to try no longer than that.

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

    try:
        threading.Thread(target=ask, name="heimdall-question", daemon=True).start()
    except RuntimeError:
        with _hurried(timeout_s):
            return call()
    try:
        return answer.result(timeout_s)
    except TimeoutError:
        if answer.done():
            raise
        raise AwayError(f"the server did not answer within {timeout_s:g} s") from None
