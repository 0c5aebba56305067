"""A server that answers, refuses or is away, as a test wants."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from heimdall_tracking.points import Point

PATIENCE_S = 30
"""How long a test waits for a background thread before it fails."""


class AwayError(Exception):
    """The server does not answer."""


class RefusedError(Exception):
    """The server says the call is wrong."""

    def __init__(self, error_code: str = "INVALID_PARAMETER_VALUE", message: str = "") -> None:
        super().__init__(message or error_code)
        self.error_code = error_code


class AnsweredError(Exception):
    """An HTTP library's error about an answer."""

    def __init__(self, status: object, message: str = "") -> None:
        super().__init__(message or f"{status} Client Error")
        self.response = SimpleNamespace(status_code=status)


class Server:
    """Takes batches of points; `open` lets calls through, each of `errors` is raised once."""

    def __init__(self, *, errors: Sequence[Exception] = (), refuses: str | None = None) -> None:
        self.batches: list[list[Point]] = []
        self.calls = 0
        self.errors = deque(errors)
        self.refuses = refuses
        self.open = threading.Event()
        self.open.set()
        self.called = threading.Semaphore(0)

    def send(self, batch: Sequence[Point]) -> None:
        self.calls += 1
        self.called.release()
        assert self.open.wait(PATIENCE_S)
        if self.errors:
            raise self.errors.popleft()
        if any(point.name == self.refuses for point in batch):
            raise RefusedError
        self.batches.append(list(batch))

    def wait_for_call(self) -> None:
        assert self.called.acquire(timeout=PATIENCE_S)

    @property
    def steps(self) -> list[int]:
        return [point.step for batch in self.batches for point in batch]


def points(steps: Sequence[int], name: str = "loss") -> list[Point]:
    return [Point(name, float(step), step, step) for step in steps]


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def join(thread: threading.Thread) -> None:
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), f"{thread.name} still runs after {PATIENCE_S} s"
