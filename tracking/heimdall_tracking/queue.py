"""The metric queue: never blocks a training step, never raises into training, keeps order, delivers in batches.

A background thread sends what was put. While the server is away it tries again, with growing delays; memory stays
bounded because the newest points wait and the oldest are only dropped, and counted, when the bound is reached.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

BATCH: Final = 1000
"""MLflow takes at most this many metrics in one call."""
CAPACITY: Final = 1_000_000
"""Points kept while the server is away: some 200 MB."""
RETRY_S: Final = 0.5
RETRY_LIMIT_S: Final = 15.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric."""

    name: str
    value: float
    step: int
    timestamp_ms: int


Send = Callable[[Sequence[Point]], None]


class MetricQueue:
    """Points on their way to the server."""

    def __init__(self, send: Send, *, capacity: int = CAPACITY) -> None:
        """Start the background thread.

        Args:
            send: Delivers a batch or raises; called from the background thread alone.
            capacity: Most points that are kept.
        """
        self._send = send
        self._points: deque[Point] = deque(maxlen=capacity)
        self._changed = threading.Condition()
        self._sending = 0
        self._closed = False
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name="metric-queue", daemon=True)
        self._thread.start()

    @property
    def undelivered(self) -> int:
        """How many points were put and not delivered, those that were dropped included."""
        with self._changed:
            return len(self._points) + self._sending + self._dropped

    def put(self, points: Sequence[Point]) -> None:
        """Take points; returns at once."""
        with self._changed:
            overflow = len(self._points) + len(points) - (self._points.maxlen or 0)
            self._dropped += max(0, overflow)
            self._points.extend(points)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is delivered.

        Args:
            timeout_s: How long to wait at most.

        Returns:
            Whether everything was delivered.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not self._points and not self._sending, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Deliver what can be delivered in time, then end the thread; whether everything was delivered."""
        delivered = self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=1)
        return delivered and not self._dropped

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._points or self._closed)
                if self._closed:
                    return
                batch = [self._points.popleft() for _ in range(min(BATCH, len(self._points)))]
                self._sending = len(batch)
            self._deliver(batch)
            with self._changed:
                self._sending = 0
                self._changed.notify_all()

    def _deliver(self, batch: Sequence[Point]) -> None:
        delay = RETRY_S
        while not self._closed:
            try:
                self._send(batch)
            except Exception as error:  # noqa: BLE001 - nothing that tracking does may end a training
                log.warning("metrics could not be delivered; trying again", error=str(error), again_in_s=delay)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, delay)
                delay = min(2 * delay, RETRY_LIMIT_S)
            else:
                return


def now_ms() -> int:
    """The time as MLflow counts it."""
    return time.time_ns() // 1_000_000
